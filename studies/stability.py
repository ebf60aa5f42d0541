"""The paper's findings on stability (section 2.3) at a size that two CPU cores can train.

    python studies/stability.py --out runs/stability

trains small models on the emoji world, one thread each: each remedy left out or put in, at
learning rates raised until something breaks. What is done is skipped and a run that was cut off
goes on, so the same command continues. It writes docs/stability/runs.jsonl, one line a run, from
which `python studies/plot_stability.py` draws the figures of docs/stability.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch

from openchameleon.config import override
from openchameleon.data.loader import RowLoader
from openchameleon.data.prepare import prepare
from openchameleon.document import Document, Record, Text
from openchameleon.errors import UserError
from openchameleon.model.config import ModelConfig, ffn_dim_for
from openchameleon.model.transformer import Transformer
from openchameleon.pipeline import Chameleon
from openchameleon.progress import track
from openchameleon.train.loop import Hook, TrainConfig, fit
from openchameleon.train.metrics import SCORE, read_metrics
from openchameleon.train.optim import OptimConfig
from openchameleon.train.step import LossConfig, batch_loss
from openchameleon.vocab import Vocab
from openchameleon.world.atlas import PRESETS
from openchameleon.world.sample import MIXTURE, all_texts, sample_records

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "stability" / "runs.jsonl"
ROW_LEN, N_HELD_OUT = 384, 24
SAMPLES = {"mixed": 9000, "many": 56_000, "text": 120_000}
"""Documents of each kind of data: enough that no run sees a row twice."""


@dataclass(frozen=True, slots=True)
class Setup:
    """One training. data: documents of text and pictures (many: for long runs), or texts alone."""

    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig
    data: Literal["mixed", "many", "text"] = "mixed"


BASE = Setup(
    model=ModelConfig(
        dim=96,
        n_layers=6,
        n_heads=3,
        n_kv_heads=3,
        vocab_size=5503,
        max_seq_len=ROW_LEN,
        ffn_dim=ffn_dim_for(96, multiple_of=32),
        embedding_std=1.0,
    ),
    train=TrainConfig(
        steps=250, batch_size=3, threads=1, log_every=10, save_every=50, eval_every=50,
        monitor_every=10, keep=1,
    ),
    optim=OptimConfig(warmup_steps=25, decay="cosine"),
)  # fmt: skip
"""QK-norm, norms on the input of the branches, z-loss 1e-5, no dropout, float32."""

LONG = ("data=many", "train.steps=1500", "train.monitor_every=25", "train.log_every=25")
"""Six times the steps: to see whether what trains well at first diverges later."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "base": (),
    "no QK-norm": ("model.qk_norm=false",),
    "text alone": ("data=text",),
    "text alone, no QK-norm": ("data=text", "model.qk_norm=false"),
    "output norms": ("model.norm_placement=output",),
    "output norms, no QK-norm": ("model.norm_placement=output", "model.qk_norm=false"),
    "no z-loss": ("train.loss.z_loss=0",),
    "dropout": ("model.dropout=0.1",),
    "bfloat16": ("train.dtype=bfloat16",),
    "bfloat16, no QK-norm": ("train.dtype=bfloat16", "model.qk_norm=false"),
    "dropout, no QK-norm": ("model.dropout=0.1", "model.qk_norm=false"),
    "codes not learned": ("train.loss.code_weight=0",),
    "base, long": LONG,
    "no QK-norm, long": (*LONG, "model.qk_norm=false"),
}
"""What each differs in from `BASE`, as on the command line of a recipe; the telling ones first."""

SHORT = [variant for variant, switches in VARIANTS.items() if switches[: len(LONG)] != LONG]

KNEE = 0.1
"""The learning rate that all short variants have: the lowest at which one breaks."""

GRID = [
    *((variant, KNEE, 0) for variant in SHORT),
    *((variant, 0.03, 0) for variant in SHORT[:6]),
    *((variant, KNEE, 1) for variant in SHORT[:2]),
    *((variant, lr, 0) for lr in (0.3, 0.01) for variant in SHORT[:6]),
    ("base", 0.003, 0),
    *((variant, lr, 0) for lr in (0.01, 0.03) for variant in VARIANTS if variant not in SHORT),
]
"""Variant, learning rate and seed of each run, in their order: what tells most first."""

SERIES = ("text_loss", "code_loss", "grad_norm", "update_norm", "output_norm", "log_z",
          "logit_max", "attention_logit_max")  # fmt: skip


