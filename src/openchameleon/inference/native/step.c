/* One decoding step of the transformer on a CPU: ids in, hidden states and logits out.

   What model/transformer.py computes for one new position of each of R rows, in one call. A row is
   a new id of some stream; the stream's keys and values lie in blocks of a pool, in the order of
   its table. Rows may be neighbours in one stream: all keys are written before any is read.

   Decoding is bound by the bytes of the weights, so each weight is read once for all rows, in the
   form it is stored in (float32, bfloat16, int8 with a scale a row), while those after it are on
   their way from memory. It is widened where it is used: bfloat16 to float32, two from a word; int8
   to int16, for products in whole numbers with activations that are rounded to int16, half a step
   in 32767 of the largest of 512. All else is float32. Each number is summed in one order, whatever
   R and the threads are: a row has the same bits alone and among others.

   Vectors are the extension that GCC and Clang share, so that one source serves AVX-512, AVX2 and
   NEON. Inside the parallel region all threads run the same code; each loop marked `omp for` is
   shared among them, and `barrier` waits for all. Without OpenMP these are plain loops. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

/* TALL rows of weights by WIDE rows of activations: sums that registers hold with room left. */
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#define WIDE 4
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define WIDE 2
#elif defined(__aarch64__)
#define LANES 4
#define WIDE 4
#else
#define LANES 4
#define WIDE 2
#endif
#define TALL 4
#define CHUNK 16 /* rows of weights that a thread takes at a time */
#define SPAN 512 /* columns that stay in the cache for all passes, and share a step of rounding */
#define LINE 64  /* bytes that are fetched together */

enum { FLOAT32, BFLOAT16, INT8, INT16 }; /* weights are stored in the first three */

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
typedef int16_t shorts __attribute__((vector_size(4 * LANES))); /* twice as many */
typedef int8_t bytes __attribute__((vector_size(2 * LANES)));

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

/* Activations as products read them. */
typedef struct {
    int64_t n, cols;
    const float *x; /* (n, cols) */
    void *ready;    /* (n, padded(cols)): for bfloat16 weights `part_row`, for int8 `round_row` */
    float *steps;   /* (n, n_spans(cols)) */
} Rows;

