"""What several files share: a tiny model of random weights, and the web page in a browser."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from page_driver import Person
    from playwright.sync_api import Browser
    from serving import Running

    from openchameleon import Chameleon


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from page_driver import CHROMIUM, launch
    from playwright.sync_api import expect, sync_playwright

    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium fonts-dejavu-core")
    with sync_playwright() as playwright:
        expect.set_options(timeout=20_000)
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_model() -> Chameleon:
    from openchameleon import Chameleon

    return Chameleon.from_pretrained("nano")


@pytest.fixture(scope="module")
def page_server(page_model: Chameleon) -> Iterator[Running]:
    from serving import serving

    with serving(lambda: page_model) as running:
        yield running


@pytest.fixture
def visit(browser: Browser, page_server: Running) -> Iterator[Callable[..., Person]]:
    """Opens the page as a new person; whatever a test does, nothing may leave the origin."""
    from page_driver import Person

    people: list[Person] = []

    def visit(at: str = page_server.url, **context: Any) -> Person:
        people.append(Person(browser.new_context(**context).new_page(), at))
        return people[-1]

    yield visit
    for person in people:
        person.page.context.close()
        own = (person.address, "data:", "blob:")
        assert [url for url in person.requested if not url.startswith(own)] == []
        # A refused request is logged by the browser; anything else is a fault of the page.
        assert [c for c in person.complaints if "Failed to load resource" not in c] == []


@pytest.fixture
def slow_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes its time, so that what happens on the way can be seen."""
    from openchameleon.inference.engine import Engine

    step = Engine.step

    def slow_step(self: Engine) -> object:
        self.lookahead = 0  # a code a step: pictures would be whole before one could look
        time.sleep(0.03)
        return step(self)

    monkeypatch.setattr(Engine, "step", slow_step)