Job = tuple[str, float, int, Path, Vocab]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/stability"))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.touch()
    vocab = prepare_rows(args.out)
    done = {(r["variant"], r["lr"], r["seed"]) for r in read_results(args.results)}
    left = [(*key, args.out, vocab) for key in GRID if key not in done]
    # Not forked: torch's threads do not survive a fork.
    with get_context("spawn").Pool(args.workers) as pool:
        runs = pool.imap_unordered(run, left)
        for result in track(runs, "stability", len(left), "runs"):
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


def prepare_rows(out: Path) -> Vocab:
    """Rows to learn from and to be judged by, made by the tokenizers of `nano`."""
    tokenizer = Chameleon.from_pretrained("nano").tokenizer
    for data, n in SAMPLES.items():
        parts = [("train", n, 0)] if data == "many" else [("train", n, 0), ("held-out", n // 20, 1)]
        for name, n_samples, seed in parts:
            rows = out / "rows" / f"{data}-{name}"
            if not rows.exists():
                records = world_records(data, n_samples, seed)
                prepare(records, tokenizer, rows, ROW_LEN, answers_only=False, n_records=n_samples)
    return tokenizer.vocab


def world_records(data: str, n: int, seed: int) -> Iterator[Record]:
    preset = PRESETS["nano"]
    if data != "text":
        return (s.record for s in sample_records(preset, "train", MIXTURE, n, seed))
    return (Document([Text(text)]) for text in islice(all_texts(preset, MIXTURE, n, seed), n))


def run(job: Job) -> dict[str, Any]:
    """Trains one model; returns the line that is kept of it."""
    variant, lr, seed, out, vocab = job
    rate, seeded = f"optim.lr={lr}", f"train.seed={seed}"
    setup = override(BASE, (*VARIANTS[variant], rate, seeded, f"model.vocab_size={vocab.size}"))
    rows = out / "rows" / f"{setup.data}-train"
    folder = out / "runs" / f"{variant.replace(', ', '-').replace(' ', '-')}-{lr:g}-{seed}"
    is_code = torch.zeros(vocab.size, dtype=torch.bool)
    is_code[vocab.image.first_id : vocab.image.stop_id] = True
    model = Transformer(setup.model)
    model.init_weights(seed)
    start, finite = time.monotonic(), True
    loader = RowLoader({setup.data: (rows, 1.0)}, setup.train.batch_size, seed)
    judged_by = "text" if setup.data == "text" else "mixed"
    hooks = {"held_out": held_out_loss(out / "rows" / f"{judged_by}-held-out", is_code)}
    try:
        fit(model, loader, setup.train, setup.optim, folder, is_code=is_code, hooks=hooks)
    except UserError:
        if "not_finite" not in read_metrics(folder / "metrics.jsonl")[-1]:
            raise
        finite = False
    lines = read_metrics(folder / "metrics.jsonl")
    shutil.rmtree(folder / "checkpoints")
    result = {"variant": variant, "lr": lr, "seed": seed, "finite": finite}
    result["seconds"] = round(time.monotonic() - start, 1)
    for name in ("text_loss", "code_loss"):
        found = [n[key] for n in lines if (key := f"{SCORE}held_out/{name}") in n]
        learned = name == "text_loss" or setup.train.loss.code_weight > 0
        result[name] = _short(found[-1]) if found and learned else None
    watched = [line for line in lines if "output_norm" in line]
    series: dict[str, Any] = {"step": [line["step"] for line in watched]}
    for key in SERIES:
        series[key] = [_short(line.get(key)) for line in watched]
    return result | {"series": series}


def held_out_loss(rows: Path, is_code: torch.Tensor) -> Hook:
    """Cross-entropy of text and of codes, in nats a token, on rows that no run learns from."""
    batch = RowLoader({"held-out": (rows, 1.0)}, N_HELD_OUT, seed=0).batch(0)

    @torch.no_grad()
    def losses(model: Transformer, step: int) -> dict[str, float]:
        _, (text, n_text, code, n_code), _ = batch_loss(model, batch, LossConfig(), is_code)
        found = {"text_loss": float(text / n_text), "code_loss": float(code / n_code)}
        return {name: loss for name, loss in found.items() if loss == loss}  # no nan: no codes

    return losses


def read_results(path: Path = RESULTS) -> list[dict[str, Any]]:
    """What is kept of the runs, in the order in which they were trained."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


if __name__ == "__main__":
    main()
