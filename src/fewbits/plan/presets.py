"""Presets: the mixtures of formats that users of llama.cpp know by name, Q4_K_M and its kin.

A preset has a base format for most matrices and spends bits where errors hurt most. Two parts of a block stand out: the
values of attention (`attn_v`), few weights whose errors every head adds up, all the more so where several query heads
share one of them; and the way out of the feed-forward network (`ffn_down`), whose inputs have the largest outliers.
The layers next to either end matter more than those between, so many presets refine only some layers. The projection
to the vocabulary never gets less than 6 bits.

The facts are llama-quantize's (llama.cpp, src/llama-quant.cpp), for models without experts, and the tests hold what it
wrote for models of several shapes. They are rules of thumb from 2023, the same for every model: a plan that measures
its own model does better at the same size, which is why presets are worth drawing beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewbits.errors import FewbitsError, FormatError, UnsupportedError
from fewbits.formats import FORMATS, Format
from fewbits.plan.rules import Tensor

_MATRIX = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>\w+)\.weight")


@dataclass(frozen=True)
class Place:
    """Where in the model a matrix of a block stands, as far as a preset asks.

    sharing: query heads to a key-value head. large: one of the models of 80 layers that llama.cpp calls 70B.
    imatrix: whether there is an importance matrix.
    """

    part: str
    layer: int
    layers: int
    sharing: int
    large: bool
    imatrix: bool


Where = Callable[[Place], bool]
Finer = Mapping[str, Mapping[Where, str]]
"""Part of a block -> where -> name of a format; of several places that hold, the first counts."""


def everywhere(place: Place) -> bool:
    return True


def where_four_heads_share(place: Place) -> bool:
    return place.sharing >= 4


def layers_before(n: int) -> Where:
    """The first n layers."""
    return lambda place: place.layer < n


def first(part: int) -> Where:
    """The first 1/part of the layers, none of them in a model with fewer layers than that."""
    return lambda place: place.layer < place.layers // part


def both_ends_and_every_third(place: Place) -> bool:
    """The first and the last eighth of the layers, and of those between every third."""
    eighth = place.layers // 8
    at_an_end = place.layer < eighth or place.layer >= 7 * place.layers // 8
    return at_an_end or (place.layer - eighth) % 3 == 2


def first_eighth_without_imatrix(place: Place) -> bool:
    return not place.imatrix and first(8)(place)


def first_eighth_with_imatrix(place: Place) -> bool:
    return place.imatrix and first(8)(place)


@dataclass(frozen=True)
class Preset:
    """A mixture. base: the format of every matrix of which `finer` says nothing, by its name in FORMATS."""

    base: str
    finer: Finer = field(default_factory=dict)

    def at(self, place: Place) -> str:
        """The format of a matrix in a block, before its shape is asked."""
        rules = self.finer.get(place.part, {})
        name = next((format for where, format in rules.items() if where(place)), self.base)
        spare = place.large and place.part == "attn_v" and name in ("q3_k", "q4_k")
        return "q5_k" if spare else name  # eight query heads share a value there, so the bits are nearly free

    def output(self, tensor: Tensor) -> str:
        """The format of the projection to the vocabulary, and of embeddings that are tied to it."""
        return "q6_k" if self.base != "q8_0" and holds(self.base, tensor) else "q8_0"


_MEDIUM: Finer = {"attn_v": {both_ends_and_every_third: "q6_k"}, "ffn_down": {both_ends_and_every_third: "q6_k"}}
_UNEVEN: Finer = {"attn_v": {where_four_heads_share: "q5_k"}, "ffn_down": {first_eighth_without_imatrix: "q5_k"}}

PRESETS: Mapping[str, Preset] = {
    "Q2_K": Preset(
        "q2_k",
        {
            "attn_v": {where_four_heads_share: "q4_k", everywhere: "q3_k"},
            "attn_output": {everywhere: "q3_k"},
            "ffn_down": {everywhere: "q3_k"},
        },
    ),
    "Q2_K_S": Preset("q2_k", {"attn_v": {where_four_heads_share: "q4_k"}, "ffn_down": {first(8): "q4_k"}}),
    "Q3_K_S": Preset("q3_k"),
    "Q3_K_M": Preset(
        "q3_k",
        {
            "attn_v": {layers_before(2): "q5_k", everywhere: "q4_k"},
            "attn_output": {everywhere: "q4_k"},
            "ffn_down": {first(16): "q5_k", everywhere: "q4_k"},
        },
    ),
    "Q3_K_L": Preset("q3_k", {part: {everywhere: "q5_k"} for part in ("attn_v", "attn_output", "ffn_down")}),
    "Q4_K_S": Preset("q4_k", {"attn_v": {layers_before(4): "q5_k"}, "ffn_down": {first(8): "q5_k"}}),
    "Q4_K_M": Preset("q4_k", _MEDIUM),
    "Q5_K_S": Preset("q5_k"),
    "Q5_K_M": Preset("q5_k", _MEDIUM),
    "Q6_K": Preset("q6_k"),
    "IQ4_XS": Preset("iq4_xs", _UNEVEN),
    "IQ4_NL": Preset("iq4_nl", _UNEVEN),
    "Q4_0": Preset("q4_0", {"ffn_down": {first_eighth_with_imatrix: "q4_1"}}),
    "Q4_1": Preset("q4_1"),
    "Q5_0": Preset("q5_0", {"ffn_down": {first_eighth_with_imatrix: "q5_1"}}),
    "Q5_1": Preset("q5_1"),
    "Q8_0": Preset("q8_0"),
}

INSTEAD: Mapping[str, str] = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "iq4_xs": "iq4_nl",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
"""Blocks of 32 in place of super-blocks of 256, for rows that are no whole super-blocks. These are llama.cpp's, who has
q4_0 where `Block.instead` has iq4_nl."""


def preset_named(name: str) -> Preset:
    """The preset of that name in upper or lower case. Raises FewbitsError if there is none."""
    preset = PRESETS.get(name.upper())
    if preset is None:
        raise FewbitsError(f"preset '{name}' is not known; there are {', '.join(PRESETS)}")
    return preset


def preset_formats(
    name: str, tensors: Sequence[Tensor], config: Mapping[str, Any], *, imatrix: bool = False
) -> dict[str, Format]:
    """For every matrix of a GGUF file the format that llama-quantize gives it under the preset of that name.

    tensors are all of the file's, under llama.cpp's names; matrices are those with two dimensions. config is the
    model's config.json, read for its model_type only: it may leave layers and heads to defaults, tensors cannot.
    imatrix: whether there is an importance matrix, on which the choices of Q4_0, Q5_0, IQ4_XS and IQ4_NL depend.
    Raises FewbitsError for an unknown name, UnsupportedError for a model with experts.
    """
    preset = preset_named(name)
    if any(len(tensor.shape) > 2 for tensor in tensors):
        raise UnsupportedError(f"preset {name.upper()}: its rules for experts are not known here; choose a format")
    places = _places(tensors, str(config.get("model_type")), imatrix=imatrix)
    return {
        tensor.name: _fitting(_format(preset, tensor, places.get(tensor.name)), tensor)
        for tensor in tensors
        if len(tensor.shape) == 2
    }


def _format(preset: Preset, tensor: Tensor, place: Place | None) -> str:
    if place is not None:
        return preset.at(place)
    return preset.output(tensor) if tensor.role == "output" else preset.base


def _places(tensors: Sequence[Tensor], model_type: str, *, imatrix: bool) -> dict[str, Place]:
    """The places of those matrices that stand in a block."""
    found = {tensor.name: match for tensor in tensors if (match := _MATRIX.fullmatch(tensor.name))}
    layers = len({match["layer"] for match in found.values()})
    sharing = _sharing(tensors)
    large = layers == 80 and (model_type == "qwen2" or (model_type in ("llama", "mistral") and sharing > 1))
    return {
        name: Place(match["part"], int(match["layer"]), layers, sharing, large, imatrix)
        for name, match in found.items()
    }


def _sharing(tensors: Sequence[Tensor]) -> int:
    """Query heads to a key-value head: all heads are equally long, so it is how many times more rows queries have."""
    rows = {tensor.name: tensor.shape[0] for tensor in tensors}
    return rows.get("blk.0.attn_q.weight", 1) // rows.get("blk.0.attn_k.weight", 1)


def _fitting(name: str, tensor: Tensor) -> Format:
    """The format, or what is taken in its place where rows are no whole blocks of it: FP16 in the end."""
    tried = (name, INSTEAD.get(name, name))
    return FORMATS[next((format for format in tried if holds(format, tensor)), "fp16")]


def holds(format: str, tensor: Tensor) -> bool:
    """Whether the tensor's rows are whole blocks of the format."""
    try:
        FORMATS[format].check(tensor.shape)
    except FormatError:
        return False
    return True
