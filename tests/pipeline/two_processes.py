"""What test_processes.py starts twice: trainings that both processes go through, and what became of them in each.

torchrun --nproc_per_node 2 two_processes.py FOLDER [--sharded]
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn

import fewbits
from fewbits.errors import FewbitsError
from fewbits.pipeline import _qlora
from fewbits.pipeline._qat import Qat, train_qat
from fewbits.pipeline._qlora import Qlora, train_qlora
from fewbits.train import Course, Length, processes
from fewbits.train.course import CheckedTrainer

FOLDER = Path(sys.argv[1])
TINY = Path(fewbits.__file__).parent / "bundled" / "tiny"
TEXT = Path(__file__).parents[2] / "ARCHITECTURE.md"
RANK = int(os.environ["RANK"])
ADAPTER = Qlora(length=Length(None, 3), window=32, batch=1, rank=4)


def trained(name: str, qlora: Qlora = ADAPTER) -> dict[str, Any]:
    return asdict(train_qlora(TINY, FOLDER / name, data=FOLDER / "data.jsonl", qlora=qlora))


def qat() -> dict[str, Any]:
    settings = Qat(length=Length(None, 2), window=32, batch=1, held_out=4)
    return asdict(train_qat(TINY, FOLDER / "qat", format="int2-g64", data=TEXT, qat=settings, start="rtn"))


def interrupted_here_alone() -> dict[str, Any]:
    """Ctrl-C reaches the second process only, in the first step; then the training goes on."""
    step_ends = Course.on_step_end

    def on_step_end(self: Course, *more: Any, **named: Any) -> None:
        step_ends(self, *more, **named)
        if RANK == 1 and self.step == 1:
            signal.raise_signal(signal.SIGINT)

    with patch.object(Course, "on_step_end", on_step_end), suppress(KeyboardInterrupt):
        raise AssertionError(trained("interrupted"))
    return trained("interrupted")


def no_number_here_alone() -> dict[str, Any]:
    """The second process' loss is none."""
    forward = nn.functional.cross_entropy

    def broken(*more: Any, **named: Any) -> Tensor:
        return forward(*more, **named) * (math.nan if RANK == 1 else 1.0)

    with patch.object(nn.functional, "cross_entropy", broken):
        return trained("none")


def by_minutes() -> dict[str, Any]:
    """The second process' clock is far ahead, so it alone would end after a step."""
    read = Course.on_optimizer_step

    def on_optimizer_step(self: Course, *more: Any, **named: Any) -> None:
        self._began -= 3000 * RANK
        read(self, *more, **named)

    with patch.object(Course, "on_optimizer_step", on_optimizer_step):
        return trained("minutes", replace(ADAPTER, length=Length(40, 9)))


def shares() -> dict[str, Any]:
    """How many of the packed bytes are here, and how many there are."""
    found: dict[str, Any] = {}
    train = CheckedTrainer.train

    def noted(self: CheckedTrainer, *more: Any, **named: Any) -> Any:
        result = train(self, *more, **named)
        packed = [p for name, p in self.model.named_parameters() if ".store." in name]
        found["here"] = sum(processes.own_share(p).nbytes for p in packed)
        found["whole"] = sum(p.nbytes for p in packed)
        return result

    with patch.object(CheckedTrainer, "train", noted):
        return trained("sharded") | found


def outcome(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return action()
    except FewbitsError as error:
        return {"error": type(error).__name__, "message": str(error)}


def sharded() -> dict[str, dict[str, Any]]:
    """accelerate shards on accelerators only; once it has been refused it is told that the CPU is one."""
    found = {"refused": outcome(lambda: trained("refused")), "qat": outcome(qat)}
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    processes.require_shardable = lambda device: None
    return found | {"sharded": outcome(shares)}


def averaged() -> dict[str, dict[str, Any]]:
    actions: dict[str, Callable[[], dict[str, Any]]] = {
        "averaged": lambda: trained("averaged"),
        "there already": lambda: trained("averaged"),
        "interrupted": interrupted_here_alone,
        "no number": no_number_here_alone,
        "minutes": by_minutes,
        "qat": qat,
    }
    return {name: outcome(action) for name, action in actions.items()}


def main() -> None:
    """In float32, where sums differ by little."""
    processes.join("cpu")
    _qlora.multiplies_bf16 = lambda device: False
    found = sharded() if processes.sharded() else averaged()
    (FOLDER / f"{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
