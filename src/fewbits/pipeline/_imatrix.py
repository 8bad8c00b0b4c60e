"""What each matrix of the original reads, measured on a text and written for llama.cpp.

The squared error of a layer's output y = W·x is, for errors of the weights that have nothing to do with each other,
Σ (ŵ − w)²·E[x²]: a column's errors weigh as much as the mean of its x². That number for every column of every matrix is
an importance matrix. llama-quantize reads it (`--imatrix`), and so does `fewbits quantize --imatrix`; unlike text it
needs no model that runs.

The model runs block by block, as in a calibrated run. Matrices go by their names in a GGUF file; that q and k have
their rows in another order there changes nothing, because a row's columns stay where they are. The projection to the
vocabulary is measured behind the last norm: `output.weight`, or `token_embd.weight` where the two are one tensor, which
is the name that llama-quantize looks up for it (llama.cpp's own tool leaves it out).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from fewbits.checkpoint import KINDS
from fewbits.checkpoint._writer import refuse_existing
from fewbits.checkpoint.imatrix import ImportanceMatrix, write_imatrix
from fewbits.engine import LayeredModel, fast_float32
from fewbits.evals import Windows
from fewbits.models import Role, describe
from fewbits.pipeline._calibrate import Calibration, text_of
from fewbits.pipeline._source import cut, local_folder, open_source, require_ties
from fewbits.pipeline._streams import Streams
from fewbits.results import CalibrationReport, ImportanceReport
from fewbits.stats import AllSeen, Collector

Progress = Callable[[int, int, str], None]


def imatrix(
    model: str | Path,
    out: str | Path,
    *,
    calibration: str | Path | Calibration = "self",
    progress: Progress | None = None,
) -> ImportanceReport:
    """Run a model on a text and write the importance of its matrices' columns as llama.cpp reads it.

    model: a Hugging Face folder, or a hub name, of an architecture that has names in GGUF. out: a path that does not
    exist. calibration: the text, a file or `self` (written by the model), or all that there is to say about it; none
    of it is held out. progress: called with (done, total, label).
    Raises a FewbitsError; then nothing is left at `out`.
    """
    began = time.monotonic()
    source, out = local_folder(model), Path(out)
    refuse_existing(out)
    reader = open_source(source)
    architecture = describe(reader.config, {name: entry.shape for name, entry in reader.entries.items()})
    require_ties(reader, architecture.tied)
    given = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
    pieces = tuple(cut(KINDS["gguf"], architecture, reader))
    with fast_float32(given.device):
        layers = LayeredModel(reader, given.device)
        places = layers.slots()
        matrices = {places[p.source].parameter: p.name for p in pieces if p.role is Role.LINEAR}
        projection = next(p.name for p in pieces if p.role is Role.OUTPUT)
        windows = text_of(reader, replace(given, held_out=0))
        with TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as scratch:
            streams = Streams(layers, windows.ids, folder=Path(scratch), limit=given.memory, original=False)
            found = measure_importance(layers, streams, matrices, projection, progress)
            streams.close()
    count, length = windows.ids.shape
    write_imatrix(out, ImportanceMatrix(found, count, length, (windows.description,)))
    return ImportanceReport(str(source), str(out), tuple(found), _report(windows), time.monotonic() - began)


@torch.no_grad()
def measure_importance(
    model: LayeredModel, streams: Streams, matrices: Mapping[str, str], projection: str, progress: Progress | None
) -> dict[str, Tensor]:
    """Name -> mean x² [K], float32, of `matrices` (parameter of the running model -> name) and the projection to the
    vocabulary. The stream ends up behind the last block.
    """
    found, steps = dict[str, Tensor](), len(model.layers) + 1
    for index, layer in enumerate(model.layers):
        if progress:
            progress(index, steps, layer)
        module = model.load(index)
        collector = _collector(_watched(module, layer, matrices), streams)
        with collector:
            for start, states in streams.quantized.batches(streams.batch):
                streams.quantized.put(start, model.run(index, states.to(model.device)))
        found |= _means(collector)
        model.drop(index)
    if progress:
        progress(len(model.layers), steps, projection)
    return found | _of_projection(model, streams, projection)


def _of_projection(model: LayeredModel, streams: Streams, name: str) -> dict[str, Tensor]:
    """Of what the projection reads; its product is not computed."""
    with model.outside():
        collector = _collector({name: model.output_matrix}, streams, stop=True)
        for _, states in streams.quantized.batches(streams.batch):
            with suppress(AllSeen), collector:
                model.logits(states.to(model.device))
    return _means(collector)


def _collector(watched: Mapping[str, Tensor], streams: Streams, *, stop: bool = False) -> Collector:
    return Collector(watched, ("importance",), tokens=streams.ids.numel(), stop=stop)


def _watched(module: nn.Module, layer: str, matrices: Mapping[str, str]) -> dict[str, Tensor]:
    """The parameters of a loaded layer that are to be measured, by the names that they get."""
    full = ((f"{layer}.{name}", parameter) for name, parameter in module.named_parameters())
    return {matrices[name]: parameter for name, parameter in full if name in matrices}


def _means(collector: Collector) -> dict[str, Tensor]:
    return {site.parameter: seen.value("importance").cpu() for site, seen in collector.statistics().items()}


def _report(windows: Windows) -> CalibrationReport:
    count, length = windows.ids.shape
    return CalibrationReport(
        source=windows.source,
        text=windows.description,
        windows=count,
        length=length,
        tokens=windows.tokens,
        digest=windows.digest,
        held_out_tokens=0,
        held_out_kld=None,
    )
