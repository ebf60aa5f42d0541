"""Writes the computed table and plot of docs/plan.md: model sizes, GPU counts, layouts, days.

    python tools/make_plan.py

Everything between the marks in docs/plan.md is written by this; nothing of it is measured.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from openchameleon.model.config import PRESETS, ModelConfig, n_params
from openchameleon.train.plan import MACHINES, USABLE, Plan, Work, best_fit

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- tools/make_plan.py writes from here -->\n", "<!-- to here -->\n"
MACHINE, UTILISATION, TOKENS = "h100", 0.45, 1e12
ROW_LEN, BATCH = 4096, 4096
GPUS = (8, 64, 512, 4096, 16_384)
SHOWN = 512
"""The number of GPUs whose memory is plotted."""


def shape(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int) -> ModelConfig:
    return ModelConfig(dim, n_layers, n_heads, n_kv_heads, vocab_size=65_536, max_seq_len=ROW_LEN,
                       ffn_dim=ffn_dim, norm_placement="output")  # fmt: skip


SIZES = {
    "1B": shape(2048, 16, 32, 8, 8192),
    "7B": PRESETS["7b"],
    "13B": shape(5120, 40, 40, 40, 13_824),
    "34B": PRESETS["34b"],
    "70B": shape(8192, 80, 64, 8, 28_672),
    "150B": shape(12_288, 96, 96, 8, 32_768),
    "405B": shape(16_384, 126, 128, 8, 53_248),
    "1T": shape(24_576, 164, 192, 8, 65_536),
}
"""The paper's two shapes, those of public Llamas, and two between and beyond them."""


def plans() -> dict[tuple[str, int], Plan | None]:
    """By (size, GPUs): the fastest plan that fits, or None."""
    works = {name: Work(name, config, ROW_LEN, BATCH, TOKENS) for name, config in SIZES.items()}
    return {
        (name, gpus): best_fit(work, MACHINE, gpus, UTILISATION)
        for name, work in works.items()
        for gpus in GPUS
    }


def table(found: dict[tuple[str, int], Plan | None]) -> str:
    columns = ("model", "GPUs", "fsdp x tp", "layers", "GiB a GPU", "network s", "step s",
               "utilisation", "GPU-hours for 1T tokens", "days for 1T tokens",
               "days for 20 tokens a parameter")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (name, gpus), p in found.items():
        if p is None:
            lines.append(f"| {name} | {gpus:,} | does not fit |" + " |" * (len(columns) - 3))
            continue
        layers = "computed again" if p.layout.checkpointing == "layers" else "kept"
        reached = p.utilisation * p.compute_s / p.step_s
        twenty = 20 * n_params(p.work.model) / TOKENS
        lines.append(
            f"| {name} | {gpus:,} | {p.layout.fsdp:,} x {p.layout.tp} | {layers}"
            f" | {p.memory.total / 2**30:.1f} | {p.network_s:.2f} | {p.step_s:.2f}"
            f" | {reached:.0%} | {p.gpu_hours:,.0f} | {_days(p.days)} | {_days(p.days * twenty)} |"
        )
    return "\n".join(lines) + "\n"


def _days(days: float) -> str:
    return f"{days:,.0f}" if days >= 100 else f"{days:.2g}"


def draw(found: dict[tuple[str, int], Plan | None], path: Path) -> None:
    """Memory by part at SHOWN GPUs, and days for a trillion tokens by GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    memory, days = figure.subplots(1, 2)
    _draw_memory(memory, {name: p for name in SIZES if (p := found[name, SHOWN]) is not None})
    for name in SIZES:
        _draw_days(days, name, [p for gpus in GPUS if (p := found[name, gpus]) is not None])
    days.set(xscale="log", yscale="log", xlabel=f"GPUs ({MACHINE.upper()})", ylabel="days")
    days.set_title("Days for a trillion tokens (computed)", loc="left", fontsize=11)
    days.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
    days.set_xlim(6, 5e4)
    days.minorticks_off()
    days.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    stated = f"{UTILISATION:.0%} utilisation, as stated"
    for label, face in ((stated, "0.4"), ("the network allows less", "white")):
        days.plot([], [], "o", color="0.4", markerfacecolor=face, label=label)
    days.legend(frameon=False, fontsize=9, loc="lower left")
    for axes in (memory, days):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)


def _draw_memory(axes: Any, shown: dict[str, Plan]) -> None:
    names = [
        f"{name}{'*' if p.layout.checkpointing == 'layers' else ''}" for name, p in shown.items()
    ]
    bottom = [0.0] * len(shown)
    for part in asdict(next(iter(shown.values())).memory):
        gib = [getattr(p.memory, part) / 2**30 for p in shown.values()]
        axes.bar(names, gib, 0.65, bottom=bottom, label=part)
        bottom = [b + g for b, g in zip(bottom, gib, strict=True)]
    usable = USABLE * MACHINES[MACHINE].memory
    axes.axhline(usable, color="black", linewidth=1, linestyle="--")
    axes.text(-0.4, usable + 1, f"a plan may fill {usable:.0f} GiB", fontsize=9)
    axes.set(ylim=(0, 1.12 * usable), ylabel="GiB", xlabel="parameters (*: layers computed again)")
    axes.set_title(f"Memory of each of {SHOWN} {MACHINE.upper()} (computed)", loc="left",
                   fontsize=11)  # fmt: skip
    axes.legend(frameon=False, fontsize=9, reverse=True, loc="upper center",
                bbox_to_anchor=(0.58, 0.9))  # fmt: skip


def _draw_days(axes: Any, name: str, plans: list[Plan]) -> None:
    xs, ys = [p.layout.gpus for p in plans], [p.days for p in plans]
    (line,) = axes.plot(xs, ys, linewidth=1.3)
    axes.text(xs[-1] * 1.25, ys[-1], name, color=line.get_color(), fontsize=9, va="center")
    for x, y, p in zip(xs, ys, plans, strict=True):
        face = "white" if p.network_s > p.compute_s else line.get_color()
        axes.plot(x, y, "o", color=line.get_color(), markerfacecolor=face, markersize=5.5)


def main() -> None:
    found, page = plans(), DOCS / "plan.md"
    (DOCS / "plan").mkdir(exist_ok=True)
    draw(found, DOCS / "plan" / "scaling.png")
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}{table(found)}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
