"""Fused experts: one 3-D parameter that holds the same matrix of every expert, cut into the matrices it is made of.

transformers 5 keeps all experts of a layer in two parameters, and some checkpoints have them so on disk:

    gate_up_proj  [E, 2·I, H]   gate in the first I rows, up in the rest      down_proj  [E, H, I]
    transposed    [E, H, 2·I]   (Llama 4, and some of Qwen 3-VL)                         [E, I, H]
    interleaved   [E, H, 2·I]   gate and up in alternate columns (gpt-oss)

Loaders of quantized checkpoints (vLLM, and transformers through its renamings) look for one matrix per expert and
projection, `experts.3.gate_proj.weight` [out_features, in_features].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbits.errors import UnsupportedError
from fewbits.models.base import Piece, Role

GATE_UP, DOWN = "gate_up_proj", "down_proj"
TRANSPOSED = ("llama4", "llama4_text")
EITHER = ("qwen3_vl_moe", "qwen3_vl_moe_text")
"""Model types whose checkpoints come in both layouts; the shape tells which."""
INTERLEAVED = ("gpt_oss", "openai_privacy_filter")


def unfused(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[Piece, ...]:
    """The matrices of a fused parameter, expert by expert.

    config is config.json. Raises UnsupportedError where the layout is not known for certain.
    """
    text = {**config, **(config.get("text_config") or {})}
    kind = text.get("model_type")
    base, _, projection = name.removesuffix(".weight").rpartition(".")
    if projection not in (GATE_UP, DOWN) or len(shape) != 3:
        raise _refusal(name, shape, kind, f"only 3-D {GATE_UP} and {DOWN} are known")
    if kind in INTERLEAVED:
        raise _refusal(name, shape, kind, "gate and up alternate in it, and no slice separates them")
    transposed = _is_transposed(name, shape, kind, projection, int(text["hidden_size"]))
    out_features, in_features = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
    if projection == DOWN:
        parts: dict[str, tuple[int, int] | None] = {DOWN: None}
    else:
        half = out_features // 2
        parts = {"gate_proj": (0, half), "up_proj": (half, out_features)}
    return tuple(
        Piece(
            name=f"{base}.{expert}.{part}.weight",
            source=name,
            role=Role.LINEAR,
            shape=(rows[1] - rows[0] if rows else out_features, in_features),
            expert=expert,
            transposed=transposed,
            rows=rows,
        )
        for expert in range(shape[0])
        for part, rows in parts.items()
    )


def _is_transposed(name: str, shape: tuple[int, ...], kind: object, projection: str, hidden: int) -> bool:
    """Whether each expert is stored [in_features, out_features]."""
    upright, lying = (shape[2], shape[1]) if projection == GATE_UP else (shape[1], shape[2])
    fits = {False: upright == hidden, True: lying == hidden}
    possible = (False, True) if kind in EITHER else (kind in TRANSPOSED,)
    found = [layout for layout in possible if fits[layout]]
    if len(found) != 1:
        why = "both layouts fit" if found else f"no dimension where it should be is hidden_size {hidden}"
        raise _refusal(name, shape, kind, why)
    return found[0]


def _refusal(name: str, shape: tuple[int, ...], kind: object, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"fused experts {name} {list(shape)} of a {kind} model cannot be cut into experts: {why}; "
        "write another kind of checkpoint, which keeps them fused"
    )
