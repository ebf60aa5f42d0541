"""The published shapes, run and not only counted: one layer of the 7B and of the 34B forward and
backward, and one training step of the image tokenizer at 512 x 512 with its discriminator.

Needs about 12 GiB of memory; one thing at a time is built and freed.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path

import torch
from common import once, parser, report
from torch import nn

from openchameleon.model.config import PRESETS
from openchameleon.model.rope import rope_tables
from openchameleon.model.transformer import Block
from openchameleon.train.vq_step import VQTrainConfig, build_vq_state, vq_train_step
from openchameleon.vqgan.config import PRESETS as VQ_PRESETS


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.manual_seed(0)
    for preset in ("7b", "34b"):
        layer(preset, 16 if args.quick else 256, args.out)
        gc.collect()
    vqgan_step(128 if args.quick else 512, args.out)


def layer(preset: str, n_tokens: int, out: Path | None) -> None:
    config = PRESETS[preset]
    block = Block(config, 0)
    x = torch.randn(1, n_tokens, config.dim, requires_grad=True)
    rope = rope_tables(torch.arange(n_tokens)[None], config)
    cost = once(lambda: block(x, rope, None, None).square().mean().backward())
    for name, parameter in [*block.named_parameters(), ("x", x)]:
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    sizes = {
        "batch": 1, "tokens": n_tokens, "dim": config.dim, "heads": config.n_heads,
        "kv_heads": config.n_kv_heads, "ffn_dim": config.ffn_dim,
    }  # fmt: skip
    report(f"full_shapes/layer_{preset}", out, sizes, params=count(block), **cost)


def vqgan_step(side: int, out: Path | None) -> None:
    """Generator and discriminator, all losses but those that need weights of other models."""
    train = VQTrainConfig(batch_size=1, adversarial_start=0, autoencoder_warmup_steps=0)
    state = build_vq_state(VQ_PRESETS["published"], train)
    assert state.discriminator is not None, "the step was to be adversarial"
    pictures = torch.randint(256, (1, 3, side, side), dtype=torch.uint8)
    losses: dict[str, float] = {}

    def step() -> None:
        output = vq_train_step(state, train, 0, pictures)
        losses.update({name: round(loss.item(), 4) for name, loss in output.losses.items()})

    cost = once(step)
    assert all(map(math.isfinite, losses.values())), losses
    sizes = {"batch": 1, "pixels": side, "codes": (side // 16) ** 2, "codebook": 8192}
    counts = {"params": count(state.model), "discriminator_params": count(state.discriminator)}
    report("full_shapes/vqgan_step", out, sizes, **counts, **cost, losses=losses)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    main()
