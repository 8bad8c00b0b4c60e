"""Running a model on a plain CPU, by numpy and compiled kernels alone: torch would cost the start a second."""

from __future__ import annotations
