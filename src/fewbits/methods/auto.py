"""Auto: recipes tried one after the other on the model itself, and the one that is best on held-out text is kept.

No recipe is best for every model and width: rotations help where channels stand out, factors (AWQ) where rounding is
coarse, signed gradients where the layers of a block depend on each other. What decides is the divergence of predictions
on text that nothing is calibrated on, after every block has been quantized. The first recipe always runs; a further one
only if it is expected to be done in the time that is left; what remains is spent on training the best one end to end
(`tune`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewbits.methods.base import Method

CANDIDATES = ("gptq", "rotate+gptq", "awq+gptq", "signround")


@dataclass(frozen=True)
class Auto(Method):
    """minutes: that all of it may take. candidates: recipes, in the order in which they are tried. steps: of training
    in the end, at most; batch: windows in each of them.
    """

    minutes: float = 30.0
    candidates: tuple[str, ...] = CANDIDATES
    steps: int = 400
    batch: int = 8

    summary: ClassVar[str] = "tries recipes on the model itself within a time limit, and trains the best one end to end"
    runs: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "auto"


AUTO = (Auto(),)
