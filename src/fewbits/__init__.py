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

if TYPE_CHECKING:
    from fewbits import formats
    from fewbits.engine import Engine, load
    from fewbits.errors import FewbitsError
    from fewbits.evals import evaluate
    from fewbits.formats import FORMATS, Format, QTensor, format_named
    from fewbits.methods import METHODS, quantize_tensor
    from fewbits.pipeline import Calibration, imatrix, make_plan, quantize, verify
    from fewbits.plan.planned import Budget
    from fewbits.results import Evaluation, ImportanceReport, Quantization, TensorReport, Verification

_ROOMS = {
    "FORMATS": "formats",
    "METHODS": "methods",
    "Budget": "plan.planned",
    "Calibration": "pipeline",
    "Engine": "engine",
    "Evaluation": "results",
    "FewbitsError": "errors",
    "Format": "formats",
    "QTensor": "formats",
    "ImportanceReport": "results",
    "Quantization": "results",
    "TensorReport": "results",
    "Verification": "results",
    "evaluate": "evals",
    "format_named": "formats",
    "formats": "formats",
    "imatrix": "pipeline",
    "load": "engine",
    "make_plan": "pipeline",
    "quantize": "pipeline",
    "quantize_tensor": "methods",
    "verify": "pipeline",
}

__all__ = [
    "FORMATS",
    "METHODS",
    "Budget",
    "Calibration",
    "Engine",
    "Evaluation",
    "FewbitsError",
    "Format",
    "ImportanceReport",
    "QTensor",
    "Quantization",
    "TensorReport",
    "Verification",
    "evaluate",
    "format_named",
    "formats",
    "imatrix",
    "load",
    "make_plan",
    "quantize",
    "quantize_tensor",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'fewbits' has no attribute '{name}'")
    room = import_module(f"fewbits.{_ROOMS[name]}")
    return room if name == _ROOMS[name] else getattr(room, name)


def __dir__() -> list[str]:
    return __all__
