"""The role of every parameter of a checkpoint, from its configuration and the names and shapes in its files.

Decoder-only models of the known families name their parameters by one scheme, so a table of regular expressions reads
the roles off the names. Anything else is built without weights by transformers, and the roles are those of the modules
that own the parameters. The table is not a second opinion: importing transformers costs seconds, which is longer than
quantizing a small model takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fewbits.models.base import Architecture, Role
from fewbits.models.families import FAMILIES

EMBEDDING, OUTPUT = "embed_tokens.weight", "lm_head.weight"
BY_NAME = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Model types beside those of FAMILIES whose parameters follow the scheme."""

_PREFIX = r"(?:model\.)?"
_LAYER = _PREFIX + r"layers\.\d+\."
RULES: tuple[tuple[re.Pattern[str], Role], ...] = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (_PREFIX + r"embed_tokens\.weight", Role.EMBEDDING),
        (r"lm_head\.weight", Role.OUTPUT),
        (_PREFIX + r"norm\.weight", Role.NORM),
        (_LAYER + r"(?:self_attn\.)?\w*norm\.weight", Role.NORM),
        (_LAYER + r"self_attn\.[qkvo]_proj\.weight", Role.LINEAR),
        (_LAYER + r"mlp\.(?:experts\.\d+\.|shared_expert\.)?(?:gate|up|down)_proj\.weight", Role.LINEAR),
        (_LAYER + r"block_sparse_moe\.experts\.\d+\.w[123]\.weight", Role.LINEAR),
        (_LAYER + r"mlp\.experts\.(?:gate_up|down)_proj", Role.EXPERTS),
        (_LAYER + r"(?:mlp|block_sparse_moe)\.(?:gate|shared_expert_gate)\.weight", Role.ROUTER),
        (_LAYER + r"[\w.]+\.bias", Role.BIAS),
        (_LAYER + r"self_attn\.rotary_emb\.inv_freq", Role.OTHER),
    )
)


def describe(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Roles of all parameters, given config.json and the shapes in the files. A matrix nobody can place is OTHER.

    Raises UnsupportedError for an architecture that transformers does not know, or that asks to run code of its own.
    """
    kind = config.get("model_type")
    roles = {name: role_by_name(name) for name in shapes}
    if (kind in FAMILIES or kind in BY_NAME) and None not in roles.values():
        known = {name: role for name, role in roles.items() if role is not None}
        return Architecture(str(kind), known, _tied_by_name(config, shapes))
    from fewbits.models._modules import describe_modules  # imports transformers

    return describe_modules(config, shapes)


def role_by_name(name: str) -> Role | None:
    """The role that the known families' scheme gives this name, None for a name outside it."""
    return next((role for pattern, role in RULES if pattern.fullmatch(name)), None)


def _tied_by_name(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    family = FAMILIES.get(str(config.get("model_type")))
    default = family.defaults["tie_word_embeddings"] if family else False
    embedding = next((name for name in (f"model.{EMBEDDING}", EMBEDDING) if name in shapes), None)
    tied = config.get("tie_word_embeddings", default)
    return {OUTPUT: embedding} if tied and embedding is not None else {}
