"""What a report tells, gathered: headers and ledger first, then whatever is measured, one model in memory at a time.

What cannot be had is left out with a sentence that says what would bring it; nothing is estimated in its place. Only
what was asked for by name (the original to compare with, a text) raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewbits import origin
from fewbits.checkpoint import Kind, Reader, ledger_path, open_checkpoint, read_ledger
from fewbits.errors import FewbitsError, UnsupportedError
from fewbits.evals.energy import decode_energy
from fewbits.evals.evaluation import compare
from fewbits.evals.predictions import predictions
from fewbits.evals.speed import Load, benchmark
from fewbits.evals.text import LENGTH, WINDOWS
from fewbits.evals.tokenizer import tokenizer_of
from fewbits.findings import Energy, Histogram, MemoryFacts, Predictions, Report, TensorFacts
from fewbits.models import Piece, cache_shape, describe
from fewbits.pipeline import _told as told
from fewbits.pipeline._estimate import source_bytes
from fewbits.pipeline._histograms import histograms
from fewbits.pipeline._quantize import output_bytes
from fewbits.pipeline._source import HUB_NAME, Unscaled, cut, local_folder, open_any
from fewbits.pipeline._tensors import absent, tensor_facts, weight_parts, words
from fewbits.pipeline._verify import relative_error, verify
from fewbits.results import Benchmark, CalibrationReport, Verification

Progress = Callable[[int, int, str], None]
CONTEXT = 8192  # tokens that the memory of keys and values is told for, at most
PROMPT, NEW = 512, 64  # tokens that speed is measured with, at most

AGAINST = "give the original: --against MODEL"
LEDGER = "there is no ledger (fewbits.json) with this checkpoint: fewbits did not write it"
REWRITTEN = "an exact transform rewrote them first, or it has no tensor of that shape, so they cannot be laid beside"
PLAN = "it was not made by a plan (fewbits quantize MODEL OUT --bpw 4.25, or --plan FILE, measures what bits buy where)"
TRAINING = "it was not trained (fewbits train qat MODEL OUT --format … --data TEXT)"
CALIBRATION = "it was made without text (methods such as gptq, awq and tune run the model on some)"

_HUB_CACHE = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")
_FRONT_MATTER = re.compile(r"---\n(?P<yaml>.*?)\n---", re.DOTALL)
_LICENSE = re.compile(r"^license:\s*[\"']?(?P<name>[\w.+-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Wanted:
    """What is measured. text, windows, length, seed: as `evaluate` takes them; speed: and energy."""

    text: str | Path | None = None
    windows: int = WINDOWS
    length: int = LENGTH
    seed: int = 0
    device: str = "cpu"
    speed: bool = True


def gather(
    out: str | Path, against: str | Path | None = None, wanted: Wanted | None = None, progress: Progress | None = None
) -> Report:
    """Everything that a report tells of the checkpoint at `out`, beside its original `against` where that is given.

    Raises CheckpointError where either cannot be opened or the ledger is damaged, and as `evaluate` does.
    """
    out, wanted = Path(out), wanted or Wanted()
    kind, reader = open_checkpoint(out)
    missing: dict[str, str] = {}
    document = _ledger(out, missing)
    history = _history(document, missing)
    config = _config(out)
    language_model = _is_language_model(config, kind)
    source = None if against is None else _Source(against, kind)
    tensors = tensor_facts(kind, reader, document.get("tensors", {}))
    tensors = _with_errors(tensors, reader, source, document, missing)
    return Report(
        name=out.name,
        kind=kind.name,
        loaded_by=kind.summary,
        architecture=next(iter(config.get("architectures") or []), config.get("model_type")),
        language_model=language_model,
        weights=sum(tensor.weights for tensor in tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        file_bytes=output_bytes(out),
        tensors=tensors,
        memory=_memory(tensors, reader, config, source, missing),
        histograms=_histograms(tensors, reader, source, document, missing),
        command=origin.command(),
        versions=origin.versions(),
        absent=tuple(absent(document.get("tensors", {}))),
        predictions=_predictions(out, source, language_model, wanted, missing, progress),
        verification=_verified(out, document, source, progress),
        speed=_speed(out, config, wanted, missing, progress),
        energy=_energy(out, wanted, missing),
        on_calibration_text=_same_file(wanted.text, history["calibration"]),
        missing=missing,
        **_origins(document, source, reader),
        **history,
    )


def _same_file(text: str | Path | None, calibration: CalibrationReport | None) -> bool:
    return text is not None and calibration is not None and Path(text).resolve() == Path(calibration.source).resolve()


class _Source:
    """The original, and which part of it each tensor of the checkpoint is made of."""

    def __init__(self, named: str | Path, kind: Kind) -> None:
        self.named, self.folder = str(named), local_folder(named)
        self.reader: Reader = Unscaled(open_any(self.folder))
        shapes = {name: entry.shape for name, entry in self.reader.entries.items()}
        architecture = describe(self.reader.config, shapes)
        self.pieces: Mapping[str, Piece] = {p.name: p for p in cut(kind, architecture, self.reader)}

    def of(self, tensor: TensorFacts) -> Piece | None:
        """None where the original has no tensor of that shape for it."""
        piece = self.pieces.get(tensor.name)
        return piece if piece is not None and tuple(piece.shape) == tensor.shape else None


def _ledger(out: Path, missing: MutableMapping[str, str]) -> dict[str, Any]:
    if ledger_path(out).exists():
        return read_ledger(out)
    missing["ledger"] = LEDGER
    return {}


def _config(out: Path) -> Mapping[str, Any]:
    """config.json's values, also of a GGUF file; empty where nobody can say."""
    try:
        return open_any(out).config
    except UnsupportedError:  # a GGUF file of another architecture
        return {}


