"""LoRA on quantized layers, through PEFT.

    y = x · Wᵀ + s · (x · Aᵀ) · Bᵀ        W frozen and packed, A [r, K] and B [N, r] trained

(Hu et al. 2021, arXiv:2106.09685; on a quantized W: Dettmers et al. 2023, QLoRA, arXiv:2305.14314.) PEFT makes
adapters for the layer types that it knows; `register` adds `QuantizedLinear` to them, so that `peft.get_peft_model`
takes a model that `fewbits.load` made, with every option that PEFT has for a plain linear layer. What it cannot do is
merge: the sum of W and B·A is no number of W's format, and would be lost without a word.

`start_at_residual` sets A and B to what the format lost (Li et al. 2023, LoftQ, arXiv:2310.08659, with W left as it
is): the best approximation of that rank of the original's weight minus the packed one's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraConfig, LoraModel
from peft.tuners.lora import layer as lora_layers
from peft.tuners.lora import model as lora_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbits.errors import UnsupportedError
from fewbits.methods.low_rank import low_rank
from fewbits.nn import LowRank, QuantizedLinear

DISPATCHER = "dispatch_default"
"""PEFT's function that chooses the adapter for a layer which no library of quantized ones has claimed."""


class LoraQuantizedLinear(lora_layers.Linear):
    """PEFT's LoRA around a `QuantizedLinear`; arguments as PEFT's."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **more: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # PEFT names the ones that it knows
            super().__init__(base_layer, adapter_name, config=config, **more)

    def forward(self, x: Tensor, *args: Any, **more: Any) -> Tensor:
        """PEFT's, in fewer operations where it is one plain adapter."""
        beside = None if args or any(value is not None for value in more.values()) else self._plain(x)
        if beside is None:
            found: Tensor = super().forward(x, *args, **more)
            return found
        adapted: Tensor = self.base_layer(x, beside)
        return adapted

    def _plain(self, x: Tensor) -> LowRank | None:
        """The adapter, where it is A and B alone, multiplied in the type of x: no dropout, bias, variant (DoRA), nor a
        second one, and its layers are no other library's (sharded ones have their weights only while they are called).
        """
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or len(active) != 1 or active[0] in self.lora_variant:
            return None
        (name,) = active
        a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        layers = type(self.base_layer) is QuantizedLinear and type(a) is nn.Linear and type(b) is nn.Linear
        if not layers or a.bias is not None or b.bias is not None or not (isinstance(dropout, nn.Identity)):
            return None
        if x.dtype != a.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return None
        return LowRank(a.weight, b.weight, self.scaling[name])

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UnsupportedError: the format cannot hold the sum."""
        raise UnsupportedError(
            f"an adapter cannot be merged into a packed weight ({self.get_base_layer().extra_repr()}): rounded again, "
            "the sum would lose most of what was learned; keep the adapter, or merge it into the original's weights"
        )

    def unmerge(self) -> None:
        """There is never anything merged."""


def register() -> None:
    """Let PEFT make adapters for `QuantizedLinear`. Importing `fewbits.train` does it."""
    known = getattr(lora_model, DISPATCHER)
    if not getattr(known, "knows_fewbits", False):
        setattr(lora_model, DISPATCHER, _before(known))


def _before(known: Callable[..., nn.Module | None]) -> Callable[..., nn.Module | None]:
    """PEFT's last dispatcher, asked when it is no layer of ours."""

    @wraps(known)
    def dispatch(target: nn.Module, adapter_name: str, config: LoraConfig, **more: Any) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, QuantizedLinear):
            return LoraQuantizedLinear(target, adapter_name, config=config, **more)
        return known(target, adapter_name, config=config, **more)

    dispatch.knows_fewbits = True  # type: ignore[attr-defined]
    return dispatch


def adapted(model: PreTrainedModel, config: LoraConfig, source: str) -> Any:
    """The model with adapters, as `get_peft_model` makes it; `source` is what they are said to belong to."""
    register()
    model.name_or_path = source
    return get_peft_model(model, config)


def linear_layers(model: nn.Module) -> list[str]:
    """The layers that get adapters: every linear one but the projection to the vocabulary, by their full names."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    kinds = (nn.Linear, QuantizedLinear)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and module is not output]


@torch.no_grad()
def start_at_residual(model: LoraModel, original: Callable[[str], Tensor], adapter: str = "default") -> None:
    """Set every adapter to the best approximation of what its layer's format lost.

    original: the weight [N, K] of a layer, by its name in the model without adapters.
    """
    for name, module in model.named_modules():
        if isinstance(module, lora_layers.Linear) and adapter in module.lora_A:
            packed: Any = module.get_base_layer()
            held = packed.weight.float()
            into_a, into_b = (each[adapter].get_parameter("weight") for each in (module.lora_A, module.lora_B))
            a, b = low_rank(original(name).to(held.device).float() - held, module.r[adapter])
            into_a.copy_(a)
            into_b.copy_(b / module.scaling[adapter])
