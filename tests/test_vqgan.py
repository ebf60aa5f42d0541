"""The image tokenizer's network: published shape and names, locality, quantiser, losses."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openchameleon.config import from_dict, to_dict
from openchameleon.errors import UserError
from openchameleon.vqgan.config import PRESETS, VQConfig
from openchameleon.vqgan.discriminator import PatchDiscriminator
from openchameleon.vqgan.kmeans import kmeans
from openchameleon.vqgan.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    pixel_loss,
)
from openchameleon.vqgan.metrics import code_counts, codebook_perplexity, codebook_usage, psnr, ssim
from openchameleon.vqgan.model import VQModel
from openchameleon.vqgan.perceptual import LPIPS, Multiscale, VGG16Features, make_perceptual
from openchameleon.vqgan.quantize import VectorQuantizer, nearest

TINY = VQConfig(
    ch=8, ch_mult=(1, 2), n_res_blocks=1, z_channels=8, embed_dim=4, n_embed=16, resolution=16
)
LOCAL = VQConfig(
    ch=16, ch_mult=(1, 2), n_res_blocks=1, z_channels=8, embed_dim=4, n_embed=16, resolution=32,
    stem=4, encoder_kernel=1, decoder_kernel=1,
)  # fmt: skip


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def published() -> VQModel:
    return build(PRESETS["published"])


def build(config: VQConfig, seed: int = 0) -> VQModel:
    torch.manual_seed(seed)
    return VQModel(config).eval()


def pictures(config: VQConfig, batch: int = 1, seed: int = 0) -> Tensor:
    side = config.resolution
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, side, side, generator=generator) * 2 - 1


def test_published_preset_has_the_published_parameter_counts(published: VQModel) -> None:
    assert n_parameters(published) == 68_718_467
    assert n_parameters(published.encoder) == 27_194_880
    assert n_parameters(published.decoder) == 39_294_851
    assert n_parameters(published.quantize) == 8192 * 256
    assert len(published.state_dict()) == 293


def test_attention_at_32_adds_the_published_number_of_parameters() -> None:
    model = VQModel(VQConfig(attn_resolutions=(32,)))
    assert n_parameters(model) == 73_976_707


def test_published_preset_has_the_published_names(published: VQModel) -> None:
    def block(prefix: str, shortcut: bool) -> set[str]:
        parts = ["norm1", "conv1", "norm2", "conv2"] + ["nin_shortcut"] * shortcut
        return {f"{prefix}.{part}" for part in parts}

    layers = {"quant_conv", "post_quant_conv"}
    for side in ("encoder", "decoder"):
        layers |= {f"{side}.{name}" for name in ("conv_in", "norm_out", "conv_out")}
        layers |= {f"{side}.mid.attn_1.{n}" for n in ("norm", "q", "k", "v", "proj_out")}
        layers |= block(f"{side}.mid.block_1", False) | block(f"{side}.mid.block_2", False)
    for level, j in itertools.product(range(5), range(2)):
        layers |= block(f"encoder.down.{level}.block.{j}", j == 0 and level in (2, 4))
    for level, j in itertools.product(range(5), range(3)):
        layers |= block(f"decoder.up.{level}.block.{j}", j == 0 and level in (1, 3))
    layers |= {f"encoder.down.{level}.downsample.conv" for level in range(4)}
    layers |= {f"decoder.up.{level}.upsample.conv" for level in range(1, 5)}
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(published.state_dict()) == names | {"quantize.embedding.weight"}


def test_published_model_encodes_and_decodes_any_multiple_of_16(published: VQModel) -> None:
    config = published.config
    assert (config.down_factor, config.codes_per_side, config.n_codes_per_image) == (16, 32, 1024)
    with torch.no_grad():
        codes = published.encode(torch.rand(1, 3, 64, 48) * 2 - 1)
        assert codes.shape == (1, 4, 3)
        assert codes.dtype == torch.int64
        assert published.decode(codes).shape == (1, 3, 64, 48)


@pytest.mark.parametrize("name", ["nano", "small"])
def test_small_presets_keep_their_shapes(name: str) -> None:
    config = PRESETS[name]
    model, side = build(config), config.resolution
    with torch.no_grad():
        output = model(pictures(config, 2))
    assert output.codes.shape == (2, config.codes_per_side, config.codes_per_side)
    assert output.reconstruction.shape == (2, 3, side, side)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_survives_json(name: str) -> None:
    assert from_dict(VQConfig, to_dict(PRESETS[name])) == PRESETS[name]


def test_forward_agrees_with_encode_then_decode() -> None:
    model = build(TINY)
    pixels = pictures(TINY, 2)
    with torch.no_grad():
        output = model(pixels)
        assert torch.equal(output.codes, model.encode(pixels))
        # The straight-through sum rounds differently from the codebook's own vectors.
        torch.testing.assert_close(
            output.reconstruction, model.decode(output.codes), rtol=0, atol=1e-4
        )


def test_a_batch_row_does_not_depend_on_its_neighbours() -> None:
    model, pixels = build(TINY), pictures(TINY, 3)
    with torch.no_grad():
        together = model.encode_vectors(pixels)
        alone = torch.cat([model.encode_vectors(p[None]) for p in pixels])
    torch.testing.assert_close(together, alone)


def changed_positions(config: VQConfig) -> Tensor:
    """Which of (h, w) code vectors change when only patch (1, 2)'s pixels do."""
    model, before = build(config), pictures(config)
    f = config.down_factor
    after = before.clone()
    after[:, :, f : 2 * f, 2 * f : 3 * f] *= -1
    with torch.no_grad():
        change = model.encode_vectors(after) - model.encode_vectors(before)
    return change.abs().amax(1)[0] > 0


