"""What a training will take, said before it starts: bytes of memory and of disk.

Counted, and compared with what was measured on small models: what is there for every parameter, what is there for every
trained number, what one batch leaves behind on its way forth for the way back. Time needs no estimate, as it is given.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fewbits.pipeline._estimate import resident_memory
from fewbits.results import Estimate

TRAINED = 28
"""Bytes of a matrix's weight: itself, its gradient, two numbers of AdamW, what it is rounded to, and what it and its
step take while they are made."""
SAVED = 2 * 12
"""Bytes of a trained number on disk: itself and two of AdamW, in a state that is there until the next one is whole."""
PREDICTIONS = 4
"""Copies of a batch's logits: of student and teacher, their softmax, and the way back."""
WIDE, INNER = 12, 4
"""Numbers kept for a token and a layer, in widths of the hidden state and of the feed-forward network."""
LIBRARIES = 900 << 20
"""That torch, transformers and accelerate take for themselves once a model trains; measured."""


def training_need(config: Mapping[str, Any], parameters: int, trained: int, tokens: int) -> Estimate:
    """Peak memory and disk of quantization-aware training.

    config: config.json. parameters: of the model; trained: numbers in its quantized matrices; tokens: of a batch.
    """
    config = config.get("text_config") or config
    hidden, layers = int(config.get("hidden_size", 0)), int(config.get("num_hidden_layers", 0))
    inner = int(config.get("intermediate_size", 4 * hidden) or 4 * hidden)
    behind = layers * (WIDE * hidden + INNER * inner) + PREDICTIONS * int(config.get("vocab_size", 0))
    memory = LIBRARIES + 4 * parameters + TRAINED * trained + 4 * tokens * behind
    return Estimate(peak_memory=max(resident_memory(), memory), disk=SAVED * trained, seconds=0.0)


def in_words(need: Estimate) -> str:
    """What is needed, beside what the machine has."""
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"training takes about {need.peak_memory / 1e9:.1f} GB of memory and {need.disk / 1e9:.1f} GB of disk"
    if need.peak_memory > has:
        found += f"; this machine has {has / 1e9:.1f} GB of memory, so make --batch or --window smaller"
    return found