/* What the threads share during a step, and one area for each of them. */
typedef struct {
    float *x, *normed, *branch, *q, *k, *v, *attended, *gate, *up, *steps, *ready;
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

INLINE words load_words(const void *p) {
    words w;
    memcpy(&w, p, sizeof w);
    return w;
}

INLINE shorts load_shorts(const void *p) {
    shorts s;
    memcpy(&s, p, sizeof s);
    return s;
}

INLINE void store_shorts(void *p, shorts s) { memcpy(p, &s, sizeof s); }

/* 2 * LANES weights as int16. Compilers widen bytes badly, so that the instructions are named. */
INLINE shorts widen_whole(const int kind, const void *data) {
    if (kind == INT16) return load_shorts(data);
#if LANES == 16
    return (shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256(data));
#elif LANES == 8
    return (shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128(data));
#else
    bytes b;
    memcpy(&b, data, sizeof b);
    return __builtin_convertvector(b, shorts);
#endif
}

/* sum + a * b, two neighbours' products to each element. */
INLINE ints add_products(shorts a, shorts b, ints sum) {
#if LANES == 16 && defined(__AVX512VNNI__)
    return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif LANES == 16
    return sum + (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif LANES == 8
    return sum + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const ints left = ((ints)a << 16) >> 16, right = ((ints)b << 16) >> 16;
    return sum + left * right + ((ints)a >> 16) * ((ints)b >> 16);
#endif
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

/* Some rows of w, from `first` on, and where their products with the rows of `in` go. */
typedef struct {
    const Matrix *w;
    int64_t first;
    const Rows *in;
    float *y; /* of row i of these and row j of `in`: y[j * y_stride + i] */
    int64_t y_stride;
    float *sums;      /* (n, TALL, LANES) */
    int16_t *own;     /* a span of these weights, widened from int8: (TALL, SPAN) */
    const char *next; /* what to fetch while these are computed with: the weights after them */
    int64_t step;     /* bytes of it for each step of a pass */
} Strip;

static int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }
static int64_t n_spans(int64_t cols) { return (cols + SPAN - 1) / SPAN; }
static int64_t strip_floats(int64_t n) { return TALL * (SPAN / 2 + n * LANES); }
INLINE int64_t size_of(const int kind) { return kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2; }

/* The weights of a strip from column `first` on, in their place. */
INLINE const char *weights_of(const int kind, const Strip *s, int64_t first) {
    return (const char *)s->w->data + (s->first * s->w->stride + first) * size_of(kind);
}

/* `bytes` from `from` on, fewer than a vector has, and zeros after them. */
INLINE const char *rest_of(const char *from, int64_t bytes, char room[4 * LANES]) {
    memset(room, 0, 4 * LANES);
    return memcpy(room, from, bytes);
}

INLINE void fetch(const char *next, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(next + i);
}

/* A pass adds to the sums of `tall` rows of weights and `wide` rows of activations, from row j on,
   what columns first .. first + n - 1 give. Both counts are constants wherever a pass is inlined:
   its sums stay in registers. */

INLINE void load_sums(const int tall, const int wide, const float *sums, vec sum[TALL][WIDE]) {
    for (int r = 0; r < wide; r++)
        for (int i = 0; i < tall; i++) sum[i][r] = load(sums + (r * TALL + i) * LANES);
}

INLINE void store_sums(const int tall, const int wide, float *sums, vec sum[TALL][WIDE]) {
    for (int r = 0; r < wide; r++)
        for (int i = 0; i < tall; i++) store(sums + (r * TALL + i) * LANES, sum[i][r]);
}

/* Of float32 weights. */
INLINE void float_pass(const int tall, const int wide, Strip *s, int64_t j, int64_t first,
                       int64_t n) {
    const char *next = s->next;
    const int64_t stride = s->w->stride, x_stride = s->in->cols, step = s->step;
    const float *w = (const float *)weights_of(FLOAT32, s, first);
    const float *x = s->in->x + j * x_stride + first;
    float *sums = s->sums + j * TALL * LANES;
    vec sum[TALL][WIDE] = {{{0}}}, in[WIDE];
    if (first) load_sums(tall, wide, sums, sum);
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES, next += step) {
        fetch(next, 4 * TALL * LANES);
        for (int r = 0; r < wide; r++) in[r] = load(x + r * x_stride + k);
        for (int r = 0; r < wide; r++) HOLD(in[r]);
        for (int i = 0; i < tall; i++) {
            vec weights = load(w + i * stride + k);
            HOLD(weights);
            for (int r = 0; r < wide; r++) sum[i][r] = multiply_add(weights, in[r], sum[i][r]);
        }
    }
    for (int i = 0; i < tall && k < n; i++)
        for (int r = 0; r < wide; r++)
            sum[i][r] = multiply_add(load_some(w + i * stride + k, n - k),
                                     load_some(x + r * x_stride + k, n - k), sum[i][r]);
    store_sums(tall, wide, sums, sum);
    s->next = next;
}

/* Adds to the sums of one row what 2 * LANES bfloat16 weights give. A word holds two of them, of
   which the second is its upper half. */
INLINE void add_halves(const int wide, const char *w, const vec *even, const vec *odd, vec *sum) {
    const words both = load_words(w);
    vec first = (vec)(both << 16), second = (vec)(both & 0xffff0000);
    HOLD(first);
    HOLD(second);
    for (int r = 0; r < wide; r++) sum[r] = multiply_add(first, even[r], sum[r]);
    for (int r = 0; r < wide; r++) sum[r] = multiply_add(second, odd[r], sum[r]);
}

/* Of bfloat16 weights, by parted activations. */
INLINE void half_pass(const int tall, const int wide, Strip *s, int64_t j, int64_t first,
                      int64_t n) {
    const char *w = weights_of(BFLOAT16, s, first), *next = s->next;
    const int64_t stride = 2 * s->w->stride, x_stride = padded(s->in->cols), step = s->step;
    const float *x = (const float *)s->in->ready + j * x_stride + first;
    float *sums = s->sums + j * TALL * LANES;
    vec sum[TALL][WIDE] = {{{0}}}, even[WIDE], odd[WIDE];
    if (first) load_sums(tall, wide, sums, sum);
    int64_t k = 0;
    for (; k + 2 * LANES <= n; k += 2 * LANES, next += step) {
        fetch(next, 4 * TALL * LANES);
        for (int r = 0; r < wide; r++) even[r] = load(x + r * x_stride + k);
        for (int r = 0; r < wide; r++) odd[r] = load(x + r * x_stride + k + LANES);
        for (int r = 0; r < wide; r++) HOLD(even[r]);
        for (int r = 0; r < wide; r++) HOLD(odd[r]);
        for (int i = 0; i < tall; i++) add_halves(wide, w + i * stride + 2 * k, even, odd, sum[i]);
    }
    for (int i = 0; i < tall && k < n; i++) {
        char room[4 * LANES];
        for (int r = 0; r < wide; r++) even[r] = load(x + r * x_stride + k);
        for (int r = 0; r < wide; r++) odd[r] = load(x + r * x_stride + k + LANES);
        const char *rest = rest_of(w + i * stride + 2 * k, 2 * (n - k), room);
        add_halves(wide, rest, even, odd, sum[i]);
    }
    store_sums(tall, wide, sums, sum);
    s->next = next;
}

/* Of int8 weights, and of int16 ones that were kept, by rounded activations: exact in the span.
   keep: the weights stay in s->own, widened, for passes to come. */
INLINE void whole_pass(const int kind, const int tall, const int wide, const int keep, Strip *s,
                       int64_t j, int64_t first, int64_t n) {
    const int64_t cols = s->in->cols, x_stride = padded(cols), size = size_of(kind), step = s->step;
    const int64_t stride = kind == INT8 ? s->w->stride : SPAN;
    const char *w = kind == INT8 ? weights_of(INT8, s, first) : (const char *)s->own;
    const char *next = s->next;
    const int16_t *x = (const int16_t *)s->in->ready + j * x_stride + first;
    const float *steps = s->in->steps + j * n_spans(cols) + first / SPAN;
    int16_t *own = s->own;
    ints sum[TALL][WIDE] = {{{0}}};
    shorts in[WIDE];
    int64_t k = 0;
    for (; k + 2 * LANES <= n; k += 2 * LANES, next += step) {
        fetch(next, 1);
        for (int r = 0; r < wide; r++) in[r] = load_shorts(x + r * x_stride + k);
        for (int r = 0; r < wide; r++) HOLD(in[r]);
        for (int i = 0; i < tall; i++) {
            shorts weights = widen_whole(kind, w + (i * stride + k) * size);
            HOLD(weights);
            if (keep) store_shorts(own + i * SPAN + k, weights);
            for (int r = 0; r < wide; r++) sum[i][r] = add_products(weights, in[r], sum[i][r]);
        }
    }
    for (int i = 0; i < tall && k < n; i++) {
        char room[4 * LANES];
        const char *rest = rest_of(w + (i * stride + k) * size, (n - k) * size, room);
        shorts weights = widen_whole(kind, rest);
        if (keep) store_shorts(own + i * SPAN + k, weights);
        for (int r = 0; r < wide; r++)
            sum[i][r] = add_products(weights, load_shorts(x + r * x_stride + k), sum[i][r]);
    }
    for (int r = 0; r < wide; r++)
        for (int i = 0; i < tall; i++) {
            float *sums = s->sums + ((j + r) * TALL + i) * LANES;
            vec v = __builtin_convertvector(sum[i][r], vec) * steps[r * n_spans(cols)];
            store(sums, first ? load(sums) + v : v);
        }
    s->next = next;
}

INLINE void pass(const int kind, const int tall, const int wide, Strip *s, int64_t j,
                 int64_t first, int64_t n) {
    if (kind == FLOAT32) float_pass(tall, wide, s, j, first, n);
    else if (kind == BFLOAT16) half_pass(tall, wide, s, j, first, n);
    else whole_pass(kind, tall, wide, 0, s, j, first, n);
}

/* Passes for all rows of activations from row j on. */
INLINE void passes(const int kind, const int tall, Strip *s, int64_t j, int64_t first, int64_t n) {
    for (; j + WIDE <= s->in->n; j += WIDE) pass(kind, tall, WIDE, s, j, first, n);
    switch (s->in->n - j) {
#if WIDE > 2
    case 3: pass(kind, tall, 3, s, j, first, n); break;
    case 2: pass(kind, tall, 2, s, j, first, n); break;
#endif
    case 1: pass(kind, tall, 1, s, j, first, n);
    }
}

/* y = scale * the totals of the sums, for row j of the activations. */
INLINE void put(const int tall, const Strip *s, int64_t j) {
    float *y = s->y + j * s->y_stride, *sums = s->sums + j * TALL * LANES;
    const float *scale = s->w->scale ? s->w->scale + s->first : 0;
    if (tall == 1) {
        *y = total(load(sums)) * (scale ? *scale : 1.0f);
        return;
    }
    four scales, t = four_totals(load(sums), load(sums + LANES), load(sums + 2 * LANES),
                                 load(sums + 3 * LANES));
    if (scale) {
        memcpy(&scales, scale, sizeof scales);
        t *= scales;
    }
    memcpy(y, &t, sizeof t);
}

INLINE void strip(const int kind, const int tall, Strip *s) {
    const int64_t cols = s->in->cols;
    for (int64_t first = 0; first < cols; first += SPAN) {
        const int64_t n = cols - first < SPAN ? cols - first : SPAN;
        if (kind == INT8 && s->in->n > WIDE) {
            whole_pass(INT8, tall, WIDE, 1, s, 0, first, n);
            passes(INT16, tall, s, WIDE, first, n);
        } else passes(kind, tall, s, 0, first, n);
    }
    for (int64_t j = 0; j < s->in->n; j++) put(tall, s, j);
}

INLINE void strips(const int kind, const Matrix *w, int64_t first, int64_t stop, const Rows *in,
                   float *y, int64_t y_stride, float *own) {
    const int64_t row_bytes = w->stride * size_of(kind), n_passes = (in->n - 1) / WIDE + 1;
    int16_t *widened = (int16_t *)(own + in->n * TALL * LANES);
    Strip s = {w, first, in, y, y_stride, own, widened, w->data, 0};
    if (w->stride == w->cols) s.step = TALL * LANES * (kind == INT8 ? 2 : 4) / n_passes;
    for (; s.first + TALL <= stop; s.first += TALL, s.y += TALL) {
        s.next = (const char *)w->data + (s.first + TALL) * row_bytes;
        strip(kind, TALL, &s);
    }
    for (s.step = 0; s.first < stop; s.first++, s.y++) strip(kind, 1, &s);
}

/* y (n, stop - first) = x (n, cols) times rows first .. stop-1 of w; `own` of `strip_floats`. */
static void product(const Matrix *w, int64_t first, int64_t stop, const Rows *in, float *y,
                    int64_t y_stride, float *own) {
    switch (w->kind) {
    case FLOAT32: strips(FLOAT32, w, first, stop, in, y, y_stride, own); break;
    case BFLOAT16: strips(BFLOAT16, w, first, stop, in, y, y_stride, own); break;
    default: strips(INT8, w, first, stop, in, y, y_stride, own);
    }
}

/* Parts the numbers of each two vectors of a row: those at even places first, then the others. */
static void part_row(const float *x, int64_t cols, float *parted) {
    for (int64_t k = 0; k < padded(cols); k += 2 * LANES)
        for (int64_t i = 0; i < LANES; i++) {
            parted[k + i] = k + 2 * i < cols ? x[k + 2 * i] : 0;
            parted[k + LANES + i] = k + 2 * i + 1 < cols ? x[k + 2 * i + 1] : 0;
        }
}

/* Rounds a row to int16, each span of it to steps of its own: the largest number is 32767 steps.
   A span with a number that is not finite has such a step. */
static void round_row(const float *x, int64_t cols, int16_t *rounded, float *steps) {
    const float nearest = 12582912.0f; /* added to a number, its low bits are the nearest integer */
    memset(rounded, 0, padded(cols) * sizeof *rounded);
    for (int64_t first = 0; first < cols; first += SPAN, x += SPAN, rounded += SPAN) {
        const int64_t n = cols - first < SPAN ? cols - first : SPAN;
        vec most = {0}, zero = {0};
        for (int64_t k = 0; k < n; k += LANES) {
            const vec v = load_some(x + k, n - k), size = (vec)((ints)v & 0x7fffffff);
            const ints more = size > most;
            most = (vec)(((ints)size & more) | ((ints)most & ~more));
            zero += v * 0.0f; /* NaN for what is not finite */
        }
        float largest = 0;
        for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
        const float factor = largest > 1e-30f ? 32767 / largest : 0;
        *steps++ = largest / 32767 + total(zero);
        for (int64_t k = 0; k < n; k += LANES) {
            const vec shifted = load_some(x + k, n - k) * factor + nearest;
            const halves low = __builtin_convertvector((words)shifted & 0xffff, halves);
            memcpy(rounded + k, &low, (n - k < LANES ? n - k : LANES) * sizeof *rounded);
        }
    }
}

/* Makes rows ready for products with weights of a kind. */
static void share_readying(const Rows *in, int64_t kind) {
    const int64_t width = padded(in->cols);
    if (kind == FLOAT32) return;
#pragma omp for
    for (int64_t j = 0; j < in->n; j++) {
        const float *x = in->x + j * in->cols;
        if (kind == BFLOAT16) part_row(x, in->cols, (float *)in->ready + j * width);
        else round_row(x, in->cols, (int16_t *)in->ready + j * width,
                       in->steps + j * n_spans(in->cols));
    }
}

/* y (n, stop - first), with y_stride from row to row, = x (n, cols) times rows first .. stop-1 of
   w. No barrier at its end. */
static void share_product(const Matrix *w, int64_t first, int64_t stop, const Rows *in, float *y,
                          int64_t y_stride, float *own) {
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = first; i < stop; i += CHUNK)
        product(w, i, i + CHUNK < stop ? i + CHUNK : stop, in, y + i - first, y_stride, own);
}

