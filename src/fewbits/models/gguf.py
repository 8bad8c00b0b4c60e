"""A transformers model in GGUF's words, and back: hyper-parameters, tensor names, the few transforms between them.

GGUF keeps a model in one file: typed metadata (the architecture's hyper-parameters, the whole tokenizer, the chat
template), then the tensors, named by llama.cpp. Three things differ in the numbers themselves: Llama's q and k rows are
interleaved, Gemma's norms hold 1 + w, and Llama 3's rotary factors are a tensor. What differs by family stands in
`families/`; what the tokenizer becomes, in `gguf_tokenizer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.models.base import Piece, Restored, Role
from fewbits.models.families import FAMILIES, Family
from fewbits.models.families._family import OUTSIDE
from fewbits.models.families._rope import llama3_factors, restored_rope, rope_parameters
from fewbits.models.gguf_tokenizer import tokenizer_metadata

ROPE_FACTORS = "rope_freqs.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_BUFFER = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias|attn\.bias)")


def gguf_supported(config: Mapping[str, Any]) -> bool:
    """Whether the architecture has a GGUF form here. A single setting may still be refused: see `gguf_metadata`."""
    return config.get("model_type") in FAMILIES


def gguf_metadata(config: Mapping[str, Any], folder: Path, *, pre: str | None = None) -> dict[str, Any]:
    """Everything a GGUF file says before its tensors, but general.file_type, which the tensors decide.

    config is config.json, folder where tokenizer and chat template lie. Values are plain: an int stands for uint32, a
    float for float32, a list of int for int32s. pre overrides the name of the pre-tokenizer (`tokenizer.ggml.pre`).
    Raises UnsupportedError for an architecture, setting or tokenizer that llama.cpp cannot run exactly.
    """
    family, full = _family(config)
    family.check(full)
    hyperparameters = {f"{family.arch}.{key}": value for key, value in family.hyperparameters(full).items()}
    general = {
        "general.architecture": family.arch,
        "general.type": "model",
        "general.name": folder.resolve().name,
    }
    return general | hyperparameters | tokenizer_metadata(folder, full, pre=pre)


def gguf_pieces(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Piece, ...]:
    """The file's tensors in the order of its layers, from the source's parameters and their shapes.

    A tied output is left out (the embeddings then have role OUTPUT), as are buffers; `gguf_dropped` has the reasons.
    llama.cpp wants every 1-D tensor in FP32.
    Raises UnsupportedError for a parameter that the family does not have in llama.cpp.
    """
    family, full = _family(config)
    dropped = gguf_dropped(config, shapes)
    pieces = [_piece(family, full, name, shape) for name, shape in shapes.items() if name not in dropped]
    return tuple(sorted(pieces, key=lambda piece: _position(piece.name)))


def gguf_dropped(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Parameters of the source that the file leaves out, and why."""
    _, full = _family(config)
    dropped = {name: "a constant that llama.cpp computes itself" for name in shapes if _BUFFER.fullmatch(name)}
    if full["tie_word_embeddings"] and "lm_head.weight" in shapes:
        dropped["lm_head.weight"] = "tied: llama.cpp uses token_embd.weight as output"
    return dropped