def test_kernel_1_codes_see_their_own_patch_alone() -> None:
    changed = changed_positions(LOCAL)
    assert changed.nonzero().tolist() == [[1, 2]]


def test_kernel_3_codes_see_further() -> None:
    assert changed_positions(replace(LOCAL, encoder_kernel=3)).sum() > 1


def test_kernel_1_decoder_writes_each_code_into_its_own_patch_alone() -> None:
    model, f = build(LOCAL), LOCAL.down_factor
    before = torch.zeros(1, 4, 4, dtype=torch.int64)
    after = before.clone()
    after[0, 1, 2] = 5
    with torch.no_grad():
        changed = (model.decode(after) - model.decode(before)).abs().amax(1)[0] > 0
    rows, columns = changed.nonzero().unbind(1)
    assert (rows.min(), rows.max()) == (f, 2 * f - 1)
    assert (columns.min(), columns.max()) == (2 * f, 3 * f - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 100}, "not a multiple of the down factor 16"),
        ({"encoder_kernel": 2}, "must be 1 or 3"),
        ({"ch_mult": ()}, "at least 1"),
        ({"n_embed": 0}, "at least 1"),
    ],
)
def test_config_refuses_numbers_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQConfig(**change)


@pytest.mark.parametrize("shape", [(1, 3, 16, 17), (3, 16, 16), (1, 4, 16, 16)])
def test_encode_refuses_wrong_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"multiples of 2"):
        build(TINY).encode(torch.zeros(shape))


def test_nearest_is_the_brute_force_answer_whatever_the_chunk() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(57, 5, generator=generator)
    codebook = torch.randn(11, 5, generator=generator)
    table = torch.cdist(vectors, codebook).square()
    index, distance = nearest(vectors, codebook, chunk=8)
    assert torch.equal(index, table.argmin(1))
    torch.testing.assert_close(distance, table.min(1).values, rtol=1e-4, atol=1e-5)


def test_quantiser_loss_is_the_formula_with_beta_on_the_codebook_term() -> None:
    quantize = VectorQuantizer(2, 1, beta=0.25)
    quantize.restart(torch.tensor([0, 1]), torch.tensor([[0.0], [10.0]]))
    z = torch.tensor([1.0, 7.0]).view(1, 1, 1, 2).requires_grad_()
    z_q, codes, loss = quantize(z)
    assert codes.flatten().tolist() == [0, 1]
    assert z_q.flatten().tolist() == [0.0, 10.0]
    assert loss.item() == pytest.approx(1.25 * (1 + 9) / 2)
    loss.backward()
    assert z.grad is not None
    assert z.grad.flatten().tolist() == pytest.approx([1.0, -3.0])  # 2 (z - e) / 2
    grad = quantize.embedding.weight.grad
    assert grad is not None
    assert grad.flatten().tolist() == pytest.approx([-0.25, 0.75])  # beta 2 (e - z) / 2