/* gate (n, ffn_dim) = silu(w1 x) * w3 x; `up` is room for the second factor. */
static void share_swiglu(const Layer *l, const Rows *in, float *gate, float *up, float *own) {
    const int64_t width = l->w1.rows;
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < width; i += CHUNK) {
        const int64_t stop = i + CHUNK < width ? i + CHUNK : width;
        product(&l->w1, i, stop, in, gate + i, width, own);
        product(&l->w3, i, stop, in, up + i, width, own);
        for (int64_t j = 0; j < in->n; j++)
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

/* Fetches part i of n of a block: all n heads of some of its slots. */
INLINE void fetch_slots(const float *block, int64_t size, int64_t stride, int64_t i, int64_t n,
                        int64_t d) {
    for (int64_t at = size * i / n; at < size * (i + 1) / n; at++)
        fetch((const char *)(block + at * stride), n * d * sizeof *block);
}

/* Attention of the queries of KV heads first .. stop-1 of row r to all positions up to its own.
   Blocks are read in the order in which they lie in memory: all heads of one, then the next. */
static void attend(const Model *m, const Batch *b, int64_t layer, int64_t r, int64_t first,
                   int64_t stop, const Scratch *s, float *scores) {
    const int64_t d = m->head_dim, group = m->n_heads / m->n_kv_heads, stride = m->n_kv_heads * d;
    const int64_t n = b->positions[r] + 1, size = b->block_size, n_queries = (stop - first) * group;
    const float *q = s->q + (r * m->n_heads + first * group) * d;
    float *out = s->attended + (r * m->n_heads + first * group) * d, *own = scores + n_queries * n;
    for (int64_t p = 0; p < n; p += size) {
        const int64_t slots = n - p < size ? n - p : size;
        const int64_t after = p + size < n ? p + size : p;
        const float *block = slot(m, b, b->keys[layer], r, p) + first * d;
        const float *next = slot(m, b, b->keys[layer], r, after) + first * d;
        for (int64_t i = 0; i < stop - first; i++) {
            const Matrix keys = {FLOAT32, slots, d, stride, block + i * d, 0};
            const Rows queries = {group, d, q + i * group * d, 0, 0};
            fetch_slots(next, size, stride, i, stop - first, d);
            strips(FLOAT32, &keys, 0, slots, &queries, scores + i * group * n + p, n, own);
        }
    }
    for (int64_t i = 0; i < n_queries; i++) softmax(scores + i * n, n, 1.0f / sqrtf((float)d));
    memset(out, 0, n_queries * d * sizeof *out);
    for (int64_t p = 0; p < n; p += size) {
        const int64_t slots = n - p < size ? n - p : size;
        const int64_t after = p + size < n ? p + size : p;
        const float *block = slot(m, b, b->values[layer], r, p) + first * d;
        const float *next = slot(m, b, b->values[layer], r, after) + first * d;
        for (int64_t i = 0; i < n_queries; i++) {
            if (i % group == 0) fetch_slots(next, size, stride, i / group, stop - first, d);
            blend(scores + i * n + p, block + i / group * d, stride, slots, d, out + i * d);
        }
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
    const int64_t n_parts = n < omp_get_num_threads() ? m->n_kv_heads : 1;
    const Rows in = {n, m->dim, m->norm_input ? s->normed : s->x, s->ready, s->steps};
    const Rows attended = {n, l->wo.cols, s->attended, s->ready, s->steps};
    const Rows gate = {n, m->ffn_dim, s->gate, s->ready, s->steps};
    float *own = s->own + omp_get_thread_num() * s->own_size;
    share_readying(&in, l->wq.kind);
    share_product(&l->wq, 0, l->wq.rows, &in, s->q, l->wq.rows, own);
    share_product(&l->wk, 0, l->wk.rows, &in, s->k, l->wk.rows, own);
    share_product(&l->wv, 0, l->wv.rows, &in, s->v, l->wv.rows, own);
    BARRIER
#pragma omp for
    for (int64_t i = 0; i < n_tasks; i++)
        place(m, l, b, layer, i / m->n_kv_heads, i % m->n_kv_heads, s);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < n * n_parts; i++)
        attend(m, b, layer, i / n_parts, i % n_parts * m->n_kv_heads / n_parts,
               (i % n_parts + 1) * m->n_kv_heads / n_parts, s, own);
    share_readying(&attended, l->wo.kind);
    share_product(&l->wo, 0, m->dim, &attended, s->branch, m->dim, own);
    BARRIER
    share_residual(m, b, m->norm_input ? l->ffn_norm : l->attention_norm, s);
    share_readying(&in, l->w1.kind);
    share_swiglu(l, &in, s->gate, s->up, own);
    BARRIER
    share_readying(&gate, l->w2.kind);
    share_product(&l->w2, 0, m->dim, &gate, s->branch, m->dim, own);
    BARRIER
    const float *next = layer + 1 < m->n_layers ? l[1].attention_norm : m->norm;
    share_residual(m, b, m->norm_input ? next : l->ffn_norm, s);
}

/* ---- what is called from outside ---- */

/* Cuts the shared areas out of `memory`, unless it is NULL; returns the floats that they take. */
static int64_t cut(const Model *m, int64_t n, int64_t n_threads, float *memory, Scratch *s) {
    const int64_t q = m->n_heads * m->head_dim, kv = m->n_kv_heads * m->head_dim;
    int64_t widest = m->ffn_dim > m->dim ? m->ffn_dim : m->dim;
    if (q > widest) widest = q;
    const int64_t scores = m->n_heads * m->n_positions, group = m->n_heads / m->n_kv_heads;
    const int64_t sizes[] = {n * m->dim, n * m->dim, n * m->dim, n * q, n * kv, n * kv, n * q,
                             n * m->ffn_dim, n * m->ffn_dim, n * n_spans(widest),
                             n * padded(widest)};
    float **areas[] = {&s->x, &s->normed, &s->branch, &s->q, &s->k, &s->v, &s->attended,
                       &s->gate, &s->up, &s->steps, &s->ready};
    int64_t used = 0;
    for (int i = 0; i < 11; used += padded(sizes[i++]))
        if (memory) *areas[i] = memory + used;
    s->own = memory ? memory + used : 0;
    s->own_size = padded(scores + strip_floats(n > group ? n : group));
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

int64_t logits_floats(const Matrix *head, int64_t n_rows, int64_t n_threads) {
    return padded(n_rows * n_spans(head->cols)) + n_rows * padded(head->cols) +
           n_threads * strip_floats(n_rows);
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

/* The embedding of an id as float32. */
static void embed(const Matrix *table, int64_t id, float *x) {
    const uint16_t *half = (const uint16_t *)table->data + id * table->stride;
    if (table->kind == FLOAT32)
        memcpy(x, (const float *)table->data + id * table->stride, table->cols * sizeof *x);
    else
        for (int64_t i = 0; i < table->cols; i++) {
            const uint32_t word = (uint32_t)half[i] << 16;
            memcpy(x + i, &word, sizeof word);
        }
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
            embed(&m->embedding, b->ids[r], x);
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

/* logits (n, stop - first), with `stride` from row to row, of hidden (n, dim); `memory` of
   `logits_floats`. */
void step_logits(const Matrix *head, int64_t first, int64_t stop, const float *hidden, int64_t n,
                 float *memory, float *logits, int64_t stride, int n_threads) {
    const int64_t n_steps = padded(n * n_spans(head->cols)), width = padded(head->cols);
    const Rows in = {n, head->cols, hidden, memory + n_steps, memory};
    float *areas = memory + n_steps + n * width;
#pragma omp parallel num_threads(n_threads)
    {
        float *own = areas + omp_get_thread_num() * strip_floats(n);
        share_readying(&in, head->kind);
        share_product(head, first, stop, &in, logits, stride, own);
    }
}
