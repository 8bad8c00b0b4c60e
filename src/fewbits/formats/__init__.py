"""Which numbers a tensor can hold, and which bytes hold them.

FORMATS is the registry: one explicit tuple per file. A new format is one file that ends in such a tuple, and one line
here; the command line, the tables in the docs and the contract tests take it from there. ACTIVATIONS are what the
inputs of linear layers can be rounded to.
"""

from __future__ import annotations

from fewbits.errors import FormatError
from fewbits.formats.activations import ACTIVATIONS, ActivationFormat, activation_named
from fewbits.formats.affine import AFFINE, Affine
from fewbits.formats.base import SCALE_TYPES, Arrays, ArraySpec, Format, Group, Grouped, Lookup, Params, QTensor
from fewbits.formats.binary import BINARY
from fewbits.formats.codebook import CODEBOOKS
from fewbits.formats.floats import FLOATS, Float
from fewbits.formats.gguf_iq import GGUF_IQ
from fewbits.formats.gguf_k import GGUF_K
from fewbits.formats.gguf_legacy import GGUF_LEGACY
from fewbits.formats.gguf_ternary import GGUF_TERNARY
from fewbits.formats.llm_int8 import LLM_INT8
from fewbits.formats.minifloat import MINIFLOATS
from fewbits.formats.offset import OFFSET
from fewbits.formats.ternary import TERNARY, Ternary

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        *FLOATS,
        *MINIFLOATS,
        *AFFINE,
        *OFFSET,
        *LLM_INT8,
        *CODEBOOKS,
        *TERNARY,
        *BINARY,
        *GGUF_LEGACY,
        *GGUF_K,
        *GGUF_IQ,
        *GGUF_TERNARY,
    )
}


def format_named(name: str) -> Format:
    """The format of that name; `-bf16` or `-fp32` after a group's size is the type of its scales.

    Raises FormatError if unknown.
    """
    format = FORMATS.get(name)
    for dtype, suffix in SCALE_TYPES.items():
        if format is None and suffix and name.endswith(suffix) and name.removesuffix(suffix) in FORMATS:
            format = FORMATS[name.removesuffix(suffix)].with_scales_in(dtype)
    if format is None or format.name != name:
        from difflib import get_close_matches

        close = get_close_matches(name, FORMATS, n=4)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise FormatError(f"format '{name}' is not known{hint} `fewbits formats` lists all {len(FORMATS)}")
    return format


__all__ = [
    "ACTIVATIONS",
    "FORMATS",
    "ActivationFormat",
    "Affine",
    "ArraySpec",
    "Arrays",
    "Float",
    "Format",
    "Group",
    "Grouped",
    "Lookup",
    "Params",
    "QTensor",
    "Ternary",
    "activation_named",
    "format_named",
]
