"""A training step of two shapes, beside that of `transformers` where it is installed.

Utilisation (mfu) is part of the measured rate of matrix products. All labels are text, since the
library's loss on codes is infinite; it has the same optimizer and clipping, but no z-loss.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import MATMUL_OPS, Run, matmul, medians, parser, report

from openchameleon.data.loader import make_batch
from openchameleon.model.config import PRESETS, ModelConfig
from openchameleon.model.flops import train_flops_per_token
from openchameleon.model.transformer import Transformer
from openchameleon.recipes.nano import recipe
from openchameleon.recipes.stages import model_config, vocab_of
from openchameleon.train.optim import OptimConfig, make_optimizer
from openchameleon.train.step import LossConfig, train_step


def main() -> None:
    args = parser(__doc__).parse_args()
    nano = recipe()
    rows = (nano.pretrain.train.batch_size, nano.row_len)
    first_text = vocab_of(nano).text_start
    for name, config, shape in (
        ("nano", model_config(nano), rows),
        ("small", replace(PRESETS["small"], dropout=0.0), (2, 512)),
    ):
        ids = np.random.default_rng(0).integers(
            first_text, config.vocab_size, (2, 64) if args.quick else shape
        )
        measure(name, config, ids, args.quick, args.out)


def measure(name: str, config: ModelConfig, ids: np.ndarray, quick: bool, out: Path | None) -> None:
    runs = {"matmul": matmul()}
    runs |= {"one_document": our_step(config, ids, 1), "packed": our_step(config, ids, 8)}
    runs["compiled"] = our_step(config, ids, 1, compiled=True)
    if step := their_step(config, ids):
        runs["transformers"] = step
    seconds = medians(runs, 1 if quick else 7)
    rate = MATMUL_OPS / seconds.pop("matmul")
    ops = ids.size * train_flops_per_token(config, ids.shape[1])
    sizes = {"rows": len(ids), "row_len": ids.shape[1], "vocab": config.vocab_size}
    for case, took in seconds.items():
        speed = {"tokens_per_s": ids.size / took, "mfu": ops / took / rate}
        theirs = seconds.get("transformers")
        peer = {"times_transformers": theirs / took} if theirs else {"note": "no transformers"}
        report(f"train_step/{name}/{case}", out, sizes, **speed, **peer)


def our_step(config: ModelConfig, ids: np.ndarray, n_documents: int, compiled: bool = False) -> Run:
    """Rows of `n_documents` documents of equal length, which do not see each other."""
    model, is_code = Transformer(config), torch.zeros(config.vocab_size, dtype=torch.bool)
    model.init_weights(seed=0)
    if compiled:
        model.hidden = torch.compile(model.hidden)  # type: ignore[method-assign]
    optimizer = make_optimizer(model, OptimConfig())
    doc_ids = np.arange(ids.shape[1]) * n_documents // ids.shape[1] + 1
    batch = make_batch(ids, np.broadcast_to(doc_ids, ids.shape), np.ones(ids.shape), pad_id=1)
    rest: dict[str, Any] = {"lr": 1e-4, "grad_clip": 1.0, "is_code": is_code}
    return lambda: train_step(model, optimizer, [batch], LossConfig(), **rest)


def their_step(config: ModelConfig, ids: np.ndarray) -> Run | None:
    try:
        import transformers
    except ImportError:
        return None
    idle = {"base_channels": 32, "channel_multiplier": [1], "resolution": 8}  # its image tokenizer
    theirs: dict[str, Any] = {
        "hidden_size": config.dim, "intermediate_size": config.ffn_dim, "vq_config": idle,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size, "vocabulary_map": {"<image>": 3, "IMGIMGAZ": 4},
        "swin_norm": config.norm_placement == "output",
    }  # fmt: skip
    model = transformers.ChameleonForConditionalGeneration(transformers.ChameleonConfig(**theirs))
    optimizer, token_ids = make_optimizer(model, OptimConfig(lr=1e-4)), torch.from_numpy(ids)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=token_ids, labels=token_ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
