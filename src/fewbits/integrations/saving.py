"""`save_pretrained` of a model that holds fewbits' layers: a checkpoint of a kind that other tools load, too.

The bytes of the layers go into the files as they are, by the writers of `fewbits quantize`: of the kinds of folders the
first that holds every tensor as it is, unless `Config.kind` says another. Everything is written beside the folder's old
files and then takes their place.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbits.checkpoint import KINDS, Entry, Kind, Writer
from fewbits.engine.tiling import taken
from fewbits.errors import UnsupportedError
from fewbits.formats import Float, QTensor
from fewbits.integrations.config import Config
from fewbits.models import Piece, targets_of, unfused
from fewbits.nn import PackedExperts, PackedWeight, QuantizedEmbedding, QuantizedLinear, W8A8Linear
from fewbits.pipeline import FOLDERS
from fewbits.results import TensorReport

INDEX = "model.safetensors.index.json"
HUB = ("commit_message", "private", "token", "revision", "create_pr", "tags")
"""Arguments of transformers' push_to_hub."""


@dataclass(frozen=True)
class Part:
    """One tensor of the file. held: a plain tensor, a packed weight or some of its rows, or all experts' together.
    source: the model's parameter.
    """

    entry: Entry
    held: Tensor | PackedWeight | PackedExperts
    source: str
    rows: tuple[int, int] | None = None

    def read(self) -> Iterator[QTensor]:
        """What is written of it, in order."""
        if isinstance(self.held, Tensor):
            yield QTensor(Float(self.held.dtype), self.held.detach().cpu(), {})
        elif isinstance(self.held, PackedWeight):
            whole = _unpacked(self.held)
            yield whole if self.rows is None else taken(whole, slice(*self.rows))
        elif self.entry.format.rowwise:
            for index in range(len(self.held)):
                yield _stacked([_unpacked(self.held.store(index))])
        else:
            yield _stacked([_unpacked(self.held.store(index)) for index in range(len(self.held))])


def _stacked(matrices: list[QTensor]) -> QTensor:
    """Matrices of one format as one tensor [matrices, out_features, in_features]."""
    params = {key: torch.stack([each.params[key] for each in matrices]) for key in matrices[0].params}
    return QTensor(matrices[0].format, torch.stack([each.codes for each in matrices]), params)


def _unpacked(weight: PackedWeight) -> QTensor:
    packed = weight.view()
    return QTensor.from_arrays(packed.format, {key: array.cpu() for key, array in packed.arrays.items()}, packed.shape)


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    **more: Any,
) -> None:
    """What stands in the place of transformers' function of this name, on a model that fewbits loaded.

    Of its further arguments those of the hub are passed on; the files' size is the writer's. An adapter that was added
    to the model is saved by itself, as transformers does it.
    Raises UnsupportedError where no kind of checkpoint, or not the one asked for, holds all tensors as they are.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        type(model).save_pretrained(model, save_directory, is_main_process, push_to_hub=push_to_hub, **more)
        return
    if is_main_process:
        _save(model, Path(save_directory))
    if push_to_hub:
        hub = {key: value for key, value in more.items() if key in HUB}
        model.push_to_hub(more.get("repo_id", Path(save_directory).name), **hub)


def _save(model: PreTrainedModel, folder: Path) -> None:
    kind, parts = _fitting(model)
    with tempfile.TemporaryDirectory() as beside:
        if model.can_generate():
            model.generation_config.save_pretrained(beside)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.partial-") as partial:
            made = Path(partial, "model")
            with kind.create(made, [part.entry for part in parts], Path(beside), _config(model)) as writer:
                reports = [_written(part, writer, model, kind) for part in parts]
                writer.commit(_ledger(model, kind, reports))
            _move(made, folder)


def _fitting(model: PreTrainedModel) -> tuple[Kind, list[Part]]:
    """The kind of checkpoint that holds the model, and its tensors there."""
    config = getattr(model.config, "quantization_config", None)
    asked = config.kind if isinstance(config, Config) else None
    refusals = []
    for name in (asked,) if asked else FOLDERS:
        kind = KINDS[name]
        parts = list(_parts(model, kind))
        refusal = _refusal(kind, parts)
        if refusal is None:
            return kind, parts
        refusals.append(f"{name}: {refusal}")
    raise UnsupportedError(f"the model cannot be saved as it is ({'; '.join(refusals)})")


def _refusal(kind: Kind, parts: list[Part]) -> str | None:
    names = {part.entry.name for part in parts}
    found = (kind.admits_beside(part.entry, names) for part in parts)
    return next((refusal for refusal in found if refusal is not None), None)


def _parts(model: PreTrainedModel, kind: Kind) -> Iterator[Part]:
    """Everything that is saved of a model, under its own names; what shares a weight once."""
    seen: set[int] = set()
    inside: list[str] = []  # names of modules whose arrays belong to a packed weight
    for path, module in model.named_modules():
        if any(path.startswith(name) for name in inside):
            continue
        if isinstance(module, PackedExperts):
            inside.append(f"{path}.")
            yield from _experts(model, path, module, kind)
            continue
        if isinstance(module, W8A8Linear):
            raise UnsupportedError(
                f"{path} rounds its inputs, and holds its codes as products need them; copy the folder it came from"
            )
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            inside.append(f"{path}.store")
            if id(module.store) not in seen:
                seen.add(id(module.store))
                name = f"{path}.weight"
                yield Part(kind.entry(name, module.store.shape, module.store.format), module.store, name)
        for name, tensor in _own(module, f"{path}." if path else "").items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield Part(Entry(name, tuple(tensor.shape), Float(tensor.dtype)), tensor, name)


def _own(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A module's own parameters and persistent buffers."""
    buffers = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
    found = {**module._parameters, **buffers}
    return {f"{prefix}{name}": tensor for name, tensor in found.items() if tensor is not None}


