"""Models as ONNX files: linear layers as integers with their scales, which onnxruntime and edge compilers run.

traced     the graph of a transformers model, a node for each quantized layer, no weight in memory
express    those nodes as ONNX's operators
written    weights streamed into the file
wrong_weights, Session, rounding
           the file read back, run by onnxruntime, and how near its outputs must be
"""

from __future__ import annotations

from fewbits.export.express import Way, express
from fewbits.export.installed import require_installed
from fewbits.export.proof import wrong_weights
from fewbits.export.rounding import relative, rounding
from fewbits.export.session import Session
from fewbits.export.tracing import OPSET, Traced, traced
from fewbits.export.writing import data_file, written

__all__ = [
    "OPSET",
    "Session",
    "Traced",
    "Way",
    "data_file",
    "express",
    "relative",
    "require_installed",
    "rounding",
    "traced",
    "written",
    "wrong_weights",
]
