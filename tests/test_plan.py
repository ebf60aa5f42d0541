"""Plans: memory against a model that is built and run, hours against the paper's."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import weakref
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from openchameleon.cli.main import main
from openchameleon.errors import UserError
from openchameleon.model.config import PRESETS, ModelConfig, n_params
from openchameleon.train.memory import Layout, activation_bytes, loss_bytes, memory_of
from openchameleon.train.plan import (
    MACHINES,
    PAPER,
    Work,
    best_fit,
    implied_utilisation,
    network_seconds,
    plan,
    remedies,
)

ROOT = Path(__file__).resolve().parent.parent
SMALL = ModelConfig(
    dim=128, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=2048, max_seq_len=256, ffn_dim=384
)
ROWS, ROW_LEN, CHUNK = 2, 256, 64

# memory, against a model that is built


def test_weights_gradients_and_optimizer_are_what_adamw_holds() -> None:
    import torch

    from openchameleon.model.transformer import Transformer
    from openchameleon.train.optim import OptimConfig, make_optimizer

    model = Transformer(SMALL)
    optimizer = make_optimizer(model, OptimConfig())
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    optimizer.step()
    moments = [s[k] for s in optimizer.state_dict()["state"].values() for k in s if "exp_avg" in k]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    memory = memory_of(SMALL, Layout(1, 1), ROW_LEN, CHUNK)
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(g.nbytes for g in gradients)
    assert memory.optimizer == sum(m.nbytes for m in moments)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "autocast"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"norm_placement": "output"}, {"qk_norm": False}, {"n_kv_heads": 4}, {"ffn_dim": 100}],
)
def test_activations_are_what_autograd_saves(changes: dict[str, Any], dtype: str) -> None:
    """Within 1%: the copies of the norms' weights, which do not grow with the tokens."""
    import torch

    config = dataclasses.replace(SMALL, **changes)
    alone, itemsize = dtype == "autocast", 4 if dtype == "float32" else 2
    model = _built(config, "float32" if alone else dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # held: no address is used twice
        return tensor

    token_ids, positions = _batch(config)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=alone):
        hidden = model.hidden(token_ids, positions)
    hidden = hidden.bfloat16() if alone else hidden
    saved[hidden.untyped_storage().data_ptr()] = hidden  # which the loss is given
    n_bytes = sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in weights)
    if alone:  # the copies of the weights, which a plan counts as gathered, the head's beside them
        copy = memory_of(config, Layout(1, 1), ROW_LEN, CHUNK).gathered
        n_bytes -= round(copy - 2 * config.vocab_size * config.dim)
    a_token = activation_bytes(config, itemsize=itemsize, alone=alone)
    expected = a_token + _cpu_norms(config, 1 + 2 * config.n_layers)
    assert n_bytes / token_ids.numel() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_forward_and_loss_peak_at_activations_and_logits(dtype: str) -> None:
    """Within 3%, by the bytes of every tensor that is alive."""
    import torch

    itemsize = getattr(torch, dtype).itemsize
    n_tokens = ROWS * ROW_LEN
    a_token = activation_bytes(SMALL, itemsize=itemsize) + _cpu_norms(SMALL, 1 + 2 * SMALL.n_layers)
    expected = n_tokens * a_token + loss_bytes(SMALL, n_tokens, CHUNK, itemsize)
    assert _peak_of_step(dtype, recompute=False) == pytest.approx(expected, rel=0.03)


def test_with_recomputation_a_step_stays_within_the_plan() -> None:
    """The plan adds what need not come together: logits are gone when layers are computed again."""
    n_tokens = ROWS * ROW_LEN
    a_token = activation_bytes(SMALL, recompute=True) + _cpu_norms(SMALL, 3)
    planned = n_tokens * a_token + loss_bytes(SMALL, n_tokens, CHUNK)
    assert 0.8 * planned < _peak_of_step("bfloat16", recompute=True) < planned
    assert planned < 0.6 * _peak_of_step("bfloat16", recompute=False)


def _built(config: ModelConfig, dtype: str) -> Any:
    """A model whose weights are of `dtype`, as FSDP2 gathers them."""
    import torch

    from openchameleon.model.transformer import Transformer

    model = Transformer(config)
    model.init_weights(seed=0)
    return model.to(getattr(torch, dtype))


def _batch(config: ModelConfig) -> tuple[Any, Any]:
    import torch

    token_ids = torch.arange(ROWS * ROW_LEN).remainder(config.vocab_size).view(ROWS, ROW_LEN)
    return token_ids, torch.arange(ROW_LEN).expand(ROWS, ROW_LEN)


def _cpu_norms(config: ModelConfig, n_norms: int) -> int:
    """Bytes a token: torch's RMSNorm is one kernel on a GPU; on a CPU it keeps one tensor more."""
    return 4 * config.dim * n_norms


