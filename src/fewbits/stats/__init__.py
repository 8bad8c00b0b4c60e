"""What calibration measures: statistics of the inputs of matrices, collected while the original runs."""

from __future__ import annotations

from fewbits.stats.collect import Collector, InputStatistics, Recorder, Site
from fewbits.stats.observers import OBSERVERS, Observer, observer_named

__all__ = ["OBSERVERS", "Collector", "InputStatistics", "Observer", "Recorder", "Site", "observer_named"]
