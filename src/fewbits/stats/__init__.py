"""What calibration measures: statistics of the inputs of matrices, collected while the original runs."""

from __future__ import annotations

from fewbits.stats.collect import Collector, InputStatistics
from fewbits.stats.curvature import Curvature, CurvatureCollector, CurvatureSums
from fewbits.stats.observers import OBSERVERS, Observer, observer_named
from fewbits.stats.watch import AllSeen, OrderOfUse, Recorder, Site

__all__ = [
    "OBSERVERS",
    "AllSeen",
    "Collector",
    "Curvature",
    "CurvatureCollector",
    "CurvatureSums",
    "InputStatistics",
    "Observer",
    "OrderOfUse",
    "Recorder",
    "Site",
    "observer_named",
]
