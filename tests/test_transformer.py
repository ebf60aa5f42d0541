"""The transformer's claims, each against a slower or plainer way to the same numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from openchameleon.config import from_dict, to_dict
from openchameleon.errors import UserError
from openchameleon.model.config import PRESETS, ModelConfig, ffn_dim_for, n_params
from openchameleon.model.flops import forward_flops_per_token, train_flops_per_token
from openchameleon.model.rope import apply_rope, rope_tables
from openchameleon.model.transformer import HeadNorm, Transformer

BASE = ModelConfig(
    dim=48,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=64,
    max_seq_len=32,
    ffn_dim=64,
    qk_norm_groups=2,
)
BOTH_PLACEMENTS = pytest.mark.parametrize("placement", ["input", "output"])


def model_of(**changes: Any) -> Transformer:
    """A small model whose norms are not the identity, in eval mode."""
    model = Transformer(dataclasses.replace(BASE, **changes))
    model.init_weights(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(BASE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


class ListCache:
    """The plainest cache: a tensor for each layer that grows."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.kept:
            old_k, old_v = self.kept[layer]
            k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        self.kept[layer] = k, v
        return k, v


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("7b", 7_013_142_528 + 16_384), ("34b", 34_293_424_128 + 98_304)],
)
def test_presets_have_the_published_number_of_parameters(preset: str, expected: int) -> None:
    with torch.device("meta"):
        model = Transformer(PRESETS[preset])
    assert n_params(PRESETS[preset]) == expected
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qk_norm": False}])
def test_n_params_counts_what_is_built(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(BASE, **changes)
    assert n_params(config) == sum(p.numel() for p in Transformer(config).parameters())


def test_ffn_dim_follows_the_published_formula() -> None:
    assert (ffn_dim_for(4096), ffn_dim_for(8192)) == (11_008, 22_016)
    assert ffn_dim_for(8192, multiple_of=4096, multiplier=1.3) == 28_672  # Llama-2 70B


def test_flops_per_token_are_the_published_shapes() -> None:
    assert train_flops_per_token(PRESETS["7b"], 4096) / 1e9 == pytest.approx(46.9, abs=0.05)
    assert train_flops_per_token(PRESETS["34b"], 4096) / 1e9 == pytest.approx(221.9, abs=0.05)
    prefill = sum(forward_flops_per_token(BASE, p + 1) for p in range(32)) / 32
    assert train_flops_per_token(BASE, 32, causal=True) == pytest.approx(3 * prefill)


def test_parameter_names_are_the_published_ones() -> None:
    names = {n for n, _ in Transformer(dataclasses.replace(BASE, n_layers=1)).named_parameters()}
    attention = {f"attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")}
    norms = {f"attention.{q}_normalization.{p}" for q in "qk" for p in ("weight", "bias")}
    feed_forward = {f"feed_forward.{w}.weight" for w in ("w1", "w2", "w3")}
    layer = attention | norms | feed_forward | {"attention_norm.weight", "ffn_norm.weight"}
    top = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    assert names == top | {f"layers.0.{name}" for name in layer}


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 50},
        {"dim": 12},
        {"n_kv_heads": 3},
        {"qk_norm_groups": 4},
        {"dropout": 1.0},
        {"n_layers": 0},
        {"ffn_dim": 0},
        {"norm_placement": "both"},
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(BASE, **changes)
    with pytest.raises(UserError, match=next(iter(changes))):
        from_dict(ModelConfig, {**to_dict(BASE), **changes})


@BOTH_PLACEMENTS
def test_a_position_sees_only_those_before_it(placement: str) -> None:
    model, tokens = model_of(norm_placement=placement), ids(1, 10)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % BASE.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :6], before[:, :6])
    assert ((after - before)[0, 6:].abs().amax(dim=1) > 1e-4).all()


