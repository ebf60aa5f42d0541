"""Checkpoints in the published layouts are read and written exactly, or refused by name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chameleon_folders as made
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from openchameleon import Chameleon, Document, Image, Text
from openchameleon.checkpoints import pickle_index
from openchameleon.checkpoints import tensors as tensors_module
from openchameleon.checkpoints.convert import (
    compare,
    convert,
    load_image_tokenizer,
    load_transformer,
    open_checkpoint,
    write_checkpoint,
)
from openchameleon.checkpoints.rotary import halves_from_pairs, pairs_from_halves
from openchameleon.checkpoints.tensors import entry_of, read_pickles, read_safetensors, write_pickle
from openchameleon.cli.main import main
from openchameleon.errors import CheckpointError, UserError
from openchameleon.inference.kv_cache import KVPool
from openchameleon.tokenizer.text import HFTokenizer
from openchameleon.vqgan.model import VQModel

transformers = pytest.importorskip("transformers")

GRID: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 2},
    {"num_key_value_heads": 1, "num_hidden_layers": 4},
    {"swin_norm": True},
    {"swin_norm": True, "num_key_value_heads": 2, "model_parallel_size": 2},
    {"model_parallel_size": 4, "num_hidden_layers": 1},
    {"swin_norm": True, "model_parallel_size": 4, "num_hidden_layers": 3},
    {"vocab_size": made.N_IDS + 17, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_parameters": made.STRETCHED, "max_position_embeddings": 256},
    {"tie_word_embeddings": True},
    {"swin_norm": True, "num_attention_heads": 8, "num_key_value_heads": 4,
     "model_parallel_size": 4},
]  # fmt: skip


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of `transformers`, and its model: GQA, norms behind the branches, two groups."""
    folder = tmp_path_factory.mktemp("checkpoints") / "hf"
    return folder, made.hf_folder(folder, **GRID[4])


@pytest.fixture(scope="module", params=[1, 4])
def meta(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, hf: tuple[Path, Any]
) -> tuple[Path, list[dict[str, Tensor]], VQModel]:
    """A folder in Meta's layout, its shards, and its VQ-GAN."""
    root = tmp_path_factory.mktemp("meta")
    shards = made.meta_folder(root / "models/7b", request.param)
    checkpoint = open_checkpoint(hf[0])
    assert checkpoint.vq is not None
    with torch.random.fork_rng():
        torch.manual_seed(3)
        vq = VQModel(checkpoint.vq).eval()
    made.spread_codebook(vq)
    made.meta_tokenizer(root / "tokenizer", vq.state_dict())
    return root / "models/7b", shards, vq


@pytest.fixture
def _pickles_are_read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that reads the pickles runs in this process; starting one takes seconds."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[3:])
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = pickle_index.main()
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    monkeypatch.setattr(tensors_module, "subprocess", SimpleNamespace(run=run))


pickles_are_read_here = pytest.mark.usefixtures("_pickles_are_read_here")


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of all files of a folder."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.parent.name}/{k}": v for k, v in load_file(path).items()}
    for path in sorted([*folder.rglob("*.pth"), *folder.rglob("*.ckpt")]):
        state = torch.load(path, weights_only=True)
        found |= {f"{path.name}/{k}": v for k, v in state.get("state_dict", state).items()}
    return found


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


