"""Train the small Llama that ships in src/fewbits/bundled/tiny, from plain text, on a CPU or a GPU.

The model exists so that `make demo` and the tests measure something real without a download: its weights are trained,
so rounding them hurts, and by how much depends on the format as it does in a large model.
Its sizes are chosen for the formats, not for quality: every in_features is a multiple of 256 (the K-quants' block), the
key and value projections are narrower than the query (grouped-query attention), the embeddings are tied, and the whole
is under 8 MB in FP16.

Hidden matrices are trained with Muon (Jordan et al. 2024, momentum orthogonalised by Newton-Schulz), the rest with
AdamW; the learning rate rises for 2 % of the steps, stays, and falls linearly to zero over the last 40 %.

    python scripts/train_bundled.py books.txt.xz --out src/fewbits/bundled/tiny --compile
"""

from __future__ import annotations

import argparse
import lzma
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: its waiting threads must not spin

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256  # tokens a training window holds
SPECIAL = ("<s>", "</s>")


def llama_config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def read_text(path: Path) -> str:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return str(file.read())


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's: any text can be written in it, and every GGUF loader knows its pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((text[i : i + 10_000] for i in range(0, len(text), 10_000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1])


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> npt.NDArray[np.int64]:
    lines = text.splitlines(keepends=True)
    batches = (lines[i : i + 1000] for i in range(0, len(lines), 1000))
    ids = [e.ids for batch in batches for e in tokenizer.backend_tokenizer.encode_batch(batch)]
    return np.concatenate([np.asarray(x, dtype=np.int64) for x in ids])


def windows(ids: npt.NDArray[np.int64], batch: int, seed: int) -> Iterator[Tensor]:
    """Endless [batch, CONTEXT + 1] windows: every epoch cuts the text at another offset and shuffles the pieces."""
    random = np.random.default_rng(seed)
    while True:
        offset = int(random.integers(CONTEXT))
        starts = random.permutation(np.arange(offset, len(ids) - CONTEXT - 1, CONTEXT))
        for i in range(0, len(starts) - batch + 1, batch):
            yield torch.from_numpy(np.stack([ids[s : s + CONTEXT + 1] for s in starts[i : i + batch]]))


def learning_rate(step: int, steps: int) -> float:
    """Factor on the peak rate: warm-up, plateau, linear decay to zero."""
    return min(1.0, step / (0.02 * steps), (steps - step) / (0.4 * steps))


def optimizers(model: LlamaForCausalLM) -> list[Optimizer]:
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        Muon(hidden, lr=0.01, momentum=0.95, weight_decay=0.05, adjust_lr_fn="original"),
        AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_on(model: Callable[..., Any], window: Tensor, device: str) -> Tensor:
    window = window.to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = model(input_ids=window[:, :-1]).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


def train(
    model: LlamaForCausalLM, ids: npt.NDArray[np.int64], tokens: float, batch: int, device: str, compiled: bool
) -> None:
    steps = math.ceil(tokens / (batch * CONTEXT))
    forward = torch.compile(model) if compiled else model
    rules = optimizers(model)
    peaks = [rule.param_groups[0]["lr"] for rule in rules]
    began, running = time.monotonic(), math.nan
    for step, window in zip(range(1, steps + 1), windows(ids, batch, seed=0), strict=False):
        for rule, peak in zip(rules, peaks, strict=True):
            rule.param_groups[0]["lr"] = peak * learning_rate(step, steps)
        loss = loss_on(forward, window, device)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rule in rules:
            rule.step()
            rule.zero_grad()
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        if step % 20 == 0 or step == steps:
            spent = time.monotonic() - began
            left = spent / step * (steps - step)
            rate = step * batch * CONTEXT / spent
            print(f"step {step}/{steps}  loss {running:.3f}  {rate:.0f} tokens/s  {left / 60:.0f} min left", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="training text, .txt or .xz")
    parser.add_argument("--out", type=Path, default=Path("src/fewbits/bundled/tiny"))
    parser.add_argument("--tokens", type=float, default=30e6, help="tokens to train on")
    parser.add_argument("--vocab", type=int, default=3072)
    parser.add_argument("--batch", type=int, default=32, help="windows a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler)")
    args = parser.parse_args()

    torch.manual_seed(0)
    text = read_text(args.text)
    tokenizer = train_tokenizer(text, args.vocab)
    ids = encode(tokenizer, text)
    model = LlamaForCausalLM(llama_config(args.vocab)).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {len(ids):,} tokens of text", flush=True)
    train(model, ids, args.tokens, args.batch, args.device, args.compile)
    tokenizer.save_pretrained(args.out)
    model.to(torch.float16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
