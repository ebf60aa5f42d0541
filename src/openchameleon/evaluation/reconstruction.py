"""An image tokenizer's report: originals beside reconstructions, and what was lost."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from openchameleon.errors import UserError
from openchameleon.tokenizer.image import ImageTokenizer
from openchameleon.vqgan.metrics import code_counts, codebook_perplexity, codebook_usage, psnr, ssim

SHOWN = 16
"""Pictures on the sheet."""
BATCH = 16


def write_report(
    tokenizer: ImageTokenizer, pictures: Iterable[PIL.Image.Image], out: Path
) -> dict[str, Any]:
    """Writes `report.json` and `reconstructions.png` into `out`; returns the report's numbers.

    PSNR (dB) and SSIM are means over pictures of the pixels in [0, 255]; usage is the share of
    the codebook seen at all, perplexity the exponential of the entropy of its use, and
    `codes_by_use` the share of all codes that the most used 1, 10 and 100 make up.
    UserError if there are no pictures.
    """
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    scores: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
    shown: list[tuple[PIL.Image.Image, PIL.Image.Image]] = []
    for batch in _batches(pictures):
        codes = tokenizer.encode(batch)
        counts += code_counts(codes, len(counts))
        back = tokenizer.decode(codes)
        originals = torch.stack([tokenizer.preprocess(p) for p in batch])
        reconstructions = torch.stack([tokenizer.preprocess(p) for p in back])
        scores["psnr"].append(psnr(reconstructions, originals))
        scores["ssim"].append(ssim(reconstructions, originals))
        shown += list(zip(batch, back, strict=True))[: SHOWN - len(shown)]
    if not shown:
        raise UserError("There are no pictures to report on.")
    most = counts.sort(descending=True).values.cumsum(0) / counts.sum()
    report = {
        "n_pictures": sum(len(v) for v in scores["psnr"]),
        "resolution": tokenizer.resolution,
        "codes_per_picture": tokenizer.n_codes,
        "codebook_size": tokenizer.codebook_size,
        **{name: round(torch.cat(v).mean().item(), 4) for name, v in scores.items()},
        "usage": round(codebook_usage(counts), 4),
        "perplexity": round(codebook_perplexity(counts), 1),
        "codes_by_use": {n: round(most[min(n, len(most)) - 1].item(), 4) for n in (1, 10, 100)},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _sheet(shown, report).savefig(out / "reconstructions.png", dpi=120)
    return report


def _batches(pictures: Iterable[PIL.Image.Image]) -> Iterable[list[PIL.Image.Image]]:
    batch: list[PIL.Image.Image] = []
    for picture in pictures:
        batch.append(picture)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _sheet(shown: list[tuple[PIL.Image.Image, PIL.Image.Image]], report: dict[str, Any]) -> Any:
    """Pairs of original (left) and reconstruction (right), four pairs a row."""
    from matplotlib.figure import Figure

    n_rows = -(-len(shown) // 4)
    figure = Figure(figsize=(12, 1.6 * n_rows + 0.7), layout="constrained")
    axes = figure.subplots(n_rows, 8, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, pair in enumerate(shown):
        for side, picture in enumerate(pair):
            axis = axes[i // 4][2 * (i % 4) + side]
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(("original", "reconstruction")[side], fontsize=7)
    figure.suptitle(
        f"PSNR {report['psnr']:.1f} dB, SSIM {report['ssim']:.3f}, codebook "
        f"{report['usage']:.0%} used, perplexity {report['perplexity']:.0f}",
        fontsize=10,
    )
    return figure
