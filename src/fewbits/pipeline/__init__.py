"""The story told once: load, plan, then stream every tensor from source through method to file, and prove the file."""

from __future__ import annotations

from fewbits.pipeline.quantize import quantize
from fewbits.pipeline.verify import verify

__all__ = ["quantize", "verify"]
