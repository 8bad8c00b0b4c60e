"""Running a model on a plain CPU, by numpy and compiled kernels alone: what starts in a tenth of a second has no torch."""

from __future__ import annotations
