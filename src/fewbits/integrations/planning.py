"""Which parameter of a transformers model gets which format, before its weights are there.

The rules are those of `fewbits quantize` (`plan/rules.py`), asked by the model's own names: matrices of linear layers
and experts in the format asked for, embeddings and what follows the base model (output projection, classifiers) kept
unless `vocabulary` says otherwise. What can run packed is less than what a file can hold: plain linear layers, plain
embeddings, and experts that transformers computes through its interface.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from fewbits.checkpoint import KINDS, Kind
from fewbits.errors import UnsupportedError
from fewbits.formats import Format
from fewbits.integrations.config import Config
from fewbits.integrations.experts import takes_experts
from fewbits.models import Role, module_roles, unfused
from fewbits.nn import can_replace
from fewbits.pipeline import choose_kind
from fewbits.plan.planned import read_plan
from fewbits.plan.rules import VOCABULARY, Choice, Rules, parse
from fewbits.plan.rules import Tensor as PlanTensor
from fewbits.plan.targets import target_named

MATRICES = (Role.LINEAR, Role.EXPERTS)
ANYTHING = "fewbits"
"""The kind of checkpoint that holds every format."""


@dataclass(frozen=True)
class ModelPlan:
    """chosen: parameter -> format and reason, of those that are quantized. kept: matrices that stay as they are
    although quantizing them was asked for, each with the reason.
    """

    chosen: Mapping[str, Choice]
    kept: Mapping[str, str]


def planned(model: PreTrainedModel, config: Config) -> ModelPlan:
    """Decide for every parameter. Raises UnsupportedError for an override or skip that matches nothing."""
    matrices = {name: tuple(found.shape) for name, found in model.named_parameters() if found.dim() > 1}
    roles = _roles(model)
    parts = {name: _parts(model, name, shape, roles[name]) for name, shape in matrices.items()}
    rules = _rules(config, parts, roles, list(_in_float32(model)))
    choices = rules.plan([part for name in matrices for part in parts[name]])
    chosen: dict[str, Choice] = {}
    kept: dict[str, str] = {}
    for name in matrices.keys() - model.all_tied_weights_keys.keys():  # which get what they are tied to
        choice = _joined(name, [choices[part.name] for part in parts[name]])
        trouble = _trouble(model, name, roles[name])
        if choice.quantized and trouble is None:
            chosen[name] = choice
        elif choice.quantized or roles[name] is Role.OTHER:
            kept[name] = trouble or "no matrix that is multiplied by"
        elif _wanted(rules, roles[name], parts[name]):
            kept[name] = choice.reason or "not asked for"
    return ModelPlan(chosen, kept)


def _wanted(rules: Rules, role: Role, parts: list[PlanTensor]) -> bool:
    """Whether a parameter was to be quantized, and no override keeps it."""
    if any(format is None and re.search(pattern, parts[0].name) for pattern, format in rules.overrides):
        return False
    return role in MATRICES or (rules.vocabulary is not None and role.value in VOCABULARY)


def _rules(config: Config, parts: Mapping[str, list[PlanTensor]], roles: Mapping[str, Role], wide: list[str]) -> Rules:
    """wide: patterns of what stays in FP32.

    Matrices are such that the kind of checkpoint which `fewbits quantize` would write holds them; embeddings and output
    projections, of which it holds none, are limited by nothing.
    """
    formats, format, kind = _asked(config)
    matrices = [(name, found) for name, found in parts.items() if roles[name] in MATRICES]
    limited = {part.name: kind for name, found in matrices for part in found if _as_in_files(name, roles[name], part)}
    names = [part.name for found in parts.values() for part in found]
    overrides = (
        *((re.escape(part), None) for part in config.skip),
        *((pattern, None if name == "keep" else parse(name)) for pattern, name in config.overrides.items()),
        *((pattern, None) for pattern in wide if any(re.search(pattern, name) for name in names)),
    )

    def admits(name: str, shape: tuple[int, ...], format: Format) -> str | None:
        holder = limited.get(name, KINDS[ANYTHING])
        return holder.admits(holder.entry(name, shape, format))

    vocabulary = None if config.vocabulary is None else parse(config.vocabulary)
    return Rules(
        format=format,
        admits=admits,
        vocabulary=vocabulary,
        overrides=overrides,
        fine_rows=kind.fine_rows,
        planned=formats,
    )


def _as_in_files(name: str, role: Role, part: PlanTensor) -> bool:
    """Whether a matrix would have this name in a file; experts that cannot be told apart would not."""
    return role is Role.LINEAR or part.name != name


def _asked(config: Config) -> tuple[Mapping[str, Format] | None, Format, Kind]:
    """The formats of a plan, the format of the rest, and the kind of checkpoint that is to hold them."""
    if config.plan is None:
        assert config.format is not None
        format = parse(config.format)
        return None, format, choose_kind(Path("model"), format, config.kind)
    plan = read_plan(Path(config.plan))
    formats = plan.tensors()
    return formats, next(iter(formats.values())), KINDS[config.kind or target_named(plan.target).kind]


def _roles(model: PreTrainedModel) -> dict[str, Role]:
    """Roles of the model's parameters; what follows the base model is an output, also a classifier's."""
    roles = module_roles(model)
    if model.base_model is model:
        return roles
    prefix = f"{model.base_model_prefix}."
    heads = {name for name, role in roles.items() if role is Role.LINEAR and not name.startswith(prefix)}
    return roles | dict.fromkeys(heads, Role.OUTPUT)


def _parts(model: PreTrainedModel, name: str, shape: tuple[int, ...], role: Role) -> list[PlanTensor]:
    """The matrices of a parameter as the rules see them: one, or those of all experts where they can be told apart."""
    dtype = model.get_parameter(name).dtype
    if role is not Role.EXPERTS:
        return [PlanTensor(name, role.value, shape, dtype)]
    try:
        pieces = unfused(name, shape, model.config.to_dict())
        return [PlanTensor(piece.name, role.value, piece.shape, dtype) for piece in pieces]
    except UnsupportedError:
        module, _ = owner(model, name)
        across = shape[1:] if not getattr(module, "is_transposed", False) else (shape[2], shape[1])
        return [PlanTensor(name, role.value, tuple(across), dtype)]


def _joined(name: str, choices: list[Choice]) -> Choice:
    """The one choice of a parameter. Raises UnsupportedError where its experts were to get several."""
    differing = {choice.format: choice for choice in choices}
    if len(differing) > 1:
        raise UnsupportedError(
            f"{name} holds the matrices of all experts in one format, and {' and '.join(map(str, differing))} were "
            "asked for; quantize the folder with `fewbits quantize`, or give them one"
        )
    return choices[0]


def _trouble(model: PreTrainedModel, name: str, role: Role) -> str | None:
    """Why a parameter could not run packed, as a sentence's end; None where it could, or nobody would ask for it."""
    module, leaf = owner(model, name)
    what = f"{type(module).__name__} {list(model.get_parameter(name).shape)}"
    if role is Role.EXPERTS:
        return (
            None if takes_experts(module, leaf) else f"{what} does not compute through transformers' experts interface"
        )
    if leaf == "weight" and can_replace(module):
        return None
    return f"{what} is neither a plain Linear nor a plain Embedding"


def _in_float32(model: PreTrainedModel) -> Iterator[str]:
    """Patterns of modules that the architecture keeps in FP32, when the model is in 16 bits."""
    if model.dtype == torch.float32:
        return
    names = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    yield from (rf"(^|\.){name}(\.|$)" for name in sorted(names))


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a parameter, and the parameter's name in it."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def nbytes(format: Format, shape: tuple[int, ...]) -> int:
    """Bytes of a parameter of this shape, of all experts where it has them, in a format."""
    return format.nbytes(shape) if len(shape) == 2 else shape[0] * format.nbytes(shape[1:])
