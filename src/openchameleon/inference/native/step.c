/* One decoding step of the transformer on a CPU: ids in, hidden states and logits out.

   What model/transformer.py computes for one new position of each of R rows, in one call. A row is
   a new id of some stream; the stream's keys and values lie in blocks of a pool, in the order of
   its table. Rows may be neighbours in one stream: all keys are written before any is read.

   Decoding is bound by the bytes of the weights, so each weight is read once for all rows, in the
   form it is stored in (float32, bfloat16, int8 with a scale a row) and is widened in registers.
   Arithmetic is float32. Each number is summed in one order, whatever R and the threads are: a row
   has the same bits alone and among others.

   Vectors are the extension that GCC and Clang share, so that one source serves AVX-512, AVX2 and
   NEON. Inside the parallel region all threads run the same code; each loop marked `omp for` is
   shared among them, and `barrier` waits for all. Without OpenMP these are plain loops. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

#if defined(__AVX512F__)
#define LANES 16
#define WIDE 6
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define WIDE 3
#elif defined(__aarch64__)
#define LANES 4
#define WIDE 6
#else
#define LANES 4
#define WIDE 3
#endif
#define TALL 4 /* TALL weight rows by WIDE activation rows: as many sums as fit the registers */
#define CHUNK 16 /* weight rows that a thread takes at a time */
#define SHORT_ROW 4096 /* bytes */

enum { FLOAT32, BFLOAT16, INT8 };

#define INLINE static inline __attribute__((always_inline))
#define BARRIER _Pragma("omp barrier")

/* Keeps a value in a register: GCC would rather load it again for each use. */
#if defined(__aarch64__)
#define HOLD(v) __asm__("" : "+w"(v))
#elif defined(__x86_64__)
#define HOLD(v) __asm__("" : "+v"(v))
#else
#define HOLD(v)
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float four __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));

/* The structs are mirrored in step.py. */

typedef struct {
    int64_t kind, rows, cols, stride; /* stride: elements from one row to the next */
    const void *data;
    const float *scale; /* one a row; NULL for 1 */
} Matrix;

typedef struct {
    Matrix wq, wk, wv, wo, w1, w2, w3;
    const float *attention_norm, *ffn_norm;
    const float *q_weight, *q_bias, *k_weight, *k_bias; /* (n_groups, head_dim) */
} Layer;

typedef struct {
    int64_t n_layers, dim, ffn_dim, n_heads, n_kv_heads, head_dim;
    int64_t n_groups;   /* of the norms of queries and keys; 0: they have none */
    int64_t norm_input; /* 1: norms stand before the branches; 0: after them */
    int64_t n_positions;
    float norm_eps;
    const float *cos, *sin; /* (n_positions, head_dim / 2) */
    const float *norm;
    Matrix embedding;
    const Layer *layers;
} Model;

typedef struct {
    int64_t n_rows, n_blocks, block_size, table_width;
    const int64_t *ids, *positions;   /* (n_rows) */
    const int64_t *tables;            /* (n_rows, table_width) */
    float *const *keys, *const *values; /* a layer: (n_blocks, block_size, n_kv_heads, head_dim) */
} Batch;

/* What the threads share during a step, and one area for each of them. */
typedef struct {
    float *x, *normed, *branch, *q, *k, *v, *attended, *gate, *up;
    float *own;
    int64_t own_size;
} Scratch;

/* ---- vectors ---- */

INLINE vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

/* a * b + c, rounded once where the CPU can: said here, as compilers do so only here and there. */
INLINE vec multiply_add(vec a, vec b, vec c) {
#if LANES == 16
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* LANES weights from element i on, as float32. `kind` is a constant wherever this is inlined.
   Compilers widen small integers badly, so that their instructions are named where known. */
INLINE vec widen(const int kind, const void *data, int64_t i) {
    const uint16_t *half = (const uint16_t *)data + i;
    const int8_t *byte = (const int8_t *)data + i;
    if (kind == FLOAT32) return load((const float *)data + i);
#if LANES == 16
    if (kind == INT8)
        return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)byte)));
    return (vec)_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)half)), 16);
