"""What a training needs on a machine: memory, tokens a second, GPU-hours, cost. Computed, not run.

  openchameleon plan 7b --machine a100-80 --gpus 1024
  openchameleon plan 34b --gpus 64 --tokens 300B --checkpointing layers --price 2.5
  openchameleon plan --paper

Utilisation is what you state, in operations that the model needs: recomputation is not counted.
docs/plan.md has the formulas, and a table up to a trillion parameters.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openchameleon.errors import UserError, nearest

if TYPE_CHECKING:
    from openchameleon.train.plan import Plan, Work

SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="RECIPE_OR_PRESET",
                        help="7b, 34b, or a recipe's name or file")  # fmt: skip
    parser.add_argument("--paper", action="store_true",
                        help="the paper's two runs, and the utilisation they imply")  # fmt: skip
    parser.add_argument("--machine", default="h100", metavar="NAME",
                        help="a100-40, a100-80, h100, h200 or b200 (%(default)s)")  # fmt: skip
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="in all (%(default)s)")
    parser.add_argument("--tokens", type=_number, metavar="N",
                        help="to train on, as 9.2T or 300B (what the recipe says)")  # fmt: skip
    parser.add_argument("--utilisation", type=float, default=0.45, metavar="U",
                        help="part of the GPU's bfloat16 rate (%(default)s)")  # fmt: skip
    parser.add_argument("--fsdp", type=int, metavar="N",
                        help="parts of the weights (as many as GPUs / tp)")  # fmt: skip
    parser.add_argument("--tp", type=int, default=1, metavar="N",
                        help="GPUs that share a layer (%(default)s)")  # fmt: skip
    parser.add_argument("--micro-batch", type=int, default=1, metavar="ROWS",
                        help="rows at a time (%(default)s)")  # fmt: skip
    parser.add_argument("--checkpointing", choices=("none", "layers"), default="none",
                        help="layers: keep each layer's input, compute the rest again")  # fmt: skip
    parser.add_argument("--price", type=float, metavar="USD", help="of a GPU-hour")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _number(text: str) -> float:
    """9.2T -> 9.2e12."""
    factor = SUFFIXES.get(text[-1:].upper())
    try:
        value = float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write 300B or 9.2T")
    return value


def run(options: argparse.Namespace) -> int:
    from openchameleon.train.memory import Layout
    from openchameleon.train.plan import plan, remedies

    if options.paper:
        return _print_paper(options.json)
    if options.name is None:
        raise UserError(
            "Give a preset or a recipe, for example `openchameleon plan 7b`, or --paper."
        )
    if options.price is not None and options.price < 0:
        raise UserError(f"--price is {options.price}; it must not be negative.")
    work = _work(options.name)
    if options.tokens:
        work = replace(work, tokens=options.tokens)
    fsdp = options.fsdp if options.fsdp is not None else max(1, options.gpus // max(1, options.tp))
    layout = Layout(options.gpus, fsdp, options.tp, options.micro_batch, options.checkpointing)
    found = plan(work, options.machine, layout, options.utilisation)
    fitting = [] if found.fits else [_options(p) for p in remedies(found)]
    if options.json:
        print(json.dumps(_as_json(found, options.price) | {"fits_with": fitting}, indent=2))
    else:
        _print_plan(found, options.price, fitting)
    return 0


def _work(name: str) -> Work:
    """The paper's run of that name; or all steps of a recipe, in the batches of most of them."""
    from openchameleon.train.plan import PAPER, Work

    if name in PAPER:
        return PAPER[name].work
    from openchameleon.recipes import RECIPES, load_recipe

    if name not in RECIPES and not Path(name).is_file():
        known = [*PAPER, *RECIPES]
        raise UserError(
            f"{name!r} is neither a recipe file nor one of {', '.join(known)}."
            f"{nearest(name, known)}"
        )
    from openchameleon.recipes.config import Pretraining
    from openchameleon.recipes.stages import model_config

    recipe = load_recipe(name)
    if isinstance(recipe, Pretraining):  # rows as long as its context
        model, row_len, trains = recipe.model, recipe.model.max_seq_len, [recipe.train]
    else:
        model, row_len = model_config(recipe), recipe.row_len
        trains = [stage.train for stage in recipe.stages().values()]
    tokens = sum(train.steps * train.batch_size for train in trains) * row_len
    longest = max(trains, key=lambda train: train.steps)
    return Work(recipe.name, model, row_len, longest.batch_size, tokens, longest.loss.chunk)


def _options(plan: Plan) -> str:
    """The command-line options of a plan's layout."""
    layout = plan.layout
    tp = f" --tp {layout.tp}" if layout.tp > 1 else ""
    recompute = " --checkpointing layers" if layout.checkpointing == "layers" else ""
    return f"--machine {plan.machine} --gpus {layout.gpus}{tp}{recompute}"


