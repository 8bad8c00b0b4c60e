"""One progress bar over the stages of a run."""

from __future__ import annotations

from fewbits.pipeline._stream import Progress

BAR = 10_000  # steps of the progress bar


class Stages:
    """Each stage has the share of the bar that its part is of `whole`: predicted seconds, or shares of one."""

    def __init__(self, progress: Progress | None, whole: float = 1.0) -> None:
        self._progress, self._whole, self._reached = progress, whole, 0.0

    def next(self, part: float) -> Progress | None:
        """What the next stage reports to; it starts where the one before ended."""
        if self._progress is None:
            return None
        progress, begin, share = self._progress, self._reached, part / self._whole
        self._reached += share
        return lambda done, total, label: progress(round(BAR * (begin + share * done / max(total, 1))), BAR, label)