@BOTH_PLACEMENTS
def test_packed_documents_equal_separate_forwards(placement: str) -> None:
    model, first, second = model_of(norm_placement=placement), ids(1, 7), ids(1, 5, seed=3)
    doc_ids = torch.tensor([1] * 7 + [2] * 5)
    mask = (doc_ids[:, None] == doc_ids).tril()[None, None]
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    packed = model(torch.cat([first, second], dim=1), positions, mask)
    torch.testing.assert_close(packed, torch.cat([model(first), model(second)], dim=1))


@BOTH_PLACEMENTS
def test_cached_decode_equals_full_forward(placement: str) -> None:
    model, tokens, cache = model_of(norm_placement=placement), ids(2, 9), ListCache()
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    at = torch.arange(9)[None]
    steps = [model(tokens[:, :4], cache=cache)]  # the first tokens, a token, the rest by a mask
    steps.append(model(tokens[:, 4:5], at[:, 4:5], cache=cache))
    steps.append(model(tokens[:, 5:], at[:, 5:], causal[:, :, 5:], cache))
    torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens))


def test_new_tokens_over_a_cache_without_a_mask_are_refused() -> None:
    model, cache = model_of(), ListCache()
    model(ids(1, 4), cache=cache)
    with pytest.raises(ValueError, match="mask"):
        model(ids(1, 2), torch.tensor([[4, 5]]), cache=cache)


def test_each_row_has_its_own_positions() -> None:
    # Rotary attention depends on distances: rows that are shifted as a whole agree.
    model, row = model_of(), ids(1, 8)
    offsets = torch.tensor([[0], [5], [900]])
    logits = model(row.expand(3, -1), offsets + torch.arange(8))
    torch.testing.assert_close(logits, logits[:1].expand(3, -1, -1), rtol=1e-3, atol=1e-4)
    spread = model(row, 2 * torch.arange(8)[None])
    assert (spread - logits[:1]).abs().max() > 1e-3


