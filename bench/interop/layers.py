"""Linear layers of a tool's torch model: as plain ones, and what goes in and comes out of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from interop.harness import INPUT, LOGITS, OUTPUT, TOKENS


def plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer in float32, for tools whose own compute in 16 bits. weight: [out_features, in_features]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data = weight.float().contiguous()
    if bias is not None:
        linear.bias.data = bias.float()
    return linear


@torch.inference_mode()
def watched(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """Logits, and of each of these layers what it reads and gives.

    For layers that round their inputs: two programs that add in another order have other codes where an input is next
    to a tie, so that logits of the same weights drift apart, and layers have to be compared one by one.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output: found.update({name + INPUT: inputs[0][0], name + OUTPUT: output[0]})
        )

    for name in layers:
        keep(name)
    found[LOGITS] = model(input_ids=torch.tensor([list(TOKENS)])).logits[0]
    return found
