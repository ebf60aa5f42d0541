"""The record of a run: one JSON line a logged step, and the page of curves drawn from it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCORE = "score/"


class MetricsLog:
    """Appends `{"step": .., name: value, ..}` lines, each given to the system when `log` returns.

    Opening it at a resumed step drops the lines of later steps, which will be written again, and
    a last line that a kill left incomplete.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= resumed_step]
            rewritten = path.with_name(path.name + ".tmp")
            rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(rewritten, path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line. A value that is not finite becomes null, which JSON can hold."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log in order, without a last one that is incomplete."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def plot_metrics(log: Path, png: Path) -> None:
    """Draws the curves of a log: losses, learning rate, scores, and the signs of divergence."""
    from matplotlib.figure import Figure  # takes a second to import

    lines = read_metrics(log)
    scores = sorted({key for line in lines for key in line if key.startswith(SCORE)})
    panels = {
        "loss (nats a token)": ["text_loss", "code_loss"],
        "learning rate": ["lr"],
        "scores": scores,
        "norms of gradient and update": ["grad_norm", "update_norm"],
        "norm of the last layer's output": ["output_norm"],
        "logits": ["log_z", "logit_max", "attention_logit_max"],
    }
    figure = Figure(figsize=(15, 7), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True)
    for axes, (title, keys) in zip(grid.flat, panels.items(), strict=True):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            axes.plot(
                [step for step, _ in points],
                [value for _, value in points],
                label=key.removeprefix(SCORE).removesuffix("_loss"),
                linewidth=1.2,
                marker="o" if key in scores else "",
                markersize=3,
            )
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(keys) > 1 or keys == scores != []:
            axes.legend(frameon=False, fontsize=8)
        if title.startswith("norm"):
            axes.set_yscale("log")
        if title == "logits":
            axes.set_yscale("symlog", linthresh=10)  # those of attention outgrow the rest
        if title == "learning rate":
            axes.set_ylim(bottom=0)  # a constant one is a line, not a range of roundings
        if not keys:
            axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="gray")
    for axes in grid[1]:
        axes.set_xlabel("step")
    figure.savefig(png, dpi=130)
