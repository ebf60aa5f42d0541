"""The exam of the emoji world: a perfect answerer scores 1, an empty one and chance score 0."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from openchameleon.document import Conversation, Document, Image, Text
from openchameleon.errors import UserError
from openchameleon.evaluation import world as exam
from openchameleon.evaluation.reconstruction import write_report
from openchameleon.tokenizer.image import ImageTokenizer
from openchameleon.vocab import Vocab
from openchameleon.vqgan.config import VQConfig
from openchameleon.vqgan.model import VQModel
from openchameleon.world.atlas import PRESETS
from openchameleon.world.render import render
from openchameleon.world.sample import write_record
from openchameleon.world.stories import continue_text

NANO = PRESETS["nano"]
VOCAB = Vocab.compact(16, 36, 300)


class PictureBook:
    """A tokenizer that keeps pictures and texts by number: ids are places on its shelf.

    They lie beyond the vocabulary, so that none is taken for a picture's begin.
    """

    def __init__(self) -> None:
        self.shelf: list[Text | Image] = []

    def encode(self, document: Document) -> list[int]:
        first = VOCAB.size + len(self.shelf)
        self.shelf += document.segments
        return list(range(first, first + len(document)))

    def decode(self, token_ids: Sequence[int]) -> Document:
        return Document([self.shelf[i - VOCAB.size] for i in token_ids])


class Answerer:
    """Stands for a Chameleon: answers prompt by prompt with what `answer` returns."""

    config = SimpleNamespace(name="nano", vocab=VOCAB)

    def __init__(self, tokenizer: PictureBook, answers: dict[str, list[Document]]) -> None:
        self.tokenizer, self.answers = tokenizer, answers

    def complete_many(self, prompts: Sequence[Any], *, raw: bool, params: Any) -> list[list[int]]:
        return [self.tokenizer.encode(self.answer(p, raw)) for p in prompts]

    def answer(self, prompt: Document | Conversation, raw: bool) -> Document:
        if raw:
            return drawn_story(prompt)
        last = prompt.messages[-1].document if isinstance(prompt, Conversation) else prompt
        return self.answers[last.text].pop(0)


def drawn_story(prompt: Document) -> Document:
    """The picture due after the sentences so far."""
    background, scene = "", None
    for sentence in (s.text for s in prompt if isinstance(s, Text)):
        scene = continue_text(scene, sentence, NANO.grid, NANO.emoji)
        assert scene is not None
    background = scene.background or "white"
    return Document([Image(render(type(scene)(background, scene.objects), NANO))])


def perfect(n: int, seed: int) -> Answerer:
    """Knows the answer of every sample of the exam."""
    answers: dict[str, list[Document]] = {}
    for split, tasks in exam.EXAMS.items():
        for task in tasks:
            if task == "told_story":
                continue
            for i in range(4 * n if task == "story_turn" else n):  # some requests repeat
                turns = write_record(task, split, (seed << 32) + i, NANO).record.messages
                at = 1 if task == "story_turn" else len(turns) - 1
                answers.setdefault(turns[at - 1].document.text, []).append(turns[at].document)
    return Answerer(PictureBook(), answers)


@pytest.fixture(scope="module")
def perfect_scores() -> dict[str, Any]:
    return exam.evaluate_world(perfect(6, 3), n=6, seed=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("split", list(exam.EXAMS))
def test_right_answers_score_one(perfect_scores: dict[str, Any], split: str) -> None:
    scores = perfect_scores["splits"][split]
    ceiling, by_kind = scores["ceiling"], scores["question_by_kind"]
    scores = {k: v for k, v in scores.items() if k not in ("ceiling", "question_by_kind")}
    said = {k: v for k, v in scores.items() if v is not None}
    assert said == dict.fromkeys(said, 1.0)
    assert said
    assert by_kind is None or set(by_kind.values()) == {1.0}
    # this tokenizer loses nothing; foreign pictures are not the checker's to read
    assert split == "foreign" or ceiling == {"picture_exact": 1.0, "picture_objects": 1.0}


def test_every_split_has_every_key(perfect_scores: dict[str, Any]) -> None:
    for scores in perfect_scores["splits"].values():
        assert set(scores) == {*exam.SCORES, "ceiling", "question_by_kind"}


def test_scores_without_meaning_are_null(perfect_scores: dict[str, Any]) -> None:
    assert perfect_scores["splits"]["longer_stories"]["question"] is None
    assert perfect_scores["splits"]["foreign"]["picture_exact"] is None


def test_empty_answers_score_zero() -> None:
    class Silent(Answerer):
        def answer(self, prompt: Document | Conversation, raw: bool) -> Document:
            return Document()

    scores = exam.evaluate_world(Silent(PictureBook(), {}), n=4, seed=0)["splits"]  # type: ignore[arg-type]
    for split in scores.values():
        del split["ceiling"], split["question_by_kind"]
        assert {v for v in split.values() if v is not None} == {0.0}


def test_constant_answers_score_near_nothing() -> None:
    class Stubborn(Answerer):
        def answer(self, prompt: Document | Conversation, raw: bool) -> Document:
            return Document([Image(PIL.Image.new("RGB", (96, 96), (255, 255, 255)))])

    scores = exam.evaluate_world(Stubborn(PictureBook(), {}), n=30, seed=0, splits=["iid"])  # type: ignore[arg-type]
    iid = scores["splits"]["iid"]
    del iid["ceiling"], iid["question_by_kind"]
    assert max(v for v in iid.values() if v is not None) < 0.05


def test_one_story_for_every_request_is_hardly_ever_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flawless story that is not of what was asked counts for "Tell a story." alone."""
    samples = (write_record("story_turn", "iid", i, NANO) for i in itertools.count())
    free = next(s for s in samples if s.meta.kind == "free")
    told = free.record.messages[1].document
    monkeypatch.setitem(exam.EXAMS, "iid", ("story_turn",))  # nothing else is asked about

    class Stubborn(Answerer):
        def answer(self, prompt: Document | Conversation, raw: bool) -> Document:
            return told

    scores = exam.evaluate_world(Stubborn(PictureBook(), {}), n=40, splits=["iid"])  # type: ignore[arg-type]
    assert 0.0 < scores["splits"]["iid"]["story_pictures_fit"] < 0.06


