"""Fixtures that several files share: a tiny model of random weights, as a folder and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest


def _text() -> list[str]:
    words = ["cat", "dog", "pizza", "top", "left", "draw", "a", "the", "and", "what", "is", "at"]
    return [f"{a} {b} {c}" for a in words for b in words for c in words]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder: 16 x 16 pictures of 4 codes, a small BPE, a context of 64 ids."""
    import torch

    from openchameleon.inference.params import ModalityParams, SamplingParams
    from openchameleon.model.config import ModelConfig
    from openchameleon.model.transformer import Transformer
    from openchameleon.pipeline import Chameleon, FolderConfig
    from openchameleon.tokenizer.image import ImageTokenizer
    from openchameleon.tokenizer.mixed import MixedTokenizer
    from openchameleon.tokenizer.text import train_text_tokenizer
    from openchameleon.vocab import Vocab
    from openchameleon.vqgan.config import VQConfig
    from openchameleon.vqgan.model import VQModel

    vq = VQConfig(ch=32, ch_mult=(1,), n_res_blocks=1, z_channels=8, embed_dim=8, n_embed=16,
                  resolution=16, stem=8, mid_attention=False)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = ImageTokenizer(VQModel(vq), vq)
    text = train_text_tokenizer(_text(), n_text=300, n_codes=16, codes_per_item=4)
    vocab = Vocab.compact(n_codes=16, codes_per_item=4, n_text=300)
    shape = ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, vocab_size=vocab.size,
                        max_seq_len=64, ffn_dim=64)  # fmt: skip
    model = Transformer(shape)
    model.init_weights(seed=0)
    sampling = SamplingParams(text=ModalityParams(temperature=0.9), seed=7)
    config = FolderConfig("tiny", vocab, shape, sampling=sampling)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    Chameleon(config, model, MixedTokenizer(vocab, text, image)).save(folder)
    return folder
