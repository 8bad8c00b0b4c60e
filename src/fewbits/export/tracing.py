"""A checkpoint's graph, made by torch.onnx.export of the transformers model, without any of its weights in memory.

The model is built empty (`engine.skeleton`). A quantized layer becomes a stand-in that is one node of the domain
`fewbits` in the graph, named after its weight; `express` turns it into ONNX's operators afterwards. Parameters that
stay in floating point are fake tensors, which have a shape and no numbers, and become tensors of the file that are read
from the checkpoint when they are written. So tracing takes as little memory for 70 billion weights as for one million.

Inputs are `input_ids`, `attention_mask` and, where the model takes them, `token_type_ids`, int64 [batch, sequence];
the output is `logits`, or what comes first in a model without them. There is no key-value cache: a decoder computes
the logits of a whole text.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from fewbits.checkpoint import is_scale
from fewbits.checkpoint.adapter import adapter_inside
from fewbits.engine import open_weights
from fewbits.engine.loading import Placement, placements, refuse_unexpected, require_shape
from fewbits.engine.skeleton import skeleton
from fewbits.engine.weights import Weight
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.export.integers import layout
from fewbits.nn import can_replace

DOMAIN = "fewbits"
OPSET = 21  # the first with blocks of weights that share a scale, and 4-bit integers
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SAMPLE = (2, 7)  # any text; both numbers may vary in the graph


@dataclass(frozen=True)
class Traced:
    """A graph (onnx_ir.Model) whose linear layers and embeddings in `quantized` are nodes of the domain `fewbits`, and
    whose tensors in `kept` have no numbers yet. Both go by the names that the model knows parameters by. output: what
    the model calls what it returns.
    """

    graph: Any
    inputs: tuple[str, ...]
    output: str
    quantized: Mapping[str, Weight]
    kept: Mapping[str, Weight]


def traced(path: Path, sequence: int | None = None) -> Traced:
    """The graph of a checkpoint of any kind. sequence: a fixed [1, sequence] for inputs instead of any shape.

    Raises UnsupportedError, by name, for what a graph of ONNX cannot express.
    """
    if adapter_inside(path) is not None:
        raise UnsupportedError(f"{path} has an adapter inside; make the two one first: fewbits merge")
    config, weights = open_weights(path)
    config.use_cache = False
    model = skeleton(config, torch.float32)
    names = _inputs(path, model)
    found = _by_parameter(model, weights)
    quantized = {name: weight for name, weight in found.items() if weight.quantized}
    kept = {name: weight for name, weight in found.items() if name not in quantized}
    _stand_in(model, quantized)
    _fake(model, kept)
    outputs: list[str] = []
    graph = _graph(_Text(model, names, outputs.append), sequence)
    return Traced(graph, names, outputs[0], quantized, kept)


def _inputs(path: Path, model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the inputs that the model takes. Raises UnsupportedError unless it reads one text."""
    taken = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder or INPUTS[0] not in taken or INPUTS[1] not in taken:
        raise UnsupportedError(
            f"{path}: {type(model).__name__} does not go from one text to one output; encoders (BERT and its like) and "
            "decoders can be exported"
        )
    kinds = getattr(model.config, "type_vocab_size", 0)  # GPT-2 takes them too, where zeros are not the same as nothing
    return tuple(name for name in INPUTS if name in taken and (name != INPUTS[2] or kinds > 1))


