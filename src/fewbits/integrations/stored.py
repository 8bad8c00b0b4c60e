"""A checkpoint that is quantized already, of any kind that fewbits reads, into a transformers model.

transformers would take the packed arrays for parameters. So before it loads, the weight of every layer that can hold
one packed is taken off the model, and the names of the arrays are put on its list of entries to ignore; it loads and
casts what is left, and then the packed weights are put in, and what has no packed form is decoded into its place.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Collection
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from fewbits.checkpoint import CACHE_SCALES, is_scale, open_checkpoint
from fewbits.checkpoint.adapter import adapter_inside
from fewbits.checkpoint.fewbits import Fewbits
from fewbits.engine.loading import Placement, placements, require_shape, values
from fewbits.engine.tiled_weight import TiledWeight
from fewbits.engine.weights import Weight
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.integrations.experts import put_experts
from fewbits.integrations.placing import put, untied
from fewbits.integrations.planning import owner
from fewbits.integrations.stored_experts import packed_experts, packs_experts
from fewbits.nn import can_replace, replace_w8a8

PLAIN_IN_OURS = r"^(.+)\.weight$", r"\1"
"""Our own kind of checkpoint has the tensor `x` that is not quantized in an array `x.weight`."""

LISTED = 5  # names in a warning

log = logging.getLogger(__name__)


class Stored:
    """The quantized entries of a checkpoint's folder, each with its place in a model that has no weights yet."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        if adapter_inside(folder) is not None:
            raise UnsupportedError(f"{folder}: has an adapter inside; load it by fewbits.load, which adds that")
        kind, reader = open_checkpoint(folder)
        self.renamings = [WeightRenaming(*PLAIN_IN_OURS)] if isinstance(kind, Fewbits) else []
        log.info("%s is read as %s", folder, kind.name)
        weights = {name: Weight(reader, entry) for name, entry in reader.entries.items()}
        if any(is_scale(weight.entry) and weight.entry.name.endswith(CACHE_SCALES) for weight in weights.values()):
            raise UnsupportedError(
                f"{folder}: rounds its key-value cache, which only fewbits.load does; load it by that"
            )
        weights = {name: weight for name, weight in weights.items() if not is_scale(weight.entry)}
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        placed, _ = placements(model, weights, dict(model.state_dict()))
        self._placed = [each for each in placed if any(weight.quantized for _, weight in each.sources)]
        self._packed = {each.target for each in self._placed if _packs(model, each)}
        self._experts = {each.target for each in self._placed if self._packs_experts(model, each)}
        self._dtypes = {each.target: model.get_parameter(each.target).dtype for each in self._placed}
        entries = [weight.entry.name for each in self._placed for _, weight in each.sources]
        _ignore(model, entries, [each.target for each in self._placed])
        targets = {each.target for each in placed}
        self._sharing = {name: [name, *untied(model, name)] for name in self._packed}
        for name in (each for names in self._sharing.values() for each in names):
            _take_off(model, name, targets)
        for name in self._experts:
            module, leaf = owner(model, name)
            _without(module, leaf)

    def fill(self, model: PreTrainedModel) -> None:
        """Put them in, when transformers has loaded the rest."""
        decoded = []
        for placement in self._placed:
            if placement.target in self._packed:
                self._pack(model, placement)
                continue
            if placement.target in self._experts:
                module, leaf = owner(model, placement.target)
                put_experts(module, leaf, packed_experts(placement, self._dtypes[placement.target], model.device))
                continue
            device = model.get_parameter(placement.target).device
            for name, value in values(model, placement, self._dtypes[placement.target], device).items():
                require_shape(name, value.shape, self._shapes[name])
                module, leaf = owner(model, name)
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            decoded.append(placement.target)
        if decoded:
            warnings.warn(_decoded(decoded), stacklevel=2)

    def _packs_experts(self, model: PreTrainedModel, placement: Placement) -> bool:
        return packs_experts(*owner(model, placement.target), placement, self._shapes[placement.target])

    def _pack(self, model: PreTrainedModel, placement: Placement) -> None:
        name, dtype = placement.target, self._dtypes[placement.target]
        (_, weight), *_ = placement.sources
        require_shape(name, weight.entry.shape, self._shapes[name])
        if weight.entry.inputs is not None:
            replace_w8a8(model, name.rpartition(".")[0], weight.multiplied(dtype, model.device))
            return
        put(model, self._sharing[name], TiledWeight.of_packed(weight.packed(dtype, model.device)))


def _decoded(names: list[str]) -> str:
    listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    return (
        f"fewbits decodes {len(names)} quantized matrices: {listed}; they lie in layers that multiply by "
        "themselves, and take the memory of the original"
    )


def _packs(model: PreTrainedModel, placement: Placement) -> bool:
    module, leaf = owner(model, placement.target)
    (_, weight), *_ = placement.sources
    packs = placement.conversion is None and leaf == "weight" and can_replace(module)
    if weight.entry.inputs is not None and not packs:
        raise UnsupportedError(
            f"{placement.target}: its inputs are to be rounded to {weight.entry.inputs}, but it is a part of a "
            f"{type(module).__name__}, which multiplies by itself; quantize its weight alone"
        )
    return packs


def _take_off(model: PreTrainedModel, name: str, placed: Collection[str]) -> None:
    """Leave a layer without its weight; only its bias is loaded, and nothing in it filled with noise."""
    module, leaf = owner(model, name)
    bias = f"{name.removesuffix(leaf)}bias"
    if getattr(module, "bias", None) is not None and bias not in placed:
        raise CheckpointError(
            f"{model.name_or_path}: {bias} is missing beside its quantized weight; the file may be damaged"
        )
    _without(module, leaf)


def _without(module: nn.Module, leaf: str) -> None:
    """Leave a layer without a parameter until it is filled. It must own nothing else that transformers computes."""
    module._parameters[leaf] = None
    module._is_hf_initialized = True  # type: ignore[assignment]


def _ignore(model: PreTrainedModel, entries: list[str], filled: list[str]) -> None:
    """Let transformers report neither the packed arrays nor the parameters that are filled later."""
    arrays = {rf"^{re.escape(name.removesuffix('.weight'))}\." for name in entries}
    patterns = {rf"^{re.escape(name)}$" for name in filled}
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *arrays}
    model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *patterns}
