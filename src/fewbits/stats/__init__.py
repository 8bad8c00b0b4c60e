"""What calibration measures: statistics of the inputs of matrices, collected while the original runs."""

from __future__ import annotations

from fewbits.stats.collect import Collector, InputStatistics, Site

__all__ = ["Collector", "InputStatistics", "Site"]
