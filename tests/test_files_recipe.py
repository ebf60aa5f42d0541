"""One command on a folder of real files: from pictures, texts and code to a model and a sample."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from openchameleon.cli.main import main
from openchameleon.config import to_dict
from openchameleon.data.pack import Rows
from openchameleon.document import Conversation, Document, Image, Message, Record, Text
from openchameleon.pipeline import Chameleon
from openchameleon.recipes import load_recipe
from openchameleon.recipes.config import Recipe, TextConfig
from openchameleon.recipes.sample import write_sample
from openchameleon.vqgan.config import VQConfig
from openchameleon.world.atlas import PRESETS
from openchameleon.world.captions import describe
from openchameleon.world.render import render
from openchameleon.world.splits import dense_scene


def tiny() -> Recipe:
    """`files` with everything that it has, of a size that trains in seconds (to no use)."""
    files = load_recipe("files")
    assert isinstance(files, Recipe)
    return replace(
        files,
        text=TextConfig(n_text=400),
        vq=VQConfig(
            ch=8, ch_mult=(1,), n_res_blocks=1, z_channels=4, embed_dim=4, n_embed=16,
            resolution=16, stem=8, mid_attention=False,
        ),
        vq_train=replace(
            files.vq_train, steps=4, batch_size=4, warmup=1, autoencoder_warmup_steps=1,
            kmeans_samples=32, perceptual="none", restart_until=3, save_every=4, log_every=1,
        ),
        model=replace(files.model, dim=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=32,
                      max_seq_len=256),
        row_len=256,
        pretrain=replace(
            files.pretrain,
            train=replace(files.pretrain.train, steps=3, batch_size=2, log_every=1, save_every=3),
        ),
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Parts of the interpreter's own library, and pictures with captions beside them."""
    world, files = PRESETS["nano"], tmp_path / "files"
    (files / "pictures").mkdir(parents=True)
    for i in range(6):
        scene = dense_scene(i, world)
        render(scene, world).save(files / "pictures" / f"{i}.png")
        (files / "pictures" / f"{i}.txt").write_text(describe(scene, world.grid))
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("this.py", "keyword.py", "bisect.py"):
        (files / name).write_bytes((library / name).read_bytes())
    (files / "empty.py").write_text("")
    (files / "notes.md").write_text("What lies here was written by others.\n" * 20)
    return files


def test_one_command_goes_from_files_to_a_written_sample(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "mine.json", tmp_path / "out"
    recipe.write_text(json.dumps(to_dict(tiny())))
    command = ["train", str(recipe), f"data={folder}", "--out", str(out)]
    assert main(command) == 0
    told = capsys.readouterr()
    assert f"What it writes is in {out}/sample/sample.md" in told.out
    assert "1 of 11 records are left out" in told.err
    assert "empty.py" in (out / "rows" / "pretrain-texts.bad.jsonl").read_text()

    page = (out / "sample" / "sample.md").read_text()
    for record in ("## bisect.py", "## notes.md", "## pictures/"):
        assert record in page
    assert page.count("Given:") == page.count("Written:") == 4
    shown = {picture.name for picture in (out / "sample").glob("*.png")}
    assert shown == {"image-1.png", "image-2.png"}  # one that was given, one that was drawn
    assert all(name in page for name in shown)
    pictures, texts = (Rows.open(out / "rows" / f"pretrain-{k}") for k in ("pictures", "texts"))
    assert pictures.manifest["n_documents"] == 6
    assert texts.manifest["n_documents"] >= 4  # those that are longer than a row are cut
    model = Chameleon.from_pretrained(out / "model")
    assert model.generate("A cat.", mode="image", seed=0).images[0].size == (16, 16)

    assert main(command) == 0
    assert "sample: done before" in capsys.readouterr().err


def test_without_a_folder_the_recipe_says_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "files", "--out", str(tmp_path / "out")]) == 2
    assert "give their folder as data=FOLDER" in capsys.readouterr().err


def test_a_sample_shows_one_record_of_each_kind(model_folder: Path, tmp_path: Path) -> None:
    model = Chameleon.from_pretrained(model_folder)
    picture = model.generate("a cat", mode="image", seed=1).images[0]
    asked = Message("user", Document([Text("draw a cat")]))
    drawn = Conversation([asked, Message("assistant", Document([Image(picture)]))])
    text = Document([Text("the cat is at the top " * 20)])
    records: list[tuple[str, Record]] = [
        ("a.py", text),
        ("b.py", text),  # as the one before
        ("c.txt", text),
        ("d.png", drawn),
        ("e.png", Document([Image(picture)])),  # nothing to begin with
        ("f.jsonl:1", Document([Text("a dog"), Image(picture)])),
        ("f.jsonl:2", Document([Text("a dog"), Image(picture)])),
    ]
    page = write_sample(model, records, tmp_path / "sample").read_text()
    shown = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert shown == ["a.py", "c.txt", "d.png", "f.jsonl:1"]
    assert page.count("the cat is at the top") <= 2 * 6  # the beginning of each, not the whole
