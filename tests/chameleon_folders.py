"""Small random checkpoints in the published layouts, for the tests of reading and writing them.

Written without the package: `transformers` writes the one, a few lines from the published facts
the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

N_CODES = 8
CONTROL = ["<s>", "<pad>", "</s>", "<unk>"]
CODES = ["IMGIMG" + "ABCDEFGH"[i] + "Z" for i in range(N_CODES)]
AFTER = ["<eoss>", "<racm3:break>", "<reserved08706>", "<reserved08707>"]
MERGES = ["h e", "l l", "he ll", "hell o", "\u0120 w", "o r", "\u0120w or", "\u0120wor l"]
N_BYTES_AND_MERGES = 256 + len(MERGES)
N_IDS = 4 + N_CODES + len(AFTER) + N_BYTES_AND_MERGES


STRETCHED = {
    "rope_type": "llama3", "rope_theta": 1e3, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
"""Rotary positions as of Llama 3.1, for heads of 16: of the 8 pairs some stay, some are blended."""


def byte_alphabet() -> list[str]:
    """The 256 characters of byte-level BPE."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in own] + [chr(256 + n) for n in range(256 - len(own))]


def tokenizer_json() -> dict[str, Any]:
    """A byte-level BPE with the released chain of pre-tokenizers, control ids and codes."""
    names = [*CONTROL, *CODES, *AFTER]
    pieces = [*byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
    isolated = {"behavior": "Isolated", "invert": False, "type": "Split"}
    splits = ["<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", "([\\t\\n]|    |  )"]
    chain = [{**isolated, "pattern": {"Regex": pattern}} for pattern in splits]
    chain += [
        {"type": "Digits", "individual_digits": True},
        {"type": "Punctuation", "behavior": "Isolated"},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, name in enumerate(names)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": chain},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": {piece: i for i, piece in enumerate([*names, *pieces])},
            "merges": MERGES,
        },
    }  # fmt: skip


VQ = {
    "embed_dim": 8, "num_embeddings": N_CODES, "latent_channels": 8, "resolution": 16,
    "base_channels": 32, "channel_multiplier": [1, 1, 2], "num_res_blocks": 1,
}  # fmt: skip
"""The image tokenizer of the tests: 16 x 16 pixels, 16 codes of 8."""


def hf_folder(folder: Path, **sizes: Any) -> Any:
    """A folder as `transformers` saves it, with its tokenizer; returns the model.

    Norms are not the identity, and those of a group of heads are equal.
    """
    import transformers

    groups = sizes.get("model_parallel_size", 1)
    config = transformers.ChameleonConfig(
        **{
            "vocab_size": N_IDS, "hidden_size": 64, "intermediate_size": 160,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
            "max_position_embeddings": 128, "bos_token_id": 0, "pad_token_id": 1,
            "eos_token_id": 2, "vq_config": VQ, "attn_implementation": "eager",
            "vocabulary_map": names(), **sizes,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
            elif "vqmodel" not in name:
                parameter.normal_(std=0.15)
        spread_codebook(model.model.vqmodel)
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                for p in (norm.weight, norm.bias):
                    parts = p.unflatten(0, (groups, -1))
                    p.copy_(parts[:, :1].expand_as(parts).flatten(0, 1))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return model


@torch.no_grad()
def spread_codebook(vq: Any) -> None:
    """Takes the codebook from what the encoder makes of noise, so that all codes are in use."""
    pixels = torch.rand(N_CODES, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1
    vectors = vq.quant_conv(vq.encoder(pixels))
    vq.quantize.embedding.weight.copy_(vectors[:, :, 1, 1])


def names() -> dict[str, int]:
    """Name -> id, with the placeholder of a picture."""
    vocab: dict[str, int] = tokenizer_json()["model"]["vocab"]
    return {**vocab, "<image>": vocab["<reserved08707>"]}


def meta_folder(folder: Path, n_shards: int, **sizes: Any) -> list[dict[str, Tensor]]:
    """A folder in Meta's layout; returns its shards."""
    model = {
        "dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "norm_eps": 1e-5,
        "rope_theta": 1e4, "multiple_of": 32, "qk_normalization": True,
        "swin_norm": n_shards > 1, **sizes,
    }  # fmt: skip
    dim, heads, kv = model["dim"], model["n_heads"], model["n_kv_heads"]
    ffn, width = -(-int(8 * dim / 3) // 32) * 32, dim // heads
    make = torch.Generator().manual_seed(1)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make) * 0.15

    whole = {name: 1 + new(dim) for name in ["norm.weight"]}
    for i in range(model["n_layers"]):
        whole |= {f"layers.{i}.{n}_norm.weight": 1 + new(dim) for n in ("attention", "ffn")}
    shards = []
    for _ in range(n_shards):
        s = n_shards
        shard = {
            "tok_embeddings.weight": new(N_IDS, dim // s),
            "output.weight": new(N_IDS // s, dim),
        }
        for i in range(model["n_layers"]):
            a, f = f"layers.{i}.attention.", f"layers.{i}.feed_forward."
            shard |= {
                f"{a}wq.weight": new(heads * width // s, dim),
                f"{a}wk.weight": new(kv * width // s, dim),
                f"{a}wv.weight": new(kv * width // s, dim),
                f"{a}wo.weight": new(dim, heads * width // s),
                f"{f}w1.weight": new(ffn // s, dim),
                f"{f}w2.weight": new(dim, ffn // s),
                f"{f}w3.weight": new(ffn // s, dim),
            }
            for letter in "qk":
                shard[f"{a}{letter}_normalization.weight"] = 1 + new(width)
                shard[f"{a}{letter}_normalization.bias"] = new(width)
        shards.append({**shard, **{k: v.clone() for k, v in whole.items()},
                       "rope.freqs": torch.ones(width // 2)})  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(
        json.dumps({"model": model, "model_parallel_size": n_shards})
    )
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": n_shards}))
    for i, shard in enumerate(shards):
        name = "consolidated.pth" if n_shards == 1 else f"consolidated.0{i}.pth"
        torch.save(shard, folder / name)
    return shards


def meta_tokenizer(folder: Path, state: dict[str, Tensor]) -> None:
    """Meta's folder of tokenizers, with the VQ-GAN of `state`."""
    folder.mkdir(parents=True)
    (folder / "text_tokenizer.json").write_text(json.dumps(tokenizer_json()))
    sizes = {
        "double_z": False, "z_channels": VQ["latent_channels"], "resolution": VQ["resolution"],
        "in_channels": 3, "out_ch": 3, "ch": VQ["base_channels"],
        "ch_mult": VQ["channel_multiplier"], "num_res_blocks": VQ["num_res_blocks"],
        "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    params = {"embed_dim": VQ["embed_dim"], "n_embed": N_CODES, "ddconfig": sizes,
              "lossconfig": {"target": "none"}, "ckpt_path": None}  # fmt: skip
    (folder / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    torch.save({"state_dict": state, "epoch": 3}, folder / "vqgan.ckpt")
