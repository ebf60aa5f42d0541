"""Draws the figures and the table of docs/stability.md from the runs that are kept beside it.

    python studies/plot_stability.py

writes docs/stability/*.png and prints the table. Trains nothing; takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stability import KNEE, RESULTS, SHORT, VARIANTS, read_results

from openchameleon.train.monitor import LEVELS, Alarm

Run = dict[str, Any]

BLUE, RED, GREEN, ORANGE = "#1f6fb4", "#c8312b", "#2a8f4f", "#e08a1e"
COLORS = {
    "base": BLUE,
    "no QK-norm": RED,
    "output norms": GREEN,
    "output norms, no QK-norm": ORANGE,
    "text alone": BLUE,
    "text alone, no QK-norm": RED,
}
TITLES = {
    "text_loss": "loss of text (nats a token)",
    "code_loss": "loss of picture codes (nats a code)",
    "output_norm": "norm of the last layer's output",
    "attention_logit_max": "largest logit of attention",
    "log_z": "mean log Z of the output head",
}


def main() -> None:
    runs = kept_runs()
    drawings = (rates, curves, remedies, signs, longer)
    for draw in drawings:
        draw(runs).savefig(RESULTS.with_name(f"{draw.__name__}.png"), dpi=110)
    print(table(runs), sensitivities(runs), sep="\n\n")


def kept_runs() -> list[Run]:
    """All runs of the log, variant by variant."""
    order = list(VARIANTS)
    return sorted(read_results(), key=lambda r: (order.index(r["variant"]), r["lr"], r["seed"]))


def rates(runs: list[Run]) -> Figure:
    """Final losses over the learning rate: what is robust is flat."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    figure.suptitle(
        "Loss after 250 steps, by learning rate, on rows that were not trained on (hollow: seed 1)"
    )
    for axes, key in zip(figure.subplots(1, 2), ("text_loss", "code_loss"), strict=True):
        for variant, color in COLORS.items():
            found = [r for r in runs if r["variant"] == variant and r[key]]
            points = [(r["lr"], r[key]) for r in found if r["seed"] == 0]
            others = [(r["lr"], r[key]) for r in found if r["seed"] > 0]
            style = "^:" if "text" in variant else "s-" if "output" in variant else "o-"
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, label=variant, ms=5)
            axes.plot(*zip(*others, strict=True), "o", color=color, mfc="none") if others else None
        axes.set(xscale="log", xlabel="highest learning rate (AdamW)")
        axes.set_xticks(ticks := sorted({r["lr"] for r in runs}), [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        finish(axes, TITLES[key])
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def curves(runs: list[Run]) -> Figure:
    """Losses and signs over the steps, of runs at one learning rate."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(f"Text and pictures, learning rate {KNEE:g}; all see the same batches")
    keys = ("text_loss", "code_loss", "attention_logit_max", "output_norm")
    for axes, key in zip(figure.subplots(2, 2).flat, keys, strict=True):
        for run in runs:
            if (
                run["lr"] == KNEE
                and run["seed"] == 0
                and run["variant"] in COLORS
                and run["code_loss"]
            ):
                series, variant = run["series"], run["variant"]
                axes.plot(series["step"], series[key], color=COLORS[variant], label=variant, lw=1.4)
        if not key.endswith("_loss"):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        finish(axes, TITLES[key] + (", of the step's batch" if key.endswith("_loss") else ""))
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def remedies(runs: list[Run]) -> Figure:
    """Every variant at one learning rate: what it ended with, and how far the signs went."""
    chosen = [r for r in runs if r["lr"] == KNEE and r["seed"] == 0][::-1]
    rows = range(len(chosen))
    figure = Figure(figsize=(13, 0.8 + 0.36 * len(chosen)), layout="constrained")
    figure.suptitle(
        f"Learning rate {KNEE:g}: held-out losses at the end, peaks of the signs (red: no QK-norm)"
    )
    keys = ("text_loss", "code_loss", "attention_logit_max", "output_norm")
    for axes, key in zip(figure.subplots(1, 4, sharey=True), keys, strict=True):
        values = [r[key] or 0.0 if key.endswith("_loss") else peak(r, key) for r in chosen]
        colors = [RED if "no QK-norm" in r["variant"] else BLUE for r in chosen]
        axes.barh(rows, values, color=colors, height=0.62)
        for row, value in zip(rows, values, strict=True):
            text = f"{value:.2f}" if key.endswith("_loss") else f"{value:,.0f}"
            axes.annotate(text if value else "none", (value, row), (3, 0), va="center",
                          textcoords="offset points", fontsize=8)  # fmt: skip
        if not key.endswith("_loss"):
            axes.set_xscale("log")
            axes.set_xlim(10, 30 * max(values))
        else:
            axes.set_xlim(0, 1.25 * max(values))
        axes.set_yticks(rows, [r["variant"] for r in chosen])
        finish(axes, TITLES[key])
        axes.title.set_fontsize(9)
    return figure


def signs(runs: list[Run]) -> Figure:
    """Each run as a point: what was measured at half of it, and the loss that it ended with."""
    mixed = [r for r in runs if r["code_loss"] and r["variant"] in SHORT]
    best = min(r["text_loss"] for r in mixed)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(
        "Each point is a run on text and pictures: a sign at its half, its loss at its end"
    )
    keys = ("attention_logit_max", "output_norm", "log_z")
    for axes, key in zip(figure.subplots(1, 3, sharey=True), keys, strict=True):
        for color, label in ((BLUE, "with QK-norm"), (RED, "without QK-norm")):
            group = [r for r in mixed if ("no QK-norm" in r["variant"]) == (color == RED)]
            halves = [r["series"][key][len(r["series"][key]) // 2] for r in group]
            above = [r["text_loss"] - best for r in group]
            axes.plot(halves, above, "o", color=color, ms=5, alpha=0.8, label=label)
        if key != "log_z":
            axes.set_xscale("log")
        axes.set_xlabel(f"{TITLES[key]}, step 130")
        finish(axes, "")
    figure.axes[0].set_ylabel("text loss above the best run's (nats a token)")
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def longer(runs: list[Run]) -> Figure:
    """Losses and signs of the runs of six times the steps."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle("Six times the steps: with QK-norm (blue) and without (red), at two rates")
    keys = ("text_loss", "code_loss", "attention_logit_max", "output_norm")
    for axes, key in zip(figure.subplots(2, 2).flat, keys, strict=True):
        for run in (r for r in runs if r["variant"] not in SHORT):
            color = RED if "no QK-norm" in run["variant"] else BLUE
            style = "-" if run["lr"] == 0.01 else ":"
            label = f"{run['variant'].removesuffix(', long')}, rate {run['lr']:g}"
            values = smooth(run["series"][key]) if key.endswith("_loss") else run["series"][key]
            axes.plot(run["series"]["step"], values, style, color=color, label=label, lw=1.4)
        if not key.endswith("_loss"):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        finish(axes, TITLES[key] + (", mean of five batches" if key.endswith("_loss") else ""))
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def smooth(values: list[float]) -> list[float]:
    """Each value with the two before and after it, as far as there are."""
    windows = [values[max(0, i - 2) : i + 3] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def peak(run: Run, key: str) -> float:
    return max(value for value in run["series"][key] if value is not None)


def alarms(run: Run) -> dict[str, int]:
    """The step at which each sign's growth would have been an alarm, played from the log."""
    alarm, series = Alarm(), run["series"]
    found: dict[str, int] = {}
    for i, step in enumerate(series["step"]):
        values = {k: math.inf if series[k][i] is None else series[k][i] for k in LEVELS}
        found |= dict.fromkeys(alarm.hear(values), step)
    return found


def table(runs: Iterable[Run]) -> str:
    """Every run as a row of Markdown: losses at the end, peaks of the signs, alarms."""
    lines = ["| run | lr | text | codes | attention logit | output norm | log Z | alarm |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in runs:
        codes = f"{r['code_loss']:.2f}" if r["code_loss"] else ""
        name = r["variant"] + (f", seed {r['seed']}" if r["seed"] else "")
        said = ", ".join(f"{sign} at {step}" for sign, step in alarms(r).items())
        lines.append(
            f"| {name} | {r['lr']:g} | {r['text_loss']:.2f} | {codes} |"
            f" {peak(r, 'attention_logit_max'):,.0f} | {peak(r, 'output_norm'):,.0f} |"
            f" {peak(r, 'log_z'):.1f} | {said} |"
        )
    return "\n".join(lines)


def sensitivities(runs: list[Run]) -> str:
    """How far the losses lie above their best, mean over the rates from 0.01 to 0.3.

    The measure of Wortsman et al. (arXiv 2309.14322); no run here ended above where it began,
    at which they cut.
    """
    lines = ["| runs | text | codes |", "|---|---|---|"]
    for variant in VARIANTS:
        chosen = [r for r in runs if r["variant"] == variant and r["lr"] >= 0.01 and r["seed"] == 0]
        if len(chosen) < 4:
            continue
        means = []
        for key in ("text_loss", "code_loss"):
            losses = [r[key] for r in chosen if r[key]]
            means.append(f"{sum(losses) / len(losses) - min(losses):.2f}" if losses else "")
        lines.append(f"| {variant} | {' | '.join(means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
