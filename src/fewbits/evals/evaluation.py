"""Measure a model against its original: one of them in memory at a time, one window of logits of each.

The original runs first, unless its predictions on this text are in the cache already (`reference`); then the other one
runs over the same tokens and each window is reduced to a few numbers a token (`divergence`).

Quantized weights are decoded once here, instead of at every use: the original, in the same dtype, took as much memory.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fewbits.checkpoint import read_ledger
from fewbits.engine import fast_float32, is_causal, load, open_weights
from fewbits.errors import CheckpointError, FewbitsError, UnsupportedError
from fewbits.evals.calibration import SELF, calibration_windows
from fewbits.evals.divergence import (
    Comparison,
    kl_divergence,
    require_numbers,
    require_windows,
    token_losses,
    top_probability,
)
from fewbits.evals.reference import (
    Prediction,
    Reference,
    model_identity,
    open_reference,
    reference_path,
    write_reference,
)
from fewbits.evals.text import LENGTH, WINDOWS, Windows, read_windows, self_text
from fewbits.evals.tokenizer import tokenizer_of
from fewbits.evals.unlikeness import unlikeness
from fewbits.results import Evaluation

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with (done, total, label) whenever a step of the work named by label is done."""


def evaluate(
    model: str | Path,
    against: str | Path,
    *,
    text: str | Path | None = None,
    windows: int = WINDOWS,
    length: int = LENGTH,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Evaluation:
    """How far the model at `model` is from its original at `against`, on windows of a text.

    text: a .txt or .jsonl file; None lets the original write the text itself, from `seed`. windows: how many, each of
    `length` tokens. dtype: of both models' arithmetic.
    Raises UnsupportedError for models that do not predict next tokens or have different vocabularies, CheckpointError
    for a text that is too short.
    """
    return compare(
        model,
        against,
        text=text,
        windows=windows,
        length=length,
        seed=seed,
        device=device,
        dtype=dtype,
        progress=progress,
    ).evaluation


@dataclass(frozen=True)
class Compared:
    """An evaluation, the windows it was made on, and what was found at every token of them."""

    evaluation: Evaluation
    windows: Windows
    comparison: Comparison


def compare(
    model: str | Path,
    against: str | Path,
    *,
    text: str | Path | None = None,
    windows: int = WINDOWS,
    length: int = LENGTH,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Compared:
    """What `evaluate` finds, with what it finds it from."""
    job = _Job(Path(model), Path(against), windows, length, torch.device(device), dtype, progress or _silent)
    job.check()
    with fast_float32(device):
        reference = job.reference(None if text is None else Path(text), seed)
        comparison = job.compare(reference)
    evaluation = Evaluation(
        model=str(model),
        against=str(against),
        text=reference.windows.description,
        tokens=reference.windows.ids[:, 1:].numel(),
        windows=len(reference.windows.ids),
        warning=calibration_warning(Path(model), Path(against), reference.windows),
        **comparison.figures(),
    )
    return Compared(evaluation, reference.windows, comparison)


def calibration_warning(model: Path, against: Path, evaluated: Windows) -> str | None:
    """A sentence where a model was calibrated on text unlike this, if that text can still be read.

    The ledger names the file and the digest of its tokens; text that the model wrote itself is like what it knows.
    """
    try:
        calibrated = read_ledger(model).get("calibration") or {}
        found = (
            calibration_windows(calibrated["source"], against, calibrated["windows"], calibrated["length"])
            if calibrated.get("source") not in (None, SELF)
            else None
        )
    except FewbitsError:  # no ledger, or the text is gone
        return None
    if found is None or found.digest != calibrated["digest"] or len(evaluated.ids) < 2 or len(found.ids) < 2:
        return None
    return unlikeness(found, evaluated).warning


class _Job:
    def __init__(
        self,
        model: Path,
        against: Path,
        windows: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress,
    ) -> None:
        self.model, self.against, self.windows, self.length = model, against, windows, length
        self.device, self.dtype, self.progress = device, dtype, progress

    def check(self) -> None:
        """Refuse what cannot be compared before anything large is read."""
        require_windows(self.windows)
        configs = [_causal_configuration(path) for path in (self.model, self.against)]
        sizes = [config.get_text_config().vocab_size for config in configs]
        if sizes[0] != sizes[1] or not _same_tokens(self.model, self.against):
            raise UnsupportedError(
                f"{self.model} (vocabulary of {sizes[0]}) and {self.against} (vocabulary of {sizes[1]}) do not share "
                "their tokens, so their predictions cannot be compared; give the original it was made from"
            )
        for path, config in zip((self.model, self.against), configs, strict=True):
            _require_length(path, config, self.length)

    def reference(self, text: Path | None, seed: int) -> Reference:
        """The original's predictions, from the cache where it has them."""
        facts: dict[str, Any] = {
            "model": model_identity(self.against),
            "dtype": str(self.dtype),
            "device": self.device.type,
        }
        if text is None:
            path = reference_path(facts | {"seed": seed, "windows": self.windows, "length": self.length})
        else:
            read = read_windows(text, tokenizer_of(self.against), self.windows, self.length)
            require_windows(len(read.ids))
            path = reference_path(facts | {"tokens": read.digest})
        found = _cached(path)
        if found is not None:
            return found if text is None else Reference(found.path, read, found.vocabulary)
        return self._recorded(path, facts, seed if text is None else read)

    def compare(self, reference: Reference) -> Comparison:
        """Run the model over the reference's windows."""
        model = load(self.model, device=self.device, dtype=self.dtype, packed=False)
        comparison = Comparison()
        for original, ours in zip(reference, self._predictions(model, reference.windows, "model"), strict=True):
            comparison.reference_loss.append(original.loss)
            comparison.loss.append(ours.loss.cpu())
            comparison.kld.append(kl_divergence(original.logits.to(self.device), ours.logits).cpu())
            comparison.reference_top.append(original.top)
            comparison.top.append(ours.top.cpu())
            comparison.reference_top_probability.append(top_probability(original.logits))
            comparison.top_probability.append(top_probability(ours.logits).cpu())
        return comparison

    def _recorded(self, path: Path, facts: Mapping[str, Any], source: Windows | int) -> Reference:
        """Run the original over the windows, or over those that it writes itself from a seed."""
        original = load(self.against, device=self.device, dtype=self.dtype, packed=False)
        if isinstance(source, int):
            source = self_text(original, self.windows, self.length, source, self.progress)
        vocabulary = original.config.get_text_config().vocab_size
        reference = write_reference(path, source, vocabulary, facts, self._predictions(original, source, "original"))
        del original
        gc.collect()  # layers and hooks refer to each other in circles: the memory is needed now
        return reference

    def _predictions(self, model: PreTrainedModel, windows: Windows, label: str) -> Iterator[Prediction]:
        for done, ids in enumerate(windows.ids, start=1):
            tokens = ids.to(self.device)
            with torch.inference_mode():
                logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
            require_numbers(logits, str(model.name_or_path))
            yield Prediction(token_losses(logits, tokens[1:]), logits.argmax(-1), logits)
            self.progress(done, len(windows.ids), label)


def _cached(path: Path) -> Reference | None:
    if not path.exists():
        return None
    try:
        return open_reference(path)
    except CheckpointError as error:
        log.warning("%s; the original runs again", error)
        return None


def _causal_configuration(path: Path) -> PretrainedConfig:
    config, _ = open_weights(path)
    if not is_causal(config):
        named = ", ".join(config.architectures or ["no class"])
        raise UnsupportedError(
            f"{path}: {named} does not predict next tokens; evaluate needs a causal language model (…ForCausalLM)"
        )
    return config


def _require_length(path: Path, config: PretrainedConfig, length: int) -> None:
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if length < 2 or (isinstance(most, int) and length > most):
        raise UnsupportedError(f"{path}: windows of {length} tokens; its context allows 2 to {most}")


def _same_tokens(a: Path, b: Path) -> bool:
    """Whether two folders' tokenizers agree, as far as both have one."""
    files = [path / "tokenizer.json" for path in (a, b)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return True
    vocabularies = [tokenizer_of(path).get_vocab() for path in (a, b)]
    return bool(vocabularies[0] == vocabularies[1])


def _silent(done: int, total: int, label: str) -> None:
    pass
