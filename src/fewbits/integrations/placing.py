"""A parameter's numbers into the quantized layer that takes its place in a transformers model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbits.errors import FormatError
from fewbits.formats import Format
from fewbits.integrations.experts import put_experts
from fewbits.integrations.planning import nbytes, owner
from fewbits.integrations.rounding import rounded, solver_named
from fewbits.methods import TensorMethod
from fewbits.nn import PackedExperts, PackedWeight, replace
from fewbits.plan.rules import Choice
from fewbits.results import TensorReport


def place(model: PreTrainedModel, name: str, w: Tensor, choice: Choice, method: str) -> tuple[TensorReport, list[str]]:
    """Quantize w, the numbers of the parameter `name`, and swap its layer, with those that share its weight.

    Returns what became of it, and the parameters that are gone. Raises FormatError for NaN or Inf.
    """
    module, leaf = owner(model, name)
    dtype = module.get_parameter(leaf).dtype
    solver = solver_named(method)
    gone = [name]
    try:
        if w.dim() == 2:
            made = rounded(w, choice.format, solver, dtype)
            gone += untied(model, name)
            put(model, gone, made.weight)
            error = made.error
        else:
            error = _place_experts(module, leaf, w, choice.format, solver)
    except FormatError as trouble:
        raise FormatError(f"{name}: {trouble}") from trouble
    report = TensorReport(
        name=name,
        fate="quantized",
        shape=tuple(w.shape),
        format=choice.format.name,
        nbytes=nbytes(choice.format, tuple(w.shape)),
        source=name,
        method=method,
        error=error,
        reason=choice.reason,
    )
    return report, gone


def put(model: PreTrainedModel, names: Iterable[str], weight: PackedWeight) -> None:
    """Swap the layers of parameters that share one weight for layers on a packed one."""
    for name in names:
        path = name.rpartition(".")[0]
        replace(model, path, weight)
        model.get_submodule(path)._is_hf_initialized = True  # type: ignore[assignment]  # nothing to fill with noise


def untied(model: PreTrainedModel, name: str) -> list[str]:
    """Parameters that share this one's weight, and are taken off transformers' list: it ties Parameters alone."""
    pairs = model.all_tied_weights_keys
    found = [target if source == name else source for target, source in pairs.items() if name in (target, source)]
    if found:
        left = {target: source for target, source in pairs.items() if name not in (target, source)}
        model.all_tied_weights_keys = model._tied_weights_keys = left
    return found


def _place_experts(module: nn.Module, leaf: str, w: Tensor, format: Format, solver: TensorMethod) -> float:
    """Every expert's matrix [out_features, in_features]; the relative error over all of them."""
    transposed = bool(getattr(module, "is_transposed", False))
    dtype = module.get_parameter(leaf).dtype
    made, lost, norm = [], 0.0, 0.0
    for one in w:
        each = rounded(one.T if transposed else one, format, solver, dtype)
        squares = float(torch.linalg.vector_norm(one, dtype=torch.float32)) ** 2
        lost, norm = lost + each.error**2 * squares, norm + squares
        made.append(each.weight)
    put_experts(module, leaf, PackedExperts(made, transposed=transposed))
    return (lost / norm) ** 0.5 if norm else 0.0
