"""fewbits: AI models in fewer bits, smaller and faster, and proven to still work.

    import fewbits

    fewbits.quantize("path/to/model", "model-int4", format="int4-g128")
    fewbits.verify("model-int4", against="path/to/model")
    print(fewbits.evaluate("model-int4", against="path/to/model").mean_kld)
    model = fewbits.load("model-int4")
    print(*fewbits.Engine("model-int4").generate("Once upon a time", max_tokens=64), sep="")

Names are imported on first use, so that what needs only torch does not wait for transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewbits.integrations.registering import watch_transformers

if TYPE_CHECKING:
    from fewbits import formats
    from fewbits.engine import Engine, load
    from fewbits.errors import FewbitsError
    from fewbits.evals import evaluate
    from fewbits.formats import FORMATS, Format, QTensor, format_named
    from fewbits.integrations.config import Config
    from fewbits.integrations.in_place import quantize_
    from fewbits.methods import METHODS, quantize_tensor
    from fewbits.pipeline import Calibration, Merging, convert, imatrix, make_plan, merge, quantize, verify
    from fewbits.pipeline._onnx import export_onnx
    from fewbits.pipeline._qat import Qat, train_qat
    from fewbits.pipeline._qlora import Qlora, train_qlora
    from fewbits.plan.planned import Budget
    from fewbits.results import (
        AdapterTraining,
        Conversion,
        Evaluation,
        ImportanceReport,
        Merge,
        OnnxExport,
        Quantization,
        TensorReport,
        Training,
        Verification,
    )
    from fewbits.train import Length

_ROOMS = {
    "FORMATS": "formats",
    "METHODS": "methods",
    "AdapterTraining": "results",
    "Budget": "plan.planned",
    "Calibration": "pipeline",
    "Config": "integrations.config",
    "Conversion": "results",
    "Engine": "engine",
    "Evaluation": "results",
    "FewbitsError": "errors",
    "Format": "formats",
    "ImportanceReport": "results",
    "Length": "train",
    "Merge": "results",
    "Merging": "pipeline",
    "OnnxExport": "results",
    "QTensor": "formats",
    "Qat": "pipeline._qat",
    "Qlora": "pipeline._qlora",
    "Quantization": "results",
    "TensorReport": "results",
    "Training": "results",
    "Verification": "results",
    "convert": "pipeline",
    "evaluate": "evals",
    "export_onnx": "pipeline._onnx",
    "format_named": "formats",
    "formats": "formats",
    "imatrix": "pipeline",
    "load": "engine",
    "make_plan": "pipeline",
    "merge": "pipeline",
    "quantize": "pipeline",
    "quantize_": "integrations.in_place",
    "quantize_tensor": "methods",
    "train_qat": "pipeline._qat",
    "train_qlora": "pipeline._qlora",
    "verify": "pipeline",
}

__all__ = [
    "FORMATS",
    "METHODS",
    "AdapterTraining",
    "Budget",
    "Calibration",
    "Config",
    "Conversion",
    "Engine",
    "Evaluation",
    "FewbitsError",
    "Format",
    "ImportanceReport",
    "Length",
    "Merge",
    "Merging",
    "OnnxExport",
    "QTensor",
    "Qat",
    "Qlora",
    "Quantization",
    "TensorReport",
    "Training",
    "Verification",
    "convert",
    "evaluate",
    "export_onnx",
    "format_named",
    "formats",
    "imatrix",
    "load",
    "make_plan",
    "merge",
    "quantize",
    "quantize_",
    "quantize_tensor",
    "train_qat",
    "train_qlora",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'fewbits' has no attribute '{name}'")
    room = import_module(f"fewbits.{_ROOMS[name]}")
    return room if name == _ROOMS[name] else getattr(room, name)


def __dir__() -> list[str]:
    return __all__


watch_transformers()
