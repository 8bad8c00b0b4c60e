"""Keys and values on their way into the cache: rounded to 8 bits, or watched to find the scales for that.

Every attention of transformers hands its new keys (after rotary embedding) and values to `past_key_values.update`, and
goes on with what that returns. A hook in front of the attention puts a `_Tap` there, which changes or watches them and
passes them on to the cache behind it, if there is one. So keys and values are rounded wherever the model runs: with a
cache of any class, while generating, and without one (`use_cache=False`), as an evaluation does.

What stands in the cache then is the rounded numbers in the model's dtype: the loss of an 8-bit cache, not its size.
Queries stay as they are. The convention (static, symmetric, one scale each for keys and values of a layer) is
compressed-tensors' `kv_cache_scheme` and vLLM's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import UnsupportedError
from fewbits.formats import ActivationFormat

CACHE = "past_key_values"
PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")

See = Callable[[Tensor], None]


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> attention that keeps keys and values, by compressed-tensors' own criterion, in order."""
    return {name: module for name, module in model.named_modules() if _caches(module)}


def round_cache(attention: nn.Module, format: ActivationFormat, k_scale: Tensor, v_scale: Tensor) -> None:
    """Let an attention's keys and values be rounded, from now on, at static scales (one number each).

    Raises UnsupportedError for what is no attention that caches.
    """
    if not _caches(attention):
        raise UnsupportedError(
            f"{type(attention).__name__} has scales for a key-value cache, but is no attention that keeps one; "
            "config.json does not belong to these weights"
        )
    hook = _Hook(_Rounding(format, float(k_scale)), _Rounding(format, float(v_scale)))
    attention.register_forward_pre_hook(hook, with_kwargs=True)


@contextmanager
def watched_caches(watchers: Mapping[nn.Module, tuple[See, See]]) -> Iterator[None]:
    """Within it, each attention shows its keys and values, [B, kv_heads, T, head_dim], to a pair of functions."""
    with ExitStack() as stack:
        for attention, (see_keys, see_values) in watchers.items():
            hook = _Hook(_Watching(see_keys), _Watching(see_values))
            stack.callback(attention.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _caches(module: nn.Module) -> bool:
    if "attention" not in type(module).__name__.lower() or not any(hasattr(module, name) for name in PROJECTIONS):
        return False
    return CACHE in inspect.signature(module.forward).parameters


@dataclass(frozen=True)
class _Rounding:
    """The scale is a Python number, so that moving or casting the model leaves it alone."""

    format: ActivationFormat
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        scale = torch.tensor([self.scale], device=x.device)
        return self.format.dequantize(*self.format.quantize(x, scale)).to(x.dtype)


@dataclass(frozen=True)
class _Watching:
    see: See

    def __call__(self, x: Tensor) -> Tensor:
        self.see(x)
        return x


@dataclass(frozen=True)
class _Hook:
    """What a forward pre-hook of an attention does: put a tap before its cache."""

    keys: Callable[[Tensor], Tensor]
    values: Callable[[Tensor], Tensor]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {CACHE: _Tap(kwargs.get(CACHE), self.keys, self.values)}


class _Tap:
    """A cache with something in front of it; all but `update` is the cache's own."""

    def __init__(self, cache: Any, keys: Callable[[Tensor], Tensor], values: Callable[[Tensor], Tensor]) -> None:
        self._cache, self._keys, self._values = cache, keys, values

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._keys(keys), self._values(values)
        if self._cache is None:
            return keys, values
        updated: tuple[Tensor, Tensor] = self._cache.update(keys, values, *args, **kwargs)
        return updated

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