#elif LANES == 8
    if (kind == INT8)
        return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)byte)));
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)half)), 16);
#else
    halves h;
    bytes b;
    if (kind == INT8) {
        memcpy(&b, byte, sizeof b);
        return __builtin_convertvector(__builtin_convertvector(b, ints), vec);
    }
    memcpy(&h, half, sizeof h);
    return (vec)(__builtin_convertvector(h, words) << 16);
#endif
}

INLINE float widen_one(const int kind, const void *data, int64_t i) {
    if (kind == BFLOAT16) {
        uint32_t word = (uint32_t)((const uint16_t *)data)[i] << 16;
        float f;
        memcpy(&f, &word, sizeof f);
        return f;
    }
    return kind == INT8 ? (float)((const int8_t *)data)[i] : ((const float *)data)[i];
}

/* Up to LANES numbers; zeros for the rest. */
INLINE vec load_some(const float *p, int64_t n) {
    vec v = {0};
    memcpy(&v, p, (n < LANES ? n : LANES) * sizeof *p);
    return v;
}

INLINE void store_some(float *p, vec v, int64_t n) {
    memcpy(p, &v, (n < LANES ? n : LANES) * sizeof *p);
}

/* The sum of a vector's elements, and of four vectors' (in the same order of additions). */
INLINE four folded(vec v) {
    four part[LANES / 4];
    memcpy(part, &v, sizeof v);
    for (int n = LANES / 8; n; n /= 2)
        for (int i = 0; i < n; i++) part[i] += part[i + n];
    return part[0];
}

INLINE float total(vec v) {
    const four f = folded(v);
    return (f[0] + f[2]) + (f[1] + f[3]);
}

INLINE four two_totals(four a, four b) {
    return (four){a[0], b[0], a[1], b[1]} + (four){a[2], b[2], a[3], b[3]};
}

INLINE four four_totals(vec a, vec b, vec c, vec d) {
    const four s = two_totals(folded(a), folded(b)), t = two_totals(folded(c), folded(d));
    return (four){s[0], s[1], t[0], t[1]} + (four){s[2], s[3], t[2], t[3]};
}

/* e^x for x in [-87, 88], to 2 units in the last place; less is taken as -87. NaN for NaN. */
INLINE vec exponential(vec x) {
    const float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, round = 12582912.0f;
    const ints low = x < -87.0f;
    x = (vec)(((ints)x & ~low) | ((ints)((vec){0} - 87.0f) & low));
    vec shifted = x * 1.44269504f + round; /* its low bits hold the nearest integer */
    vec n = shifted - round;
    vec r = x - n * ln2_high - n * ln2_low;
    vec p = (vec){0} + 1 / 720.0f;
    const float terms[] = {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f};
    for (int i = 0; i < 6; i++) p = multiply_add(p, r, (vec){0} + terms[i]);
    return (vec)((words)p + ((words)shifted << 23));
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum = multiply_add(load(a + i), load(b + i), sum);
    float s = total(sum);
    for (; i < n; i++) s += a[i] * b[i];
    return s;
}

/* ---- products with weights ---- */

/* y[j][i] = scale[i] * (row i of w) . (row j of x) for `tall` rows of w from `first` on and `wide`
   rows of x. Both counts are constants wherever this is inlined: the sums stay in registers.
   ahead: fetch the next tile too. The hardware foresees long rows by itself, but not short ones. */
