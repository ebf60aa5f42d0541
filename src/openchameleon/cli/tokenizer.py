"""Trains and judges tokenizers: the BPE of texts and the VQ-GAN of pictures.

From a folder of pictures and a file of texts to tokenizers of both:

  openchameleon tokenizer image pictures --preset small --out tokenizer train.steps=20000
  openchameleon tokenizer text corpus.jsonl --image-tokenizer tokenizer --out tokenizer.model
  openchameleon tokenizer report tokenizer pictures --out report
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openchameleon.cli.main import Action
from openchameleon.cli.output import make_folder, refuse_existing
from openchameleon.config import config_hash, override
from openchameleon.data.sources import file_stamps
from openchameleon.document import read_jsonl
from openchameleon.errors import UserError, nearest
from openchameleon.image_io import SUFFIXES, open_image, square

if TYPE_CHECKING:
    from torch import Tensor

    from openchameleon.tokenizer.image import ImageTokenizer


def add_text_arguments(text: argparse.ArgumentParser) -> None:
    text.add_argument("corpus", type=Path, help="a text file, or JSON lines of records")
    text.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .model file")
    text.add_argument("--n-text", type=int, default=4096, metavar="N",
                      help="pieces, the 256 bytes among them (%(default)s)")  # fmt: skip
    text.add_argument("--image-tokenizer", type=Path, metavar="DIR",
                      help="leave ids for its codes (else for the 8192 published)")  # fmt: skip


def run_text(options: argparse.Namespace) -> int:
    """Trains a BPE that gives every text back as it was and leaves ids for picture codes."""
    if options.out.suffix != ".model":
        raise UserError(f"--out is {options.out}; a text tokenizer's name ends in .model.")
    refuse_existing(options.out)
    texts = read_texts(options.corpus)
    make_folder(options.out.parent)
    from openchameleon.tokenizer.image import ImageTokenizer
    from openchameleon.tokenizer.text import train_text_tokenizer

    n_codes, codes_per_item = 8192, 1024
    if options.image_tokenizer is not None:
        image = ImageTokenizer.load(options.image_tokenizer)
        n_codes, codes_per_item = image.codebook_size, image.n_codes
    tokenizer = train_text_tokenizer(texts, options.n_text, n_codes, codes_per_item)
    tokenizer.save(options.out)
    n_characters = sum(map(len, texts))
    n_ids = sum(len(tokenizer.encode(text)) for text in texts[:1000])
    ratio = sum(map(len, texts[:1000])) / max(n_ids, 1)
    print(f"{options.out}: {options.n_text} pieces from {n_characters} characters,"
          f" {ratio:.2f} characters a piece")  # fmt: skip
    return 0


def add_image_arguments(image: argparse.ArgumentParser) -> None:
    image.add_argument("pictures", type=Path, help="a folder, searched to its bottom")
    image.add_argument(
        "changes", nargs="*", default=(), metavar="a.b=c", help="such as train.lr=1e-4"
    )
    image.add_argument("--preset", default="small", help="sizes to begin from (%(default)s)")
    image.add_argument("--out", type=Path, required=True, metavar="DIR",
                       help="the tokenizer; a run cut off goes on from DIR/run")  # fmt: skip
    image.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                       help="where it trains (%(default)s)")  # fmt: skip


def run_image(options: argparse.Namespace) -> int:
    """Trains the VQ-GAN on a folder of pictures; `vq.` changes its sizes, `train.` its training."""
    import torch

    from openchameleon.tokenizer.image import ImageTokenizer
    from openchameleon.train.image_tokenizer import train_image_tokenizer
    from openchameleon.train.vq_step import VQTrainConfig
    from openchameleon.vqgan.config import PRESETS, VQConfig

    run_config = make_dataclass("RunConfig", [("vq", VQConfig), ("train", VQTrainConfig)])
    if options.preset not in PRESETS:
        raise UserError(
            f"Unknown preset {options.preset!r}.{nearest(options.preset, PRESETS)}"
            f" The presets are {', '.join(PRESETS)}."
        )
    chosen = override(run_config(PRESETS[options.preset], VQTrainConfig()), options.changes)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no GPU that PyTorch can use; leave --device out.")
    if not (options.out / "run").is_dir():
        refuse_existing(options.out / "config.json")
    files = find_pictures(options.pictures)
    batches = picture_batches(files, chosen.vq.resolution, chosen.train.seed)
    model = train_image_tokenizer(
        chosen.vq,
        chosen.train,
        batches,
        None,
        options.out / "run",
        options.device,
        data=config_hash(file_stamps(files, options.pictures)),
    )
    ImageTokenizer(model, chosen.vq).save(options.out)
    print(f"{options.out}: {chosen.train.steps} steps over {len(files)} pictures")
    return 0


def add_report_arguments(report: argparse.ArgumentParser) -> None:
    report.add_argument("tokenizer", help="its folder, or a model's folder or embedded name")
    report.add_argument("pictures", type=Path, help="a folder, searched to its bottom")
    report.add_argument("--out", type=Path, required=True, metavar="DIR", help="the report")
    report.add_argument("--n", type=int, default=256, help="pictures at most (%(default)s)")


def run_report(options: argparse.Namespace) -> int:
    """Shows originals beside reconstructions, with PSNR, SSIM and the codebook's use."""
    if options.n < 1:
        raise UserError(f"--n is {options.n}; it must be at least 1.")
    refuse_existing(options.out / "report.json")
    files = find_pictures(options.pictures)[: options.n]
    make_folder(options.out)
    from openchameleon.evaluation.reconstruction import write_report

    tokenizer = load_image_tokenizer(options.tokenizer)
    numbers = write_report(tokenizer, map(open_image, files), options.out)
    print(json.dumps(numbers, indent=2))
    return 0


