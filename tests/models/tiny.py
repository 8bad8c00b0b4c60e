"""Random models of each family and tokenizers of each kind, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from fewbits.checkpoint import Entry
from fewbits.checkpoint.gguf import Gguf
from fewbits.formats import Float, Format, QTensor
from fewbits.models import gguf_extras, gguf_metadata, gguf_pieces

TEXT = """It was the best of times, it was the worst of times; it was 1775, or 1,024 or 3.14159.
"I'll go," she said, "we've been HERE before: don't!"   Three spaces,\ttabs\n\n\nand  empty lines.
naïve café — Übergröße 😀🦙 日本語 привет 12 123 1234 12345\r\n  x = foo(bar)[0]; // comment\n'S 'll 'VE
"""
FP32 = Float(torch.float32)


def byte_level(*steps: str, ignore_merges: bool = False, added: tuple[str, ...] = ()) -> Tokenizer:
    """A byte-level BPE whose pre-tokenizer has these steps: regular expressions, 'digits', or 'regex' for GPT-2's."""
    parts = [pre_tokenizers.Digits(True) if step == "digits" else _split(step) for step in steps if step != "regex"]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="regex" in steps)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def sentencepiece(*, bos: bool = True, metaspace: str | None = None) -> Tokenizer:
    """A BPE over ▁ with byte fallback and, as transformers makes them of a SentencePiece model, all possible merges."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=220, show_progress=False)
    trained.train_from_iterator([TEXT] * 3, trainer)
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1]) if "\n" not in piece]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=metaspace, split=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(plain | settings))
    return folder


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def save_model(folder: Path, kind: str, tokenizer: Tokenizer | None = None, **settings: Any) -> PreTrainedModel:
    """A random model of this type in a folder, FP32, its norms and biases random too."""
    tokenizer = tokenizer or byte_level("regex")
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SHAPE, "vocab_size": tokenizer.get_vocab_size(), **settings})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def export(folder: Path, out: Path, format: Format = FP32) -> dict[str, torch.Tensor]:
    """Write a folder as GGUF by what the models room says of it; the numbers that each tensor is to hold."""
    config, weights = read_config(folder), read_weights(folder)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    numbers = {}
    for piece in gguf_pieces(config, shapes):
        order = piece.row_order()
        w = weights[piece.source] if order is None else weights[piece.source][order]
        numbers[piece.name] = w.float() + piece.added
    numbers |= {name: torch.tensor(values) for name, values in gguf_extras(config).items()}
    quantized = {name: _quantized(w, format if w.dim() > 1 else FP32) for name, w in numbers.items()}
    write(out, quantized, gguf_metadata(config, folder))
    return {name: q.dequantize() for name, q in quantized.items()}


def write(out: Path, tensors: Mapping[str, QTensor], metadata: Mapping[str, Any]) -> None:
    entries = [Entry(name, q.shape, q.format) for name, q in tensors.items()]
    with Gguf().create(out, entries, out.parent, metadata) as writer:
        for name, q in tensors.items():
            writer.write(name, q)
        writer.commit({})


def _quantized(w: torch.Tensor, format: Format) -> QTensor:
    params = format.fit(w)
    return QTensor(format, format.round(w, params), params)