def _is_language_model(config: Mapping[str, Any], kind: Kind) -> bool:
    names = config.get("architectures") or []
    return kind.name == "gguf" or any(str(name).endswith("ForCausalLM") for name in names)


def _with_errors(
    tensors: tuple[TensorFacts, ...],
    reader: Reader,
    source: _Source | None,
    document: Mapping[str, Any],
    missing: MutableMapping[str, str],
) -> tuple[TensorFacts, ...]:
    """Errors are the ledger's; without one they are measured against the original, a few rows at a time."""
    if document:
        return tensors
    if source is None:
        missing["errors"] = f"{LEDGER}; {AGAINST}"
        return tensors

    def measured(tensor: TensorFacts) -> TensorFacts:
        piece = None if tensor.floating else source.of(tensor)
        return tensor if piece is None else replace(tensor, error=relative_error(reader, source.reader, piece))

    return tuple(map(measured, tensors))


def _memory(
    tensors: tuple[TensorFacts, ...],
    reader: Reader,
    config: Mapping[str, Any],
    source: _Source | None,
    missing: MutableMapping[str, str],
) -> MemoryFacts:
    context, numbers = _context(config, CONTEXT), None
    try:
        numbers = cache_shape(config).numbers(context)
    except UnsupportedError as error:
        missing["cache"] = str(error)
    return MemoryFacts(
        weights=weight_parts(tensors, reader),
        original=None if source is None else source_bytes(source.reader),
        context=context,
        cache_fp16=None if numbers is None else 2 * numbers,
        cache_int8=numbers,
    )


def _context(config: Mapping[str, Any], most: int) -> int:
    text = {**config, **(config.get("text_config") or {})}
    made_for = text.get("max_position_embeddings")
    return min(most, made_for) if isinstance(made_for, int) and made_for > 0 else most


def _histograms(
    tensors: tuple[TensorFacts, ...],
    reader: Reader,
    source: _Source | None,
    document: Mapping[str, Any],
    missing: MutableMapping[str, str],
) -> tuple[Histogram, ...]:
    if source is None:
        missing["original weights"] = AGAINST
        return tuple(histograms(reader, tensors, None, {}))
    lines = document.get("tensors", {})
    kept = {t.name: p for t in tensors if (p := source.of(t)) and not lines.get(t.name, {}).get("transformed")}
    found = tuple(histograms(reader, tensors, source.reader, kept))
    if not all(each.counts for each in found):
        missing["original weights"] = REWRITTEN
    return found


