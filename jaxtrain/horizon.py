"""A horizon: how long something lasts, in steps, epochs or percent of the run."""

import dataclasses
import re
from decimal import Decimal
from typing import Literal

from jaxtrain.errors import UserError

_TEXT = re.compile(r"(\d+(?:\.\d+)?(?:[eE]\d+)?)(steps?|epochs?|%)?")
Unit = Literal["steps", "epochs", "percent"]
_UNITS: dict[str | None, Unit] = {
    None: "steps",
    "step": "steps",
    "steps": "steps",
    "epoch": "epochs",
    "epochs": "epochs",
    "%": "percent",
}


class Steps(float):
    """A number of steps that a horizon came to, which need not be whole: 5% of 50 steps.

    >>> Steps(2.5)
    2.5
    """


@dataclasses.dataclass(frozen=True)
class Horizon:
    """A length of training that a run turns into steps once it knows its data.

    >>> Horizon.parse("2epochs").steps(total_steps=100, steps_per_epoch=11.25)
    22.5
    >>> str(Horizon.parse("5%")), str(Horizon.parse("200"))
    ('5%', '200steps')
    """

    value: float
    unit: Unit = "steps"

    @classmethod
    def parse(cls, text: str) -> "Horizon":
        """Reads `200`, `200steps`, `2epochs` or `5%`; `UserError` for anything else."""
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise UserError(f"{text!r}: not a horizon; expected e.g. 200, 200steps, 2epochs or 5%")
        horizon = cls(float(match[1]), _UNITS[match[2]])
        if horizon.unit == "steps" and horizon.value != int(horizon.value):
            raise UserError(
                f"{text!r}: steps must be a whole number; for a part of the run write e.g. 5%"
            )
        if horizon.unit == "percent" and horizon.value > 100:
            raise UserError(f"{text!r}: must be at most 100%")
        return horizon

    def steps(self, *, total_steps: float, steps_per_epoch: float) -> float:
        """The same length in steps (not rounded: schedules are continuous)."""
        scale = {"steps": 1.0, "epochs": steps_per_epoch, "percent": total_steps / 100}
        return self.value * scale[self.unit]

    def __str__(self) -> str:
        """The text that `parse` reads back, which takes no negative exponent."""
        number = f"{Decimal(repr(self.value)):f}".removesuffix(".0")
        return number + ("%" if self.unit == "percent" else self.unit)
