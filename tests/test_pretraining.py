"""A pretraining on prepared streams: two stages, golden losses, and a model folder that loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openchameleon.cli.main import main
from openchameleon.config import from_dict, override, to_dict
from openchameleon.data.phases import Phase
from openchameleon.data.prepare import prepare
from openchameleon.document import Document, Text
from openchameleon.errors import Stopped, UserError
from openchameleon.model.config import PRESETS
from openchameleon.pipeline import Chameleon, load_tokenizer
from openchameleon.recipes import load_recipe, pretraining, run_recipe
from openchameleon.recipes.config import Pretraining, second_mixture
from openchameleon.train import parallel
from openchameleon.train.loop import fit
from openchameleon.train.metrics import read_metrics

GOLDEN = Path(__file__).parent / "golden" / "debug_cpu.jsonl"
TOLERANCE = 1e-5
"""Relative. Other threads and instruction sets moved no loss by more than 2e-7 here."""


@pytest.fixture(scope="module")
def debug() -> Pretraining:
    recipe = load_recipe("debug_cpu")
    assert isinstance(recipe, Pretraining)
    return recipe


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than most of the rest; the first run of this file does it."""
    monkeypatch.setattr(pretraining, "plot_metrics", lambda log, png: None)


@pytest.fixture(scope="module")
def run(debug: Pretraining, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "debug_cpu"
    run_recipe(debug, out)
    return out


def with_rows_of(run: Path, out: Path) -> Path:
    """A new run folder that has the streams of another already."""
    shutil.copytree(run / "rows", out / "rows")
    return out


def test_debug_cpu_gives_the_committed_losses(run: Path) -> None:
    golden = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    lines = read_metrics(run / "run" / "metrics.jsonl")
    assert len(lines) == len(golden) == 20
    for line, expected in zip(lines, golden, strict=True):
        found = {key: line[key] for key in expected}
        assert found == pytest.approx(expected, rel=TOLERANCE), (
            f"The losses of debug_cpu moved at step {line['step']}. If that was meant, commit what "
            "`python tools/golden_losses.py` writes, and say why."
        )


def test_a_pretraining_ends_in_a_model_that_reads_and_draws(run: Path, debug: Pretraining) -> None:
    model = Chameleon.from_pretrained(run / "model")
    assert [p.size for p in model.generate("Draw a cat.", mode="image", seed=0).images] == [
        (96, 96)
    ]
    assert (run / "run" / "curves.png").stat().st_size > 10_000
    assert from_dict(Pretraining, json.loads((run / "recipe.json").read_text())) == debug


def test_a_run_cut_in_its_second_stage_goes_on_to_the_same_weights(
    run: Path, debug: Pretraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = with_rows_of(run, tmp_path / "cut")

    def cut(*args: object, **kwargs: object) -> None:
        fit(*args, **kwargs, stop_at=18)  # type: ignore[arg-type]
        raise Stopped("cut")

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "fit", cut)
        with pytest.raises(Stopped):
            run_recipe(debug, out)
    assert run_recipe(debug, out) == out / "model"
    file = "model/model.safetensors"
    assert (out / file).read_bytes() == (run / file).read_bytes()


def test_a_changed_mixture_is_another_run(run: Path, debug: Pretraining) -> None:
    for change in ("switch_at=0.5", "first.code=3"):
        with pytest.raises(UserError, match="run of another config"):
            run_recipe(override(debug, [change]), run)


def test_the_second_mixture_halves_the_first_and_shares_the_rest() -> None:
    first = {"text": 3.0, "pairs": 1.0}
    assert second_mixture(first, ["text", "pairs", "better", "chat"]) == {
        "text": 1.5, "pairs": 0.5, "better": 1.0, "chat": 1.0,
    }  # fmt: skip


def test_stages_switch_at_their_share_of_the_steps(debug: Pretraining) -> None:
    second = {"pairs": 1.0, "interleaved": 0.5, "code": 0.5, "instructions": 2.0}
    assert debug.phases() == [Phase(0, debug.first), Phase(16, second)]
    own = override(debug, ['second={"code": 1.0}', "switch_at=0.25"])
    assert own.phases() == [Phase(0, debug.first), Phase(5, {"code": 1.0})]
    assert override(debug, ["switch_at=1"]).phases() == [Phase(0, debug.first)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('first={"pears": 1.0}', "no stream 'pears'. Did you mean 'pairs'"),
        ('second={"code": 0}', "second.code = 0.0 must be above 0"),
        ("first={}", "at least one stream"),
        ("switch_at=0", "must lie in"),
        ('streams.code={"mixture": {"drow": 1}, "n_samples": 1}', "streams.code"),
        ("streams.code=nowhere", "nowhere holds no prepared rows"),
        ("model.max_seq_len=128", "Record 1 has .* tokens, a row 128"),
        ("tokenizer=nanoo", "No model 'nanoo'"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_words(
    change: str, message: str, debug: Pretraining, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_recipe(override(debug, [change]), tmp_path / "out")


@pytest.fixture
def text_rows(model_folder: Path, tmp_path: Path) -> Path:
    """A stream prepared with other tokenizers than nano's."""
    documents = [Document([Text("the cat at the top " * 3)])] * 4
    prepare(documents, load_tokenizer(model_folder), tmp_path / "text", row_len=64)
    return tmp_path / "text"


def test_streams_of_other_tokenizers_or_longer_rows_are_refused(
    text_rows: Path, debug: Pretraining, model_folder: Path, tmp_path: Path
) -> None:
    own = replace(debug, streams={"text": str(text_rows)}, first={"text": 1.0})
    with pytest.raises(UserError, match="not prepared with the tokenizers of nano"):
        run_recipe(own, tmp_path / "a")
    theirs = override(own, [f"tokenizer={model_folder}", "model.max_seq_len=32"])
    with pytest.raises(UserError, match="rows have 64 tokens, the model a context of 32"):
        run_recipe(theirs, tmp_path / "b")


def test_a_run_may_begin_with_a_models_weights(
    text_rows: Path, debug: Pretraining, model_folder: Path, tmp_path: Path
) -> None:
    start = Chameleon.from_pretrained(model_folder)
    shape = replace(start.config.model, dropout=0.1)
    recipe = replace(
        debug,
        tokenizer=str(model_folder),
        from_weights=True,
        model=shape,
        streams={"text": str(text_rows)},
        first={"text": 1.0},
    )
    model = pretraining.make_model(recipe, start.config.vocab, parallel.alone(), start)
    assert model.config == shape
    for name, weight in start.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    with pytest.raises(UserError, match="norm_placement was input, is output"):
        pretraining.make_model(
            override(recipe, ["model.norm_placement=output"]),
            start.config.vocab,
            parallel.alone(),
            start,
        )
    folder = run_recipe(override(recipe, ["train.steps=2"]), tmp_path / "out")
    assert Chameleon.from_pretrained(folder).config.outputs == start.config.outputs


def test_a_folder_of_tokenizers_alone_prepares_and_trains(
    model_folder: Path, debug: Pretraining, tmp_path: Path
) -> None:
    whole, alone = load_tokenizer(model_folder), tmp_path / "tokenizers"
    alone.mkdir()
    whole.text.save(alone / "tokenizer.model")
    assert whole.image is not None
    whole.image.save(alone / "image_tokenizer")
    found = load_tokenizer(alone)
    assert found.vocab == whole.vocab
    assert found.encode(Document([Text("a cat")])) == whole.encode(Document([Text("a cat")]))

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the cat is at the top of the pizza\n" * 40)
    command = ["prepare", str(tmp_path / "texts"), "--model", str(alone), "--row-len", "64"]
    assert main([*command, "--out", str(tmp_path / "rows"), "--workers", "1"]) == 0
    recipe = replace(
        override(debug, [f"tokenizer={alone}", "train.steps=2", "model.max_seq_len=64"]),
        streams={"text": str(tmp_path / "rows")},
        first={"text": 1.0},
    )
    model = Chameleon.from_pretrained(run_recipe(recipe, tmp_path / "out"))
    assert model.config.vocab == whole.vocab


@pytest.mark.parametrize(
    ("name", "tokens", "steps", "dropout"),
    [("pretrain_7b", 2**23, 1_096_725, 0.1), ("pretrain_34b", 3 * 2**22, 731_150, 0.0)],
)
def test_the_papers_recipes_have_the_papers_numbers(
    name: str, tokens: int, steps: int, dropout: float
) -> None:
    recipe = load_recipe(name)
    assert isinstance(recipe, Pretraining)
    train, optim = recipe.train, recipe.optim
    assert train.batch_size * recipe.model.max_seq_len == tokens
    assert train.steps == steps
    assert recipe.phases()[1].begin == round(0.8 * steps)
    assert train.loss.z_loss == 1e-5
    assert recipe.model == PRESETS[name.removeprefix("pretrain_")]
    assert recipe.model.dropout == dropout
    assert to_dict(optim) == {
        "lr": 1e-4, "matrices": "adamw", "betas": [0.9, 0.95], "eps": 1e-5, "weight_decay": 0.1,
        "warmup_steps": 4000, "decay": "exponential", "min_lr_ratio": 0.01, "grad_clip": 1.0,
    }  # fmt: skip


def test_the_recipe_in_the_docs_loads(tmp_path: Path) -> None:
    docs = Path(__file__).parent.parent / "docs" / "training.md"
    file = tmp_path / "mine.py"
    file.write_text(docs.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0])
    recipe = load_recipe(str(file))
    assert isinstance(recipe, Pretraining)
    assert recipe.phases()[1].weights == {"text": 1.0, "pairs": 0.5, "instructions": 1.5}
