"""A horizon: how long something lasts, in steps, epochs, tokens or percent of the run."""

import dataclasses
import re
from decimal import Decimal
from typing import Literal

from jaxtrain.errors import UserError

_TEXT = re.compile(r"(\d+(?:\.\d+)?(?:[eE]\d+)?)(steps?|epochs?|%|([KMBTkmbt])?tokens?)?")
_COUNT = re.compile(r"(\d+(?:\.\d+)?(?:[eE]\d+)?)([KMBTkmbt])?")
SCALES = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 1000}
Unit = Literal["steps", "epochs", "tokens", "percent"]
_UNITS: dict[str | None, Unit] = {
    None: "steps",
    "step": "steps",
    "steps": "steps",
    "epoch": "epochs",
    "epochs": "epochs",
    "%": "percent",
}


class TokenCount(int):
    """A number of tokens, which may be written with K, M, B or T, or k, m, b or t.

    >>> TokenCount.parse("1.5B"), TokenCount.parse("2k"), str(TokenCount(300_000))
    (1500000000, 2000, '300K')
    """

    @classmethod
    def parse(cls, text: str) -> "TokenCount":
        """Reads `1000000`, `1M` or `1e6`; `UserError` for anything else."""
        match = _COUNT.fullmatch(text.strip())
        if match is None:
            raise UserError(f"{text!r}: not a number of tokens; expected e.g. 300K, 10M or 1.5B")
        count = Decimal(match[1]) * SCALES.get((match[2] or "").upper(), 1)
        if count != int(count):
            raise UserError(f"{text!r}: must be a whole number of tokens")
        return cls(count)

    def __str__(self) -> str:
        """The shortest text that `parse` reads back."""
        for letter, scale in SCALES.items():
            if self and not self % scale:
                return f"{int(self) // scale}{letter}"
        return str(int(self))

    __repr__ = int.__repr__


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
        """Reads `200`, `200steps`, `2epochs`, `10Mtokens` or `5%`; `UserError` for anything
        else."""
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise UserError(f"{text!r}: not a horizon; expected e.g. 200, 200steps, 2epochs or 5%")
        if match[2] and "token" in match[2]:
            return cls(float(TokenCount.parse(match[1] + (match[3] or ""))), "tokens")
        horizon = cls(float(match[1]), _UNITS[match[2]])
        if horizon.unit == "steps" and horizon.value != int(horizon.value):
            raise UserError(
                f"{text!r}: steps must be a whole number; for a part of the run write e.g. 5%"
            )
        if horizon.unit == "percent" and horizon.value > 100:
            raise UserError(f"{text!r}: must be at most 100%")
        return horizon

    def steps(
        self, *, total_steps: float, steps_per_epoch: float, tokens_per_step: float | None = None
    ) -> float:
        """The same length in steps (not rounded: schedules are continuous)."""
        if self.unit == "tokens":
            if not tokens_per_step:
                raise UserError(f"{self}: no tokens are counted here; give steps, epochs or %")
            return self.value / tokens_per_step
        scale = {"steps": 1.0, "epochs": steps_per_epoch, "percent": total_steps / 100}
        return self.value * scale[self.unit]

    def __str__(self) -> str:
        """The text that `parse` reads back, which takes no negative exponent."""
        if self.unit == "tokens":
            return f"{TokenCount(self.value)}tokens"
        number = f"{Decimal(repr(self.value)):f}".removesuffix(".0")
        return number + ("%" if self.unit == "percent" else self.unit)
