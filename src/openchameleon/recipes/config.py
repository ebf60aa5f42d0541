"""What a recipe is: one frozen config for everything from nothing to a model folder."""

from __future__ import annotations

from dataclasses import dataclass, field

from openchameleon.errors import nearest
from openchameleon.inference.params import SamplingParams
from openchameleon.model.config import ModelConfig
from openchameleon.train.loop import TrainConfig
from openchameleon.train.optim import OptimConfig
from openchameleon.train.vq_step import VQTrainConfig
from openchameleon.vqgan.config import VQConfig
from openchameleon.world.atlas import PRESETS
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

    world: the preset that samples come from; `data`: a folder of records or of captioned pictures
    used in its place, for every stage. foreign_pictures: share of the image tokenizer's pictures
    drawn by other means. row_len: tokens in a packed row. bind: a first, short stage on the densest
    mixture, in which names bind to codes (docs/LOG.md), if there is one. picture_first: the only
    picture of a user's turn is read before its words, in training and in the model that is made.
    """

    name: str
    world: str
    text: TextConfig
    vq: VQConfig
    vq_train: VQTrainConfig
    model: ModelConfig
    pretrain: StageConfig
    tune: StageConfig
    row_len: int
    bind: StageConfig | None = None
    seed: int = 0
    data: str | None = None
    foreign_pictures: float = 0.2
    workers: int = 2
    picture_first: bool = True
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        if self.world not in PRESETS:
            raise ValueError(f"world = {self.world!r} is not one of {', '.join(PRESETS)}.")
        for name, stage in self.stages().items():
            for task in stage.mixture:
                if task not in TASKS:
                    raise ValueError(f"{name}.mixture: no task {task!r}.{nearest(task, TASKS)}")

    def stages(self) -> dict[str, StageConfig]:
        """The runs that there are, by name, in their order."""
        runs = {name: getattr(self, name) for name in STAGES}
        return {name: stage for name, stage in runs.items() if stage is not None}