def test_straight_through_hands_the_gradient_to_the_encoder_unchanged() -> None:
    quantize = VectorQuantizer(8, 3, beta=0.25)
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    slope = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    z_q, _, _ = quantize(z)
    (z_q * slope).sum().backward()
    assert z.grad is not None
    assert torch.equal(z.grad, slope)
    assert quantize.embedding.weight.grad is None


def test_codebook_starts_within_one_over_n() -> None:
    weight = VectorQuantizer(64, 32, beta=0.25).embedding.weight
    assert weight.abs().max() <= 1 / 64
    assert weight.abs().max() > 0.9 / 64


def test_restart_overwrites_only_the_rows_named() -> None:
    quantize = VectorQuantizer(5, 2, beta=0.25)
    before = quantize.embedding.weight.detach().clone()
    quantize.restart(torch.tensor([1, 3]), torch.tensor([[7.0, 8.0], [9.0, 10.0]]))
    assert quantize.embedding.weight[[1, 3]].tolist() == [[7.0, 8.0], [9.0, 10.0]]
    assert torch.equal(quantize.embedding.weight[[0, 2, 4]], before[[0, 2, 4]])
    with pytest.raises(ValueError, match="1 rows to restart, 2 vectors"):
        quantize.restart(torch.tensor([1]), torch.zeros(2, 2))


def test_kmeans_finds_separate_groups_however_uneven() -> None:
    generator = torch.Generator().manual_seed(0)
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    sizes = (1000, 20, 5, 2)  # most of a picture is background
    groups = [
        m + 0.02 * torch.randn(n, 2, generator=generator)
        for m, n in zip(middles, sizes, strict=True)
    ]
    centres = kmeans(torch.cat(groups), 4, n_iters=5, seed=0)
    nearest_group, _ = nearest(centres, middles)
    assert sorted(nearest_group.tolist()) == [0, 1, 2, 3]
    means = torch.stack([g.mean(0) for g in groups])
    torch.testing.assert_close(centres, means[nearest_group], rtol=0, atol=1e-4)


def test_kmeans_works_with_fewer_distinct_vectors_than_clusters() -> None:
    vectors = torch.tensor([[0.0], [1.0]]).repeat(8, 1)
    centres = kmeans(vectors, 6, n_iters=3, seed=0)
    assert set(centres.flatten().tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match="2 vectors are too few for 3"):
        kmeans(vectors[:2], 3, n_iters=1, seed=0)