def load_image_tokenizer(name_or_folder: str) -> ImageTokenizer:
    """An image tokenizer's own folder, or that of a model. UserError says what was sought."""
    from openchameleon.model_folder import IMAGE_TOKENIZER, find_model
    from openchameleon.tokenizer.image import ImageTokenizer

    folder = find_model(name_or_folder)
    inside = folder / IMAGE_TOKENIZER
    return ImageTokenizer.load(inside if inside.is_dir() else folder)


def find_pictures(folder: Path) -> list[Path]:
    """Picture files under a folder, sorted. UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder} has no pictures ({', '.join(sorted(SUFFIXES))}).")
    return files


def picture_batches(files: list[Path], side: int, seed: int) -> Callable[[int, int], Tensor]:
    """`(step, batch size) -> (B, 3, side, side) uint8`: each epoch sees every file once.

    The order is a function of (seed, epoch) alone, so that a resumed run goes on where it was.
    """
    import torch

    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(len(files), generator=generator).tolist()

    def batch(step: int, batch_size: int) -> Tensor:
        places = range(step * batch_size, (step + 1) * batch_size)
        orders = {epoch: order(epoch) for epoch in {i // len(files) for i in places}}
        chosen = [files[orders[i // len(files)][i % len(files)]] for i in places]
        raw = b"".join(square(open_image(path), side).tobytes() for path in chosen)
        pixels = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        return pixels.view(batch_size, side, side, 3).permute(0, 3, 1, 2).contiguous()

    return batch


def read_texts(path: Path) -> list[str]:
    """The texts of a JSON lines file of records, else the lines of a text file. UserError."""
    try:
        if path.suffix == ".jsonl":
            texts = [text for _, record in read_jsonl(path) for text in _texts_of(record)]
        else:
            texts = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not any(text.strip() for text in texts):
        raise UserError(f"{path} has no text to train on.")
    return texts


def _texts_of(node: object) -> Iterator[str]:
    """Every "text" in a record, however deep."""
    if isinstance(node, dict):
        if isinstance(node.get("text"), str):
            yield node["text"]
        for value in node.values():
            yield from _texts_of(value)
    elif isinstance(node, list):
        for item in node:
            yield from _texts_of(item)


ACTIONS = {
    "text": Action("train the text tokenizer", add_text_arguments, run_text),
    "image": Action("train the image tokenizer", add_image_arguments, run_image),
    "report": Action(
        "originals beside reconstructions, and numbers", add_report_arguments, run_report
    ),
}