def _by_parameter(model: PreTrainedModel, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Every parameter of the model and the weight that it is, tied ones under both names."""
    for name, weight in weights.items():
        if is_scale(weight.entry) and not name.endswith(".input_scale"):
            raise UnsupportedError(
                f"{name}: keys and values are rounded for the cache, and the graph has none; quantize the original "
                "without --kv-cache"
            )
    expected = dict(model.state_dict())
    placed, unexpected = placements(model, {n: w for n, w in weights.items() if not is_scale(w.entry)}, expected)
    refuse_unexpected(model, unexpected)
    found = {placement.target: _only(placement) for placement in placed}
    for name, other in model.all_tied_weights_keys.items():
        known = found.get(name) or found.get(other)
        if known is not None:
            found = {name: known, other: known} | found
    for name, weight in found.items():
        require_shape(name, weight.entry.shape, expected[name].shape)
    missing = [name for name, tensor in expected.items() if name not in found and tensor.is_meta]
    if missing:
        raise CheckpointError(f"{model.name_or_path}: {missing[0]} is not in the checkpoint; a shard may be missing")
    return found


def _only(placement: Placement) -> Weight:
    """The one weight that a parameter is made of."""
    if placement.conversion is not None:
        raise UnsupportedError(
            f"{placement.target}: several tensors of the checkpoint are fused in the running model (experts), which "
            "ONNX has no quantized operator for; a model without experts can be exported"
        )
    return placement.sources[0][1]


def _stand_in(model: PreTrainedModel, quantized: Mapping[str, Weight]) -> None:
    """Swap layers of quantized weights for nodes."""
    for name, weight in quantized.items():
        layout(name, weight.entry.format)  # or why there is none
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf != "weight" or not can_replace(module):
            raise UnsupportedError(
                f"{name} is {weight.entry.format} in a {type(module).__name__}; ONNX has quantized operators for "
                "linear layers and embeddings, so keep it in floating point (--override NAME=keep)"
            )
        parent, _, own = path.rpartition(".")
        stand_in = _Linear(name, module) if isinstance(module, nn.Linear) else _Embedding(name, weight)
        setattr(model.get_submodule(parent), own, stand_in)


def _fake(model: nn.Module, kept: Mapping[str, Weight]) -> None:
    """Give kept parameters shapes without numbers; tied ones share theirs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    shared: dict[str, nn.Parameter] = {}
    for name, weight in kept.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        with mode:
            before = getattr(module, leaf)
            empty = torch.empty(before.shape, dtype=before.dtype)
        if leaf in module._buffers:
            module._buffers[leaf] = empty
        else:
            parameter = nn.Parameter(empty, requires_grad=False)
            module._parameters[leaf] = shared.setdefault(weight.entry.name, parameter)


class _Linear(nn.Module):
    """One node for x · Wᵀ; a bias is added behind it."""

    def __init__(self, name: str, layer: nn.Linear) -> None:
        super().__init__()
        self.name, self.out_features, self.bias = name, layer.out_features, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = _node("Linear", x, self.name, (*x.shape[:-1], self.out_features))
        return y if self.bias is None else y + self.bias


class _Embedding(nn.Module):
    """One node for rows of a table."""

    def __init__(self, name: str, weight: Weight) -> None:
        super().__init__()
        self.name, self.columns = name, weight.entry.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        return _node("Embedding", ids, self.name, (*ids.shape, self.columns))


def _node(kind: str, x: Tensor, name: str, shape: tuple[Any, ...]) -> Tensor:
    made: Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::{kind}", [x], {"weight": name}, dtype=torch.float32, shape=shape)
    return made


class _Text(nn.Module):
    """The model as a function of its inputs in order, to one output, whose name it tells."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...], tell: Callable[[str], None]) -> None:
        super().__init__()
        self.model, self.names, self.tell = model, names, tell

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs = self.model(**dict(zip(self.names, inputs, strict=True)))
        name = "logits" if "logits" in outputs else next(iter(outputs))
        self.tell(name)
        found: Tensor = outputs[name]
        return found


def _graph(text: _Text, sequence: int | None) -> Any:
    names = text.names
    shape = SAMPLE if sequence is None else (1, sequence)
    axes = ({0: "batch", 1: "sequence"},) * len(names) if sequence is None else None
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            text.eval(),
            tuple(torch.ones(shape, dtype=torch.int64) for _ in names),
            input_names=names,
            dynamic_shapes=None if axes is None else (axes,),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of packages that are not there, and of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
