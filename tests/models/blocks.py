"""Blocks of a model that is in memory whole, with their links and what their matrices read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tiny import SHAPE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from fewbits.methods import Block
from fewbits.models import Slot, links
from fewbits.stats import Collector, Site

MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "mixtral": MOE,
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    "qwen3_moe": MOE,
}
"""Model type -> settings for a small random model of it: one of each that is known by name."""


def random_model(kind: str, **settings: Any) -> PreTrainedModel:
    """A small random model of this type, FP32, in eval mode; norms and biases are random too."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SHAPE, "vocab_size": 300, **FAMILIES.get(kind, {}), **settings})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2).requires_grad_(False)
    return model.eval()


def blocks(model: PreTrainedModel) -> list[Block]:
    """Its decoder layers; every matrix but routers is one to be quantized, experts one by one."""
    config = model.config.to_dict()
    model.config._experts_implementation = "eager"  # products that the collector sees
    found = []
    for index, layer in enumerate(model.model.layers):
        parameters = dict(layer.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        slots = {name: slot for key, shape in shapes.items() for name, slot in slots_of(key, shape)}
        found.append(Block(f"model.layers.{index}", parameters, slots, links=links(config, shapes)))
    return found


def slots_of(name: str, shape: tuple[int, ...]) -> Iterable[tuple[str, Slot]]:
    """The matrices that lie in a parameter of a layer."""
    if name.endswith("gate_up_proj"):
        half = shape[1] // 2
        for expert in range(shape[0]):
            for part, rows in (("gate_proj", (0, half)), ("up_proj", (half, 2 * half))):
                yield name.replace("gate_up_proj", f"{expert}.{part}"), Slot(name, expert, rows=rows)
    elif len(shape) == 3:
        for expert in range(shape[0]):
            yield name.replace("down_proj", f"{expert}.down_proj"), Slot(name, expert)
    elif name.endswith("proj.weight"):
        yield name, Slot(name)


@torch.no_grad()
def statistics(model: PreTrainedModel, block: Block, ids: torch.Tensor, needs: Iterable[str]) -> dict:
    """Of each of the block's matrices, while the model reads ids [B, T]; an expert without tokens sees all of them."""
    watched = {slot.parameter: block.parameters[slot.parameter] for slot in block.slots.values()}
    with Collector(watched, needs, tokens=ids.numel()) as collector:
        model(input_ids=ids)
    sites = collector.statistics()
    anyone = {site.parameter: found for site, found in sites.items()}
    return {
        name: sites.get(Site(slot.parameter, slot.expert), anyone[slot.parameter]).values()
        for name, slot in block.slots.items()
    }


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.double()


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the root mean square of what is expected."""
    return float((found - expected).abs().max() / expected.square().mean().sqrt())