INLINE void tile(const int kind, const int tall, const int wide, const int ahead, const Matrix *w,
                 int64_t first, const float *x, int64_t x_stride, float *y, int64_t y_stride) {
    vec sum[TALL][WIDE] = {{{0}}};
    const int64_t base = first * w->stride, size = kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1;
    const char *next = (const char *)w->data + (base + tall * w->stride) * size;
    int64_t k = 0;
    for (; k + LANES <= w->cols; k += LANES, next += tall * LANES * size) {
        if (ahead)
            for (int i = 0; i < tall * LANES * size; i += 64) __builtin_prefetch(next + i);
        vec in[WIDE];
        for (int j = 0; j < wide; j++) in[j] = load(x + j * x_stride + k);
        for (int j = 0; j < wide; j++) HOLD(in[j]);
        for (int i = 0; i < tall; i++) {
            vec weights = widen(kind, w->data, base + i * w->stride + k);
            HOLD(weights);
            for (int j = 0; j < wide; j++) sum[i][j] = multiply_add(weights, in[j], sum[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < wide; j++) {
        four sums = {0}, scale;
        if (tall == 1) sums[0] = total(sum[0][j]);
        else sums = four_totals(sum[0][j], sum[1][j], sum[2][j], sum[3][j]);
        if (tall == TALL && k == w->cols) { /* nothing is left over: the usual case */
            if (w->scale) {
                memcpy(&scale, w->scale + first, sizeof scale);
                sums *= scale;
            }
            memcpy(y + j * y_stride, &sums, sizeof sums);
            continue;
        }
        for (int i = 0; i < tall; i++) {
            float s = sums[i];
            for (int64_t t = k; t < w->cols; t++)
                s += widen_one(kind, w->data, base + i * w->stride + t) * x[j * x_stride + t];
            y[j * y_stride + i] = w->scale ? s * w->scale[first + i] : s;
        }
    }
}

INLINE void strip(const int kind, const int wide, const int ahead, const Matrix *w, int64_t first,
                  int64_t stop, const float *x, int64_t x_stride, float *y, int64_t y_stride) {
    int64_t i = first;
    for (; i + TALL <= stop; i += TALL, y += TALL)
        tile(kind, TALL, wide, ahead, w, i, x, x_stride, y, y_stride);
    for (; i < stop; i++, y++) tile(kind, 1, wide, 0, w, i, x, x_stride, y, y_stride);
}

/* y (n, stop - first) = x (n, cols) times rows first .. stop-1 of w, for n of any size. */
INLINE void strips(const int kind, const Matrix *w, int64_t first, int64_t stop, const float *x,
                   int64_t x_stride, int64_t n, float *y, int64_t y_stride) {
    const int64_t row_bytes = w->cols * (kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1);
    int ahead = w->stride == w->cols && row_bytes <= SHORT_ROW;
    for (; n > 0; n -= WIDE, x += WIDE * x_stride, y += WIDE * y_stride, ahead = 0)
        switch (n < WIDE ? n : WIDE) {
        case 1: strip(kind, 1, ahead, w, first, stop, x, x_stride, y, y_stride); break;
        case 2: strip(kind, 2, ahead, w, first, stop, x, x_stride, y, y_stride); break;
#if WIDE > 3
        case 3: strip(kind, 3, ahead, w, first, stop, x, x_stride, y, y_stride); break;
        case 4: strip(kind, 4, ahead, w, first, stop, x, x_stride, y, y_stride); break;
        case 5: strip(kind, 5, ahead, w, first, stop, x, x_stride, y, y_stride); break;
#endif
        default: strip(kind, WIDE, ahead, w, first, stop, x, x_stride, y, y_stride);
        }
}

/* Row i of w as float32, unscaled. */
INLINE void widen_row(const int kind, const Matrix *w, int64_t i, float *out) {
    int64_t k = 0;
    const int64_t base = i * w->stride;
    for (; k + LANES <= w->cols; k += LANES) store(out + k, widen(kind, w->data, base + k));
    for (; k < w->cols; k++) out[k] = widen_one(kind, w->data, base + k);
}

/* Rows first .. stop-1 of w times n activations, with `own` to hold CHUNK rows as float32. */
static void product(const Matrix *w, int64_t first, int64_t stop, const float *x, int64_t n,
                    float *y, int64_t y_stride, float *own) {
    Matrix widened;
    if (w->kind != FLOAT32 && n > 4 * WIDE) { /* used so often that they are widened once */
        for (int64_t i = first; i < stop; i++)
            if (w->kind == INT8) widen_row(INT8, w, i, own + (i - first) * w->cols);
            else widen_row(BFLOAT16, w, i, own + (i - first) * w->cols);
        const float *scale = w->scale ? w->scale + first : 0;
        widened = (Matrix){FLOAT32, stop - first, w->cols, w->cols, own, scale};
        w = &widened, stop -= first, first = 0;
    }
    switch (w->kind) {
    case FLOAT32: strips(FLOAT32, w, first, stop, x, w->cols, n, y, y_stride); break;
    case BFLOAT16: strips(BFLOAT16, w, first, stop, x, w->cols, n, y, y_stride); break;
    default: strips(INT8, w, first, stop, x, w->cols, n, y, y_stride);
    }
}

/* y (n, stop - first) = x (n, cols) times rows first .. stop-1 of w. No barrier at its end. */
static void share_product(const Matrix *w, int64_t first, int64_t stop, const float *x, int64_t n,
                          float *y, float *own) {
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = first; i < stop; i += CHUNK)
        product(w, i, i + CHUNK < stop ? i + CHUNK : stop, x, n, y + i - first, stop - first, own);
}

/* gate (n, ffn_dim) = silu(w1 x) * w3 x; `up` is room for the second factor. */
static void share_swiglu(const Layer *l, const float *x, int64_t n, float *gate, float *up,
                         float *own) {
    const int64_t width = l->w1.rows;
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < width; i += CHUNK) {
        const int64_t stop = i + CHUNK < width ? i + CHUNK : width;
        product(&l->w1, i, stop, x, n, gate + i, width, own);
        product(&l->w3, i, stop, x, n, up + i, width, own);
        for (int64_t j = 0; j < n; j++)
            for (int64_t k = i; k < stop; k += LANES) {
                const int64_t left = stop - k, at = j * width + k;
                vec a = load_some(gate + at, left);
                a = a / (1.0f + exponential(-a)) * load_some(up + at, left);
                store_some(gate + at, a, left);
            }
    }
}

/* ---- the parts of a layer ---- */

/* y = x / rms(x) * weight; y may be x. */
static void rms_norm(const float *x, const float *weight, int64_t n, float eps, float *y) {
    const float factor = 1.0f / sqrtf(dot(x, x, n) / n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
}

/* LayerNorm of one head, in place. */
static void head_norm(float *x, const float *weight, const float *bias, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    for (int64_t i = 0; i < n; i++) x[i] -= sum / n;
    const float factor = 1.0f / sqrtf(dot(x, x, n) / n + 1e-5f);
    for (int64_t i = 0; i < n; i++) x[i] = x[i] * factor * weight[i] + bias[i];
}

static void rotate(float *x, const float *cos, const float *sin, int64_t n_pairs) {
    for (int64_t i = 0; i < n_pairs; i++) {
        const float even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = even * cos[i] - odd * sin[i];
        x[2 * i + 1] = even * sin[i] + odd * cos[i];
    }
}

/* Where position p of row r lies in a layer's pool. */
static float *slot(const Model *m, const Batch *b, float *pool, int64_t r, int64_t p) {
    const int64_t block = b->tables[r * b->table_width + p / b->block_size];
    return pool + (block * b->block_size + p % b->block_size) * m->n_kv_heads * m->head_dim;
}

/* Norms and rotates the queries and the key of KV head `kv` of row r; stores key and value. */
static void place(const Model *m, const Layer *l, const Batch *b, int64_t layer, int64_t r,
                  int64_t kv, const Scratch *s) {
    const int64_t d = m->head_dim, group = m->n_heads / m->n_kv_heads, p = b->positions[r];
    const float *cos = m->cos + p * (d / 2), *sin = m->sin + p * (d / 2);
    float *q = s->q + (r * m->n_heads + kv * group) * d, *k = s->k + (r * m->n_kv_heads + kv) * d;
    if (m->n_groups) {
        const int64_t norm = kv / (m->n_kv_heads / m->n_groups) * d;
        for (int64_t g = 0; g < group; g++)
            head_norm(q + g * d, l->q_weight + norm, l->q_bias + norm, d);
        head_norm(k, l->k_weight + norm, l->k_bias + norm, d);
    }
    for (int64_t g = 0; g < group; g++) rotate(q + g * d, cos, sin, d / 2);
    rotate(k, cos, sin, d / 2);
    memcpy(slot(m, b, b->keys[layer], r, p) + kv * d, k, d * sizeof *k);
    memcpy(slot(m, b, b->values[layer], r, p) + kv * d, s->v + (r * m->n_kv_heads + kv) * d,
           d * sizeof *k);
}

/* Turns scores (n) into weights that sum to 1. */
static void softmax(float *scores, int64_t n, float scale) {
    float most = scores[0];
    for (int64_t i = 1; i < n; i++) most = scores[i] > most ? scores[i] : most;
    vec sum = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        vec e = exponential((load_some(scores + i, n - i) - most) * scale);
        store_some(scores + i, e, n - i);
        sum += load_some(scores + i, n - i);
    }
    const float factor = 1.0f / total(sum);
    for (int64_t i = 0; i < n; i++) scores[i] *= factor;
}

/* out (d) += weights (n) times the values (d) of n slots. */
static void blend(const float *weights, const float *values, int64_t stride, int64_t n, int64_t d,
                  float *out) {
    int64_t j = 0;
    for (; j + 4 * LANES <= d; j += 4 * LANES) {
        vec sum[4];
        for (int k = 0; k < 4; k++) sum[k] = load(out + j + k * LANES);
        for (int64_t i = 0; i < n; i++)
            for (int k = 0; k < 4; k++)
                sum[k] = multiply_add((vec){0} + weights[i],
                                      load(values + i * stride + j + k * LANES), sum[k]);
        for (int k = 0; k < 4; k++) store(out + j + k * LANES, sum[k]);
    }
    for (; j < d; j++)
        for (int64_t i = 0; i < n; i++) out[j] += weights[i] * values[i * stride + j];
}

/* Attention of the queries of KV head `kv` of row r to all positions up to its own. */
static void attend(const Model *m, const Batch *b, int64_t layer, int64_t r, int64_t kv,
                   const Scratch *s, float *scores) {
    const int64_t d = m->head_dim, group = m->n_heads / m->n_kv_heads, stride = m->n_kv_heads * d;
    const int64_t n = b->positions[r] + 1, head = r * m->n_heads + kv * group;
    for (int64_t p = 0; p < n; p += b->block_size) {
        const int64_t slots = n - p < b->block_size ? n - p : b->block_size;
        const float *first = slot(m, b, b->keys[layer], r, p) + kv * d;
        const Matrix keys = {FLOAT32, slots, d, stride, first, 0};
        strips(FLOAT32, &keys, 0, slots, s->q + head * d, d, group, scores + p, n);
    }
    float *out = s->attended + head * d;
    memset(out, 0, group * d * sizeof *out);
    for (int64_t g = 0; g < group; g++) softmax(scores + g * n, n, 1.0f / sqrtf((float)d));
    for (int64_t p = 0; p < n; p += b->block_size) {
        const int64_t slots = n - p < b->block_size ? n - p : b->block_size;
        const float *values = slot(m, b, b->values[layer], r, p) + kv * d;
        for (int64_t g = 0; g < group; g++)
            blend(scores + g * n + p, values, stride, slots, d, out + g * d);
    }
}

/* Adds a branch to the residual stream, and norms what the next branch reads (`next`). */
static void share_residual(const Model *m, const Batch *b, const float *norm, const Scratch *s) {
    const int64_t dim = m->dim;
#pragma omp for
    for (int64_t r = 0; r < b->n_rows; r++) {
        float *x = s->x + r * dim, *branch = s->branch + r * dim;
        if (!m->norm_input) rms_norm(branch, norm, dim, m->norm_eps, branch);
        for (int64_t i = 0; i < dim; i++) x[i] += branch[i];
        if (m->norm_input) rms_norm(x, norm, dim, m->norm_eps, s->normed + r * dim);
    }
}

static void share_layer(const Model *m, const Batch *b, int64_t layer, const Scratch *s) {
    const Layer *l = m->layers + layer;
    const int64_t n = b->n_rows, n_tasks = n * m->n_kv_heads;
    const float *in = m->norm_input ? s->normed : s->x;
    float *own = s->own + omp_get_thread_num() * s->own_size;
    share_product(&l->wq, 0, l->wq.rows, in, n, s->q, own);
    share_product(&l->wk, 0, l->wk.rows, in, n, s->k, own);
    share_product(&l->wv, 0, l->wv.rows, in, n, s->v, own);
    BARRIER
#pragma omp for
    for (int64_t i = 0; i < n_tasks; i++)
        place(m, l, b, layer, i / m->n_kv_heads, i % m->n_kv_heads, s);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < n_tasks; i++)
        attend(m, b, layer, i / m->n_kv_heads, i % m->n_kv_heads, s, own);
    share_product(&l->wo, 0, m->dim, s->attended, n, s->branch, own);
    BARRIER
    share_residual(m, b, m->norm_input ? l->ffn_norm : l->attention_norm, s);
    share_swiglu(l, in, n, s->gate, s->up, own);
    BARRIER
    share_product(&l->w2, 0, m->dim, s->gate, n, s->branch, own);
    BARRIER
    const float *next = layer + 1 < m->n_layers ? l[1].attention_norm : m->norm;
    share_residual(m, b, m->norm_input ? next : l->ffn_norm, s);
}

