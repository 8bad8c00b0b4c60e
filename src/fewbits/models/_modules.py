"""Roles from modules: the model is built by transformers on the meta device, where tensors have shapes and no memory.

Names in files and names in modules differ where a checkpoint is older than the code: transformers' own table of
renamings says which is which (and which experts, one by one on disk, it fuses in memory). Code that comes with a
checkpoint is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fewbits.errors import UnsupportedError
from fewbits.models.base import Architecture, Role

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def describe_modules(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """See `fewbits.models.describe`."""
    model = _without_weights(config)
    targets = targets_of(model, shapes)
    parameters = module_roles(model)
    roles = {name: _role(parameters.get(targets[name], Role.OTHER), shape) for name, shape in shapes.items()}
    return Architecture(None, roles, _tied(model, targets))


def _without_weights(config: Mapping[str, Any]) -> Any:
    """The transformers model on the meta device."""
    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        code = "; it asks to run code of its own (auto_map), which fewbits never does" if "auto_map" in config else ""
        raise UnsupportedError(f"architecture '{kind}' is not in the installed transformers{code}")
    values = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    made = CONFIG_MAPPING[kind].from_dict(values)
    with torch.device("meta"):
        return model_class(made)._from_config(made)


def model_class(config: Any) -> Any:
    """The class that config.json names, else the causal language model of its type, else the bare model."""
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise UnsupportedError(f"architecture '{config.model_type}': transformers has no model for it")


def targets_of(model: Any, names: Mapping[str, Any]) -> dict[str, str]:
    """Name in the file -> name of the parameter in the model (itself where nothing fits)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    targets = {}
    for name in names:
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        targets[name] = target if target in known or name not in known else name
    return targets


def module_roles(model: nn.Module) -> dict[str, Role]:
    """Role of each of the model's parameters and buffers, tied ones under each of their names."""
    output = _or_none(model, "get_output_embeddings")
    experts = {count for key in EXPERT_COUNTS if (count := _config_value(model, key))}
    experts |= {1} if experts else set()  # the gate of a shared expert has one output
    roles = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                role = (
                    Role.OUTPUT if module is output and name == "weight" else _owned(module, name, parameter, experts)
                )
                roles[f"{path}.{name}" if path else name] = role
    return roles


def _owned(module: nn.Module, name: str, parameter: torch.Tensor, experts: set[int]) -> Role:
    kind = type(module).__name__
    if name.endswith("bias"):
        return Role.BIAS
    if "Norm" in kind:
        return Role.NORM
    if isinstance(module, nn.Embedding):
        return Role.EMBEDDING
    if "Experts" in kind and parameter.dim() == 3:
        return Role.EXPERTS
    if parameter.dim() == 2 and ("Router" in kind or "Gate" in kind or parameter.shape[0] in experts):
        return Role.ROUTER
    return Role.LINEAR if isinstance(module, nn.Linear) and name == "weight" else Role.OTHER


def _role(role: Role, shape: tuple[int, ...]) -> Role:
    """The role of an array in the file whose parameter in the model has this role: experts may lie there singly."""
    return Role.LINEAR if role is Role.EXPERTS and len(shape) == 2 else role


def _tied(model: Any, targets: Mapping[str, str]) -> dict[str, str]:
    """Parameters that the model ties, by their names in the file where they are there."""
    in_file = {target: name for name, target in targets.items()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = {in_file.get(copy, copy): in_file.get(source) for copy, source in tied.items()}
    # Where only the "copy" is in the file, it is the one that stays.
    return {copy: source for copy, source in pairs.items() if source is not None}


def _or_none(model: Any, method: str) -> nn.Module | None:
    try:
        found: nn.Module | None = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return found


def _config_value(model: Any, key: str) -> int | None:
    value = getattr(model.config.get_text_config(), key, None)
    return value if isinstance(value, int) else None
