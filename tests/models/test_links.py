"""Links by hand, and on random models of each family: factors that move along them change no prediction."""

from __future__ import annotations

import pytest
import torch
from blocks import FAMILIES, blocks, deviation, logits, random_model

from fewbits.errors import UnsupportedError
from fewbits.methods._folding import fold
from fewbits.models import Flow, Link, links, residual

IDS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(1))
FLOAT32 = 1e-4
"""Norms compute in float32 (2^-24 = 6e-8 a step); the deepest path here has some 40 steps, and softmax and logits of
random models multiply by 10 or so each. A factor that goes astray changes logits by their own size."""

LLAMA = {
    "input_layernorm.weight": (8,),
    "self_attn.q_proj.weight": (8, 8),
    "self_attn.k_proj.weight": (4, 8),
    "self_attn.v_proj.weight": (4, 8),
    "self_attn.o_proj.weight": (8, 8),
    "post_attention_layernorm.weight": (8,),
    "mlp.gate_proj.weight": (12, 8),
    "mlp.up_proj.weight": (12, 8),
    "mlp.down_proj.weight": (8, 12),
}
QKV = tuple(f"self_attn.{x}_proj.weight" for x in "qkv")


def test_llama_by_hand() -> None:
    assert set(links({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 4}, LLAMA)) == {
        Link("norm", "input_layernorm.weight", QKV),
        Link("norm", "post_attention_layernorm.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        Link("linear", "self_attn.v_proj.weight", ("self_attn.o_proj.weight",), repeats=2, head=2),
        Link("linear", "mlp.up_proj.weight", ("mlp.down_proj.weight",)),
    }


def test_fused_experts_by_hand() -> None:
    shapes = {
        "post_attention_layernorm.weight": (8,),
        "mlp.gate.weight": (2, 8),
        "mlp.experts.gate_up_proj": (2, 6, 8),
        "mlp.experts.down_proj": (2, 8, 3),
    }
    inside = {"producer": "mlp.experts.gate_up_proj", "consumers": ("mlp.experts.down_proj",), "rows": (3, 6)}
    assert set(links({"model_type": "mixtral"}, shapes)) == {
        Link("norm", "post_attention_layernorm.weight", ("mlp.gate.weight", "mlp.experts.gate_up_proj")),
        Link("linear", **inside, expert=0),
        Link("linear", **inside, expert=1),
    }


def test_nothing_is_assumed_of_other_architectures() -> None:
    assert links({"model_type": "olmo2"}, LLAMA) == ()
    with pytest.raises(UnsupportedError, match="olmo2"):
        residual({"model_type": "olmo2"}, LLAMA)


@pytest.mark.parametrize("kind", FAMILIES)
def test_factors_along_links_change_no_prediction(kind: str) -> None:
    model = random_model(kind)
    before = logits(model, IDS)
    generator = torch.Generator().manual_seed(0)
    for block in blocks(model):
        assert len(block.links) >= 4
        for link in block.links:
            weight = block.parameters[link.producer]
            weight = weight[0][slice(*link.rows)] if link.rows else weight
            fold(block, link, torch.rand(len(weight), generator=generator) * 4 + 0.25)
    assert deviation(logits(model, IDS), before) < FLOAT32


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_matrix_is_at_the_end_of_a_link(kind: str) -> None:
    for block in blocks(random_model(kind)):
        consumers = {name for link in block.links for name in link.consumers}
        assert {slot.parameter for slot in block.slots.values()} <= consumers


def test_residual_by_hand() -> None:
    layer = "model.layers.3."
    shapes = {layer + name: shape for name, shape in LLAMA.items()}
    shapes |= {"model.embed_tokens.weight": (9, 8), "model.norm.weight": (8,), "lm_head.weight": (9, 8)}
    shapes |= {layer + "self_attn.v_proj.bias": (4,), layer + "self_attn.o_proj.bias": (8,)}
    found = residual({"model_type": "llama"}, shapes)
    norm, mlp_norm = layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight"
    assert found == {
        norm: Flow("norm"),
        mlp_norm: Flow("norm"),
        "model.norm.weight": Flow("norm"),
        "model.embed_tokens.weight": Flow("reads"),
        "lm_head.weight": Flow("reads", "model.norm.weight"),
        layer + "self_attn.q_proj.weight": Flow("reads", norm),
        layer + "self_attn.k_proj.weight": Flow("reads", norm),
        layer + "self_attn.v_proj.weight": Flow("reads", norm, values="rows"),
        layer + "self_attn.v_proj.bias": Flow(values="rows"),
        layer + "self_attn.o_proj.weight": Flow("writes", values="columns"),
        layer + "self_attn.o_proj.bias": Flow("writes"),
        layer + "mlp.gate_proj.weight": Flow("reads", mlp_norm),
        layer + "mlp.up_proj.weight": Flow("reads", mlp_norm),
        layer + "mlp.down_proj.weight": Flow("writes"),
    }
