"""Recipes: from nothing to a model folder, in stages that are skipped or go on when run again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from openchameleon.config import config_hash, from_dict, override, to_dict
from openchameleon.errors import UserError
from openchameleon.files import locked
from openchameleon.recipes import RECIPES, load_recipe, run_recipe, stages
from openchameleon.recipes.config import STAGES, Recipe, StageConfig, TextConfig
from openchameleon.recipes.pictures import write_shard
from openchameleon.train.loop import TrainConfig
from openchameleon.train.optim import OptimConfig
from openchameleon.train.vq_step import VQTrainConfig
from openchameleon.vqgan.config import VQConfig


def tiny(data: str | None = None) -> Recipe:
    """Everything the real recipe has, of a size that trains in seconds (to no use)."""
    nano = load_recipe("nano")
    stage = StageConfig(
        train=TrainConfig(steps=2, batch_size=2, log_every=1, save_every=1),
        optim=OptimConfig(warmup_steps=1),
        mixture={"draw": 1.0, "question": 1.0},
        n_shards=1,
        shard_size=12,
    )
    return replace(
        nano,
        name="tiny",
        text=TextConfig(n_text=330, n_samples=60),
        vq=VQConfig(
            ch=8, ch_mult=(1,), n_res_blocks=1, z_channels=4, embed_dim=4, n_embed=16,
            resolution=96, stem=32, encoder_kernel=1, decoder_kernel=1, mid_attention=False,
        ),
        vq_train=VQTrainConfig(
            steps=2, batch_size=4, warmup=1, autoencoder_warmup_steps=1, kmeans_samples=32,
            kmeans_iters=1, perceptual="none", save_every=1, log_every=1,
        ),
        model=replace(nano.model, dim=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=32),
        bind=replace(stage, mixture={"inventory": 1.0}),
        pretrain=stage,
        tune=stage,
        row_len=512,
        data=data,
        workers=1,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest; the first run of this file does it."""
    monkeypatch.setattr(stages, "plot_metrics", lambda log, png: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, Path]:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    recipe = tiny()
    return recipe, out, run_recipe(recipe, out)


def test_a_recipe_ends_in_a_model_that_answers(run: tuple[Recipe, Path, Path]) -> None:
    from openchameleon.pipeline import Chameleon

    model = Chameleon.from_pretrained(run[2])
    answer = model.generate("Draw a cat.", mode="image", seed=0)
    assert [p.size for p in answer.images] == [(96, 96)]
    assert json.loads((run[2] / "config.json").read_text())["picture_first"] is True
    for stage in ("bind", "pretrain", "tune"):
        assert (run[1] / "runs" / stage / "curves.png").stat().st_size > 10_000


