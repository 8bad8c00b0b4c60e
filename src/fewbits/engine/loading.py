"""Any checkpoint that fewbits reads, as a transformers model that keeps its quantized weights packed.

The model is built without weights (`skeleton`); each entry of the checkpoint finds its parameter by transformers' own
table of renamings (old names, a missing or superfluous prefix, experts that lie one by one on disk and fused in the
model); then entries are read one at a time, straight into their place. A quantized matrix swaps its layer for a
quantized one. What transformers fuses, or computes in a layer of its own making, has no packed form and is decoded.
Where the checkpoint says that inputs are rounded as well, the layer does that and multiplies codes, and where it has
scales for the key-value cache, what goes into the cache is rounded (`cache`): the model runs as engines run it.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from fewbits.checkpoint import CACHE_SCALES, is_scale
from fewbits.checkpoint.adapter import adapter_inside, read_adapter
from fewbits.engine.cache import round_cache
from fewbits.engine.skeleton import skeleton
from fewbits.engine.weights import Weight, open_weights
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.nn import (
    LowRankLinear,
    PackedWeight,
    QuantizedEmbedding,
    QuantizedLinear,
    W8A8Linear,
    add_low_rank,
    can_replace,
    replace,
    replace_w8a8,
)

log = logging.getLogger(__name__)

RECOMPUTED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""Entries of old checkpoints that are computed nowadays."""


KEYS, VALUES = CACHE_SCALES


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    packed: bool = True,
) -> PreTrainedModel:
    """Open a checkpoint of any kind as a transformers model, in eval mode.

    dtype: of the parameters that are not quantized, and of all arithmetic.
    packed: keep quantized matrices packed and decode them at every use, so that memory is about the file's size.
        False decodes them once: as fast, and as large, as the original model. Layers that round their inputs keep
        their 8-bit weights either way.
    An adapter inside the checkpoint's folder stays beside the layers that it changes.
    Raises CheckpointError where an entry is missing, unexpected or of the wrong shape, UnsupportedError for an
    architecture that transformers does not have.
    """
    path = Path(path)
    config, weights = open_weights(path)
    model = skeleton(config, dtype)
    _fill(model, weights, _Target(dtype, torch.device(device), packed))
    if (adapter := adapter_inside(path)) is not None:
        for name, added in read_adapter(adapter).items():
            add_low_rank(model, name, added.a, added.b, dtype)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    if any(isinstance(module, PackedWeight | W8A8Linear | LowRankLinear) for module in model.modules()):
        setattr(model, "save_pretrained", _refuse_saving)  # noqa: B010  # mypy forbids the plain assignment
    return model.to(torch.device(device))  # type: ignore[arg-type,no-any-return]  # the decorator hides the signature


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise UnsupportedError(
        "save_pretrained would write packed weights under names that nothing loads; copy the checkpoint it "
        "came from, or load that with packed=False to save it in floating point"
    )


@dataclass(frozen=True)
class _Target:
    dtype: torch.dtype
    device: torch.device
    packed: bool


@dataclass
class Placement:
    """What makes one parameter: an entry, or several that one of transformers' conversions joins."""

    target: str
    conversion: Any = None
    sources: list[tuple[str, Weight]] = field(default_factory=list)


def _fill(model: PreTrainedModel, weights: Mapping[str, Weight], target: _Target) -> None:
    expected = dict(model.state_dict())
    scales = {name: weight for name, weight in weights.items() if is_scale(weight.entry)}
    placed, unexpected = placements(model, {n: w for n, w in weights.items() if n not in scales}, expected)
    refuse_unexpected(model, unexpected)
    wide = _kept_in_float32(model, target.dtype)
    filled: set[str] = set()
    decoded: list[str] = []
    for placement in placed:
        meta = expected[placement.target]
        dtype = torch.float32 if wide and wide.search(placement.target) else meta.dtype
        if _pack_into(model, placement, dtype, target):
            filled.add(placement.target)
            continue
        for name, value in values(model, placement, dtype, target.device).items():
            assign(model, name, value, expected)
            filled.add(name)
        if target.packed and any(weight.quantized for _, weight in placement.sources):
            decoded.append(placement.target)
    if decoded:
        log.info("decoded to %s, having no packed form in transformers: %s", target.dtype, _listed(decoded))
    _round_caches(model, scales, placed)
    filled |= tie_parameters(model, filled)
    _refuse_missing(model, expected.keys() - filled)