def _experts(model: PreTrainedModel, name: str, experts: PackedExperts, kind: Kind) -> Iterator[Part]:
    """A matrix for every expert and projection, where transformers knows to join them again; else all in one."""
    first = experts.store(0)
    if experts.transposed:
        raise UnsupportedError(
            f"{name} is [experts, in_features, out_features] in the model, and its packed rows go the other way: no "
            "kind of checkpoint holds that; quantize the folder with `fewbits quantize` to have it in a file"
        )
    pieces = _pieces(model, name, experts)
    if not pieces or set(targets_of(model, {piece.name: None for piece in pieces}).values()) != {name}:
        yield Part(kind.entry(name, (len(experts), *first.shape), first.format), experts, name)
        return
    for piece in pieces:
        assert piece.expert is not None
        yield Part(kind.entry(piece.name, piece.shape, first.format), experts.store(piece.expert), name, piece.rows)


def _pieces(model: PreTrainedModel, name: str, experts: PackedExperts) -> tuple[Piece, ...]:
    """The matrices of a fused parameter; none where they are not known, or their rows cannot be parted."""
    first = experts.store(0)
    try:
        return unfused(name, (len(experts), *first.shape), model.config.to_dict()) if first.format.rowwise else ()
    except UnsupportedError:
        return ()


def _written(part: Part, writer: Writer, model: PreTrainedModel, kind: Kind) -> TensorReport:
    """Write a tensor, and say what became of it."""
    for each in part.read():
        writer.write(part.entry.name, each)
    format = part.entry.format
    quantizer: Any = getattr(model, "hf_quantizer", None)
    known = getattr(quantizer, "reports", {}).get(part.source)
    quantized = not isinstance(format, Float)
    return TensorReport(
        name=part.entry.name,
        fate="quantized" if quantized else "kept",
        shape=part.entry.shape,
        format=format.name,
        nbytes=kind.file_bytes(format, part.entry.shape),
        source=part.source,
        method=known.method if known else None,
        error=known.error if known else None,
        digests=writer.digests[part.entry.name],
    )


def _ledger(model: PreTrainedModel, kind: Kind, reports: list[TensorReport]) -> dict[str, Any]:
    return {
        "fewbits": version("fewbits"),
        "source": Path(str(model.name_or_path)).name,
        "kind": kind.name,
        "torch": torch.__version__,
        "tensors": [{key: value for key, value in asdict(report).items() if value is not None} for report in reports],
    }


def _config(model: PreTrainedModel) -> Mapping[str, Any]:
    """config.json, but for what the kind says of quantization."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    found: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    return {key: value for key, value in found.items() if key != "quantization_config"}


def _move(made: Path, folder: Path) -> None:
    """Put the files of one folder into another, in the place of older weights there."""
    folder.mkdir(exist_ok=True)
    new = {file.name for file in made.iterdir()}
    for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
        if old.name not in new:
            old.unlink(missing_ok=True)
    for file in made.iterdir():
        file.replace(folder / file.name)
