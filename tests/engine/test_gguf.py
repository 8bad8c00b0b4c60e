"""Loading GGUF files; transformers, which decodes them with gguf-py, is the oracle."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fewbits.engine import load
from fewbits.nn import QuantizedEmbedding, QuantizedLinear
from fewbits.pipeline import quantize

IDS = torch.tensor([[1, 5, 9, 60, 2, 2, 7]])


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(("name", "format"), [("stories260K", "q8_0"), ("babyllama", "q4_0"), ("babyllama", "q5_1")])
def test_a_gguf_gives_transformers_logits_bit_for_bit(name, format, shared_models, tmp_path):
    """Llama's q and k rows are interleaved in the file: a row out of order would show."""
    quantize(shared_models / name, tmp_path / "m.gguf", format=format, prove=False)
    model = load(tmp_path / "m.gguf")
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert torch.equal(logits(model), logits(theirs))


def test_a_float_gguf_gives_the_originals_logits(shared_models, tmp_path):
    quantize(shared_models / "stories260K", tmp_path / "m.gguf", format="fp32", prove=False)
    original = load(shared_models / "stories260K")
    assert torch.equal(logits(load(tmp_path / "m.gguf")), logits(original))