def placements(
    model: PreTrainedModel, weights: Mapping[str, Weight], expected: dict[str, Tensor]
) -> tuple[list[Placement], list[str]]:
    """Every entry's place, and the entries that have none (biases of zeros, which need none, aside)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    conversions = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in conversions for pattern in entry.source_patterns}
    prefix, placed, unexpected = model.base_model_prefix, dict[str, Placement](), list[str]()
    for name in sorted(weights, key=_natural):
        target, pattern = rename_source_key(name, renamings, conversions, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = name, None
        if target not in expected:
            if not _adds_nothing(weights[name]):
                unexpected.append(name)
            continue
        conversion = copy.deepcopy(by_pattern[pattern]) if pattern is not None else None
        placement = placed.setdefault(target, Placement(target, conversion))
        placement.sources.append((pattern or name, weights[name]))
    return list(placed.values()), unexpected


def _adds_nothing(weight: Weight) -> bool:
    """Whether it is a bias of zeros: AutoGPTQ gave one to every layer, also in models that have none."""
    bias = weight.entry.name.endswith(".bias") and not weight.quantized
    return bias and not bool(weight.numbers(torch.float32, torch.device("cpu")).any())


def _pack_into(model: nn.Module, placement: Placement, dtype: torch.dtype, target: _Target) -> bool:
    """Swap the parameter's layer for a quantized one, if the entry and the layer allow it."""
    module_name, _, leaf = placement.target.rpartition(".")
    _, weight = placement.sources[0]
    if weight.entry.inputs is not None:
        _multiply_in(model, placement, dtype, target)
        return True
    if not (target.packed and weight.quantized and placement.conversion is None and leaf == "weight"):
        return False
    if not can_replace(model.get_submodule(module_name)):
        return False
    require_shape(placement.target, weight.entry.shape, model.get_parameter(placement.target).shape)
    replace(model, module_name, weight.packed(dtype, target.device))
    return True


def _multiply_in(model: nn.Module, placement: Placement, dtype: torch.dtype, target: _Target) -> None:
    """Swap the parameter's layer for one that rounds its input. Raises UnsupportedError if it cannot be."""
    module_name, _, leaf = placement.target.rpartition(".")
    _, weight = placement.sources[0]
    if placement.conversion is not None or leaf != "weight":
        raise UnsupportedError(
            f"{placement.target}: its inputs are to be rounded to {weight.entry.inputs}, but it is fused with others "
            "in the running model; quantize its weight alone"
        )
    require_shape(placement.target, weight.entry.shape, model.get_parameter(placement.target).shape)
    replace_w8a8(model, module_name, weight.multiplied(dtype, target.device))


def _round_caches(model: nn.Module, scales: Mapping[str, Weight], placed: Iterable[Placement]) -> None:
    """Let each attention that has scales round its keys and values.

    The attention is found by a weight inside of it, since the model may know it by another name than the file.
    """
    for name in (name for name in scales if name.endswith(KEYS)):
        attention = name.removesuffix(KEYS)
        inside = next((p for p in placed if p.sources[0][1].entry.name.startswith(f"{attention}.")), None)
        keys, others = scales[name], scales.get(attention + VALUES)
        if inside is None or others is None or keys.entry.inputs is None:
            raise CheckpointError(f"{name}: belongs to no attention with {attention}{VALUES}; the file is damaged")
        local = inside.sources[0][1].entry.name.removeprefix(attention)
        module = model.get_submodule(inside.target.rsplit(".", local.count("."))[0])
        k_scale, v_scale = (scale.numbers(torch.float32, torch.device("cpu")) for scale in (keys, others))
        round_cache(module, keys.entry.inputs, k_scale, v_scale)


