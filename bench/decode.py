"""Decoding beside `generate` of `transformers` on the same weights, which bfloat16 holds exactly.

Greedy, random weights, no guesses ahead. Ours: PyTorch alone, as without a compiler,
and the native step with weights held as float32, bfloat16 and int8. `times_transformers`: over
`transformers` with its defaults in float32. It never writes codes, so that a picture is compared
with its text, of as many ids. `same_ids`: part of its ids that are ours too. `memory`: that of the
weights and of the most that the first run adds, over that of the weights, keys and values.
--best: its other ways too, a static cache, plain and compiled. --prompt 1024 --new 1: prompts.
"""

from __future__ import annotations

import copy
import os
import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from timeit import timeit
from typing import Any

import torch
from common import once, parser, report

from openchameleon.checkpoints import hf
from openchameleon.checkpoints.rotary import halves_from_pairs
from openchameleon.inference.engine import Engine
from openchameleon.inference.native.step import SWITCH, library
from openchameleon.inference.params import ModalityParams, SamplingParams
from openchameleon.inference.sequence import Request
from openchameleon.inference.stored import store_weights
from openchameleon.model.config import PRESETS, ModelConfig, ffn_dim_for, n_params
from openchameleon.model.transformer import Transformer
from openchameleon.vocab import Vocab

SMALL = replace(PRESETS["small"], max_seq_len=2048)
SHAPES = {
    "small": SMALL,
    "medium": replace(SMALL, dim=1280, n_layers=18, n_heads=20, n_kv_heads=20,
                      ffn_dim=ffn_dim_for(1280), tie_embeddings=False),
}  # fmt: skip
ZERO = ModalityParams(temperature=0)
Ids = list[list[int]]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", choices=SHAPES, default="small")
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--prompt", type=int, default=16)
    arguments.add_argument("--new", type=int, default=64)
    arguments.add_argument("--best", action="store_true")
    arguments.add_argument("--repeats", type=int, default=7)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    config, n_new = SHAPES[args.shape], 8 if args.quick else args.new
    vocab = Vocab.compact(8192, max(1, n_new - 2), config.vocab_size - 8192 - 7)
    cases = ("text", "picture") if n_new > 2 else ("text",)
    model = Transformer(config).eval()
    model.init_weights(seed=0)
    model.to(torch.bfloat16).to(torch.float32)
    span, rng = (vocab.text_start, vocab.size), torch.Generator().manual_seed(0)
    prompts = torch.randint(*span, (args.batch, args.prompt), generator=rng).tolist()
    ways = ("default", "static", "compiled") if args.best else ("default",)
    runs = {f"transformers/{way}": theirs(model, prompts, n_new, way) for way in ways}
    runs |= {f"pytorch/{case}": ours(model, vocab, prompts, case, n_new, "0") for case in cases}
    kinds: list[Any] = ["float32", "bfloat16", "int8"] if library() else []
    for kind in kinds:
        held = copy.deepcopy(model)
        if kind != "float32":
            store_weights(held, kind)
        runs |= {f"{kind}/{case}": ours(held, vocab, prompts, case, n_new, "1") for case in cases}
    cache = 8 * config.n_layers * config.n_kv_heads * config.head_dim * (args.prompt + n_new)
    measure(runs, args, args.batch * cache, {
        "shape": args.shape, "parameters": n_params(config), "batch": args.batch,
        "prompt": args.prompt, "new_ids": n_new,
    })  # fmt: skip


