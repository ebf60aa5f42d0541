"""Decoding as a share of the memory's bandwidth, which is what bounds it with few streams.

Random weights, greedy, no guesses ahead. `of_bandwidth`: the time that reading the weights, the
head's rows of what may be written, and all keys and values would take at the measured bandwidth, as
part of the median step. Pictures alone and under guidance with two more streams each.
On a GPU: --shape 7b --context 2048 --compile.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from timeit import timeit
from typing import Any

import torch
from common import parser, report
from decode import SHAPES, bytes_of, never_ending

from openchameleon.inference.engine import Engine
from openchameleon.inference.params import ModalityParams, SamplingParams
from openchameleon.inference.sequence import Request
from openchameleon.inference.stored import store_weights
from openchameleon.model.config import PRESETS, ModelConfig, n_params
from openchameleon.model.transformer import Transformer
from openchameleon.vocab import Vocab

ALL_SHAPES = PRESETS | SHAPES
CASES: dict[str, dict[str, Any]] = {
    "text": {"mode": "text"},
    "picture": {"mode": "image"},
    "guided": {"mode": "image", "guidance_text": 3.0, "guidance_image": 1.2},
}
ZERO = ModalityParams(temperature=0)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", choices=ALL_SHAPES, default="small")
    arguments.add_argument("--dtype", choices=("bfloat16", "int8"), default="bfloat16")
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    arguments.add_argument("--context", type=int, default=128, help="ids of prompt")
    arguments.add_argument("--steps", type=int, default=24)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--compile", action="store_true")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ALL_SHAPES[args.shape]
    codes_per_item = max(args.context // 2, args.steps + 4)
    vocab = Vocab.compact(8192, codes_per_item, config.vocab_size - 8192 - 7)
    model = random_model(config, args.dtype, device)
    for n_streams in args.batch[:1] if args.quick else args.batch:
        for case in CASES:
            measure(args, model, vocab, case, n_streams)


def random_model(config: ModelConfig, dtype: str, device: torch.device) -> Transformer:
    """On a CPU the weights are held so and computed with in float32."""
    with torch.device("meta"):
        model = Transformer(config).eval()
    model.to_empty(device=device).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.uniform_(-0.02, 0.02)
    if dtype == "int8" or device.type == "cpu":
        kind: Any = dtype
        store_weights(model, kind, torch.float32 if device.type == "cpu" else None)
    return model


def measure(args: Namespace, model: Transformer, vocab: Vocab, case: str, n_streams: int) -> None:
    params = SamplingParams(ZERO, ZERO, **CASES[case], max_tokens=2 * (args.context + args.steps))
    if case == "text":
        vocab = never_ending(vocab)
    engine = Engine(model, vocab, max_batch=3 * n_streams, lookahead=0, compiled=args.compile,
                    cache_tokens=3 * n_streams * model.config.max_seq_len)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    picture = vocab.image.ids_from_codes([0] * vocab.image.codes_per_item)
    sequences = []
    for _ in range(n_streams):  # a picture first: what guidance leaves out and keeps
        prompt = [vocab.bos_id, *(picture if len(picture) < args.context - 8 else [])]
        n_text = args.context - len(prompt)
        span = (vocab.text_start, vocab.text_stop, (n_text,))
        prompt += torch.randint(*span, generator=generator).tolist()
        sequences.append(engine.add(Request(prompt, params)))
    while min(len(s.new_ids) for s in sequences) < 3:
        engine.step()
    n_held = sum(len(stream.token_ids) for s in sequences for stream in s.streams)
    seconds = [timeit(engine.step, number=1) for _ in range(args.steps)]
    assert all(sequence.finish_reason is None for sequence in sequences)
    for sequence in sequences:
        engine.abort(sequence)
    step, read = statistics.median(seconds), n_bytes(model, vocab, case, n_held)
    bandwidth = read_rate(model.output_weight.device)
    sizes = {
        "shape": args.shape, "parameters": n_params(model.config), "weights": args.dtype,
        "streams": n_streams, "context": args.context, "compiled": args.compile,
    }  # fmt: skip
    report(
        f"bandwidth/{case}", args.out, sizes, tokens_per_s=n_streams / step, step_s=step,
        of_bandwidth=read / bandwidth / step, read_gb_s=bandwidth / 1e9,
    )  # fmt: skip


def n_bytes(model: Transformer, vocab: Vocab, case: str, n_held: int) -> int:
    """That a step reads: the layers, rows of the head, keys and values of n_held positions."""
    config = model.config
    head = getattr(model, "output", model.tok_embeddings)
    spans = vocab.spans_outside_codes() if case == "text" else [(0, vocab.image.count)]
    rows = sum(stop - first for first, stop in spans)
    a_position = 2 * config.n_layers * config.n_kv_heads * config.head_dim * model.dtype.itemsize
    head_row = head.weight.shape[1] * head.weight.itemsize
    return bytes_of(model.layers) + rows * head_row + n_held * a_position


def read_rate(device: torch.device) -> float:
    """Bytes a second at which a large tensor is summed."""
    numbers = torch.ones(2**27, device=device)
    turns = [timeit(lambda: numbers.sum().item(), number=1) for _ in range(8)]
    return numbers.nbytes / statistics.median(turns[1:])


if __name__ == "__main__":
    main()
