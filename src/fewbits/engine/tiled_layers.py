"""Quantized layers of a transformers model onto compiled kernels, so that what is not composed runs fast too.

Weight after weight is read from its packed arrays a slab at a time, tiled, and put in place of them, so besides the
model there is never more than one matrix in memory. An embedding goes along only where it shares its weight with a
linear layer: looking up a few rows is as fast from packed arrays. Layers that round their inputs as the checkpoint says
(`W8A8Linear`) and what is no quantized layer (experts that transformers fuses) stay as they are.
"""

from __future__ import annotations

from torch import nn

from fewbits.engine.tiling import tiled_packed
from fewbits.kernels.threads import team
from fewbits.nn import PackedWeight, QuantizedEmbedding, QuantizedLinear, replace_tiled
from fewbits.runtime.compiled import compiled
from fewbits.runtime.products import Products

_Layer = QuantizedLinear | QuantizedEmbedding


def tile_layers(model: nn.Module, threads: int | None = None) -> None:
    """Swap the quantized linear layers of a model on the CPU for ones in tiles, with the embeddings tied to them.

    threads: of all layers together; all cores by default. Nothing changes without compiled kernels, and
    `compiled` says so once.
    """
    if compiled() is None:
        return
    products = Products(threads, team=team())
    for names in _sharing(model):
        matrix = products.matrix(tiled_packed(_store(model, names[0]).view()))
        for name in names:
            if isinstance(model.get_submodule(name), _Layer):  # one with two names is swapped by its first
                replace_tiled(model, name, matrix)


def _sharing(model: nn.Module) -> list[list[str]]:
    """Names of the layers of each packed weight that a linear layer has."""
    found: dict[int, list[str]] = {}  # by identity: holding a weight here would keep it
    wanted: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _Layer):
            found.setdefault(id(module.store), []).append(name)
            wanted |= {id(module.store)} if isinstance(module, QuantizedLinear) else set()
    return [names for key, names in found.items() if key in wanted]


def _store(model: nn.Module, name: str) -> PackedWeight:
    layer = model.get_submodule(name)
    assert isinstance(layer, _Layer)
    return layer.store