def _as_json(plan: Plan, price: float | None) -> dict[str, Any]:
    """Bytes and seconds as they are, not rounded."""
    work = {"name": plan.work.name, "tokens": plan.work.tokens, "row_len": plan.work.row_len}
    names = ("compute_s", "network_s", "step_s", "n_steps", "tokens_per_s", "gpu_hours", "days")
    return {
        "measured": False,
        **work,
        "batch_size": plan.work.batch_size,
        "machine": plan.machine,
        "utilisation": plan.utilisation,
        "layout": asdict(plan.layout),
        "memory_bytes": asdict(plan.memory) | {"total": plan.memory.total},
        "fits": plan.fits,
        **{name: getattr(plan, name) for name in names},
        "cost_usd": None if price is None else plan.gpu_hours * price,
    }


def _print_plan(plan: Plan, price: float | None, fitting: list[str]) -> None:
    from openchameleon.model.config import n_params

    work, gpus = plan.work, f"{plan.layout.gpus:,} x {plan.machine}"
    print(f"{work.name}: {n_params(work.model):,} parameters, {_short(work.tokens)} tokens, {gpus}")
    print("Computed from shapes and datasheets; nothing here is measured.\n")
    _print_memory(plan)
    if plan.fits:
        print("  It fits.")
    else:
        print("  It does not fit." + (" These do:" if fitting else " Nothing that was tried does."))
    for options in fitting:
        print(f"    {options}")
    _print_time(plan, price)


def _print_memory(plan: Plan) -> None:
    from openchameleon.train.plan import MACHINES, USABLE

    memory = MACHINES[plan.machine].memory
    print(f"GiB on a GPU of {memory:g}, of which a plan may fill {USABLE * memory:.0f}")
    for part, n_bytes in [*asdict(plan.memory).items(), ("total", plan.memory.total)]:
        print(f"  {part:<12}{n_bytes / 2**30:>10.2f}")


def _print_time(plan: Plan, price: float | None) -> None:
    from openchameleon.train.plan import MACHINES, micro_steps

    work, layout = plan.work, plan.layout
    replicas = layout.gpus // (layout.fsdp * layout.tp)
    kept = "all activations kept" if layout.checkpointing == "none" else "layers computed again"
    print(f"layout  fsdp {layout.fsdp:,} x tp {layout.tp} x {replicas:,} replicas; {kept}")
    rows = f"{micro_steps(work, layout):,} x {layout.micro_batch} rows of {work.row_len:,} tokens"
    network = f"the network alone takes {_figure(plan.network_s)} s"
    print(f"step    {_figure(plan.step_s)} s, in {rows}; {network}")
    reached = plan.utilisation * plan.compute_s / plan.step_s
    rate = f"{reached:.1%} of {MACHINES[plan.machine].flops / 1e12:,.0f} TFLOP/s"
    why = "as stated" if plan.compute_s == plan.step_s else "the network allows no more"
    print(f"speed   {plan.tokens_per_s:,.0f} tokens/s a GPU, {rate} ({why})")
    hours = f"{_figure(plan.days)} days, {_figure(plan.gpu_hours)} GPU-hours"
    cost = "" if price is None else f", ${plan.gpu_hours * price:,.0f} at ${price:g} an hour"
    print(f"time    {plan.n_steps:,.0f} steps, {hours}{cost}")


def _figure(value: float) -> str:
    """Three digits, or all before the point where there are more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _short(tokens: float) -> str:
    """9.2e12 -> 9.2T."""
    for suffix, factor in reversed(SUFFIXES.items()):
        if tokens >= factor:
            return f"{tokens / factor:.4g}{suffix}"
    return f"{tokens:g}"


def _print_paper(as_json: bool) -> int:
    """The paper's GPU-hours, what they imply, and what a plan at 45% comes to."""
    from openchameleon.train.memory import Layout
    from openchameleon.train.plan import PAPER, implied_utilisation, plan

    rows: list[dict[str, Any]] = []
    for name, run in PAPER.items():
        tokens_per_s, utilisation = implied_utilisation(run)
        planned = plan(run.work, run.machine, Layout(run.gpus, run.gpus))
        rows.append({
            "model": name, "tokens": run.work.tokens, "gpus": run.gpus, "machine": run.machine,
            "gpu_hours": run.gpu_hours, "tokens_per_s": tokens_per_s, "utilisation": utilisation,
            "planned_at": planned.utilisation, "planned_gpu_hours": planned.gpu_hours,
        })  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        used = ", ".join(f"{value:.1%} ({name})" for name, value in row["utilisation"].items())
        planned, hours = row["planned_gpu_hours"], row["gpu_hours"]
        print(f"{row['model']}: {_short(row['tokens'])} tokens on {row['gpus']:,} {row['machine']}")
        print(f"  the paper      {hours:,} GPU-hours")
        print(f"  which implies  {row['tokens_per_s']:,.0f} tokens/s a GPU, utilisation {used}")
        print(f"  a plan's       {planned:,.0f} GPU-hours at {row['planned_at']:.0%},")
        print(f"                 {planned / hours:.3f} of the paper's")
    print("Operations are counted with attention in full, causal once, or as 6 a parameter (6N).")
    return 0
