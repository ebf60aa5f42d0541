"""Our transformer gives the logits of the Hugging Face implementation on the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openchameleon.model.config import ModelConfig, NormPlacement
from openchameleon.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

PERMUTED = {"q_proj": "wq", "k_proj": "wk"}
PLAIN = {
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def reference_model(config: ModelConfig) -> torch.nn.Module:
    """A random Hugging Face model of our shape, with norms that are not the identity."""
    vq_config = {
        "embed_dim": 4,
        "num_embeddings": 8,
        "latent_channels": 32,
        "resolution": 8,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
    }
    hf_config = transformers.ChameleonConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        rms_norm_eps=config.norm_eps,
        swin_norm=config.norm_placement == "output",
        model_parallel_size=config.qk_norm_groups,
        vq_config=vq_config,
        vocabulary_map={"<image>": 3, "IMGIMGAZ": 4},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.ChameleonForConditionalGeneration(hf_config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=0.15)
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                for p in (norm.weight, norm.bias):
                    groups = p.unflatten(0, (config.qk_norm_groups, -1))
                    p.copy_(groups[:, :1].expand_as(groups).flatten(0, 1))
    return model


def our_weights(hf: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their names and half-split rotary layout -> ours, with adjacent pairs."""
    half = config.head_dim // 2
    ours = {
        "tok_embeddings.weight": hf["model.embed_tokens.weight"],
        "norm.weight": hf["model.norm.weight"],
        "output.weight": hf["lm_head.weight"],
    }
    for i in range(config.n_layers):
        theirs, mine = f"model.layers.{i}.", f"layers.{i}."
        for hf_name, name in PLAIN.items():
            ours[f"{mine}{name}.weight"] = hf[f"{theirs}{hf_name}.weight"]
        for hf_name, name in PERMUTED.items():
            weight = hf[f"{theirs}self_attn.{hf_name}.weight"]
            pairs = weight.unflatten(0, (-1, 2, half)).transpose(1, 2)
            ours[f"{mine}attention.{name}.weight"] = pairs.reshape(weight.shape)
        for letter in "qk":
            for kind in ("weight", "bias"):
                heads = hf[f"{theirs}self_attn.{letter}_norm.{kind}"]
                groups = heads.unflatten(0, (config.qk_norm_groups, -1))[:, 0]
                pairs = groups.unflatten(1, (2, half)).transpose(1, 2).flatten(1)
                ours[f"{mine}attention.{letter}_normalization.{kind}"] = pairs
    return ours


@pytest.mark.parametrize(
    ("n_kv_heads", "qk_norm_groups", "placement"),
    [(4, 1, "input"), (2, 1, "input"), (4, 1, "output"), (2, 2, "output"), (4, 4, "output")],
)
def test_logits_equal_hugging_face(
    n_kv_heads: int, qk_norm_groups: int, placement: NormPlacement
) -> None:
    config = ModelConfig(
        dim=64,
        n_layers=3,
        n_heads=4,
        n_kv_heads=n_kv_heads,
        vocab_size=97,
        max_seq_len=64,
        ffn_dim=160,
        qk_norm_groups=qk_norm_groups,
        norm_placement=placement,
    )
    reference = reference_model(config)
    model = Transformer(config).eval()
    model.load_state_dict(our_weights(reference.state_dict(), config))
    token_ids = torch.randint(5, 97, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # Through the body: the reference's own forward hides the logits of image ids.
        hidden = reference.model(input_ids=token_ids, use_cache=False).last_hidden_state
        expected = reference.lm_head(hidden)
        torch.testing.assert_close(model.hidden(token_ids), hidden, rtol=0, atol=2e-5)
        torch.testing.assert_close(model(token_ids), expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.5