/* ---- what is called from outside ---- */

static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

/* Cuts the shared areas out of `memory`, unless it is NULL; returns the floats that they take. */
static int64_t cut(const Model *m, int64_t n, int64_t n_threads, float *memory, Scratch *s) {
    const int64_t q = m->n_heads * m->head_dim, kv = m->n_kv_heads * m->head_dim;
    const int64_t widest = m->ffn_dim > m->dim ? m->ffn_dim : m->dim;
    const int64_t scores = m->n_heads / m->n_kv_heads * m->n_positions;
    const int64_t sizes[] = {n * m->dim, n * m->dim, n * m->dim, n * q, n * kv, n * kv, n * q,
                             n * m->ffn_dim, n * m->ffn_dim};
    float **areas[] = {&s->x, &s->normed, &s->branch, &s->q, &s->k, &s->v, &s->attended,
                       &s->gate, &s->up};
    int64_t used = 0;
    for (int i = 0; i < 9; used += padded(sizes[i++]))
        if (memory) *areas[i] = memory + used;
    s->own = memory ? memory + used : 0;
    s->own_size = padded(scores > CHUNK * widest ? scores : CHUNK * widest);
    return used + n_threads * s->own_size;
}

int has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* Floats of memory that a call needs. */
int64_t hidden_floats(const Model *m, int64_t n_rows, int64_t n_threads) {
    Scratch s;
    return cut(m, n_rows, n_threads, 0, &s);
}