@torch.no_grad()
def greedy(logits: Callable[[Tensor], Tensor], ids: Tensor, n: int) -> list[int]:
    """The likeliest continuation; `logits` of all ids so far, the last position last."""
    for _ in range(n):
        ids = torch.cat([ids, logits(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


@torch.no_grad()
def greedy_cached(step: Callable[[Tensor, int], Tensor], ids: Tensor, n: int) -> list[int]:
    """The same, where `step` is given only what is new and where it stands."""
    new, done = ids, 0
    for _ in range(n):
        logits = step(new, done)
        done += new.shape[1]
        new = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], dim=1)
    return ids[0].tolist()


@pytest.mark.parametrize("sizes", GRID, ids=str)
def test_a_model_of_the_hub_gives_its_logits_and_continuations(
    sizes: dict[str, Any], tmp_path: Path
) -> None:
    theirs = made.hf_folder(tmp_path / "hf", **sizes)
    checkpoint = open_checkpoint(tmp_path / "hf")
    ours = load_transformer(checkpoint)
    ids = torch.randint(0, made.N_IDS, (2, 48), generator=torch.Generator().manual_seed(1))

    def body(ids: Tensor, **more: Any) -> Any:
        # Not the whole forward: that hides the logits of picture codes.
        return theirs.model(input_ids=ids, **more)

    with torch.no_grad():
        expected = theirs.lm_head(body(ids, use_cache=False).last_hidden_state)
        torch.testing.assert_close(ours(ids), expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.5

    past = transformers.DynamicCache(config=theirs.config)

    def their_step(new: Tensor, done: int) -> Tensor:
        out = body(new, past_key_values=past, use_cache=True)
        return theirs.lm_head(out.last_hidden_state)

    pool, blocks = KVPool(checkpoint.config.model.n_layers, 5, 16), [[4, 2, 5, 1, 3]]

    def our_step(new: Tensor, done: int) -> Tensor:
        view = pool.view(blocks, [done], [new.shape[1]], new.device)
        return ours(new, view.positions, view.mask, view)

    prompt = ids[:1, :8]
    whole = greedy(lambda x: theirs.lm_head(body(x, use_cache=False).last_hidden_state), prompt, 40)
    assert greedy(ours, prompt, 40) == whole
    assert greedy_cached(their_step, prompt, 40) == whole
    assert greedy_cached(our_step, prompt, 40) == whole


@pytest.mark.parametrize("sizes", GRID, ids=str)
def test_the_hubs_layout_there_and_back_is_identical(sizes: dict[str, Any], tmp_path: Path) -> None:
    made.hf_folder(tmp_path / "hf", **sizes)
    convert(tmp_path / "hf", tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "back", "hf", verify=True)
    theirs, back = load_file(tmp_path / "hf/model.safetensors"), tensors(tmp_path / "back")
    assert identical(theirs, {k.removeprefix("back/"): v for k, v in back.items()})
    again = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert identical(theirs, {k: again.state_dict()[k] for k in theirs})


def test_shards_and_configs_of_older_versions_are_read(
    hf: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, model = hf
    model.save_pretrained(tmp_path / "old", max_shard_size="40KB")
    assert len(list((tmp_path / "old").glob("*.safetensors"))) > 3
    shutil.copy(folder / "tokenizer.json", tmp_path / "old")
    config = json.loads((tmp_path / "old/config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["vq_config"] = {
        "ch": 32, "ch_mult": [1, 1, 2], "n_embed": made.N_CODES, "z_channels": 8, "double_z": False,
        "embed_dim": 8, "num_res_blocks": 1, "resolution": 16, "out_ch": 3, "in_channels": 3,
    }  # fmt: skip
    del config["vocabulary_map"]
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    new, old = open_checkpoint(folder), open_checkpoint(tmp_path / "old")
    assert (old.config.model, old.config.vocab, old.vq) == (
        new.config.model, new.config.vocab, new.vq
    )  # fmt: skip
    assert all(torch.equal(old.weights[k].read(), e.read()) for k, e in new.weights.items())


def test_heads_that_fine_tuning_moved_apart_get_groups_of_their_own(tmp_path: Path) -> None:
    theirs = made.hf_folder(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    state = load_file(file)
    name = "model.layers.1.self_attn.q_norm.weight"
    state[name][2] += 0.5
    save_file(state, file, {"format": "pt"})
    assert open_checkpoint(tmp_path / "hf").config.model.qk_norm_groups == 4
    theirs.load_state_dict(state)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        expected = theirs.lm_head(theirs.model(input_ids=ids, use_cache=False).last_hidden_state)
    ours = load_transformer(open_checkpoint(tmp_path / "hf"))
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=2e-5)


def test_heads_apart_that_share_their_keys_are_refused_by_name(tmp_path: Path) -> None:
    made.hf_folder(tmp_path / "hf", num_key_value_heads=2)
    file = tmp_path / "hf/model.safetensors"
    state = load_file(file)
    state["model.layers.1.self_attn.q_norm.bias"][1] += 0.5
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_norm\.bias"):
        convert(tmp_path / "hf", tmp_path / "native", "native")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"], "nothing is left behind"


def reference_logits(
    shards: list[dict[str, Tensor]], params: dict[str, Any], ids: Tensor
) -> Tensor:
    """What tensor-parallel ranks would compute, from the published equations alone."""
    dim, width = params["dim"], params["dim"] // params["n_heads"]
    t = len(ids)
    angles = torch.arange(t)[:, None] / params["rope_theta"] ** (torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.ones(t, width // 2), angles.float())[:, None]

    def rms(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (dim,), shards[0][name], params["norm_eps"])

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def attention(x: Tensor, layer: str) -> Tensor:
        total = torch.zeros_like(x)
        for shard in shards:
            w = {k.removeprefix(layer): v for k, v in shard.items() if k.startswith(layer)}
            q, k, v = ((x @ w[f"w{n}.weight"].T).unflatten(-1, (-1, width)) for n in "qkv")
            q, k = (
                rotated(F.layer_norm(y, (width,), w[f"{n}_normalization.weight"],
                                     w[f"{n}_normalization.bias"], 1e-5))
                for n, y in (("q", q), ("k", k))
            )  # fmt: skip
            k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
            scores = torch.einsum("thd,shd->hts", q, k) / width**0.5
            scores += torch.full((t, t), -torch.inf).triu(1)
            heads = torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(-2)
            total += heads @ w["wo.weight"].T
        return total

    def feed_forward(x: Tensor, layer: str) -> Tensor:
        parts = (
            (s[f"{layer}w1.weight"], s[f"{layer}w2.weight"], s[f"{layer}w3.weight"]) for s in shards
        )
        return sum((F.silu(x @ a.T) * (x @ c.T)) @ b.T for a, b, c in parts)  # type: ignore[return-value]

    x = torch.cat([s["tok_embeddings.weight"][ids] for s in shards], -1)
    for i in range(params["n_layers"]):
        for branch, part, norm in (
            (attention, "attention", "attention_norm"), (feed_forward, "feed_forward", "ffn_norm"),
        ):  # fmt: skip
            name, layer = f"layers.{i}.{norm}.weight", f"layers.{i}.{part}."
            behind = params["swin_norm"]
            x = x + (rms(branch(x, layer), name) if behind else branch(rms(x, name), layer))
    return torch.cat([rms(x, "norm.weight") @ s["output.weight"].T for s in shards], -1)


def test_metas_shards_give_the_logits_of_the_published_equations(meta: tuple[Any, ...]) -> None:
    folder, shards, _ = meta
    params = json.loads((folder / "params.json").read_text())["model"]
    ids = torch.randint(0, made.N_IDS, (40,), generator=torch.Generator().manual_seed(2))
    checkpoint = open_checkpoint(folder, allow_pickle=True)
    ours = load_transformer(checkpoint)
    expected = reference_logits(shards, params, ids)
    torch.testing.assert_close(ours(ids[None])[0], expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.5
    assert checkpoint.config.model.qk_norm_groups == len(shards)
    assert checkpoint.config.outputs == ("text",)


@pickles_are_read_here
def test_metas_layout_there_and_back_is_identical(meta: tuple[Any, ...], tmp_path: Path) -> None:
    folder = meta[0]
    convert(folder, tmp_path / "native", "native", allow_pickle=True)
    convert(tmp_path / "native", tmp_path / "back", "meta", verify=True)
    before, after = tensors(folder), tensors(tmp_path / "back")
    before |= tensors(folder.parent.parent / "tokenizer")
    for name in [name for name in before if name.endswith("rope.freqs")]:
        del before[name], after[name]
    assert identical(before, after)
    tokenizer = (folder.parent.parent / "tokenizer/text_tokenizer.json").read_bytes()
    assert (tmp_path / "back/tokenizer/text_tokenizer.json").read_bytes() == tokenizer


@pickles_are_read_here
def test_metas_model_is_read_by_the_hub(meta: tuple[Any, ...], tmp_path: Path) -> None:
    folder, _, vq = meta
    convert(folder, tmp_path / "hf", "hf", allow_pickle=True, verify=True)
    theirs = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(0, made.N_IDS, (1, 40), generator=torch.Generator().manual_seed(2))
    ours = load_transformer(open_checkpoint(folder, allow_pickle=True))
    with torch.no_grad():
        expected = theirs.lm_head(theirs.model(input_ids=ids, use_cache=False).last_hidden_state)
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=2e-5)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(4)) * 2 - 1
    with torch.no_grad():
        codes = theirs.model.vqmodel.encode(pixels).image_tokens
    assert torch.equal(codes.view(2, 4, 4), vq.encode(pixels))
    # What the hub's layout has no place for stands beside, so the way back loses nothing.
    convert(tmp_path / "hf", tmp_path / "back", "meta")
    before, after = tensors(folder), tensors(tmp_path / "back")
    before |= tensors(folder.parent.parent / "tokenizer")
    assert identical(*({k: v for k, v in t.items() if "rope" not in k} for t in (before, after)))


def reference_pixels(
    state: dict[str, Tensor], codes: Tensor, n_levels: int, n_blocks: int
) -> Tensor:
    """Codes (B, h, w) -> pixels, from the published equations of the VQ-GAN alone."""

    def conv(x: Tensor, name: str, padding: int = 1) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def block(x: Tensor, name: str) -> Tensor:
        h = conv(F.silu(norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = conv(F.silu(norm(h, f"{name}.norm2")), f"{name}.conv2")
        wider = f"{name}.nin_shortcut.weight" in state
        return h + (conv(x, f"{name}.nin_shortcut", 0) if wider else x)

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = (conv(norm(x, f"{name}.norm"), f"{name}.{n}", 0).flatten(2) for n in "qkv")
        weights = (q.mT @ k / q.shape[1] ** 0.5).softmax(-1)
        return x + conv((v @ weights.mT).view_as(x), f"{name}.proj_out", 0)

    x = state["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)
    x = conv(conv(x, "post_quant_conv", 0), "decoder.conv_in")
    x = block(x, "decoder.mid.block_1")
    x = block(attention(x, "decoder.mid.attn_1"), "decoder.mid.block_2")
    for level in reversed(range(n_levels)):
        for i in range(n_blocks):
            x = block(x, f"decoder.up.{level}.block.{i}")
        if level:
            x = conv(F.interpolate(x, scale_factor=2.0), f"decoder.up.{level}.upsample.conv")
    return conv(F.silu(norm(x, "decoder.norm_out")), "decoder.conv_out")


@pickles_are_read_here
def test_the_image_tokenizers_of_both_layouts_give_their_codes_and_pixels(
    hf: tuple[Path, Any], meta: tuple[Any, ...]
) -> None:
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(4)) * 2 - 1
    folder, model = hf
    reads = load_image_tokenizer(open_checkpoint(folder))
    draws = load_image_tokenizer(open_checkpoint(meta[0], allow_pickle=True))
    assert reads is not None
    assert draws is not None
    with torch.no_grad():
        theirs = model.model.vqmodel.encode(pixels).image_tokens.view(3, 4, 4)
        assert torch.equal(reads.model.encode(pixels), theirs)
        codes = draws.model.encode(pixels)
        assert torch.equal(codes, meta[2].encode(pixels))
        vqgan = meta[0].parent.parent / "tokenizer/vqgan.ckpt"
        state = torch.load(vqgan, weights_only=True)["state_dict"]
        expected = reference_pixels(state, codes, n_levels=3, n_blocks=2)
        torch.testing.assert_close(draws.model.decode(codes), expected, rtol=0, atol=1e-5)
        assert expected.std() > 0.01
    assert len(theirs.unique()) > 2
    with pytest.raises(UserError, match="no decoder"):
        reads.decode(theirs.flatten(1))


def test_a_picture_takes_the_hubs_path_to_its_embeddings(hf: tuple[Path, Any]) -> None:
    folder, model = hf
    processor = transformers.ChameleonImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    image = load_image_tokenizer(open_checkpoint(folder))
    assert image is not None
    image.as_hub = True
    checkpoint = open_checkpoint(folder)
    ours = load_transformer(checkpoint)
    rng = np.random.default_rng(0)
    for size in ((16, 16), (40, 23), (17, 90), (8, 11)):
        picture = PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        pixels = processor(picture, return_tensors="pt").pixel_values
        torch.testing.assert_close(image.preprocess(picture)[None], pixels, rtol=0, atol=1e-6)
        ids = model.model.get_image_tokens(pixels).flatten()
        codes = image.encode([picture])[0]
        assert torch.equal(codes + checkpoint.config.vocab.image.first_id, ids)
        assert torch.equal(ours.tok_embeddings(ids), model.model.embed_tokens(ids))


TOKENIZER = HFTokenizer(json.dumps(made.tokenizer_json()).encode())
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text(
    st.sampled_from("helo wr\t\n  012.,!<>IMGABJZ\u00e9"), max_size=60
)
SPELLINGS = st.sampled_from(
    ["<s>", "</s>", "<reserved08706>", "<racm3:break>", "IMGIMGAZ", "IMGIMGHZ", "<eoss>", "<pad>"]
)


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
def test_the_released_chain_gives_the_ids_of_the_library(text: str) -> None:
    from tokenizers import Tokenizer

    source = made.tokenizer_json()
    names = [entry["content"] for entry in source["added_tokens"]]
    assume(not any(name in text for name in names))
    theirs = Tokenizer.from_str(json.dumps(source)).encode(text, add_special_tokens=False).ids
    assert TOKENIZER.encode(text) == theirs
    assert TOKENIZER.decode(theirs) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(ANY_TEXT | SPELLINGS, max_size=5).map("".join))
def test_no_text_spells_a_control_id_or_a_code(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert min(ids, default=1 << 30) >= 4 + made.N_CODES + len(made.AFTER)
    assert TOKENIZER.decode(ids) == text


@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 3))
def test_the_two_layouts_of_rotary_pairs_are_inverse(heads: int, half: int, width: int) -> None:
    rows = torch.arange(heads * 2 * half * width).view(heads * 2 * half, width)
    assert torch.equal(pairs_from_halves(halves_from_pairs(rows, 2 * half), 2 * half), rows)
    assert halves_from_pairs(rows, 2 * half)[1].equal(rows[2 if half > 1 else 1])


@pickles_are_read_here
def test_a_text_model_of_either_layout_answers_and_does_not_draw(
    hf: tuple[Path, Any], meta: tuple[Any, ...]
) -> None:
    picture = PIL.Image.effect_noise((30, 20), 90).convert("RGB")
    for folder in (hf[0], meta[0]):
        model = Chameleon.from_pretrained(folder, device="cpu", allow_pickle=True)
        answer = model.generate(Document([Text("hello"), Image(picture)]), max_tokens=8, seed=1)
        assert not answer.images
        with pytest.raises(UserError, match="writes text only"):
            model.generate("hello", mode="image")


def test_a_native_model_keeps_what_only_we_can_say(model_folder: Path, tmp_path: Path) -> None:
    convert(model_folder, tmp_path / "native", "native", verify=True)
    before = Chameleon.from_pretrained(model_folder, device="cpu")
    after = Chameleon.from_pretrained(tmp_path / "native", device="cpu")
    assert after.config == before.config
    found = tensors(tmp_path / "native")
    renamed = {k.replace("native/", f"{model_folder.name}/"): v for k, v in found.items()}
    assert identical(tensors(model_folder), renamed)


def test_what_a_layout_cannot_hold_is_named_and_nothing_is_written(
    model_folder: Path, hf: tuple[Path, Any], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in\.weight .*stem of 8"):
        convert(model_folder, tmp_path / "hf", "hf")
    with pytest.raises(CheckpointError, match="sentencepiece"):
        convert(model_folder, tmp_path / "meta", "meta")
    with pytest.raises(CheckpointError, match=r"no decoder\.\* tensors"):
        convert(hf[0], tmp_path / "meta", "meta")
    assert not list(tmp_path.iterdir())


@pickles_are_read_here
@pytest.mark.parametrize("to", ["native", "meta"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    to: Any, meta: tuple[Any, ...], tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"new could not be written: .*(too large|no room)"):
            convert(meta[0], tmp_path / "new", to, allow_pickle=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_has_no_room_is_not_begun(
    hf: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"no space: needed 0\.0 GiB, had 0\.0 GiB"):
        convert(hf[0], tmp_path / "new", "native")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_conversion_leaves_nothing(
    hf: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openchameleon.checkpoints import native

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(hf[0], tmp_path / "new", "native")
    assert not list(tmp_path.iterdir())


def test_a_terminated_conversion_leaves_nothing(
    hf: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openchameleon.checkpoints import native

    def terminated(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(native, "write_safetensors", terminated)
    line = ["openchameleon", "convert", str(hf[0]), str(tmp_path / "new"), "--to", "native"]
    monkeypatch.setattr(sys, "argv", line)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main() == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["native", "hf"])
def test_no_file_is_written_outside_the_new_folder(
    source: Any, hf: tuple[Path, Any], tmp_path: Path
) -> None:
    convert(hf[0], tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "hf", "hf")
    file = tmp_path / source / "config.json"
    config = json.loads(file.read_text())
    (config if source == "native" else config["openchameleon"])["text_tokenizer"] = str(
        tmp_path / "owned"
    )
    file.write_text(json.dumps(config))
    shutil.copy(tmp_path / "hf/tokenizer.json", tmp_path / source / "owned")
    with pytest.raises(CheckpointError, match="no plain file name"):
        convert(tmp_path / source, tmp_path / "out", "native")
    assert not (tmp_path / "owned").exists()


def test_numbers_that_are_not_finite_are_carried_over_when_that_is_wished(
    hf: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(hf[0], tmp_path / "hf")
    broken(tmp_path / "hf", lambda s: s[HEAD][1].fill_(torch.nan))
    convert(tmp_path / "hf", tmp_path / "out", "native", allow_nonfinite=True, verify=True)
    assert tensors(tmp_path / "out")["out/output.weight"][1].isnan().all()


def test_half_and_mixed_types_are_kept(hf: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(hf[0], tmp_path / "hf")

    def halve(state: dict[str, Tensor]) -> None:
        for name in state:
            dtype = torch.float32 if "vqmodel" in name else torch.bfloat16
            state[name] = state[name].to(torch.float16 if name == NORM else dtype)

    broken(tmp_path / "hf", halve)
    convert(tmp_path / "hf", tmp_path / "native", "native", verify=True)
    convert(tmp_path / "native", tmp_path / "back", "hf", verify=True)
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert identical(before, {k.replace("back/", "hf/"): v for k, v in after.items()})
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"


@pickles_are_read_here
def test_the_hubs_processor_reads_what_is_written(meta: tuple[Any, ...], tmp_path: Path) -> None:
    convert(meta[0], tmp_path / "hf", "hf", allow_pickle=True)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    picture = PIL.Image.effect_noise((30, 20), 90).convert("RGB")
    given = processor(images=picture, text="<image>hello", return_tensors="pt")
    vocab = open_checkpoint(tmp_path / "hf").config.vocab
    placeholder, hello = (made.names()[n] for n in ("<reserved08707>", "hello"))
    image = [vocab.image.begin_id, *[placeholder] * 16, vocab.image.end_id]
    assert given.input_ids[0].tolist() == [vocab.bos_id, *image, hello, vocab.eot_id]
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert model.config.vocabulary_map["<image>"] == placeholder
    codes = model.model.get_image_tokens(given.pixel_values).flatten() - vocab.image.first_id
    ours = load_image_tokenizer(open_checkpoint(meta[0], allow_pickle=True))
    assert ours is not None
    assert torch.equal(codes, ours.encode([picture])[0])


def test_an_existing_folder_is_not_written_over(hf: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(hf[0], tmp_path / "there", "native")


def test_a_manifest_lists_every_file_with_its_sum(hf: tuple[Path, Any], tmp_path: Path) -> None:
    manifest = convert(hf[0], tmp_path / "native", "native")
    files = {str(p.relative_to(tmp_path / "native")) for p in (tmp_path / "native").rglob("*.*")}
    assert files == {*manifest["files"], "manifest.json"}
    assert json.loads((tmp_path / "native/manifest.json").read_text()) == manifest


def test_verify_notices_one_changed_number(hf: tuple[Path, Any], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(hf[0])
    manifest = write_checkpoint(checkpoint, tmp_path, "native")
    assert compare(checkpoint, tmp_path, manifest)["tensors"] == len(checkpoint.all_weights)
    state = load_file(tmp_path / "model.safetensors")
    state["layers.0.feed_forward.w1.weight"][0, 0] += 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not read back"):
        compare(checkpoint, tmp_path, manifest)
    with pytest.raises(CheckpointError, match=r"layers\.0\.feed_forward\.w1\.weight differs"):
        compare(checkpoint, tmp_path, {"files": {}})


def test_pickles_are_refused_unless_they_are_wished(meta: tuple[Any, ...]) -> None:
    with pytest.raises(CheckpointError, match=r"--allow-pickle"):
        open_checkpoint(meta[0])


class Hostile:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def test_a_hostile_pickle_does_nothing_even_when_pickles_are_wished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.meta_folder(tmp_path / "model", 1)
    (tmp_path / "model/tokenizer").mkdir()
    (tmp_path / "model/tokenizer/text_tokenizer.json").write_text("{}")
    payload = {"weight": torch.zeros(2), "other": Hostile(tmp_path / "owned")}
    torch.save(payload, tmp_path / "model/consolidated.pth")
    command = ["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "native"]
    assert main(command) == 3
    assert "--allow-pickle" in capsys.readouterr().err
    assert main([*command, "--allow-pickle"]) == 3
    assert re.search(r"consolidated\.pth .* more than tensors", capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_pickle_is_not_read_with_modules_that_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"weight": torch.arange(3)}, tmp_path / "a.pth")
    (tmp_path / "torch.py").write_text("raise SystemExit('this was run')")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(read_pickles([Path("a.pth")])[0]["weight"].read(), torch.arange(3))


def test_tensors_come_back_from_a_pickle_as_they_went(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    state = {
        "plain": base, "turned": base.T, "part": base[1:3, 2:], "half": base.bfloat16(),
        "empty": torch.zeros(0, 3), "one": torch.tensor(7), "bool": base > 3,
    }  # fmt: skip
    torch.save({"state_dict": state, "step": 5}, tmp_path / "a.pth")
    [found] = read_pickles([tmp_path / "a.pth"])
    assert identical({k.removeprefix("state_dict."): e.read() for k, e in found.items()}, state)
    write_pickle({k: entry_of(v) for k, v in state.items()}, tmp_path / "b.pth")
    assert identical(torch.load(tmp_path / "b.pth", weights_only=True), state)
    assert zipfile.ZipFile(tmp_path / "b.pth").testzip() is None, "sums as other readers ask for"


def test_shards_are_cut_at_a_gibibyte_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openchameleon.checkpoints import tensors as module

    monkeypatch.setattr(module, "SHARD_BYTES", 400)
    state = {f"t{i}": torch.randn(i + 1, 20) for i in range(8)}
    module.write_safetensors({k: entry_of(v) for k, v in state.items()}, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 4
    assert identical({k: e.read() for k, e in read_safetensors(tmp_path).items()}, state)


def test_a_native_folder_in_shards_is_the_same_model(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openchameleon.checkpoints import tensors as module

    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    convert(model_folder, tmp_path / "shards", "native", verify=True)
    assert (tmp_path / "shards/model.safetensors.index.json").is_file()
    whole = Chameleon.from_pretrained(model_folder, device="cpu")
    shards = Chameleon.from_pretrained(tmp_path / "shards", device="cpu")
    ids = torch.arange(20)[None]
    assert torch.equal(whole.model(ids), shards.model(ids))
    next((tmp_path / "shards").glob("model-0*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"model-0.* is missing"):
        Chameleon.from_pretrained(tmp_path / "shards")


def broken(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def edited(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def indexed(folder: Path, file: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))


NORM, HEAD = "model.norm.weight", "lm_head.weight"
QUERY, QUERY_NORM = (f"model.layers.0.self_attn.{n}.weight" for n in ("q_proj", "q_norm"))
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (
        lambda f: broken(f, lambda s: s.pop(NORM)),
        r"no tensor for norm\.weight",
    ),
    "wrong shape": (
        lambda f: broken(f, lambda s: s.update({HEAD: torch.zeros(3, 64)})),
        r"lm_head\.weight has shape \[3, 64\]",
    ),
    "strange tensor": (
        lambda f: broken(f, lambda s: s.update(x=torch.zeros(1))),
        r"model\.safetensors: x has no place",
    ),
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", 5000),
        r"model\.safetensors is not a readable",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "no json": (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
    "other model": (lambda f: edited(f, model_type="bert"), r"'bert'"),
    "bias": (lambda f: edited(f, attention_bias=True), r"attention_bias = True"),
    "stretched": (lambda f: edited(f, rope_parameters={"rope_type": "yarn"}), r"'yarn'"),
    "wrong sizes": (lambda f: edited(f, hidden_size=66), r"config\.json: dim = 66"),
    "no sizes": (lambda f: edited(f, hidden_size=None), r"config\.json"),
    "shards": (lambda f: indexed(f, "gone.safetensors"), r"gone\.safetensors is missing"),
    "path out": (lambda f: indexed(f, "../x.safetensors"), r"no plain file name"),
    "wrong projection": (
        lambda f: broken(f, lambda s: s.update({QUERY: torch.zeros(3, 64)})),
        r"q_proj\.weight has shape \[3, 64\]",
    ),
    "flat norm": (
        lambda f: broken(f, lambda s: s.update({QUERY_NORM: torch.zeros(64)})),
        r"q_norm\.weight has shape \[64\]",
    ),
    "type": (
        lambda f: broken(f, lambda s: s.update({HEAD: s[HEAD].to(torch.float8_e4m3fn)})),
        r"lm_head\.weight is of type F8_E4M3",
    ),
    "not finite": (
        lambda f: broken(f, lambda s: s[HEAD][1].fill_(torch.nan)),
        r"lm_head\.weight holds numbers that are infinite or none",
    ),
    "rope": (lambda f: edited(f, rope_parameters="x"), r"rope_parameters = 'x'.* no JSON object"),
    "vq_config": (lambda f: edited(f, vq_config=[1]), r"vq_config = \[1\].* no JSON object"),
    "names": (lambda f: edited(f, vocabulary_map={"<s>": "0"}), r"not all whole numbers"),
    "mark": (lambda f: edited(f, openchameleon=3), r"openchameleon = 3.* no JSON object"),
    "groups": (lambda f: edited(f, model_parallel_size=-1), r"config\.json: .*groups"),
    "both shards": (
        lambda f: (
            save_file({NORM: torch.zeros(64)}, f / "a.safetensors"),
            save_file({NORM: torch.zeros(64)}, f / "b.safetensors"),
            (f / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {NORM: "a.safetensors", HEAD: "b.safetensors"}})
            ),
        ),
        r"b\.safetensors: model\.norm\.weight is not where",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_checkpoint_is_one_sentence_and_exit_code_3(
    mistake: str, hf: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(hf[0], folder)
    breaking, message = MISTAKES[mistake]
    breaking(folder)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "native"]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pickles_are_read_here
@pytest.mark.parametrize("meta", [4], indirect=True)
def test_shards_of_meta_that_disagree_are_named(meta: tuple[Any, ...], tmp_path: Path) -> None:
    folder = meta[0]
    shutil.copytree(folder.parent.parent, tmp_path / "copy")
    models = tmp_path / "copy/models/7b"
    state = torch.load(models / "consolidated.02.pth", weights_only=True)
    state["norm.weight"][3] += 1
    torch.save(state, models / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.02\.pth: norm\.weight differs"):
        convert(models, tmp_path / "out", "native", allow_pickle=True)
    (models / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth is missing"):
        convert(models, tmp_path / "out", "native", allow_pickle=True)


def test_convert_says_what_it_did(
    hf: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(hf[0]), str(tmp_path / "out"), "--to", "native", "--verify"]) == 0
    assert "hf -> native" in (out := capsys.readouterr().out)
    assert "verified" in out
