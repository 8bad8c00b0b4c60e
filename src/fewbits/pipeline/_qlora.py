"""An adapter on a frozen quantized base, told once: quantize the base, train the adapter, write it.

The base lies beside the output while it is trained on, with the states of the training, so that a killed run goes on;
in the end only the adapter is kept, as PEFT writes it, with a note (`fewbits.json`) of what it was trained on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbits.checkpoint import open_checkpoint
from fewbits.checkpoint._writer import disk_errors, refuse_existing
from fewbits.checkpoint.adapter import NOTE
from fewbits.engine import fast_float32, load, open_weights
from fewbits.errors import UnsupportedError
from fewbits.evals import model_identity
from fewbits.evals.tokenizer import tokenizer_of
from fewbits.evals.whole_text import read_all
from fewbits.formats import Float
from fewbits.methods.products import multiplies_bf16
from fewbits.nn import PackedWeight
from fewbits.pipeline._journal import Journal, unfinished
from fewbits.pipeline._quantize import quantize
from fewbits.pipeline._source import local_folder
from fewbits.pipeline._stages import Stages
from fewbits.pipeline._stream import Progress
from fewbits.plan.rules import parse
from fewbits.results import AdapterTraining
from fewbits.train import Course, Length, processes, train
from fewbits.train.adamw8 import AdamW8bit
from fewbits.train.data import Packed, Rows
from fewbits.train.lora import adapted, linear_layers, start_at_residual
from fewbits.train.samples import PackedSamples, read_samples

BASE_SHARE = 0.1  # of the progress bar
HELD_OUT = 0.05  # of the windows


@dataclass(frozen=True)
class Qlora:
    """How an adapter is trained.

    rank, alpha, dropout: LoRA's; the product of the factors is multiplied by alpha / rank. residual: begin at what the
    base's format lost instead of at nothing. rate: of AdamW. optimizer: `adamw`, or `adamw8bit`, whose state takes 2
    bytes a trained number instead of 8. checkpointing: run each layer again on the way back instead of
    keeping its activations.
    """

    length: Length = field(default_factory=Length)
    window: int = 512
    batch: int = 4
    accumulate: int = 1
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    residual: bool = False
    rate: float = 2e-4
    optimizer: str = "adamw"
    checkpointing: bool = True
    seed: int = 0
    device: str = "cpu"


def train_qlora(
    model: str | Path,
    adapter: str | Path,
    *,
    data: str | Path,
    base: str = "nf4-dq",
    vocabulary: str | None = None,
    qlora: Qlora | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> AdapterTraining:
    """Train an adapter for a model on a frozen quantized base, and write it to a new folder.

    model: a Hugging Face folder or a GGUF file; where it is quantized already, it is the base as it is. data: a .jsonl
    file of samples (`train.samples`), or plain text. base: the format of its matrices; vocabulary: of embeddings and
    output projection (None: as they are). announce: told what is noticed about the data.
    Run by several processes (`train.processes`), the main one makes the base and writes, and all of them return.
    Started again with the same arguments after a kill or Ctrl-C it goes on from the last saved state. Raises a
    FewbitsError; then nothing is left at `adapter`, and KeyboardInterrupt once the state is saved.
    """
    began, qlora, out = time.monotonic(), qlora or Qlora(), Path(adapter)
    processes.join(qlora.device)
    with fast_float32(qlora.device), ExitStack() as until_written:
        stages = Stages(progress if processes.is_main() else None)
        with processes.main_first():
            refuse_existing(out)
            processes.require_shardable(qlora.device)
            source = local_folder(model)
            format = parse(base).name
            trained, held, description, notes = _windows(Path(data), source, qlora)
            journal = Journal(
                unfinished(out),
                {
                    "source": model_identity(source),
                    "base": [format, vocabulary],
                    "text": [trained.digest, held.digest],
                    "training": repr(replace(qlora, length=Length())),
                    "processes": processes.count(),
                },
                {},
            )
            if processes.is_main():
                until_written.enter_context(journal)
                if announce is not None:
                    for note in notes:
                        announce(note)
            folder = _base(source, journal.folder / "base", format, vocabulary, stages.next(BASE_SHARE))
        torch.manual_seed(qlora.seed)
        student = load(folder, device=qlora.device)
        base_bytes, whole_bytes = packed_bytes(student)
        whole = _with_adapter(student, source, qlora)
        found = train(
            whole,
            _optimizer(whole, qlora),
            Course(qlora.length.minutes, qlora.length.steps),
            trained,
            held,
            journal.folder / "training",
            stages.next(1 - BASE_SHARE),
            per_device_train_batch_size=qlora.batch,
            per_device_eval_batch_size=qlora.batch,
            gradient_accumulation_steps=qlora.accumulate,
            gradient_checkpointing=qlora.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=multiplies_bf16(torch.device(qlora.device)),
            label_names=["labels"],
            seed=qlora.seed,
        )
        result = AdapterTraining(
            source=str(source),
            output=str(out),
            base=format if folder != source else _formats(source),
            data=description,
            rank=qlora.rank,
            trained_weights=sum(p.numel() for p in whole.parameters() if p.requires_grad),
            base_bytes=base_bytes,
            base_bytes_in_16_bits=whole_bytes,
            steps=found.steps,
            tokens=found.steps * qlora.batch * qlora.accumulate * processes.count() * qlora.window,
            seconds=time.monotonic() - began,
            before=found.before,
            after=found.after,
            curve=found.curve,
            notes=notes,
        )
        learned = processes.trained(whole)
        with processes.main_first():
            if processes.is_main():
                about = {"base_made": folder != source, "vocabulary": vocabulary}
                _write(whole, learned, journal.folder / "adapter", out, result, about)
                journal.remove()
    return result


def _windows(data: Path, source: Path, qlora: Qlora) -> tuple[Rows, Rows, str, tuple[str, ...]]:
    """What is trained on, what is held out, what it is in words, and what was noticed."""
    tokenizer = tokenizer_of(source)
    if data.suffix == ".jsonl":
        found = read_samples(data, tokenizer, qlora.window)
        count = len(found.samples)
        held = max(1, round(HELD_OUT * count))
        if count < 2:
            raise UnsupportedError(f"{data}: one sample is too few to train on and to hold one out; give more")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        pack = [
            PackedSamples(part, qlora.window, pad, qlora.seed) for part in (found.samples[held:], found.samples[:held])
        ]
        return pack[0], pack[1], f"{data.name}, {count} samples", found.notes
    text = read_all(data, tokenizer, qlora.window)
    held = max(1, round(HELD_OUT * len(text.ids)))
    if len(text.ids) < 2:
        raise UnsupportedError(f"{data}: one window of {qlora.window} tokens is too few; give a longer text")
    return Packed(text.ids[:-held], labels=True), Packed(text.ids[-held:], labels=True), text.description, ()


def _base(source: Path, folder: Path, format: str, vocabulary: str | None, progress: Progress | None) -> Path:
    """A quantized checkpoint: the source, if it is one, or what is made of it, unless it is there already."""
    _, reader = open_checkpoint(source)
    if any(not isinstance(entry.format, Float) for entry in reader.entries.values()):
        return source
    if not processes.is_main():
        processes.require_shared(folder)
    elif not folder.exists():
        quantize(source, folder, format=format, kind="fewbits", vocabulary=vocabulary, prove=False, progress=progress)
    return folder


def _formats(source: Path) -> str:
    _, reader = open_checkpoint(source)
    found = {entry.format.name for entry in reader.entries.values() if not isinstance(entry.format, Float)}
    return ", ".join(sorted(found))


def packed_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of a model's parameters and packed weights, and what they would be in 16 bits; what is tied counts once."""
    stores = {id(m): m for m in model.modules() if isinstance(m, PackedWeight)}.values()
    weights = sum(torch.Size(store.shape).numel() for store in stores)
    packed = sum(store.format.nbytes(store.shape) for store in stores)
    kept = sum(p.numel() for p in model.parameters())
    return packed + 2 * kept, 2 * (weights + kept)


