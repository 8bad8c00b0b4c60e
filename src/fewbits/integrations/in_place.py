"""Torch modules quantized where they are: `quantize_`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewbits.errors import FormatError, UnsupportedError
from fewbits.formats import Float, Format, format_named
from fewbits.integrations.rounding import Rounded, rounded, solver_named
from fewbits.methods import TensorMethod
from fewbits.nn import can_replace, replace
from fewbits.results import TensorReport

Predicate = Callable[[str, nn.Module], str | None]
Layer = nn.Linear | nn.Embedding


def quantize_(module: nn.Module, format: str | Predicate, *, method: str = "rtn") -> list[TensorReport]:
    """Swap a module's linear layers for quantized ones, in place. Those that share a weight go on sharing it.

    format: a format's name, for every `nn.Linear` inside of the module; or a function of (name, layer), asked for
    every `nn.Linear` and `nn.Embedding`, which returns a format's name, or None to leave the layer as it is.
    method: how codes are chosen, of the methods that need no text (`rtn`, `rtn-plain`, `hqq`).

    Returns a line for every linear layer and embedding: its format and relative error, or why it was kept.
    Raises, before anything is changed, FormatError for an unknown format or a shape that it cannot hold, and
    UnsupportedError for a layer that is asked for and cannot be swapped. Raises FormatError for NaN or Inf when that
    layer's turn comes.
    """
    solver = solver_named(method)
    layers = {n: m for n, m in module.named_modules(remove_duplicate=False) if isinstance(m, Layer)}
    formats = {name: _format(name, layer, format) for name, layer in layers.items()}
    _require_agreement(layers, formats)
    made: dict[int, Rounded] = {}
    reports = []
    for name, layer in layers.items():
        chosen = formats[name]
        if chosen is None:
            reports.append(_kept(name, layer, format))
            continue
        w = layer.weight
        if id(w) not in made:
            made[id(w)] = _rounded(name, w, chosen, solver)
        replace(module, name, made[id(w)].weight)
        reports.append(_quantized(name, w, chosen, method, made[id(w)].error))
    return reports


def _format(name: str, layer: Layer, asked: str | Predicate) -> Format | None:
    """The format of a layer, None where it is left as it is."""
    if isinstance(asked, str):
        wanted = asked if isinstance(layer, nn.Linear) and can_replace(layer) else None
        format_named(asked)
    else:
        wanted = asked(name, layer)
    if wanted is None:
        return None
    if not name or not can_replace(layer):
        what = "the module itself" if not name else f"{name}, a {type(layer).__name__},"
        raise UnsupportedError(f"{what} cannot be swapped; give a module with plain Linear and Embedding layers inside")
    found = format_named(wanted)
    if isinstance(found, Float):
        raise UnsupportedError(f"{name}: {wanted} is a floating-point type; cast the layer with .to() instead")
    if layer.weight.dtype == torch.bfloat16:
        found = found.with_scales_in(torch.bfloat16)
    try:
        found.check(tuple(layer.weight.shape))
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from error
    return found


def _require_agreement(layers: dict[str, Layer], formats: dict[str, Format | None]) -> None:
    """Raise UnsupportedError where layers that share a weight were to get different formats."""
    first: dict[int, str] = {}
    for name, layer in layers.items():
        other = first.setdefault(id(layer.weight), name)
        a, b = formats[other], formats[name]
        if a is not None and b is not None and a != b:
            raise UnsupportedError(
                f"{other} and {name} share a weight, which cannot be {a} and {b}; give them one format"
            )


def _rounded(name: str, w: Tensor, format: Format, solver: TensorMethod) -> Rounded:
    try:
        return rounded(w.detach(), format, solver, w.dtype)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from error


def _quantized(name: str, w: Tensor, format: Format, method: str, error: float) -> TensorReport:
    shape = tuple(w.shape)
    return TensorReport(
        name=f"{name}.weight",
        fate="quantized",
        shape=shape,
        format=format.name,
        nbytes=format.nbytes(shape),
        source=f"{name}.weight",
        method=method,
        error=error,
    )


def _kept(name: str, layer: Layer, asked: str | Predicate) -> TensorReport:
    plain = can_replace(layer)
    reason = "not asked for" if plain else f"a {type(layer).__name__}, which may compute something else than its base"
    if plain and isinstance(asked, str):
        reason = "an embedding; give a function to quantize it"
    w = layer.weight
    return TensorReport(
        name=f"{name}.weight",
        fate="kept",
        shape=tuple(w.shape),
        format=Float(w.dtype).name,
        nbytes=w.nbytes,
        source=f"{name}.weight",
        reason=reason,
    )
