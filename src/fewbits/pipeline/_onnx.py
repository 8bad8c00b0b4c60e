"""A checkpoint as an ONNX file, proven: its weights read back, its outputs compared with fewbits' own.

The file is made, checked, decoded and run before it gets its name. Outputs are compared on random tokens, a text and a
shorter one with padding, whose places are left out: `exact` with a limit that follows from float32's rounding
(`export.rounding`), and as onnxruntime runs a file by default, where the difference is a figure and no proof.
One model is in memory at a time: ours is dropped before onnxruntime loads its own.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fewbits.checkpoint import Entry
from fewbits.checkpoint._writer import refuse_existing
from fewbits.engine import load, open_weights
from fewbits.errors import UnsupportedError, VerificationError
from fewbits.export import (
    OPSET,
    Session,
    Traced,
    Way,
    data_file,
    express,
    relative,
    require_installed,
    rounding,
    traced,
    written,
    wrong_weights,
)
from fewbits.pipeline._quantize import output_bytes, quantize
from fewbits.pipeline._source import local_folder
from fewbits.pipeline._stages import Stages
from fewbits.pipeline._stream import Progress
from fewbits.results import OnnxExport, OnnxRun

PROBE = 32
"""Tokens of the longer text."""
SHORTER = 20
WAYS: tuple[Way, ...] = ("portable", "onnxruntime")


def export_onnx(
    model: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    inputs: str | None = None,
    sequence: int | None = None,
    way: Way = "portable",
    run: bool = True,
    progress: Progress | None = None,
) -> OnnxExport:
    """Write a checkpoint as an ONNX file, prove its weights, run it in onnxruntime and compare.

    model: any checkpoint that fewbits reads, quantized or not, or a hub name; an encoder or a decoder (a whole text to
    its logits, no key-value cache). format, inputs: quantize a floating-point one first, as `quantize` does, to
    nearest. sequence: inputs of the fixed shape [1, sequence] instead of any. way: operators of the standard alone
    (opset 21), or onnxruntime's MatMulNBits where weights have groups. run: False leaves out onnxruntime, and so the
    comparison.
    Raises UnsupportedError for what ONNX cannot express, VerificationError where the file is not as meant; then nothing
    is left at `out`.
    """
    began, out = time.monotonic(), Path(out)
    require_installed(running=run)
    refuse_existing(out)
    if way not in WAYS:
        raise UnsupportedError(f"'{way}' is no way to write ONNX; take one of {', '.join(WAYS)}")
    if sequence is not None and sequence < 1:
        raise UnsupportedError(f"a sequence of {sequence} tokens: give 1 or more")
    if inputs is not None and format is None:
        raise UnsupportedError(f"inputs in {inputs} need weights in integers; give a format too, such as int8")
    source, stages = local_folder(model), Stages(progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.quantized-", dir=out.parent) as folder:
        path = source
        if format is not None:
            path = Path(folder) / "model"
            told = stages.next(0.2)
            quantize(source, path, format=format, inputs=inputs, kind="fewbits", prove=False, progress=told)
        made = traced(path, sequence)
        with written(express(made, way), out, stages.next(0.3)) as file:
            _require_right(file, made, stages.next(0.2))
            runs = _compared(path, file, made.inputs, sequence) if run else ()
    return OnnxExport(
        source=str(source),
        output=str(out),
        way=way,
        opset=OPSET,
        sequence=sequence,
        formats=dict(Counter(_format(weight.entry) for weight in made.quantized.values())),
        kept=len(made.kept),
        source_bytes=output_bytes(source),
        output_bytes=sum(each.stat().st_size for each in (out, data_file(out)) if each.exists()),
        seconds=time.monotonic() - began,
        runs=runs,
    )


def _format(entry: Entry) -> str:
    return entry.format.name if entry.inputs is None else f"{entry.format} with {entry.inputs} inputs"


def _require_right(file: Path, made: Traced, progress: Progress | None) -> None:
    wrong = wrong_weights(file, made.quantized, made.kept, progress)
    if wrong:
        raise VerificationError(
            f"{len(wrong)} weights of the ONNX file are not the checkpoint's ({wrong[0]}); nothing was kept, "
            "please report it"
        )


def _compared(path: Path, file: Path, names: tuple[str, ...], sequence: int | None) -> tuple[OnnxRun, ...]:
    """Two runs beside fewbits' own. Raises VerificationError if the exact one is further away than rounding is."""
    given, mask = _probe(path, sequence)
    given = {name: given[name] for name in names}
    expected, limit = _ours(path, given, mask)
    exact, usual = (_run(Session(file, exact=exact), given, mask, expected) for exact in (True, False))
    if not exact.difference <= limit:
        raise VerificationError(
            f"onnxruntime's outputs are {exact.difference:.2g} away from fewbits' own (relative, by the norm), and "
            f"float32's rounding explains at most {limit:.2g}; nothing was kept, please report it"
        )
    return replace(exact, limit=limit), usual


def _ours(path: Path, given: dict[str, Tensor], mask: Tensor) -> tuple[Tensor, float]:
    """What fewbits' own reading puts out, and how far another run of it may be away."""
    model = load(path)

    def outputs() -> Tensor:
        with torch.inference_mode():
            found = model(**given)
        return _read(found["logits"] if "logits" in found else next(iter(found.values())), mask)

    return outputs(), rounding(model, outputs)


def _probe(path: Path, sequence: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """Random tokens, two texts of which the second is shorter, or one of a fixed length; and which are no padding."""
    config, _ = open_weights(path)
    known = getattr(config, "max_position_embeddings", None) or PROBE
    length = sequence or min(PROBE, max(1, known // 2))
    shape = (2 if sequence is None else 1, length)
    tokens = torch.randint(config.get_text_config().vocab_size, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[-1, max(1, length * SHORTER // PROBE) :] = 0
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": torch.zeros_like(tokens)}, mask.bool()


def _read(output: Tensor, mask: Tensor) -> Tensor:
    """Rows of an output that are no padding's: of each token, or of each text."""
    return (output[mask] if output.dim() == mask.dim() + 1 else output).float()


def _run(session: Session, given: dict[str, Tensor], mask: Tensor, expected: Tensor) -> OnnxRun:
    found = _read(session(given), mask)
    agreement = None
    if session.output == "logits":
        agreement = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    return OnnxRun(
        exact=session.exact,
        difference=relative(found, expected),
        largest=float((found - expected).abs().max()),
        top1_agreement=agreement,
        rows=len(expected),
    )