def test_finished_stages_are_skipped(
    run: tuple[Recipe, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out, model = run
    weights = (model / "model.safetensors").read_bytes()

    def again(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage ran again")

    for name in ("train_text", "train_image", "prepare"):
        monkeypatch.setattr(stages, name, again)
    assert run_recipe(recipe, out) == model
    assert (model / "model.safetensors").read_bytes() == weights


def test_a_run_cut_between_stages_goes_on_to_the_same_weights(
    run: tuple[Recipe, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _, model = run

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_stage", cut)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, tmp_path / "tiny")
    resumed = run_recipe(recipe, tmp_path / "tiny")
    for file in ("model.safetensors", "tokenizer.model", "image_tokenizer/model.safetensors"):
        assert (resumed / file).read_bytes() == (model / file).read_bytes(), file


def test_a_folder_of_another_config_is_refused_and_left_as_it_is(
    run: tuple[Recipe, Path, Path],
) -> None:
    recipe, out, _ = run
    with pytest.raises(UserError, match="another config"):
        run_recipe(replace(recipe, seed=1), out)
    assert from_dict(Recipe, json.loads((out / "recipe.json").read_text())) == recipe


def test_what_is_removed_is_made_again(run: tuple[Recipe, Path, Path], tmp_path: Path) -> None:
    recipe, done, _ = run
    out = tmp_path / "tiny"
    shutil.copytree(done, out)
    (out / "tokenizer.model").unlink()
    shutil.rmtree(out / "rows" / "tune-000")
    run_recipe(recipe, out)
    for file in ("tokenizer.model", "rows/tune-000/tokens.npy"):
        assert (out / file).read_bytes() == (done / file).read_bytes()


def test_what_was_half_made_again_is_not_done(
    run: tuple[Recipe, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, done, _ = run
    out = tmp_path / "tiny"
    shutil.copytree(done, out)
    samples, rows = out / "samples" / "tune-000", out / "rows" / "tune-000"
    shutil.rmtree(samples)
    shutil.rmtree(rows)

    def cut(recipe: Recipe, name: str, stage: object, shard: int, folder: Path) -> None:
        folder.mkdir()
        (folder / "records.jsonl").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages.pictures, "write_shard", cut)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, out)
    run_recipe(recipe, out)
    assert (rows / "tokens.npy").read_bytes() == (
        done / "rows" / "tune-000" / "tokens.npy"
    ).read_bytes()


def test_a_folder_in_use_is_refused(run: tuple[Recipe, Path, Path]) -> None:
    recipe, out, _ = run
    with locked(out), pytest.raises(UserError, match="is in use by process"):
        run_recipe(recipe, out)


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    code = (
        "import time\n"
        "from multiprocessing import get_context\n"
        "from pathlib import Path\n"
        "import os\n"
        "from openchameleon.data.workers import end_with\n"
        "if __name__ == '__main__':\n"
        "    pool = get_context('spawn').Pool(1, end_with, (os.getpid(),))\n"
        "    print(pool.apply(os.getpid), flush=True)\n"
        "    pool.apply(time.sleep, (60,))\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(worker)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # one that ended, but that nobody has asked about yet, is no longer running
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return not status.stdout.startswith("Z")


def test_a_users_captioned_pictures_train_with_the_same_command(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(8):
        PIL.Image.new("RGB", (120, 100), (30 * i, 90, 10)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"A plain picture, number {i}, of one colour.")
    recipe = replace(tiny(str(folder)), text=TextConfig(n_text=290))
    model = run_recipe(recipe, tmp_path / "out")
    assert json.loads((model / "config.json").read_text())["name"] == "tiny"
    (folder / "3.txt").write_text("Not plain.")
    with pytest.raises(UserError, match="another config"):  # its texts have changed since
        run_recipe(recipe, tmp_path / "out")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_round_trip_through_json(name: str) -> None:
    recipe = load_recipe(name)
    again = from_dict(type(recipe), to_dict(recipe))
    assert again == recipe
    assert config_hash(again) == config_hash(recipe)


def test_a_json_file_of_either_kind_is_a_recipe(tmp_path: Path) -> None:
    for name in ("nano", "debug_cpu"):
        (tmp_path / "mine.json").write_text(json.dumps(to_dict(load_recipe(name))))
        assert load_recipe(str(tmp_path / "mine.json")) == load_recipe(name)


def test_an_override_changes_one_value() -> None:
    changed = override(load_recipe("nano"), ["pretrain.train.steps=7", "vq_train.lr=0.5"])
    assert (changed.pretrain.train.steps, changed.vq_train.lr) == (7, 0.5)


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"pretrain.train.stesp.*Did you mean 'steps'"):
        override(load_recipe("nano"), ["pretrain.train.stesp=7"])


def test_recipe_files_load(tmp_path: Path) -> None:
    as_json = tmp_path / "mine.json"
    as_json.write_text(json.dumps(to_dict(tiny())))
    assert load_recipe(str(as_json)) == tiny()
    as_python = tmp_path / "mine.py"
    as_python.write_text(
        "from openchameleon.recipes.nano import recipe as nano\n"
        "from dataclasses import replace\n"
        "def recipe():\n    return replace(nano(), name='mine')\n"
    )
    assert load_recipe(str(as_python)).name == "mine"


def test_a_recipe_file_with_impossible_values_is_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from openchameleon.recipes.debug_cpu import recipe as debug\n"
        "from dataclasses import replace\n"
        "def recipe():\n    return replace(debug(), switch_at=2.0)\n"
    )
    with pytest.raises(UserError, match=r"mine.py: switch_at = 2.0 must lie in"):
        load_recipe(str(file))


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'nano'"):
        load_recipe("nanoo")


def test_one_seed_changes_every_part_that_draws_at_random() -> None:
    plain, other = (stages.seeded(replace(load_recipe("nano"), seed=seed)) for seed in (0, 3))
    assert plain == load_recipe("nano")
    assert other.vq_train.seed == 3
    assert {name: run.train.seed for name, run in other.stages().items()} == {
        "bind": 3, "pretrain": 3, "tune": 3,
    }  # fmt: skip


def test_no_two_shards_of_a_recipe_hold_the_same_samples(tmp_path: Path) -> None:
    recipe = tiny()
    records = set()
    runs = [(replace(recipe, seed=seed), name) for seed in (0, 1) for name in STAGES]
    for i, (seeded, name) in enumerate(runs):
        for shard in (0, 1):
            folder = tmp_path / f"{i}-{shard}"
            write_shard(seeded, name, recipe.pretrain, shard, folder)
            records.add((folder / "records.jsonl").read_text())
    assert len(records) == 2 * len(runs)


def test_a_recipe_may_have_no_first_stage() -> None:
    assert list(replace(tiny(), bind=None).stages()) == ["pretrain", "tune"]