def gguf_extras(config: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Tensors that no parameter of the source holds: name -> values, 1-D, to be stored in FP32."""
    _, full = _family(config)
    rope = rope_parameters(full)
    return {ROPE_FACTORS: llama3_factors(rope, full["head_dim"])} if rope["rope_type"] == "llama3" else {}


def from_gguf(
    metadata: Mapping[str, Any], names: Iterable[str], rope_factors: Sequence[float] | None = None
) -> tuple[dict[str, Any], dict[str, Restored]]:
    """config.json of the transformers model that computes what the file says, and where its parameters come from.

    names are the file's tensors. rope_factors are the values of rope_freqs.weight, needed where the file has it. A tied
    output is not in the mapping: transformers ties it by the configuration.
    Raises UnsupportedError for an architecture or a tensor that is not among the families here, CheckpointError where
    the metadata is incomplete.
    """
    found = frozenset(names)
    family = _family_of_file(metadata, found)
    if ROPE_FACTORS in found and rope_factors is None:
        raise UnsupportedError(f"the file has {ROPE_FACTORS}: pass its values as rope_factors")
    prefix = f"{family.arch}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    try:
        values["tokens"] = len(metadata["tokenizer.ggml.tokens"])
        config = _restored_config(family, values, found, rope_factors) | _special_ids(metadata)
    except KeyError as error:
        raise CheckpointError(f"the file's metadata lacks {error}, which a {family.arch} must have") from error
    except (TypeError, ValueError) as error:
        raise UnsupportedError(f"the file's {family.arch} metadata has a value of another kind: {error}") from error
    return config, _restored(family, config, found - {ROPE_FACTORS})


def _family(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family and its complete configuration."""
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise UnsupportedError(
            f"architecture '{kind}' cannot be written to GGUF; supported are {', '.join(FAMILIES)}. "
            "compressed-tensors takes any architecture"
        )
    return family, family.filled(config)


def _piece(family: Family, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Piece:
    layer = _LAYER.fullmatch(name)
    inside = layer[2] if layer else name
    found = (family.block if layer else OUTSIDE).get(inside)
    if found is None or (layer and int(layer[1]) >= int(config["num_hidden_layers"])):
        raise UnsupportedError(
            f"parameter {name} {list(shape)}: llama.cpp's {family.arch} has no such tensor; write compressed-tensors"
        )
    target, role = found
    if role is Role.EMBEDDING and config["tie_word_embeddings"]:
        role = Role.OUTPUT  # it is both, and what it does last is what its errors show in
    return Piece(
        name=f"blk.{layer[1]}.{target}" if layer else target,
        source=name,
        role=role,
        shape=shape,
        interleaved_heads=family.heads_of(inside, config),
        added=family.norm_offset if role is Role.NORM else 0.0,
    )


def _position(name: str) -> tuple[int, int, str]:
    block = _BLOCK.fullmatch(name)
    return (1, int(block[1]), name) if block else (0 if name.startswith("token_embd") else 2, 0, name)


def _family_of_file(metadata: Mapping[str, Any], names: frozenset[str]) -> Family:
    """The first family of that architecture: a Mistral comes back as the Llama that it is to llama.cpp."""
    arch = metadata.get("general.architecture")
    family = next((family for family in FAMILIES.values() if family.arch == arch), None)
    if family is None:
        known = dict.fromkeys(family.arch for family in FAMILIES.values())
        raise UnsupportedError(f"GGUF architecture '{arch}' cannot be loaded; supported are {', '.join(known)}")
    return family


def _restored_config(
    family: Family, values: Mapping[str, Any], names: frozenset[str], factors: Sequence[float] | None
) -> dict[str, Any]:
    heads = int(values["attention.head_count"])
    head_dim = int(values.get("attention.key_length", values["embedding_length"] // heads))
    if int(values.get("rope.dimension_count", head_dim)) != head_dim:
        raise UnsupportedError(f"rope.dimension_count {values['rope.dimension_count']} of a head of {head_dim}")
    return {
        "architectures": [family.causal_lm],
        "model_type": family.model_type,
        "vocab_size": int(values["tokens"]),
        "hidden_size": int(values["embedding_length"]),
        "intermediate_size": int(values["feed_forward_length"]),
        "num_hidden_layers": int(values["block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(values.get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(values["context_length"]),
        "rms_norm_eps": float(values["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": restored_rope(values, factors),
        "tie_word_embeddings": "output.weight" not in names,
        "dtype": "float32",
    } | family.restored({**values, "attention.key_length": head_dim}, names)


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, int | None]:
    return {f"{kind}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for kind, key in _SPECIAL.items()}


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _restored(family: Family, config: Mapping[str, Any], names: frozenset[str]) -> dict[str, Restored]:
    inside = {target: (source, role) for source, (target, role) in family.block.items()}
    outside = {target: (source, role) for source, (target, role) in OUTSIDE.items()}
    restored = {}
    for name in sorted(names, key=_position):
        block = _BLOCK.fullmatch(name)
        found = inside.get(block[2]) if block else outside.get(name)
        if found is None:
            raise UnsupportedError(f"tensor {name}: transformers' {family.causal_lm} has no such parameter")
        source, role = found
        full = f"model.layers.{block[1]}.{source}" if block else source
        offset = family.norm_offset if role is Role.NORM else 0.0
        restored[full] = Restored(name, family.heads_of(source, config), -offset)
    return restored
