"""Which steps a run leaves out: those not finite, and those far outside of what came before.

Every process of a run sees the same numbers and so decides the same.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openchameleon.errors import Diverged

MAX_NOT_FINITE = 3
"""As many steps not finite in a row end a run."""


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """What is an outlying step: its loss or gradient norm lies more than `sigmas` deviations above
    the mean of the last `window` steps that were taken. 0 leaves none out.

    least: steps to see before judging. most: as many outlying steps in a row end a run, since a
    level that stays is no outlier.
    """

    sigmas: float = 0.0
    window: int = 128
    least: int = 64
    most: int = 5

    def __post_init__(self) -> None:
        if self.sigmas < 0 or self.most < 1:
            raise ValueError(f"sigmas = {self.sigmas} must be 0 or more, most = {self.most} 1.")
        if not 2 <= self.least <= self.window:
            raise ValueError(f"least = {self.least} must lie in [2, window = {self.window}].")


class StepLeftOut(FloatingPointError):
    """A step that was not taken, and why; the weights are as they were before it."""


class Guard:
    """Remembers the steps taken, and judges the next. Its state is a run's, saved with it.

    Steps that are left out are not remembered: one of them cannot hide the next.
    """

    def __init__(self, config: GuardConfig, state: Mapping[str, Any] | None = None) -> None:
        self.config = config
        state = state or {"losses": [], "norms": [], "not_finite": 0, "outlying": 0}
        self.losses: deque[float] = deque(state["losses"], config.window)
        self.norms: deque[float] = deque(state["norms"], config.window)
        self.not_finite, self.outlying = state["not_finite"], state["outlying"]  # in a row

    def state(self) -> dict[str, Any]:
        """JSON data from which a guard goes on."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "not_finite": self.not_finite,
            "outlying": self.outlying,
        }

    def judge(self, loss: float, grad_norm: float) -> None:
        """Counts a step that is about to be taken; raises StepLeftOut where it must not be."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.not_finite += 1
            raise StepLeftOut(f"loss {loss}, gradient norm {grad_norm}")
        for name, value, before in (
            ("loss", loss, self.losses),
            ("gradient norm", grad_norm, self.norms),
        ):
            if (bound := self._bound(before)) is not None and value > bound:
                self.outlying += 1
                raise StepLeftOut(
                    f"{name} {value:.4g} lies above {bound:.4g}, {self.config.sigmas:g} deviations"
                    f" over the mean of {len(before)} steps"
                )
        self.losses.append(loss)
        self.norms.append(grad_norm)
        self.not_finite = self.outlying = 0

    def _bound(self, values: Sequence[float]) -> float | None:
        if not self.config.sigmas or len(values) < self.config.least:
            return None
        return statistics.fmean(values) + self.config.sigmas * statistics.pstdev(values)

    def end_if_hopeless(self, step: int) -> None:
        """Raises Diverged where too many steps in a row were left out, the last one `step`."""
        if self.not_finite >= MAX_NOT_FINITE:
            raise Diverged(
                f"{MAX_NOT_FINITE} steps in a row were not finite, the last one {step}; train with"
                " a lower optim.lr."
            )
        if self.outlying >= self.config.most:
            raise Diverged(
                f"{self.config.most} steps in a row were left out as outlying, the last one {step}:"
                " the loss has risen to stay. Go back with `openchameleon rewind`, or raise"
                " train.guard.sigmas."
            )
