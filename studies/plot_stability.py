"""Draws the figures and the table of docs/stability.md from the runs that are kept beside it.

    python studies/plot_stability.py

writes docs/stability/*.png and prints the table. Trains nothing; takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stability import RESULTS, read_results

from openchameleon.train.monitor import LEVELS, Alarm

Run = dict[str, Any]

BLUE, RED, GREEN, ORANGE, PURPLE, GRAY = (
    "#1f6fb4", "#c8312b", "#2a8f4f", "#e08a1e", "#7b4fa3", "#777777"
)  # fmt: skip
LABELS = {
    "text_loss": "text: cross-entropy (nats a token)",
    "code_loss": "picture codes: cross-entropy (nats a code)",
    "output_norm": "norm of the last layer's output",
    "attention_logit_max": "largest logit of attention",
    "log_z": "log Z of the output head, mean",
    "update_norm": "norm of a step's update",
}


def main() -> None:
    runs = read_results()
    folder = RESULTS.parent
    save(rates(runs), folder / "rates.png")
    save(curves(runs, 0.1, {"base": BLUE, "no QK-norm": RED}), folder / "qk_norm.png")
    save(signs(runs), folder / "signs.png")
    print(table(runs))


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    print(path)


def rates(runs: list[Run]) -> Figure:
    """Final losses over the learning rate: what is robust is flat."""
    styles = {
        "base": (BLUE, "o-"),
        "no QK-norm": (RED, "o-"),
        "output norms": (GREEN, "s-"),
        "output norms, no QK-norm": (ORANGE, "s-"),
        "text alone": (BLUE, "^:"),
        "text alone, no QK-norm": (RED, "^:"),
    }
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    figure.suptitle("QK-norm makes a wide range of learning rates do; without it the loss breaks")
    for axes, key in zip(figure.subplots(1, 2), ("text_loss", "code_loss"), strict=True):
        for variant, (color, style) in styles.items():
            points = sorted((r["lr"], r[key]) for r in runs if r["variant"] == variant and r[key])
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, label=variant, ms=5)
        axes.set(xscale="log", xlabel="peak learning rate (AdamW)")
        finish(axes, f"held-out {LABELS[key]}")
        axes.set_xticks(ticks := sorted({r["lr"] for r in runs}), [f"{t:g}" for t in ticks])
        axes.minorticks_off()
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def curves(runs: list[Run], lr: float, variants: dict[str, str]) -> Figure:
    """Losses and signs over the steps, of runs at one learning rate."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(f"Peak learning rate {lr:g}")
    keys = ("text_loss", "code_loss", "attention_logit_max", "output_norm")
    for axes, key in zip(figure.subplots(2, 2).flat, keys, strict=True):
        for run in (r for r in runs if r["lr"] == lr and r["variant"] in variants):
            series = run["series"]
            axes.plot(series["step"], series[key], color=variants[run["variant"]],
                      label=run["variant"], lw=1.4)  # fmt: skip
        if key not in ("text_loss", "code_loss"):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        finish(axes, LABELS[key])
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def signs(runs: list[Run]) -> Figure:
    """Each run as a point: what was measured in its first half, over what it ended with."""
    mixed = [r for r in runs if r["code_loss"]]
    best = min(r["text_loss"] for r in mixed)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle("What a sign says at half of the run about the loss at its end")
    keys = ("attention_logit_max", "output_norm", "log_z")
    for axes, key in zip(figure.subplots(1, 3, sharey=True), keys, strict=True):
        for color, has_norm in ((BLUE, True), (RED, False)):
            chosen = [r for r in mixed if ("no QK-norm" not in r["variant"]) == has_norm]
            x = [at_half(r, key) for r in chosen]
            y = [r["text_loss"] - best for r in chosen]
            label = "with QK-norm" if has_norm else "without QK-norm"
            axes.plot(x, y, "o", color=color, ms=5, alpha=0.8, label=label)
        if key != "log_z":
            axes.set_xscale("log")
        axes.set_xlabel(LABELS[key])
        finish(axes, "")
    figure.axes[0].set_ylabel("held-out text loss above the best run's (nats a token)")
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def at_half(run: Run, key: str) -> float:
    values = run["series"][key]
    return values[len(values) // 2]


def alarms(run: Run) -> dict[str, int]:
    """The step at which each sign's growth would have been an alarm, played from the log."""
    alarm, series, found = Alarm(), run["series"], {}
    for i, step in enumerate(series["step"]):
        values = {k: math.inf if series[k][i] is None else series[k][i] for k in LEVELS}
        found |= dict.fromkeys(alarm.hear(values), step)
    return found


def table(runs: Iterable[Run]) -> str:
    """Every run as a row of Markdown."""
    lines = ["| run | lr | text | codes | output norm | log Z | attention logit | alarm |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in sorted(runs, key=lambda r: (r["variant"], r["lr"])):
        peak = {k: max(v for v in r["series"][k] if v is not None) for k in LEVELS}
        said = ", ".join(f"{k} at {step}" for k, step in alarms(r).items())
        code = f"{r['code_loss']:.2f}" if r["code_loss"] else ""
        lines.append(
            f"| {r['variant']} | {r['lr']:g} | {r['text_loss']:.2f} | {code} |"
            f" {peak['output_norm']:,.0f} | {peak['log_z']:.1f} |"
            f" {peak['attention_logit_max']:,.0f} | {said} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