def test_rope_rotates_adjacent_pairs_by_position_times_frequency() -> None:
    x = torch.randn(1, 3, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.tensor([[0, 4, 1000]])
    rotated = apply_rope(x, *rope_tables(positions, dataclasses.replace(BASE, dim=24)))
    frequency = torch.tensor([1.0, 1e4 ** (-1 / 3), 1e4 ** (-2 / 3)], dtype=torch.float64)
    angle = positions[0, :, None] * frequency
    turned = torch.view_as_complex(x.unflatten(-1, (3, 2))) * torch.polar(
        torch.ones_like(angle), angle
    ).unsqueeze(1)
    torch.testing.assert_close(
        rotated, torch.view_as_real(turned).flatten(-2), rtol=1e-4, atol=1e-4
    )


def test_grouped_queries_equal_full_heads_with_repeated_kv() -> None:
    grouped = model_of(n_kv_heads=2)
    full = model_of(n_kv_heads=4)
    state = grouped.state_dict()
    for name, value in state.items():
        if name.endswith(("wk.weight", "wv.weight")):
            heads = value.unflatten(0, (2, BASE.head_dim))
            state[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(full(ids(2, 8)), grouped(ids(2, 8)))


def test_head_norm_groups_equal_a_layer_norm_for_each_head() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = HeadNorm(n_groups=2, head_dim=6)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    x = torch.randn(2, 3, 4, 6, generator=generator) + 1
    for head in range(4):
        weight, bias = norm.weight[head // 2], norm.bias[head // 2]
        expected = torch.nn.functional.layer_norm(x[:, :, head], (6,), weight, bias, eps=1e-5)
        torch.testing.assert_close(norm(x)[:, :, head], expected)


def test_output_placement_adds_branches_of_the_norms_size() -> None:
    model = Transformer(dataclasses.replace(BASE, norm_placement="output"))
    model.init_weights(seed=0)
    x = 7 * torch.randn(1, 5, BASE.dim, generator=torch.Generator().manual_seed(0))
    rope = rope_tables(torch.arange(5)[None], BASE)
    block = model.layers[0]
    block.attention_norm.weight.data.fill_(2.0)
    block.ffn_norm.weight.data.zero_()
    added = block(x, rope, None, None) - x
    torch.testing.assert_close(
        added.pow(2).mean(-1).sqrt(), torch.full((1, 5), 2.0), rtol=0.01, atol=0
    )


@BOTH_PLACEMENTS
def test_dropout_acts_in_training_only(placement: str) -> None:
    model, plain = model_of(dropout=0.5, norm_placement=placement), ids(1, 6)
    without = model_of(norm_placement=placement)
    torch.testing.assert_close(model(plain), without(plain), rtol=0, atol=0)
    model.train()
    torch.manual_seed(0)
    one, other = model(plain), model(plain)
    assert (one - other).abs().max() > 1e-3


def test_logits_are_float32_whatever_the_weights_are() -> None:
    model = model_of().to(torch.bfloat16)
    assert model.hidden(ids(1, 4)).dtype == torch.bfloat16
    assert model(ids(1, 4)).dtype == torch.float32


def test_tied_head_is_the_embedding_table() -> None:
    model = model_of(tie_embeddings=True)
    assert model.output_weight is model.tok_embeddings.weight
    expected = model.hidden(ids(1, 4)) @ model.tok_embeddings.weight.T
    torch.testing.assert_close(model(ids(1, 4)), expected)


def test_first_weights_depend_on_seed_and_name_alone() -> None:
    deep, shallow = Transformer(BASE), Transformer(dataclasses.replace(BASE, n_layers=1))
    with torch.device("meta"):
        late = Transformer(BASE)
    late.to_empty(device="cpu")
    for model in (deep, shallow, late):
        model.init_weights(seed=3)
    weights = dict(deep.named_parameters())
    for name, weight in late.named_parameters():
        assert torch.equal(weight, weights[name]), name
    assert torch.equal(shallow.layers[0].attention.wq.weight, deep.layers[0].attention.wq.weight)
    assert not torch.equal(deep.layers[0].attention.wq.weight, deep.layers[1].attention.wq.weight)
    shallow.init_weights(seed=4)
    assert not torch.equal(shallow.output_weight, deep.output_weight)


def test_first_weights_have_the_documented_spread() -> None:
    config = dataclasses.replace(BASE, dim=256, ffn_dim=512, n_layers=2, vocab_size=512)
    model = Transformer(config)
    model.init_weights(seed=0)
    layer = model.layers[0]
    for weight, std in [
        (model.tok_embeddings.weight, 0.02),
        (model.output.weight, 0.02),
        (layer.attention.wq.weight, 1 / 16),
        (layer.attention.wo.weight, 1 / 32),
        (layer.feed_forward.w1.weight, 1 / 16),
        (layer.feed_forward.w2.weight, 512**-0.5 / 2),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert (layer.attention.q_normalization.weight == 1).all()
    assert (layer.attention.k_normalization.bias == 0).all()
    assert (layer.attention_norm.weight == 1).all()
    ending = Transformer(dataclasses.replace(config, norm_placement="output"))
    ending.init_weights(seed=0)
    assert (ending.layers[0].attention_norm.weight == 0.5).all()
    assert (ending.norm.weight == 1).all()


def test_the_forward_has_no_graph_breaks() -> None:
    model = model_of()
    explained = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(explained(ids(2, 6)), model(ids(2, 6)))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_attention_by_blocks_equals_attention_by_a_dense_mask(n_kv_heads: int) -> None:
    from openchameleon.train.step import document_blocks, document_mask

    doc_ids = torch.cat(
        [torch.full((1, n), i) for i, n in ((1, 70), (2, 100), (3, 60), (0, 26))], 1
    )
    doc_ids = torch.cat([doc_ids, doc_ids.flip(1)])
    model, row = model_of(n_kv_heads=n_kv_heads), ids(2, 256)
    with torch.no_grad():
        dense = model(row, mask=document_mask(doc_ids))
        blocks = model(row, mask=document_blocks(doc_ids))
    torch.testing.assert_close(blocks, dense, rtol=1e-4, atol=1e-4)
    assert (dense - model(row)).abs().max() > 1e-2
