"""A text-only Llama becomes a mixed-modal model that reads text as it did, and can be trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chameleon_folders as made
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from openchameleon import Chameleon, Document, Image, Text
from openchameleon.checkpoints.convert import WarmStart, convert, load_transformer, open_checkpoint
from openchameleon.cli.main import main
from openchameleon.data.loader import make_batch
from openchameleon.errors import CheckpointError
from openchameleon.tokenizer.image import ImageTokenizer
from openchameleon.train.optim import OptimConfig, make_optimizer
from openchameleon.train.step import LossConfig, train_step
from openchameleon.vqgan.config import VQConfig
from openchameleon.vqgan.model import VQModel

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image tokenizer of 4 codes out of 8."""
    config = VQConfig(ch=32, ch_mult=(1,), n_res_blocks=1, z_channels=8, embed_dim=8, n_embed=8,
                      resolution=16, stem=8, mid_attention=False)  # fmt: skip
    folder = tmp_path_factory.mktemp("images")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ImageTokenizer(VQModel(config), config).save(folder)
    return folder


def text_tokenizer() -> dict[str, Any]:
    """A byte-level tokenizer with two control ids and no picture in it."""
    data = made.tokenizer_json()
    pieces = [
        p for p in data["model"]["vocab"] if p not in (*made.CONTROL, *made.CODES, *made.AFTER)
    ]
    data["model"]["vocab"] = {p: i for i, p in enumerate([*pieces, "<|begin|>", "<|end|>"])}
    ids = data["model"]["vocab"]
    data["added_tokens"] = [
        {**data["added_tokens"][0], "id": ids[name], "content": name}
        for name in ("<|begin|>", "<|end|>")
    ]
    return data


