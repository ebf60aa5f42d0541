"""What a recipe is: one frozen config, of a whole training from nothing or of one pretraining."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from openchameleon.data.phases import Phase
from openchameleon.data.sources.bad import BadPolicy
from openchameleon.errors import UserError, nearest
from openchameleon.inference.params import SamplingParams
from openchameleon.model.config import ModelConfig
from openchameleon.train.loop import TrainConfig
from openchameleon.train.optim import OptimConfig
from openchameleon.train.parallel import ParallelConfig
from openchameleon.train.vq_step import VQTrainConfig
from openchameleon.vqgan.config import VQConfig
from openchameleon.world.atlas import PRESETS, WorldPreset
from openchameleon.world.tasks import TASKS

STAGES = ("bind", "pretrain", "tune")
"""The runs of the transformer, in their order."""


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The BPE: `n_text` text ids (256 bytes included), learned from `n_samples` samples.

    They are of the data folder, or of the world's own mixture: so a stage's mixture may change and
    the ids stay.
    """

    n_text: int
    n_samples: int = 20_000


@dataclass(frozen=True, slots=True)
class StageConfig:
    """One run of the transformer over `n_shards` shards of `shard_size` samples of a mixture.

    answers_only: of a conversation only the assistant's turns are learned.
    mixture: weights of the world's tasks; unused with a data folder of one's own.
    """

    train: TrainConfig
    optim: OptimConfig
    mixture: dict[str, float]
    n_shards: int
    shard_size: int
    answers_only: bool = True
    foreign_share: float = 0.5


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole training, tokenizers included.

    world: the preset that samples come from; `data`: a folder of records, or of pictures, texts and
    code, used in its place, for every stage; one of the two must be given. bad: what becomes of
    records in `data` that cannot be used. picture_share: the share of the rows of a batch that hold
    records with pictures, where `data` has both kinds; None mixes them as they come.
    foreign_pictures: share of the image tokenizer's pictures drawn by other means. row_len: tokens
    in a packed row. bind: a first, short stage on the densest mixture, in which names bind to codes
    (docs/LOG.md), if there is one; tune: a last one, if there is one. picture_first: the only
    picture of a user's turn is read before its words, in training and in the model that is made.
    examples: prompts that the model is made for, which go into its folder unless it learns `data`.
    """

    name: str
    world: str | None
    text: TextConfig
    vq: VQConfig
    vq_train: VQTrainConfig
    model: ModelConfig
    pretrain: StageConfig
    row_len: int
    bind: StageConfig | None = None
    tune: StageConfig | None = None
    seed: int = 0
    data: str | None = None
    bad: BadPolicy = field(default_factory=BadPolicy)
    picture_share: float | None = None
    foreign_pictures: float = 0.2
    workers: int = 2
    picture_first: bool = True
    sampling: SamplingParams = field(default_factory=SamplingParams)
    examples: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.world is not None and self.world not in PRESETS:
            raise ValueError(f"world = {self.world!r} is not one of {', '.join(PRESETS)}.")
        if self.picture_share is not None and not 0.0 < self.picture_share < 1.0:
            raise ValueError(f"picture_share = {self.picture_share} must lie between 0 and 1.")
        for name, stage in self.stages().items():
            for task in stage.mixture:
                if task not in TASKS:
                    raise ValueError(f"{name}.mixture: no task {task!r}.{nearest(task, TASKS)}")

    @property
    def preset(self) -> WorldPreset:
        """The world that samples come from, where there is no data."""
        if self.world is None:
            raise UserError(
                f"The recipe {self.name!r} learns from files of yours: give their folder as"
                " data=FOLDER."
            )
        return PRESETS[self.world]

    def stages(self) -> dict[str, StageConfig]:
        """The runs that there are, by name, in their order."""
        runs = {name: getattr(self, name) for name in STAGES}
        return {name: stage for name, stage in runs.items() if stage is not None}


@dataclass(frozen=True, slots=True)
class WorldStream:
    """A stream that a run makes for itself: `n_samples` of a mixture of the world's tasks."""

    mixture: dict[str, float]
    n_samples: int
    world: str = "nano"

    def __post_init__(self) -> None:
        if self.world not in PRESETS:
            raise ValueError(f"world = {self.world!r} is not one of {', '.join(PRESETS)}.")
        for task in self.mixture:
            if task not in TASKS:
                raise ValueError(f"mixture: no task {task!r}.{nearest(task, TASKS)}")


@dataclass(frozen=True, slots=True)
class Pretraining:
    """One training of a transformer on prepared streams, in two stages (paper, section 2.2).

    tokenizer: the name or folder of the model whose tokenizers wrote the streams; the new model
    gets them, and with `from_weights` begins with that model's weights too. The vocabulary of
    `model` is theirs, whatever it says. streams: name -> folder, as `prepare` writes it, or a
    stream of the world. first: the weights of streams until `switch_at` of the steps; second: those
    after it, or none for `second_mixture`. parallel: how the processes of `torchrun` are used.
    """

    name: str
    tokenizer: str
    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig
    streams: dict[str, str | WorldStream]
    first: dict[str, float]
    second: dict[str, float] = field(default_factory=dict)
    switch_at: float = 0.8
    from_weights: bool = False
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        if not 0.0 < self.switch_at <= 1.0:
            raise ValueError(f"switch_at = {self.switch_at} must lie in (0, 1].")
        if not self.first:
            raise ValueError("first = {}: at least one stream must have a weight.")
        for stage, mixture in (("first", self.first), ("second", self.second)):
            for name, weight in mixture.items():
                if name not in self.streams:
                    raise ValueError(f"{stage}: no stream {name!r}.{nearest(name, self.streams)}")
                if weight <= 0:
                    raise ValueError(f"{stage}.{name} = {weight} must be above 0.")

    def phases(self) -> list[Phase]:
        """The mixtures, each with the step that it begins at."""
        first = Phase(0, self.first)
        second = Phase(
            round(self.switch_at * self.train.steps),
            self.second or second_mixture(self.first, self.streams),
        )
        return [first, second] if 0 < second.begin < self.train.steps else [first]


def second_mixture(first: Mapping[str, float], streams: Iterable[str]) -> dict[str, float]:
    """The weights of `first` halved; the streams that it leaves out share the other half alike."""
    others = [name for name in streams if name not in first]
    halved = {name: weight / 2 for name, weight in first.items()}
    return halved | {name: sum(halved.values()) / len(others) for name in others}