def _with_adapter(model: PreTrainedModel, source: Path, qlora: Qlora) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.config.use_cache = False
    config = LoraConfig(
        r=qlora.rank,
        lora_alpha=qlora.alpha,
        lora_dropout=qlora.dropout,
        target_modules=linear_layers(model),
        task_type="CAUSAL_LM",
    )
    found = adapted(model, config, str(source))
    if qlora.residual:
        _, weights = open_weights(source)
        device = torch.device(qlora.device)
        start_at_residual(found, lambda name: weights[f"{_plain(name)}.weight"].numbers(torch.float32, device))
    return found


def _plain(name: str) -> str:
    """A layer's name without what PEFT puts before it."""
    return name.removeprefix("base_model.model.")


def _optimizer(model: nn.Module, qlora: Qlora) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if qlora.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=qlora.rate, weight_decay=0.0, fused=True)
    if qlora.optimizer == "adamw8bit":
        return AdamW8bit(trained, lr=qlora.rate)
    raise UnsupportedError(f"optimizer '{qlora.optimizer}' is not known; take adamw or adamw8bit")


def _write(
    whole: Any, learned: dict[str, Tensor], folder: Path, out: Path, result: AdapterTraining, about: Mapping[str, Any]
) -> None:
    """The adapter under its own name once all of it is on the disk. about: what `fewbits merge` makes the base by."""
    with disk_errors(out):
        whole.save_pretrained(str(folder), state_dict=learned)
        note = {
            "fewbits": version("fewbits"),
            "source": Path(result.source).name,
            "base": result.base,
            **about,
            "data": result.data,
            "steps": result.steps,
            "held_out_loss": result.after,
        }
        (folder / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(out)