def _predictions(
    out: Path,
    source: _Source | None,
    language_model: bool,
    wanted: Wanted,
    missing: MutableMapping[str, str],
    progress: Progress | None,
) -> Predictions | None:
    if source is None:
        missing["predictions"] = AGAINST
        return None
    if not language_model:
        missing["predictions"] = "it does not predict next tokens"
        return None
    found = compare(
        out,
        source.folder,
        text=wanted.text,
        windows=wanted.windows,
        length=wanted.length,
        seed=wanted.seed,
        device=wanted.device,
        progress=progress,
    )
    return predictions(found, tokenizer_of(source.folder))


def _verified(
    out: Path, document: Mapping[str, Any], source: _Source | None, progress: Progress | None
) -> Verification | None:
    if not document:
        return None
    return verify(out, None if source is None else source.folder, logits=False, progress=progress)


def _speed(
    out: Path, config: Mapping[str, Any], wanted: Wanted, missing: MutableMapping[str, str], progress: Progress | None
) -> Benchmark | None:
    if not wanted.speed:
        missing["speed"] = "--no-speed was given"
        return None
    if progress:
        progress(0, 1, "speed")
    try:
        return benchmark(out, Load(prompt_tokens=_context(config, PROMPT), new_tokens=_context(config, NEW)))
    except FewbitsError as error:
        missing["speed"] = str(error)
        return None


def _energy(out: Path, wanted: Wanted, missing: MutableMapping[str, str]) -> Energy | None:
    if not wanted.speed:
        missing["energy"] = "--no-speed was given"
        return None
    try:
        return decode_energy(out)
    except FewbitsError as error:
        missing["energy"] = str(error)
        return None


def _origins(document: Mapping[str, Any], source: _Source | None, reader: Reader) -> dict[str, Any]:
    """What is known of where it comes from."""
    made_with = {key: str(document[key]) for key in ("fewbits", "torch") if key in document}
    return {
        "source": words(document.get("source")) or (None if source is None else source.folder.name),
        "source_bytes": None if source is None else source_bytes(source.reader),
        "base_model": None if source is None else hub_name(source.named, source.folder),
        "license": next(filter(None, _licenses(source, reader)), None),
        "method": words(document.get("method")),
        "imatrix": words(document.get("imatrix")),
        "made_by": words(document.get("command")),
        "made_with": made_with or None,
    }


def _history(document: Mapping[str, Any], missing: MutableMapping[str, str]) -> dict[str, Any]:
    """Calibration, plan and training, as the ledger has them."""
    found = {
        "calibration": told.told(document, "calibration", told.calibration),
        "planning": told.told(document, "plan", told.planning),
        "training": told.told(document, "training", told.training),
    }
    without = {"calibration": CALIBRATION, "planning": PLAN, "training": TRAINING}
    missing.update({key: LEDGER if not document else without[key] for key, value in found.items() if value is None})
    return found


def hub_name(named: str, folder: Path) -> str | None:
    """OWNER/NAME of a model on the hub: as it was named, or by the hub's cache that it lies in."""
    if HUB_NAME.fullmatch(named) and not Path(named).exists():
        return named
    cached = next((m for part in folder.absolute().parts if (m := _HUB_CACHE.fullmatch(part))), None)
    return f"{cached['owner']}/{cached['name']}" if cached else None


def _licenses(source: _Source | None, reader: Reader) -> Iterator[str | None]:
    """Of the original's card, of its configuration, of this one's."""
    if source is not None:
        yield _card_license(source.folder / "README.md")
        yield words(source.reader.config.get("license"))
    yield words(reader.config.get("license") or reader.config.get("general.license"))


def _card_license(card: Path) -> str | None:
    try:
        found = _FRONT_MATTER.match(card.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    named = _LICENSE.search(found["yaml"]) if found else None
    return named["name"] if named else None
