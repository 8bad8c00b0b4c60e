"""A causal language model whose decoder layers are in memory one at a time.

The model is built without weights. What lies outside its layers (embeddings, the last norm, the projection to the
vocabulary) is loaded when it is used; a layer is loaded, run over everything, changed perhaps, and dropped.

What a layer is called with besides the hidden states (rotary angles, masks) is the model's own affair and depends only
on the shape of the input. So the model runs once with stubs for layers that write down how they are called, and the
same arguments are used for every batch; all batches are windows of one length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.checkpoint import Reader
from fewbits.engine.cache import attentions
from fewbits.engine.loading import Placement, assign, placements, refuse_unexpected, tie_parameters, values
from fewbits.engine.skeleton import configuration, is_causal, skeleton
from fewbits.engine.weights import Weight
from fewbits.errors import UnsupportedError
from fewbits.models import Slot

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class LayeredModel:
    """A causal language model in float32, one layer in memory at a time.

    layers: the names of its decoder layers, in order. products: the type that layers multiply in, bfloat16 where its
    rounding is small against what is measured; everything else stays float32.
    Raises UnsupportedError for what is no causal language model or has no list of decoder layers.
    """

    def __init__(self, reader: Reader, device: torch.device | str = "cpu") -> None:
        config = configuration(reader.path, reader.config)
        if not is_causal(config):
            named = ", ".join(config.architectures or ["no class"])
            raise UnsupportedError(f"{reader.path}: {named} does not predict next tokens, so it cannot be calibrated")
        config._experts_implementation = "eager"  # one product an expert, with the tokens that chose it
        self.device = torch.device(device)
        self.products = torch.float32
        self.config = config
        self._reader = reader
        self._model = skeleton(config, torch.float32)
        self._expected = dict(self._model.state_dict())
        self._prefix, self._layers = decoder_layers(self._model)
        self.layers = tuple(f"{self._prefix}.{i}" for i in range(len(self._layers)))
        weights = {name: Weight(reader, entry) for name, entry in reader.entries.items()}
        placed, unexpected = placements(self._model, weights, self._expected)
        refuse_unexpected(self._model, unexpected)
        self._placements = placed
        self._calls: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._in_use = 0  # callers that need what lies outside of the layers
        self._replaced: Mapping[str, Tensor] = {}  # parameters outside of the layers, by name
        self._sources: dict[str, Tensor] = {}  # what they were, while they are in memory
        self._tuples = False  # whether this architecture's layers return tuples

    @property
    def hidden_size(self) -> int:
        """Numbers in the hidden state of one token."""
        return int(self.config.get_text_config().hidden_size)

    def layer_of(self, name: str) -> int | None:
        """Index of the layer that a parameter of the running model belongs to; None outside of all."""
        if not name.startswith(self._prefix + "."):
            return None
        return int(name[len(self._prefix) + 1 :].partition(".")[0])

    def slots(self) -> dict[str, Slot]:
        """Entry of the checkpoint -> where it lies in the running model."""
        return {
            weight.entry.name: _slot(placement, pattern, weight)
            for placement in self._placements
            for pattern, weight in placement.sources
        }

    @property
    def path(self) -> Path:
        """Where its checkpoint is."""
        return self._reader.path

    @property
    def values(self) -> dict[str, Any]:
        """config.json, as the checkpoint has it."""
        return self._reader.config

    def attentions(self, index: int) -> dict[str, nn.Module]:
        """Name -> attention of a layer that keeps keys and values."""
        return {f"{self.layers[index]}.{name}": module for name, module in attentions(self._layers[index]).items()}

    def load(self, index: int, without: Collection[str] = ()) -> nn.Module:
        """A layer with its weights, float32, on the device; they are read anew at every call.

        without: parameters, by their names in the model, that stay without numbers.
        """
        self._fill(lambda name: self.layer_of(name) == index and name not in without)
        layer = self._layers[index]
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        for buffer in layer.buffers():
            buffer.data = buffer.data.to(self.device)
        return layer

    def drop(self, index: int) -> None:
        """Free a layer's weights."""
        self._empty(self._layers[index])

    def embed(self, ids: Tensor) -> Tensor:
        """What the first layer reads, float32 [B, T, H], for token ids [B, T]."""
        with self.outside(), torch.no_grad():
            caught: list[Tensor] = []

            def stub(x: Tensor, *_: Any, **__: Any) -> Tensor:
                caught.append(x)
                raise _Enough

            with self._stubs([stub]):
                parts = []
                for row in ids.split(1):
                    try:
                        self._model(input_ids=row.to(self.device), use_cache=False)
                    except _Enough:
                        parts.append(caught.pop())
            return torch.cat(parts)

    def run(self, index: int, x: Tensor, replaced: Mapping[str, Tensor] | None = None) -> Tensor:
        """What a loaded layer makes of hidden states [B, T, H], `replaced` in place of its own parameters."""
        arguments = self._arguments(x.shape[0], x.shape[1])[index]
        lower = self.products != torch.float32
        with torch.autocast(self.device.type, self.products, cache_enabled=False) if lower else nullcontext():
            out = torch.func.functional_call(self._layers[index], dict(replaced or {}), (x,), arguments)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden.float()

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Within it, products are float32 ones: what is reported is measured so."""
        products, self.products = self.products, torch.float32
        try:
            yield
        finally:
            self.products = products

    @property
    def input_matrix(self) -> Tensor:
        """The embeddings [vocab, H], within `outside`."""
        return _weight(self._model.get_input_embeddings())

    @property
    def output_matrix(self) -> Tensor:
        """The projection to the vocabulary [vocab, H], within `outside`; the embeddings themselves where it is tied."""
        return _weight(self._model.get_output_embeddings())

    def uses(self, name: str) -> tuple[bool, bool]:
        """Whether a parameter outside of the layers holds the embeddings, and whether it projects to the vocabulary."""
        with self.outside():
            parameter = self._model.get_parameter(name)
            return parameter is self.input_matrix, parameter is self.output_matrix

    def outer(self, name: str) -> Tensor:
        """A parameter outside of the layers, a copy, float32."""
        with self.outside():
            return self._model.get_parameter(name).detach().clone()

    def replace(self, name: str, value: Tensor) -> None:
        """From now on a parameter outside of the layers is `value`, and so is whatever is tied to it."""
        with self.outside():
            self._put({**self._replaced, name: value})

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it, these parameters outside of the layers are replaced, and no others."""
        with self.outside():
            before = self._replaced
            self._put(values)
            try:
                yield
            finally:
                self._put(before)

    def original(self) -> AbstractContextManager[None]:
        """Within it, what lies outside of the layers is as in the source."""
        return self.replaced({})

    def _put(self, values: Mapping[str, Tensor]) -> None:
        """Let parameters outside of the layers, which are in memory, be the source's but for these."""
        for name, source in self._sources.items():
            self._model.get_parameter(name).data = source
        self._sources.clear()
        self._replaced = {name: value.to(self.device, torch.float32) for name, value in values.items()}
        for name, value in self._replaced.items():
            parameter = self._model.get_parameter(name)
            self._sources[name], parameter.data = parameter.data, value

    def logits(self, x: Tensor) -> Tensor:
        """The model's predictions, float32 [B, T, vocab], from what the last layer returned [B, T, H]."""
        stub = self._returning(lambda _: x)
        with self.outside(), self._stubs([stub] + [self._returning(lambda seen: seen)] * (len(self._layers) - 1)):
            ids = torch.zeros(x.shape[:2], dtype=torch.int64, device=self.device)
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits.float()
        return logits

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Keep what lies outside the layers in memory, for several calls of `embed` or `logits`."""
        if self._in_use == 0:
            self._fill(lambda name: self.layer_of(name) is None)
            self._outside_to_device()
            self._put(self._replaced)
        self._in_use += 1
        try:
            yield
        finally:
            self._in_use -= 1
            if self._in_use == 0:
                self._sources.clear()
                self._drop_outside()

    def _returning(self, function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def stub(x: Tensor, *_: Any, **__: Any) -> Any:
            return (function(x),) if self._tuples else function(x)

        return stub

    def _arguments(self, batch: int, length: int) -> list[dict[str, Any]]:
        """How the model calls each layer, besides the hidden states, for an input of this shape."""
        if (batch, length) in self._calls:
            return self._calls[batch, length]
        for self._tuples in (False, True):
            calls = self._recorded(batch, length)
            if calls is not None:
                self._calls[batch, length] = calls
                return calls
        raise UnsupportedError(f"{self._reader.path}: its layers cannot be run one by one; use rtn")

    def _recorded(self, batch: int, length: int) -> list[dict[str, Any]] | None:
        """How each layer is called; None if the model does not go on from what the stubs return."""
        calls: list[dict[str, Any]] = []
        shapes: list[torch.Size] = []

        def stub(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args:
                raise UnsupportedError(
                    f"{self._reader.path}: its layers take more than the hidden states by position, which cannot be "
                    "replayed; use a method that needs no calibration"
                )
            calls.append({key: value for key, value in kwargs.items() if key != "past_key_values"})
            shapes.append(x.shape)
            if len(calls) == len(self._layers):
                raise _Enough
            return (x,) if self._tuples else x

        with self.outside(), self._stubs([stub] * len(self._layers)), torch.no_grad():
            ids = torch.zeros(batch, length, dtype=torch.int64, device=self.device)
            try:
                self._model(input_ids=ids, use_cache=False)
            except _Enough:
                pass
            except (TypeError, AttributeError, IndexError, ValueError, RuntimeError):
                if self._tuples:
                    raise
                return None
        return calls if all(shape == shapes[0] for shape in shapes) else None

    @contextmanager
    def _stubs(self, stubs: list[Callable[..., Any]]) -> Iterator[None]:
        for layer, stub in zip(self._layers, stubs, strict=False):
            layer.__dict__["forward"] = stub
        try:
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)

    def _outside_to_device(self) -> None:
        for name, module in self._model.named_modules():
            if self.layer_of(name) is None and name != self._prefix:
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    if tensor is not None and not tensor.is_meta:
                        tensor.data = tensor.data.to(self.device)

    def _drop_outside(self) -> None:
        for name in self._expected:
            if self.layer_of(name) is None:
                self._to_meta(name)

    def _fill(self, wanted: Callable[[str], bool]) -> None:
        filled = set[str]()
        for placement in self._placements:
            if wanted(placement.target):
                for name, value in values(self._model, placement, torch.float32, self.device).items():
                    assign(self._model, name, value, self._expected)
                    filled.add(name)
        tie_parameters(self._model, filled)

    def _empty(self, layer: nn.Module) -> None:
        prefix = next(name for name, module in self._model.named_modules() if module is layer)
        for name in self._expected:
            if name.startswith(prefix + "."):
                self._to_meta(name)

    def _to_meta(self, name: str) -> None:
        module_name, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(module_name)
        if leaf in module._parameters:
            shape = self._expected[name]
            module._parameters[leaf] = nn.Parameter(torch.empty_like(shape, device="meta"), requires_grad=False)


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight


class _Enough(Exception):  # noqa: N818  # no error: it only ends a run
    """Ends a run of the model once what follows is of no interest."""


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """(name, list) of the model's decoder layers. Raises UnsupportedError if it has none, or several such lists."""
    kinds = set(model._no_split_modules or ())
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and {type(m).__name__ for m in module} <= kinds
    ]
    if len(found) != 1:
        raise UnsupportedError(
            f"{type(model).__name__} has {len(found)} lists of decoder layers where one is needed; "
            "use a method that needs no calibration (rtn, hqq)"
        )
    return found[0]


def _slot(placement: Placement, pattern: str, weight: Weight) -> Slot:
    """Where an entry lies in its parameter: all of it, or one expert's matrix that transformers fuses with others."""
    expert = _EXPERT.search(weight.entry.name)
    if placement.conversion is None or expert is None:
        return Slot(placement.target)
    parts = list(dict.fromkeys(placement.conversion.source_patterns))
    if len(parts) == 1:
        return Slot(placement.target, int(expert[1]))
    first = parts.index(pattern) * weight.entry.shape[0]
    return Slot(placement.target, int(expert[1]), rows=(first, first + weight.entry.shape[0]))
