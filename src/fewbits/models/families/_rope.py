"""Rotary position embeddings: transformers' parameters in GGUF's keys, as far as llama.cpp can follow them.

`default` rotates pair i of a head of size d by position · θ^(−2i/d). `linear` divides positions by a factor. `yarn`
(arXiv 2309.00071) divides only the slow frequencies and scales attention by 0.1·ln(factor) + 1. `llama3` divides each
frequency by a factor of its own, which llama.cpp reads as a tensor, `rope_freqs.weight`; transformers spells such a
table `longrope`, which is how it comes back from GGUF.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fewbits.errors import UnsupportedError

_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def rope_parameters(config: Mapping[str, Any], layers: str = "full_attention") -> dict[str, Any]:
    """Rotary parameters of one kind of layer as transformers 5 writes them, also from a config.json of version 4.

    `rope_type` and `rope_theta` are always there.
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "full_attention" in found or "sliding_attention" in found:
        found = dict(found.get(layers) or {})
    elif layers == "sliding_attention":
        found = {"rope_theta": config.get("rope_local_base_freq")}
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    theta = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}[layers]
    found["rope_theta"] = float(found.get("rope_theta") or config.get(theta) or 10000.0)
    return found


def rope_hyperparameters(rope: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """GGUF's rope.* keys. longest is max_position_embeddings."""
    keys: dict[str, Any] = {"rope.freq_base": rope["rope_theta"]}
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        keys |= _yarn(rope, longest)
    return keys


def _yarn(rope: Mapping[str, Any], longest: int) -> dict[str, Any]:
    for name, value in _BETAS.items():
        if float(rope.get(name) or value) != value:
            raise UnsupportedError(f"yarn with {name} {rope[name]}: llama.cpp computes with {value:g} in this family")
    if rope.get("truncate") is False:
        raise UnsupportedError("yarn with truncate false: llama.cpp always rounds the correction range")
    keys: dict[str, Any] = {
        "rope.scaling.original_context_length": int(rope.get("original_max_position_embeddings") or longest)
    }
    relative = _attention_factor(rope) / _mscale(rope["factor"])
    if not math.isclose(relative, 1.0, rel_tol=1e-6):
        keys["rope.scaling.attn_factor"] = relative
    return keys


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _attention_factor(rope: Mapping[str, Any]) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = float(rope["factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _mscale(factor, rope["mscale"]) / _mscale(factor, rope["mscale_all_dim"])
    return _mscale(factor)


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """What each of head_dim / 2 frequencies is divided by: 1 for the fast ones, `factor` for the slow, a blend between.

    Source: transformers' _compute_llama3_parameters.
    """
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original, theta = float(rope["original_max_position_embeddings"]), float(rope["rope_theta"])

    def divisor(pair: int) -> float:
        turns = original / (2 * math.pi * theta ** (2 * pair / head_dim))
        if turns > high:
            return 1.0
        if turns < low:
            return factor
        smooth = float((turns - low) / (high - low))
        return 1.0 / ((1 - smooth) / factor + smooth)

    return tuple(divisor(pair) for pair in range(head_dim // 2))


def restored_rope(values: Mapping[str, Any], factors: Sequence[float] | None) -> dict[str, Any]:
    """transformers' rope_parameters from GGUF's hyper-parameters (without prefix) and factors (rope_freqs.weight)."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(values.get("rope.freq_base", 10000.0))}
    kind = values.get("rope.scaling.type", "none")
    if factors is not None:
        table = [float(f) for f in factors]
        original = int(values["context_length"])
        rope |= {"rope_type": "longrope", "short_factor": table, "long_factor": table, "attention_factor": 1.0}
        return rope | {"original_max_position_embeddings": original, "factor": 1.0}
    if kind == "none" or float(values.get("rope.scaling.factor", 1.0)) == 1.0:
        return rope
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(f"rope.scaling.type '{kind}' has no counterpart here; linear and yarn have")
    rope |= {"rope_type": kind, "factor": float(values["rope.scaling.factor"])}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = int(values["rope.scaling.original_context_length"])
        relative = float(values.get("rope.scaling.attn_factor", 1.0))
        rope["attention_factor"] = relative * _mscale(rope["factor"])
    return rope