def test_a_moved_object_is_not_exact() -> None:
    class Sloppy(Answerer):
        def answer(self, prompt: Document | Conversation, raw: bool) -> Document:
            right = super().answer(prompt, raw)
            return Document(
                Image(s.pil.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT))
                if isinstance(s, Image)
                else s
                for s in right
            )

    model = Sloppy(PictureBook(), perfect(12, 3).answers)
    scores = exam.evaluate_world(model, n=12, seed=3, splits=["unseen_cells"])  # type: ignore[arg-type]
    assert scores["splits"]["unseen_cells"]["picture_exact"] < 0.5


def test_a_picture_with_a_code_too_few_is_counted() -> None:
    image = VOCAB.image
    whole = image.ids_from_codes([3] * 36)
    short = [image.begin_id, *whole[2:]]
    assert exam._items_whole([*whole, *short, 300], image) == [True, False]


def test_unknown_split_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'foreign'"):
        exam.evaluate_world(perfect(0, 0), splits=["foriegn"])  # type: ignore[arg-type]


def test_reconstruction_report_counts_and_draws(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = VQConfig(
        ch=8, ch_mult=(1,), n_res_blocks=1, z_channels=8, embed_dim=8, n_embed=16, resolution=16,
        stem=4, encoder_kernel=1, decoder_kernel=1, mid_attention=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    pictures = [
        PIL.Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(20)
    ]
    report = write_report(ImageTokenizer(VQModel(config), config), iter(pictures), tmp_path)
    assert report["n_pictures"] == 20
    assert 0 < report["usage"] <= 1
    assert report["psnr"] < 20  # random weights
    with PIL.Image.open(tmp_path / "reconstructions.png") as sheet:
        assert sheet.width > 1000
    with pytest.raises(UserError):
        write_report(ImageTokenizer(VQModel(config), config), iter([]), tmp_path)
