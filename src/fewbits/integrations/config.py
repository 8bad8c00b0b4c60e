"""`fewbits.Config`: what `from_pretrained(…, quantization_config=…)` is to make of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbits.checkpoint import KINDS
from fewbits.errors import UnsupportedError
from fewbits.formats import format_named

METHOD = "fewbits"
IN_4_BITS, IN_8_BITS = "int4-g32", "int8"


class Config(QuantizationConfigMixin):
    """Quantize while loading.

    One of load_in_4bit (`int4-g32`), load_in_8bit (`int8`), format (any of `fewbits formats`) and plan (a file that
    `fewbits plan` wrote) says in what; with none of them the checkpoint is one that is quantized already, by fewbits
    or another tool.

    vocabulary: format of embeddings and output projection, which are kept otherwise. overrides: regular expression ->
    format (or "keep") for parameters whose name it is found in. skip: modules, by a part of their name, that stay as
    they are. method: how codes are chosen, of those that need no text (`rtn`, `rtn-plain`, `hqq`). kind: of checkpoint
    that `save_pretrained` writes, of `checkpoint.KINDS`; by default the most widely loaded one that holds the format.

    Raises UnsupportedError for arguments that contradict each other, FormatError for a format that is not known.
    """

    def __init__(
        self,
        *,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        format: str | None = None,
        plan: str | Path | None = None,
        vocabulary: str | None = None,
        overrides: Mapping[str, str] | None = None,
        skip: list[str] | None = None,
        method: str = "rtn",
        kind: str | None = None,
        quant_method: str = METHOD,
    ) -> None:
        given = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit, "format": format, "plan": plan}
        asked = [name for name, value in given.items() if value]
        if len(asked) > 1:
            raise UnsupportedError(f"{' and '.join(asked)} were given; each of them says the format, so give one")
        if kind is not None and kind not in KINDS:
            raise UnsupportedError(f"file type '{kind}' is not known; choose one of {', '.join(KINDS)}")
        self.quant_method: Any = quant_method
        self.format = IN_4_BITS if load_in_4bit else IN_8_BITS if load_in_8bit else format
        self.plan = None if plan is None else str(plan)
        self.vocabulary, self.overrides, self.skip = vocabulary, dict(overrides or {}), list(skip or ())
        self.method, self.kind = method, kind
        for name in (self.format, vocabulary, *(f for f in self.overrides.values() if f != "keep")):
            if name is not None:
                format_named(name)

    @property
    def asks(self) -> bool:
        """Whether it says a format."""
        return self.format is not None or self.plan is not None

    def require_nothing_asked(self) -> None:
        """Raise UnsupportedError if it says a format, for a checkpoint that is quantized already."""
        if self.asks:
            raise UnsupportedError(
                f"the checkpoint is quantized already, and {self.format or self.plan} was asked for; load it with "
                "fewbits.Config(), or quantize the original checkpoint"
            )

    def to_dict(self) -> dict[str, Any]:
        """The arguments that differ from their defaults, and the method's name."""
        return {key: value for key, value in vars(self).items() if value}
