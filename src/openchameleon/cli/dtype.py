"""The option of commands that generate: how the model's weights are held."""

from __future__ import annotations

import argparse


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """`--dtype`, for `Chameleon.from_pretrained`."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"),
                        help="how weights are held: the smaller, the faster; int8 rounds them"
                             " (float32 on a CPU, else as in the file)")  # fmt: skip