def _peak_of_step(dtype: str, recompute: bool) -> int:
    """The most bytes of tensors alive during forward, loss and backward, beside the weights."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.checkpoint import checkpoint

    from openchameleon.train.losses import chunked_loss

    class Alive(TorchDispatchMode):
        """Counts the storages that operations return and that were not given to them."""

        def __init__(self) -> None:
            super().__init__()
            self.now = self.peak = 0
            self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
            result = func(*args, **(kwargs or {}))
            for storage in (t.untyped_storage() for t in tensors(result)):
                if storage._cdata not in given and storage not in self.seen:
                    self.seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.gone, storage.nbytes())
            self.peak = max(self.peak, self.now)
            return result

        def gone(self, n_bytes: int) -> None:
            self.now -= n_bytes

    def tensors(tree: Any) -> list[Any]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    model = _built(SMALL, dtype)
    if recompute:
        for layer in model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    token_ids, positions = _batch(SMALL)
    weights = torch.ones(token_ids.numel())
    with Alive() as alive:
        hidden = model.hidden(token_ids, positions).flatten(0, 1)
        sums = chunked_loss(hidden, model.output_weight, token_ids.flatten(), weights, 1e-5, CHUNK)
        del hidden
        sums.loss_sum.backward()
    return alive.peak


def test_shards_and_tensor_parallelism_divide_what_they_share() -> None:
    config = dataclasses.replace(PRESETS["34b"], vocab_size=64)  # layers, nearly all of it
    whole, cut = (memory_of(config, Layout(n, n), 4096, 512) for n in (8, 64))
    assert cut.weights == whole.weights / 8
    assert cut.optimizer == 2 * cut.gradients == 2 * cut.weights
    assert (cut.gathered, cut.activations) == (whole.gathered, whole.activations)
    halved = memory_of(config, Layout(64, 32, tp=2), 4096, 512)
    assert halved.weights == pytest.approx(cut.weights, rel=1e-3)
    assert halved.gathered == pytest.approx(cut.gathered / 2, rel=1e-3)
    assert cut.activations / 2 < halved.activations < cut.activations
    assert halved.total == sum(dataclasses.asdict(halved).values())


def test_tables_are_whole_for_each_of_the_tensor_parallel_ranks() -> None:
    config = dataclasses.replace(PRESETS["7b"], n_layers=1)
    tables = 2 * config.vocab_size * config.dim
    memory = memory_of(config, Layout(8, 1, tp=8), 4096, 512)
    assert 4 * tables < memory.weights < 4 * n_params(config)
    assert memory.gathered > 2 * tables


# time, against the paper's


@pytest.mark.parametrize(
    ("name", "tokens_per_s", "full", "causal", "six_n"),
    [("7b", 2984, 0.449, 0.418, 0.402), ("34b", 597, 0.424, 0.406, 0.394)],
)
def test_the_papers_hours_imply_its_utilisation(
    name: str, tokens_per_s: float, full: float, causal: float, six_n: float
) -> None:
    speed, used = implied_utilisation(PAPER[name])
    assert speed == pytest.approx(tokens_per_s, abs=0.5)
    assert used == pytest.approx({"full": full, "causal": causal, "6N": six_n}, abs=0.0005)


def test_7b_on_1024_a100s_takes_the_papers_hours_within_a_tenth() -> None:
    paper = PAPER["7b"]
    planned = plan(paper.work, "a100-80", Layout(1024, 1024), utilisation=0.45)
    assert planned.fits
    assert planned.step_s == planned.compute_s  # the network does not bound it
    assert planned.gpu_hours == pytest.approx(paper.gpu_hours, rel=0.1)
    assert planned.days == pytest.approx(planned.gpu_hours / 1024 / 24)
    assert planned.tokens_per_s * 1024 * planned.days * 86_400 == pytest.approx(9.2e12)


def test_at_the_implied_utilisation_a_plan_takes_exactly_the_papers_hours() -> None:
    for paper in PAPER.values():
        used = implied_utilisation(paper)[1]["full"]
        layout = Layout(paper.gpus, paper.gpus, checkpointing="layers")
        planned = plan(paper.work, paper.machine, layout, used)
        assert planned.fits
        assert planned.gpu_hours == pytest.approx(paper.gpu_hours)


def test_the_network_bounds_a_step_between_nodes_only() -> None:
    config = PRESETS["7b"]
    n_bytes = n_params(config)
    assert network_seconds(config, Layout(8, 8), 4, 1.0) == 0
    assert network_seconds(config, Layout(8, 1, tp=8), 4, 1.0) == 0
    assert network_seconds(config, Layout(4, 1), 4, 1.0) == 0
    # two nodes, each of which lacks half of the weights in every micro-batch
    assert network_seconds(config, Layout(16, 16), 4, 1.0) == pytest.approx(4 * 8 * n_bytes / 2)
    # two whole copies, whose gradients meet once
    assert network_seconds(config, Layout(16, 8), 4, 1.0) == pytest.approx(8 * n_bytes / 2)
    slow = plan(Work("7b", config, 4096, 4096, 1e12), "h100", Layout(4096, 512, tp=8))
    assert slow.step_s == slow.network_s > slow.compute_s


# what fits


def test_remedies_fit_and_are_the_simplest_on_these_gpus() -> None:
    unfit = plan(PAPER["34b"].work, "a100-80", Layout(3072, 3072))
    assert not unfit.fits
    here, *larger = remedies(unfit)
    assert here.layout == Layout(3072, 3072, checkpointing="layers")
    assert [p.machine for p in larger] == ["h200"]
    assert all(p.fits for p in (here, *larger))


def test_where_too_few_gpus_cannot_hold_it_more_of_them_are_the_remedy() -> None:
    work = PAPER["34b"].work
    assert best_fit(work, "a100-80", 1) is None
    found = remedies(plan(work, "a100-80", Layout(1, 1)))
    assert found[0].machine == "a100-80"
    assert found[0].layout.gpus > 1
    assert best_fit(work, "a100-80", found[0].layout.gpus // 2) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 0}, "gpus is 0"),
        ({"gpus": 12, "fsdp": 8}, "12 GPUs are no multiple of fsdp 8 x tp 1"),
        ({"gpus": 3, "fsdp": 3}, "2048 rows is no multiple of the 3"),
        ({"gpus": 16, "tp": 16}, "must divide the 32 key heads of 7b: 1, 2, 4, 8"),
        ({"gpus": 6, "tp": 3}, "must divide the 32 key heads of 7b: 1, 2, 4, 8"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(PAPER["7b"].work, "h100", Layout(**({"gpus": 8, "fsdp": 1} | changes)))


# the command and the page


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    line = "plan 7b --machine a100-80 --gpus 1024 --tokens 9.2T --utilisation .45 --price 2"
    assert main(line.split()) == 0
    text = capsys.readouterr().out
    assert "nothing here is measured" in text
    assert "It fits." in text
    assert "853,838 GPU-hours, $1,707,675 at $2 an hour" in text


def test_the_command_says_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "34b", "--gpus", "64", "--tokens", "300b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured"] is False
    assert found["fits"] is False
    assert found["tokens"] == 3e11
    assert found["memory_bytes"]["total"] > MACHINES["h100"].memory * 0.9 * 2**30
    options = found["fits_with"][0].split()
    assert main(["plan", "34b", *options]) == 0
    assert "It fits." in capsys.readouterr().out


def test_a_recipe_is_planned_by_all_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    from openchameleon.recipes.nano import recipe

    assert main(["plan", "nano", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stages = recipe().stages().values()
    n_rows = sum(stage.train.steps * stage.train.batch_size for stage in stages)
    assert found["tokens"] == n_rows * recipe().row_len


@pytest.mark.parametrize("name", ["7b", "34b"])
def test_the_papers_recipe_is_planned_as_the_papers_run(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = []
    for planned in (name, f"pretrain_{name}"):
        assert main(["plan", planned, "--gpus", "1024", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    paper, recipe = plans
    assert recipe["memory_bytes"] == paper["memory_bytes"]
    assert recipe["batch_size"] == paper["batch_size"]
    assert recipe["gpu_hours"] == pytest.approx(paper["gpu_hours"], rel=1e-5)


def test_the_papers_rows_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--paper"]) == 0
    text = capsys.readouterr().out
    assert "856,481 GPU-hours" in text
    assert "4,282,407 GPU-hours" in text
    assert "44.9% (full), 41.8% (causal), 40.2% (6N)" in text
    assert main(["plan", "--paper", "--json"]) == 0
    assert [row["model"] for row in json.loads(capsys.readouterr().out)] == ["7b", "34b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plan", "Give a preset or a recipe"),
        ("plan 34c", "is neither a recipe file nor one of 7b, 34b, nano, small"),
        ("plan 7b --machine h10", "Did you mean 'h100'"),
        ("plan 7b --tokens many", "write 300B or 9.2T"),
        ("plan 7b --tokens nan", "write 300B or 9.2T"),
        ("plan 7b --utilisation 45", "at most at 1"),
        ("plan 7b --gpus 0", "gpus is 0"),
        ("plan 7b --tp 0", "tp is 0"),
        ("plan 7b --price -1", "must not be negative"),
    ],
)
def test_mistakes_of_the_command_line_are_one_sentence(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_the_page_has_the_table_that_is_computed_now() -> None:
    """`python tools/make_plan.py` writes it anew."""
    spec = importlib.util.spec_from_file_location("make_plan", ROOT / "tools/make_plan.py")
    assert spec is not None
    assert spec.loader is not None
    make_plan: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_plan)
    page = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    assert make_plan.BEGIN + make_plan.table(make_plan.plans()) + make_plan.END in page


@pytest.mark.parametrize("name", ["7b", "34b"])
def test_the_papers_recipes_are_planned_as_the_papers_runs(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = ["--gpus", str(PAPER[name].gpus), "--machine", "a100-80", "--json"]
    found = []
    for which in (name, f"pretrain_{name}"):
        assert main(["plan", which, *gpus]) == 0
        found.append(json.loads(capsys.readouterr().out))
    run, recipe = found
    assert recipe["gpu_hours"] == pytest.approx(run["gpu_hours"], rel=1e-3)
    assert recipe["memory_bytes"] == run["memory_bytes"]
