"""What transformers' registries hold of fewbits. `registering` imports it once they are there, which puts it in.

- `fewbits`: folders of our own kind, and `quantization_config=fewbits.Config(…)`.
- `gptq` and `awq` where the packages are missing that transformers' own quantizers need (optimum and gptqmodel): such
  checkpoints are then read by fewbits, where transformers could only refuse them. To quantize by these methods while
  loading stays transformers' own, with its own error.
- `fewbits.Config` given for a checkpoint that another tool has quantized: fewbits reads it. transformers refuses a
  configuration of another class than the file's, so `merge_quantization_configs` lets ours through.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from fewbits.integrations.config import METHOD, Config
from fewbits.integrations.quantizer import FewbitsQuantizer

READ_WITHOUT = {"gptq": ("optimum", "gptqmodel"), "awq": ("gptqmodel",)}
"""Methods whose checkpoints fewbits reads where one of these packages is missing."""


def register() -> None:
    """Put them in, once."""
    quantizers: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    if METHOD in quantizers:
        return
    auto.register_quantization_config(METHOD)(Config)
    auto.register_quantizer(METHOD)(FewbitsQuantizer)
    for method, packages in READ_WITHOUT.items():
        if any(find_spec(package) is None for package in packages):
            quantizers[method] = _reading(quantizers[method])
    known = auto.AutoHfQuantizer.merge_quantization_configs
    setattr(auto.AutoHfQuantizer, "merge_quantization_configs", staticmethod(_letting_ours_through(known)))  # noqa: B010


def _reading(theirs: type[HfQuantizer]) -> Callable[..., HfQuantizer]:
    """Ours for a checkpoint that is quantized already, theirs for one that is to be."""

    def quantizer(config: Any, *, pre_quantized: bool = True, **more: Any) -> HfQuantizer:
        if not pre_quantized:
            return theirs(config, pre_quantized=False, **more)
        return FewbitsQuantizer(Config(), pre_quantized=True, **more)

    return quantizer


def _letting_ours_through(known: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def merge(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if isinstance(quantization_config_from_args, Config):
            quantization_config_from_args.require_nothing_asked()
            return quantization_config_from_args
        return known(quantization_config, quantization_config_from_args)

    return merge


register()
