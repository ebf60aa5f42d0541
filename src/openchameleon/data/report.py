"""What was prepared, as a page and a picture beside the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openchameleon.data.statistics import ASPECTS, FILLS, LENGTHS, SIDES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT, PLOTS = "report.md", "report.png"
LEFT_OUT = {
    "duplicate": "the same, or nearly, as an earlier one",
    "small": "a picture's shorter side has too few pixels",
    "narrow": "a picture is too long for its height or width",
}
BINS_SHOWN = 6  # at least, so that one bar does not fill a panel
USED, UNUSED = "#4878a8", "#c0504d"


def write_report(manifest: Mapping[str, Any], out: Path) -> None:
    """Writes report.md and report.png of a corpus's manifest."""
    statistics = manifest["statistics"]
    _plot(manifest, out / PLOTS)
    tokens, records = statistics["tokens"], statistics["records"]
    n_tokens, n_records = max(sum(tokens.values()), 1), manifest["n_records"]
    options = ", ".join(f"{key} {value}" for key, value in manifest["options"].items())
    lines = [
        "# What was prepared",
        "",
        f"{manifest['n_tokens']:,} tokens of {manifest['n_documents']:,} documents in"
        f" {manifest['n_rows']:,} rows of {manifest['row_len']:,}, filled to"
        f" {manifest['fill']:.1%}; shards: {len(manifest['shards']):,}.",
        "",
        f"Options: {options}.",
        "",
        f"![statistics]({PLOTS})",
        "",
        "| tokens | | |",
        "|---|---:|---:|",
        *(f"| {key} | {n:,} | {n / n_tokens:.1%} |" for key, n in sorted(tokens.items())),
        "",
        "| records | | |",
        "|---|---:|---:|",
        *(f"| {key} | {n:,} | {n / n_records:.2%} |" for key, n in sorted(records.items())),
        *(
            f"| left out: {LEFT_OUT[key]} | {n:,} | {n / n_records:.2%} |"
            for key, n in manifest["left_out"].items()
            if n
        ),
        f"| bad: see `quarantine/` | {manifest['n_bad']:,} | {manifest['n_bad'] / n_records:.2%} |",
        "",
        "A text longer than a row is several documents. Control tokens begin and end documents and"
        " turns; a picture's begin and end count as its own.",
    ]
    (out / REPORT).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _plot(manifest: Mapping[str, Any], png: Path) -> None:
    from matplotlib.figure import Figure  # takes a second to import
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    statistics = manifest["statistics"]
    figure = Figure(figsize=(12, 6.8), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    figure.suptitle(
        f"{manifest['n_tokens']:,} tokens in {manifest['n_rows']:,} rows of"
        f" {manifest['row_len']:,}, from {manifest['n_records']:,} records",
        fontsize=12,
    )
    axes = figure.subplots(2, 3)
    _bars(axes[0, 0], "tokens", statistics["tokens"])
    _histogram(axes[0, 1], "documents by length", LENGTHS, statistics["lengths"], "tokens")
    _histogram(axes[0, 2], "rows by fill", FILLS, statistics["fills"], "share that holds tokens")
    unused = {"bad": manifest["n_bad"]} | manifest["left_out"]
    _bars(axes[1, 0], "records", statistics["records"], {k: n for k, n in unused.items() if n})
    _histogram(axes[1, 1], "pictures by size", SIDES, statistics["sides"], "pixels, shorter side")
    _histogram(
        axes[1, 2], "pictures by aspect", ASPECTS, statistics["aspects"], "longer side / shorter"
    )
    figure.savefig(png, dpi=110)


def _bars(
    axes: Axes, title: str, counts: Mapping[str, int], unused: Mapping[str, int] | None = None
) -> None:
    """A bar a name with its number; what was not used in red, below."""
    both = [*sorted(counts.items(), key=lambda item: -item[1]), *(unused or {}).items()]
    names, values = [name for name, _ in both], [n for _, n in both]
    colours = [USED] * len(counts) + [UNUSED] * len(unused or {})
    bars = axes.barh(names, values, color=colours, height=0.6)
    axes.tick_params(axis="y", length=0)
    axes.bar_label(bars, [f"{n:,}" for n in values], padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    _plain(axes, title)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_ylim(max(len(both), 4) - 0.4, -0.6)


def _histogram(
    axes: Axes, title: str, ends: Sequence[float], counts: Sequence[int], unit: str
) -> None:
    """A bar a bin from the first to the last that are filled, and some more, named by its end."""
    from matplotlib.ticker import MaxNLocator

    names = [f"{end:g}" for end in ends] + [f"> {ends[-1]:g}"]
    filled = [i for i, n in enumerate(counts) if n]
    if not filled:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="gray")
        _plain(axes, title)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    begin = max(min(filled[0] - 1, len(counts) - BINS_SHOWN), 0)
    shown = slice(begin, max(filled[-1] + 2, begin + BINS_SHOWN))
    axes.bar(names[shown], counts[shown], width=0.8, color=USED)
    _plain(axes, title)
    axes.set_xlabel(f"{unit}, up to")
    many = len(names[shown]) > 8
    axes.tick_params(axis="x", labelsize=8, rotation=40 if many else 0)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, pad=8)
    axes.spines[["top", "right"]].set_visible(False)
