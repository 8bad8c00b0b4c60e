"""Fused experts of a transformers model on packed matrices.

transformers lets `config._experts_implementation` name the function that a layer of experts computes with; ours goes
from expert to expert, with those of its parameters that are packed (`nn.PackedExperts`) and those that are not. It
leaves the gate to the layer's own `_apply_gate`, which knows how gate and up lie in a matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fewbits.nn import PackedExperts

IMPLEMENTATION = "fewbits"
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def takes_experts(module: nn.Module, leaf: str) -> bool:
    """Whether a layer computes through transformers' interface for experts, with this parameter among its matrices."""
    return leaf in PROJECTIONS and all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "is_transposed"))


def put_experts(module: nn.Module, leaf: str, experts: PackedExperts) -> None:
    """Packed experts in the place of a layer's parameter, and the layer onto our function."""
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
    del module._parameters[leaf]
    module.add_module(leaf, experts.train(module.training))
    config: Any = module.config
    config._experts_implementation = IMPLEMENTATION


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What a layer of experts makes of hidden states [tokens, H], given each token's experts and their weights
    [tokens, k].
    """
    out = torch.zeros_like(hidden_states)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    for expert in top_k_index.unique().tolist():
        if expert >= self.num_experts:  # of another process, where experts are shared out
            continue
        token, k = torch.where(top_k_index == expert)
        y = _multiplied(self, first, expert, hidden_states[token])
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = _multiplied(self, "down_proj", expert, y) * top_k_weights[token, k, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def _multiplied(layer: Any, projection: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(layer, projection)
    bias = getattr(layer, f"{projection}_bias")[expert] if layer.has_bias else None
    if isinstance(weight, PackedExperts):
        return weight.multiply(expert, x, bias)
    return linear(x, weight[expert].T if layer.is_transposed else weight[expert], bias)