def first_llamas_tokenizer() -> dict[str, Any]:
    """One with byte fallback, and marks for spaces."""
    data = made.tokenizer_json()
    names = ["<unk>", "<|begin|>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [*names, *"\u2581helowrd", "he", "ll", "hell", "hello", "\u2581w"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = ["h e", "l l", "he ll", "hell o", "\u2581 w"]
    data["model"] |= {"vocab": ids, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"}
    data["added_tokens"] = [
        {**data["added_tokens"][0], "id": ids[name], "content": name} for name in names[:3]
    ]
    data["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]}  # fmt: skip
    data["pre_tokenizer"] = None
    return data


def llama_folder(folder: Path, tokenizer: dict[str, Any] | None = None, **sizes: Any) -> Any:
    """A folder as `transformers` saves a Llama; returns the model."""
    tokenizer = tokenizer or text_tokenizer()
    n = len(tokenizer["model"]["vocab"])
    config = transformers.LlamaConfig(
        **{
            "vocab_size": n, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "bos_token_id": n - 2, "eos_token_id": n - 1, "tie_word_embeddings": False,
            "attn_implementation": "eager", **sizes,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


@pytest.mark.parametrize(
    "sizes",
    [{}, {"tie_word_embeddings": True}, {"rope_parameters": made.STRETCHED}],
    ids=["plain", "tied", "stretched"],
)
def test_without_qk_norm_the_logits_of_text_are_the_sources(
    sizes: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    source = llama_folder(tmp_path / "llama", **sizes)
    convert(tmp_path / "llama", tmp_path / "start", "native", warm_start=WarmStart(images))
    checkpoint = open_checkpoint(tmp_path / "start")
    ours, n_old = load_transformer(checkpoint), source.config.vocab_size
    ids = torch.randint(0, n_old, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = source(ids).logits
    found = ours(ids)
    torch.testing.assert_close(found[..., :n_old], expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.3
    vocab = checkpoint.config.vocab
    assert (
        found.shape[-1] == vocab.size == n_old + 1 + 3 + 2 + 8
    )  # a free one; pad, unk, eot; a picture's two; codes
    assert (vocab.bos_id, vocab.eos_id) == (n_old - 2, n_old - 1)
    assert vocab.image.stop_id == vocab.size
    share = found.softmax(-1)[..., n_old:].sum(-1)
    assert share.max() < 3 * (vocab.size - n_old) / vocab.size, "no new id is likely"


def test_a_llama_whose_tokenizer_has_byte_fallback_reads_and_writes_as_it_did(
    images: Path, tmp_path: Path
) -> None:
    source = llama_folder(
        tmp_path / "llama", first_llamas_tokenizer(), bos_token_id=1, eos_token_id=2
    )
    convert(tmp_path / "llama", tmp_path / "start", "native", warm_start=WarmStart(images))
    chameleon = Chameleon.from_pretrained(tmp_path / "start", device="cpu")
    text = " hello world \N{SLICE OF PIZZA}</s>"
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "llama/tokenizer.json")
    )
    ids = chameleon.tokenizer.encode(Document([Text(text)]))
    assert theirs(text[1:], add_special_tokens=False).input_ids == [
        i for i in ids if chameleon.config.vocab.is_text(i)
    ]
    assert chameleon.tokenizer.decode(ids).text == text
    n_old = source.config.vocab_size
    known = torch.tensor([ids])[:, 1:-1].clamp(max=n_old - 1)
    with torch.no_grad():
        expected = source(known).logits
    torch.testing.assert_close(chameleon.model(known)[..., :n_old], expected, rtol=0, atol=2e-5)


def test_qk_norm_begins_as_a_plain_norm(images: Path, tmp_path: Path) -> None:
    source = llama_folder(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "start", "native", warm_start=WarmStart(images, True))
    ours = load_transformer(open_checkpoint(tmp_path / "start"))
    ids = torch.randint(0, source.config.vocab_size, (4, 40))
    seen: list[torch.Tensor] = []
    norm = ours.layers[0].attention.q_normalization
    norm.register_forward_hook(lambda _m, _i, out: seen.append(out))
    ours(ids)
    assert seen[0].mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(
        seen[0].var(-1, correction=0), torch.ones(4, 40, 4), rtol=1e-3, atol=0
    )


def test_a_start_is_ready_for_training_on_pictures_and_text(images: Path, tmp_path: Path) -> None:
    llama_folder(tmp_path / "llama")
    code = main(["convert", str(tmp_path / "llama"), str(tmp_path / "start"), "--to", "native",
                 "--image-tokenizer", str(images), "--qk-norm", "--verify"])  # fmt: skip
    assert code == 0
    chameleon = Chameleon.from_pretrained(tmp_path / "start", device="cpu")
    picture = PIL.Image.effect_noise((16, 16), 90).convert("RGB")
    ids = chameleon.tokenizer.encode(Document([Text("hello world"), Image(picture), Text("low")]))
    assert chameleon.tokenizer.decode(ids).text == "hello worldlow"
    row = torch.tensor([ids]).numpy()
    ones = torch.ones_like(torch.tensor([ids])).numpy()
    vocab = chameleon.config.vocab
    batch = make_batch(row, ones, ones, vocab.pad_id)
    model = chameleon.model.train().requires_grad_(True)
    optimizer = make_optimizer(model, OptimConfig(lr=3e-3))
    is_code = torch.zeros(vocab.size, dtype=torch.bool)
    is_code[vocab.image.first_id : vocab.image.stop_id] = True
    losses = [
        train_step(model, optimizer, [batch], LossConfig(), lr=3e-3, grad_clip=1.0, is_code=is_code)
        for _ in range(20)
    ]
    assert losses[-1].text_loss < losses[0].text_loss / 2  # type: ignore[operator]
    assert losses[-1].code_loss < losses[0].code_loss / 2  # type: ignore[operator]


def test_a_start_with_qk_norm_is_read_by_the_hub(tmp_path: Path) -> None:
    config = VQConfig(ch=32, ch_mult=(1, 1, 2), n_res_blocks=1, z_channels=8, embed_dim=8,
                      n_embed=8, resolution=16)  # fmt: skip
    ImageTokenizer(VQModel(config), config).save(tmp_path / "images")
    llama_folder(tmp_path / "llama")
    start = WarmStart(tmp_path / "images", qk_norm=True)
    convert(tmp_path / "llama", tmp_path / "hf", "hf", verify=True, warm_start=start)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    picture = PIL.Image.effect_noise((30, 20), 90).convert("RGB")
    given = processor(images=picture, text="<image>hello", return_tensors="pt")
    checkpoint = open_checkpoint(tmp_path / "hf")
    vocab, n_old = checkpoint.config.vocab, len(text_tokenizer()["model"]["vocab"])
    ids = given.input_ids[0].tolist()
    assert ids[:2] == [vocab.bos_id, vocab.image.begin_id]
    assert ids[2:18] == [n_old] * 16, "the free id is the placeholder"
    assert ids[18] == vocab.image.end_id
    assert ids[-1] == vocab.eot_id
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        hidden = model.model(**given, use_cache=False).last_hidden_state
        codes = model.model.get_image_tokens(given.pixel_values).flatten().tolist()
    ids[2:18] = codes
    ours = load_transformer(checkpoint)(torch.tensor([ids]))
    torch.testing.assert_close(ours, model.lm_head(hidden), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
        lambda s: s.update({"lm_head.weight": s["lm_head.weight"][1:].clone()}),
        lambda s: s.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(5, 64)}),
        lambda s: s.pop("model.norm.weight"),
    ],
)
def test_a_llama_whose_tensors_are_wrong_is_refused(
    change: Callable[[dict[str, torch.Tensor]], object], images: Path, tmp_path: Path
) -> None:
    llama_folder(tmp_path / "llama")
    state = load_file(tmp_path / "llama/model.safetensors")
    change(state)
    save_file(state, tmp_path / "llama/model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no place|has shape|no tensor"):
        convert(tmp_path / "llama", tmp_path / "start", "native", warm_start=WarmStart(images))
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "no key 'factor'"),
        ({"rope_parameters": {**made.STRETCHED, "factor": 0.0}}, "factor = 0.0"),
        ({"attention_bias": True}, "attention_bias"),
        ({"head_dim": 24}, "head_dim = 24"),
        ({"model_type": "mistral"}, "'mistral'"),
    ],
)
def test_a_llama_that_cannot_be_held_is_refused(
    values: dict[str, Any], message: str, images: Path, tmp_path: Path
) -> None:
    llama_folder(tmp_path / "llama")
    config = json.loads((tmp_path / "llama/config.json").read_text())
    (tmp_path / "llama/config.json").write_text(json.dumps(config | values))
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "llama", tmp_path / "start", "native", warm_start=WarmStart(images))
    assert not (tmp_path / "start").exists()


def test_a_llama_without_an_image_tokenizer_is_told_of_it(tmp_path: Path) -> None:
    llama_folder(tmp_path / "llama")
    with pytest.raises(CheckpointError, match=r"--image-tokenizer"):
        convert(tmp_path / "llama", tmp_path / "start", "native")