def test_discriminator_gives_a_logit_a_patch() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(ch=8)
    assert discriminator(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    assert n_parameters(PatchDiscriminator()) == 2_765_633
    assert discriminator(torch.zeros(2, 3, 24, 24)).shape == (2, 1, 1, 1)


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert discriminator_loss(real, fake).item() == pytest.approx((0.25 + 0.75) / 2)
    assert generator_loss(fake).item() == pytest.approx(0.75)


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    ratio = adaptive_weight((weight * 6).sum(), (weight * 2).sum(), weight)
    assert ratio.item() == pytest.approx(3.0, rel=1e-3)
    assert not ratio.requires_grad
    assert adaptive_weight(weight.sum(), 0 * weight.sum(), weight).item() == 1e4


def test_pixel_loss_weighs_pixels_by_the_map() -> None:
    target = torch.zeros(1, 3, 2, 2)
    output = torch.full((1, 3, 2, 2), 2.0)
    weight = torch.tensor([[4.0, 1.0], [1.0, 1.0]]).view(1, 1, 2, 2)
    assert pixel_loss(output, target, l1=1.0, l2=0.5).item() == pytest.approx(2 + 0.5 * 4)
    assert pixel_loss(output, target, 1.0, 0.5, weight).item() == pytest.approx(4 * 7 / 4)
    with pytest.raises(ValueError, match="weight map"):
        pixel_loss(output, target, 1.0, 0.5, torch.ones(1, 2, 2))


def test_psnr_by_hand() -> None:
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    b[1] = 0.2
    assert psnr(a, b).tolist() == pytest.approx([100.0, 20.0], abs=1e-3)


def test_ssim_equals_its_definition_at_one_window() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, 1, 11, 11, generator=generator).double() for _ in range(2))
    x = torch.arange(11.0, dtype=torch.float64) - 5
    window = torch.exp(-(x[:, None] ** 2 + x[None] ** 2) / 4.5)
    window /= window.sum()
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
    cov = (window * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    expected /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    torch.testing.assert_close(ssim(a, b, peak=1.0)[0], expected)
    assert ssim(a, a, peak=1.0).item() == pytest.approx(1.0)


def test_codebook_metrics_by_hand() -> None:
    counts = code_counts(torch.tensor([[0, 0], [1, 1]]), 8)
    assert counts.tolist() == [2, 2, 0, 0, 0, 0, 0, 0]
    assert codebook_usage(counts) == 0.25
    assert codebook_perplexity(counts) == pytest.approx(2.0)
    assert codebook_perplexity(torch.zeros(8, dtype=torch.int64)) == 0.0


@pytest.mark.parametrize("side", [7, 16, 96])
def test_multiscale_is_zero_on_equals_and_falls_with_blur(side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, side, side, generator=generator) * 2 - 1
    distance = Multiscale()
    assert distance(a, a).item() == pytest.approx(0.0, abs=1e-5)
    noise = torch.randn(a.shape, generator=generator)
    near, far = distance(a + 0.05 * noise, a), distance(a + 0.5 * noise, a)
    assert 0 < near < far
    flat = torch.zeros_like(a, requires_grad=True)
    distance(flat, a).backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def lpips_weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    vgg = {
        name: torch.randn(value.shape, generator=generator) * 0.05
        for name, value in VGG16Features().state_dict().items()
    }
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator)
        for i, c in enumerate((64, 128, 256, 512, 512))
    }
    return vgg, heads


def test_lpips_equals_a_plain_reference(tmp_path: Path) -> None:
    vgg, heads = lpips_weights()
    torch.save({**vgg, "classifier.0.weight": torch.zeros(2)}, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "heads.pth")
    distance = make_perceptual(
        "vgg_lpips", str(tmp_path / "vgg16.pth"), str(tmp_path / "heads.pth")
    )
    assert distance is not None
    assert not any(p.requires_grad for p in distance.parameters())
    a, b = pictures(TINY, 2, seed=1), pictures(TINY, 2, seed=2)

    def maps(x: Tensor) -> list[Tensor]:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = (x - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
        taps = []
        for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            x = F.max_pool2d(x, 2) if stage[0] else x
            for i in stage:
                x = F.conv2d(
                    x, vgg[f"features.{i}.weight"], vgg[f"features.{i}.bias"], padding=1
                ).relu()
            taps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return taps

    expected = torch.zeros(2)
    for i, (fa, fb) in enumerate(zip(maps(a), maps(b), strict=True)):
        expected += (heads[f"lin{i}.model.1.weight"] * (fa - fb) ** 2).sum(1).mean((1, 2))
    torch.testing.assert_close(distance(a, b), expected.mean())
    assert expected.mean() > 0


def test_lpips_refuses_files_that_are_something_else(tmp_path: Path) -> None:
    vgg, heads = lpips_weights()
    with pytest.raises(UserError, match="not a torchvision VGG16"):
        LPIPS({k.replace("features", "trunk"): v for k, v in vgg.items()}, heads)
    with pytest.raises(UserError, match="not a torchvision VGG16"):
        LPIPS(vgg, {})
    with pytest.raises(UserError, match=r"perceptual_path '.*nothing.pth' is not a file"):
        make_perceptual("vgg_lpips", str(tmp_path / "nothing.pth"), "")


def test_hf_backbone_is_a_distance_with_a_gradient(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    transformers.ConvNextModel(config).save_pretrained(tmp_path)
    distance = make_perceptual("hf", str(tmp_path))
    assert distance is not None
    a, b = pictures(TINY, 2, seed=1).requires_grad_(), pictures(TINY, 2, seed=2)
    assert distance(b, b).item() == pytest.approx(0.0, abs=1e-5)
    loss = distance(a, b)
    loss.backward()
    assert loss > 0
    assert a.grad is not None
    assert a.grad.abs().max() > 0
    with pytest.raises(UserError, match="not a folder"):
        make_perceptual("hf", str(tmp_path / "nothing"))
