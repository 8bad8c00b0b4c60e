"""What a ledger tells of how its checkpoint was made, as dataclasses. A ledger is a file and may be anybody's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fewbits.errors import CheckpointError
from fewbits.findings import Planning, TrainingFacts
from fewbits.results import CalibrationReport, FrontierPoint, LossPoint

T = TypeVar("T")

UNITS = {"size": "a file of {:g} MB", "memory": "a process of {:g} MB"}


def told(ledger: Mapping[str, Any], key: str, made: Callable[[Any], T]) -> T | None:
    """A part of the ledger; None where it says nothing of it. Raises CheckpointError for what cannot be."""
    found = ledger.get(key)
    if found is None:
        return None
    try:
        return made(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the ledger's '{key}' is not as fewbits writes it ({type(error).__name__}: {error}); it was changed since"
        ) from error


def calibration(found: Any) -> CalibrationReport:
    held_out = found["held_out_kld"]
    return CalibrationReport(
        source=str(found["source"]),
        text=str(found["text"]),
        windows=int(found["windows"]),
        length=int(found["length"]),
        tokens=int(found["tokens"]),
        digest=str(found["digest"]),
        held_out_tokens=int(found["held_out_tokens"]),
        held_out_kld=None if held_out is None else finite(held_out),
    )


def planning(found: Any) -> Planning:
    trial = found["trial"]
    return Planning(
        budget=in_words(found["budget"]),
        target=str(found["target"]),
        method=str(found["method"]),
        nbytes=int(found["nbytes"]),
        divergence=finite(found["divergence"]),
        measured_on=None if found["measured_on"] is None else str(found["measured_on"]),
        trial=None if trial is None else finite(trial),
        points=tuple(map(_point, found["points"])),
    )


def training(found: Any) -> TrainingFacts:
    return TrainingFacts(
        start=str(found["start"]),
        data=str(found["data"]),
        steps=int(found["steps"]),
        tokens=int(found["tokens"]),
        before=finite(found["before"]),
        after=finite(found["after"]),
        curve=tuple(LossPoint(int(p["step"]), _loss(p["loss"]), _loss(p["held_out"])) for p in found["curve"]),
    )


def in_words(budget: Mapping[str, Any]) -> str:
    """What was to be kept to."""
    if "preset" in budget:
        return f"the mixture of llama.cpp's preset {budget['preset']}"
    if "bpw" in budget:
        return f"{float(budget['bpw']):g} bits a weight"
    if "max_kld" in budget:
        return f"at most {float(budget['max_kld']):g} nats a token from the original"
    (key,) = [key for key in UNITS if key in budget]
    words = UNITS[key].format(float(budget[key]) / 1e6)
    return f"{words} with {int(budget['context'])} tokens of context" if key == "memory" else words


def _point(found: Any) -> FrontierPoint:
    kind = found["kind"]
    if kind not in ("plan", "preset", "peer"):
        raise ValueError(f"a point of kind {kind!r}")
    nbytes, divergence = int(found["nbytes"]), finite(found["divergence"])
    if not (nbytes > 0 and divergence > 0):
        raise ValueError(f"a point at {nbytes} bytes and {divergence} nats")
    return FrontierPoint(str(found["name"]), nbytes, divergence, kind, bool(found["measured"]))


def _loss(found: Any) -> float | None:
    return None if found is None or not math.isfinite(float(found)) else float(found)


def finite(found: Any) -> float:
    """Raises ValueError for what is no finite number."""
    value = float(found)
    if not math.isfinite(value):
        raise ValueError(f"{value} is not finite")
    return value