def values(
    model: PreTrainedModel, placement: Placement, dtype: torch.dtype, device: torch.device
) -> Mapping[str, Tensor]:
    """The numbers of a parameter; of several, where a conversion splits what lies together."""
    if placement.conversion is None:
        (_, weight), *_ = placement.sources
        return {placement.target: weight.numbers(dtype, device)}
    for pattern, weight in placement.sources:
        placement.conversion.add_tensor(placement.target, weight.entry.name, pattern, weight.numbers(dtype, device))
    converted = placement.conversion.convert(placement.target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def assign(model: nn.Module, name: str, value: Tensor, expected: Mapping[str, Tensor]) -> None:
    if name not in expected:
        raise CheckpointError(f"{name}: made from the checkpoint's entries, but the model has no such parameter")
    require_shape(name, value.shape, expected[name].shape)
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=value.is_floating_point())


def tie_parameters(model: PreTrainedModel, filled: set[str]) -> set[str]:
    """Let parameters that the architecture ties share one weight; returns the names filled that way.

    Where the file has both, they are tied only if they are equal. What is not tied as a Parameter is taken off
    transformers' list, or its `tie_weights` would look for the Parameters.
    """
    shared, tied = set[str](), dict[str, str]()
    for target, source in model.all_tied_weights_keys.items():
        if target in filled and source in filled:
            if not _equal(model, target, source):
                log.info("%s and %s, tied by the configuration, differ in the file: loaded as they are", target, source)
                continue
            _share(model, target, source)
        elif source in filled:
            _share(model, target, source)
            shared.add(target)
        elif target in filled:
            _share(model, source, target)
            shared.add(source)
        if _parameter(model, target) is not None:
            tied[target] = source
    if tied != model.all_tied_weights_keys:
        model.all_tied_weights_keys = model._tied_weights_keys = tied
    return shared


def _equal(model: nn.Module, target: str, source: str) -> bool:
    a, b = _parameter(model, target), _parameter(model, source)
    return a is not None and b is not None and torch.equal(a, b)


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """The Parameter of that name; None where its layer holds a packed weight."""
    module_name, _, leaf = name.rpartition(".")
    return model.get_submodule(module_name)._parameters.get(leaf)


def _share(model: nn.Module, target: str, source: str) -> None:
    """Give parameter `target` the weight of `source`: the same packed one, or the same Parameter."""
    owner = model.get_submodule(source.rpartition(".")[0])
    receiver = target.rpartition(".")[0]
    if isinstance(owner, QuantizedLinear | QuantizedEmbedding) and can_replace(model.get_submodule(receiver)):
        replace(model, receiver, owner.store)
        return
    weight = getattr(owner, source.rpartition(".")[2])
    parameter = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    model.get_submodule(receiver)._parameters[target.rpartition(".")[2]] = parameter


def _kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Parameters that the architecture keeps in FP32 when the model is in 16 bits."""
    names: set[str] = set()
    if dtype == torch.float16:
        names |= set(model._keep_in_fp32_modules or ())
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(model._keep_in_fp32_modules_strict or ())
    return re.compile("|".join(rf"(^|\.){name}(\.|$)" for name in sorted(names))) if names else None


def refuse_unexpected(model: PreTrainedModel, names: Iterable[str]) -> None:
    ignored = (*RECOMPUTED, *(model._keys_to_ignore_on_load_unexpected or ()))
    left = [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]
    if left:
        raise CheckpointError(
            f"{model.name_or_path}: {type(model).__name__} has no parameter for {_listed(left)}; "
            "config.json does not belong to these weights"
        )


def _refuse_missing(model: PreTrainedModel, names: Iterable[str]) -> None:
    ignored = tuple(model._keys_to_ignore_on_load_missing or ())
    left = [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]
    left += [name for name, tensor in _tensors(model) if tensor.is_meta and name not in left]
    if left:
        raise CheckpointError(
            f"{model.name_or_path}: {type(model).__name__} needs {_listed(sorted(left, key=_natural))}, "
            "which the checkpoint does not have; a shard may be missing"
        )


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def require_shape(name: str, found: Iterable[int], needed: Iterable[int]) -> None:
    if list(found) != list(needed):
        raise CheckpointError(
            f"{name} is {list(found)} in the checkpoint, but config.json asks for {list(needed)}; "
            "they do not belong together"
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _listed(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