def measure(
    runs: dict[str, tuple[int, Callable[[], Ids]]],
    args: Namespace,
    cache: int,
    sizes: dict[str, Any],
) -> None:
    """In turns. A spread is the quartiles' distance, as part of the median.

    runs: bytes of weights, and what to time. cache: bytes of keys and values.
    """
    ids: dict[str, Ids] = {}
    added = {
        name: once(partial(keep, ids, name, run))["peak_gib"] for name, (_, run) in runs.items()
    }
    n_turns = 1 if args.quick else args.repeats
    turns = [{k: timeit(run, number=1) for k, (_, run) in runs.items()} for _ in range(n_turns)]
    theirs = statistics.median(turn["transformers/default"] for turn in turns)
    for name, (weights, _) in runs.items():
        seconds = sorted(turn[name] for turn in turns)
        took = statistics.median(seconds)
        spread = (seconds[(3 * n_turns) // 4] - seconds[n_turns // 4]) / took
        values = {"tokens_per_s": args.batch * sizes["new_ids"] / took, "spread": spread}
        values["times_transformers"] = theirs / took
        values["memory"] = (weights + added[name] * 2**30) / (weights + cache)
        if name.endswith("text"):
            values["same_ids"] = same(ids[name], ids["transformers/default"])
        report(f"decode/{name}", args.out, sizes, **values)


def keep(ids: dict[str, Ids], name: str, run: Callable[[], Ids]) -> None:
    ids[name] = run()


def ours(
    model: Transformer, vocab: Vocab, prompts: Ids, case: str, n_new: int, native: str
) -> tuple[int, Callable[[], Ids]]:
    engine = Engine(model, never_ending(vocab) if case == "text" else vocab, lookahead=0)
    mode: Any = {"text": "text", "picture": "image"}[case]
    params = SamplingParams(ZERO, ZERO, mode=mode, max_tokens=n_new + (case == "picture"))
    requests = [Request(prompt, params) for prompt in prompts]

    def run() -> Ids:
        os.environ[SWITCH] = native  # asked when an engine first reads
        ids = [completion.token_ids for completion in engine.generate(requests)]
        assert {len(row) for row in ids} == {n_new}
        engine.blocks.forget()  # prompts are read anew, as theirs are
        return ids

    return bytes_of(model), run


def never_ending(vocab: Vocab) -> Vocab:
    """Texts do not end by themselves: what would end them is an id that is never written."""
    return replace(vocab, eos_id=vocab.unk_id, unk_id=vocab.eos_id)


def bytes_of(model: torch.nn.Module) -> int:
    """Of the weights; what is tied counts once."""
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())


def theirs(model: Transformer, prompts: Ids, n_new: int, way: str) -> tuple[int, Callable[[], Ids]]:
    import transformers

    peer = transformers.ChameleonForConditionalGeneration(their_config(model.config)).eval()
    weights = model.state_dict()
    for name, weight in weights.items():
        if name.endswith(("wq.weight", "wk.weight")):
            weight = halves_from_pairs(weight, model.config.head_dim)
        elif "_normalization." in name:  # all alike at first, so that their order does not matter
            weight = weight.expand(model.config.n_heads, -1)
        peer.get_parameter(hf.name_of(name)).copy_(weight)
    ids = torch.tensor(prompts)
    peer.generation_config.eos_token_id = None
    wishes: dict[str, Any] = {"max_new_tokens": n_new, "do_sample": False, "pad_token_id": 1}
    wishes["attention_mask"] = torch.ones_like(ids)
    if way != "default":
        wishes["cache_implementation"] = "static"
    if way == "compiled":
        peer.forward = torch.compile(peer.forward)
    generate: Any = peer.generate
    return bytes_of(peer), lambda: generate(ids, **wishes)[:, ids.shape[1] :].tolist()


def their_config(config: ModelConfig) -> Any:
    import transformers

    return transformers.ChameleonConfig(
        hidden_size=config.dim, intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, tie_word_embeddings=config.tie_embeddings,
        vocab_size=config.vocab_size, swin_norm=config.norm_placement == "output",
        vocabulary_map={"<image>": 3, **{f"IMGIMG{code(i)}Z": 4 + i for i in range(8192)}},
        vq_config={"base_channels": 32, "channel_multiplier": [1], "resolution": 8},
    )  # fmt: skip


def code(i: int) -> str:
    """Digits of a code's name: A is 0, B is 1 ..."""
    return "".join("ABCDEFGHIJ"[int(digit)] for digit in str(i))


def same(ids: Ids, others: Ids) -> float:
    rows = zip(ids, others, strict=True)
    pairs = [a == b for row, other in rows for a, b in zip(row, other, strict=True)]
    return sum(pairs) / len(pairs)


if __name__ == "__main__":
    main()