int64_t logits_floats(const Matrix *head, int64_t n_threads) {
    return n_threads * CHUNK * head->cols;
}

/* The first row whose id, position or table is outside its range, or -1. */
static int64_t misplaced(const Model *m, const Batch *b) {
    for (int64_t r = 0; r < b->n_rows; r++) {
        const int64_t p = b->positions[r], n_used = p / b->block_size + 1;
        if (b->ids[r] < 0 || b->ids[r] >= m->embedding.rows) return r;
        if (p < 0 || p >= m->n_positions || n_used > b->table_width) return r;
        for (int64_t i = 0; i < n_used; i++) {
            const int64_t block = b->tables[r * b->table_width + i];
            if (block < 0 || block >= b->n_blocks) return r;
        }
    }
    return -1;
}

/* hidden (n_rows, dim), after the final norm; `memory` of `hidden_floats`. Returns `misplaced`. */
int64_t step_hidden(const Model *m, const Batch *b, float *memory, float *hidden, int n_threads) {
    Scratch s;
    cut(m, b->n_rows, n_threads, memory, &s);
    const int64_t wrong = misplaced(m, b);
    if (wrong >= 0) return wrong;
#pragma omp parallel num_threads(n_threads)
    {
#pragma omp for
        for (int64_t r = 0; r < b->n_rows; r++) {
            float *x = s.x + r * m->dim;
            if (m->embedding.kind == BFLOAT16) widen_row(BFLOAT16, &m->embedding, b->ids[r], x);
            else widen_row(FLOAT32, &m->embedding, b->ids[r], x);
            if (m->norm_input)
                rms_norm(x, m->layers->attention_norm, m->dim, m->norm_eps, s.normed + r * m->dim);
        }
        for (int64_t layer = 0; layer < m->n_layers; layer++) share_layer(m, b, layer, &s);
#pragma omp for
        for (int64_t r = 0; r < b->n_rows; r++) {
            float *out = hidden + r * m->dim;
            if (m->norm_input) memcpy(out, s.normed + r * m->dim, m->dim * sizeof *out);
            else rms_norm(s.x + r * m->dim, m->norm, m->dim, m->norm_eps, out);
        }
    }
    return -1;
}

/* logits (n, stop - first) of hidden (n, dim); `memory` of `logits_floats`. */
void step_logits(const Matrix *head, int64_t first, int64_t stop, const float *hidden, int64_t n,
                 float *memory, float *logits, int n_threads) {
#pragma omp parallel num_threads(n_threads)
    share_product(head, first, stop, hidden, n, logits,
                  memory + omp_get_thread_num() * CHUNK * head->cols);
}
