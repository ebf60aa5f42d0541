"""Converts checkpoints: Meta's and Hugging Face's Chameleon layouts and ours, each to each.

A text-only Llama in Hugging Face's layout becomes a mixed-modal model, to be trained, where it is
given an image tokenizer.

  openchameleon convert chameleon-7b-hf model --to native --verify
  openchameleon convert models/7b model-hf --to hf --allow-pickle
  openchameleon convert llama start --to native --image-tokenizer tokenizer --qk-norm

The manifest of the new folder lists its files with their sha256. docs/checkpoints.md says what each
layout can hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from openchameleon.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a folder of any of the layouts")
    parser.add_argument("target", type=Path, help="a new folder")
    parser.add_argument("--to", choices=("native", "hf", "meta"), required=True,
                        help="the layout of the new folder")  # fmt: skip
    parser.add_argument("--allow-pickle", action="store_true",
                        help="read Meta's .pth files, which are pickles")  # fmt: skip
    parser.add_argument("--allow-nonfinite", action="store_true",
                        help="carry infinite numbers and NaN over")  # fmt: skip
    parser.add_argument("--verify", action="store_true",
                        help="read the new folder back: sums, tensors and logits")  # fmt: skip
    parser.add_argument("--image-tokenizer", type=Path, metavar="DIR",
                        help="begin a mixed-modal model from a text-only Llama")  # fmt: skip
    parser.add_argument("--qk-norm", action="store_true",
                        help="with --image-tokenizer: add the paper's QK-norm")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0,
                        help="with --image-tokenizer: of the new rows (%(default)s)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from openchameleon.checkpoints.convert import WarmStart, convert

    images = options.image_tokenizer
    if options.qk_norm and images is None:
        raise UserError("--qk-norm is for a start from a Llama; give --image-tokenizer too.")
    manifest = convert(
        options.source,
        options.target,
        options.to,
        allow_pickle=options.allow_pickle,
        allow_nonfinite=options.allow_nonfinite,
        verify=options.verify,
        warm_start=WarmStart(images, options.qk_norm, options.seed) if images else None,
    )
    n_bytes = sum(file["bytes"] for file in manifest["files"].values())
    verified = ", verified: the same tensors, the same logits" if options.verify else ""
    print(
        f"{options.target}: {manifest['from']} -> {options.to}, {n_bytes / 2**20:.1f} MiB{verified}"
    )
    return 0
