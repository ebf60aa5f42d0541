"""The tokenizers of the nano size: megabytes of text and pictures a second, each way."""

from __future__ import annotations

from dataclasses import replace

import torch
from common import Run, medians, parser, report

from openchameleon.pipeline import Chameleon, embedded_models
from openchameleon.recipes import pictures
from openchameleon.recipes.config import TextConfig
from openchameleon.recipes.nano import recipe
from openchameleon.tokenizer.image import ImageTokenizer
from openchameleon.tokenizer.text import TextTokenizer, train_text_tokenizer
from openchameleon.vqgan.model import VQModel
from openchameleon.world.render import render
from openchameleon.world.sample import MIXTURE, all_texts
from openchameleon.world.splits import dense_scene


def main() -> None:
    args = parser(__doc__).parse_args()
    n_samples, n_pictures = (50, 2) if args.quick else (2000, 64)
    text, image, name = load(quick=args.quick)
    preset = recipe().preset
    texts = list(all_texts(preset, MIXTURE, n_samples, seed=1))
    ids = [text.encode(t) for t in texts]
    drawn = [render(dense_scene(i, preset), preset) for i in range(n_pictures)]
    codes = image.encode(drawn)

    runs: dict[str, Run] = {
        "text_encode": lambda: [text.encode(t) for t in texts],
        "text_decode": lambda: [text.decode(i) for i in ids],
        "picture_encode": lambda: image.encode(drawn),
        "picture_encode_one": lambda: image.encode(drawn[:1]),
        "picture_decode": lambda: image.decode(codes),
        "picture_decode_one": lambda: image.decode(codes[:1]),
    }
    seconds = medians(runs, 1 if args.quick else 7)
    n_bytes, n_ids = sum(len(t.encode()) for t in texts), sum(map(len, ids))
    for case, took in seconds.items():
        if case.startswith("text"):
            sizes = {"model": name, "texts": len(texts), "bytes": n_bytes, "ids": n_ids}
            report(f"tokenizer/{case}", args.out, sizes, mb_per_s=n_bytes / 1e6 / took)
        else:
            n = 1 if case.endswith("one") else n_pictures
            sizes = {"model": name, "pictures": n, "pixels": image.resolution}
            report(f"tokenizer/{case}", args.out, sizes, pictures_per_s=n / took)


def load(quick: bool) -> tuple[TextTokenizer, ImageTokenizer, str]:
    """The embedded model's; without one, a BPE trained here and an image tokenizer untrained."""
    if "nano" in embedded_models():
        tokenizer = Chameleon.from_pretrained("nano", device="cpu").tokenizer
        assert tokenizer.image is not None, "the embedded model reads pictures"
        return tokenizer.text, tokenizer.image, "nano"
    nano = recipe()
    if quick:
        nano = replace(nano, text=TextConfig(n_text=600, n_samples=500))
    vq, n_text = nano.vq, nano.text.n_text
    text = train_text_tokenizer(pictures.texts(nano), n_text, vq.n_embed, vq.n_codes_per_image)
    torch.manual_seed(0)
    return text, ImageTokenizer(VQModel(vq), vq), "nano, untrained"


if __name__ == "__main__":
    main()
