"""What feeds what: neighbours that a factor or a rotation can pass between, and who touches the residual stream.

A decoder layer of the known families is four chains of linear pieces, each broken by one nonlinearity that leaves
single channels alone or alone in a product:

    norm ─γ─► q, k, v                      a factor for each channel of γ moves into the columns of q, k and v
    v ─► attention ─► o                    attention mixes tokens, never channels of a head: rows of v, columns of o
    norm ─γ─► gate, up                     of all experts at once, and of the router, which reads the same
    up ─► act(gate)·up ─► down             the product is linear in up, not in gate

Queries and keys feed no such chain: rotary embeddings and norms of each head stand behind them.
(SmoothQuant, arXiv:2211.10438, section 4, has the first and third; AWQ, arXiv:2306.00978, section 3.2, all four.)

Between layers there is one stream of hidden states. Everything that reads it does so behind an RMS norm, everything
that writes it adds to it, so the whole model can live in a rotated basis (QuaRot, arXiv:2404.00456, section 3): an RMS
norm without weights divides by the stream's length, which no rotation changes. `residual` lists who reads and writes.
Gemma 2 and 3 put a norm *with* weights between a writer and the stream: a factor for each channel that cannot move
into the writer, because the norm would divide it out again, nor to the other side of a rotation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fewbits.errors import UnsupportedError
from fewbits.models.describe import BY_NAME, EMBEDDING, OUTPUT, role_by_name
from fewbits.models.families import FAMILIES
from fewbits.models.slots import Link

Shapes = Mapping[str, tuple[int, ...]]

HEADS = {"mixtral": 32, "qwen2_moe": 16, "qwen3_moe": 32}
"""Attention heads where config.json leaves them out, as transformers fills them in (the families know theirs)."""
INPUT_NORM = "input_layernorm.weight"
MLP_NORMS = ("pre_feedforward_layernorm.weight", "post_attention_layernorm.weight")
"""The norm in front of the second half: the first of these that a layer has."""
FINAL_NORMS = ("model.norm.weight", "norm.weight")
QKV = re.compile(r"self_attn\.[qkv]_proj\.weight")
MLP_READERS = re.compile(
    r"(?:mlp|block_sparse_moe)\."
    r"(?:(?:shared_expert\.|experts\.\d+\.)?(?:gate|up)_proj\.weight|experts\.\d+\.w[13]\.weight"
    r"|experts\.gate_up_proj|(?:gate|shared_expert_gate)\.weight)"
)
WRITERS = re.compile(r"self_attn\.o_proj\.\w+|(?:mlp|block_sparse_moe)\..*(?:down_proj(?:\.\w+)?|\.w2\.weight)")
PAIRS = (("self_attn.v_proj", "self_attn.o_proj"), ("up_proj", "down_proj"), ("w3", "w2"))
"""A linear layer and the one that reads its output channels, elementwise or head by head."""
_LAYER = re.compile(r"(?P<prefix>(?:model\.)?layers\.\d+\.)(?P<local>.+)")


@dataclass(frozen=True)
class Flow:
    """How a parameter of the checkpoint meets the residual stream, and the values of attention.

    kind: `reads` it with its last dimension, `writes` it with the one before (the only one of a bias), both behind the
    other if it does neither (None); `norm` is a norm in between, whose weight goes into what reads behind it. norm: the
    parameter with that weight, for readers. offset: what norms add to their stored weights.
    values: whether its rows (`rows`) or columns (`columns`) are the channels of attention's values, head by head.
    """

    kind: Literal["reads", "writes", "norm"] | None = None
    norm: str | None = None
    offset: float = 0.0
    values: Literal["rows", "columns"] | None = None


def links(config: Mapping[str, Any], shapes: Shapes) -> tuple[Link, ...]:
    """The links of one decoder layer, given config.json and the shapes of its parameters by their names in the layer.

    Empty for an architecture that is not known by name: nobody has looked what stands between its matrices.
    """
    if not _known(config):
        return ()
    return (*_behind_norms(config, shapes), *_behind_linears(config, shapes))


def residual(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Flow]:
    """How each parameter of a checkpoint, by its name there, meets the residual stream.

    Raises UnsupportedError where the model cannot be written in a rotated basis.
    """
    kind = config.get("model_type")
    if not _known(config):
        raise UnsupportedError(
            f"rotate: it is not known what reads and writes the hidden states of a {kind} model; "
            f"leave it out, or use one of {', '.join((*FAMILIES, *BY_NAME))}"
        )
    between = next((name for name in shapes if name.endswith("post_feedforward_layernorm.weight")), None)
    if between is not None:
        raise UnsupportedError(
            f"rotate: {between} scales single channels of what a layer adds to the hidden states, so a {kind} model "
            "has no rotated twin; leave rotate out (gptq, awq and signround work)"
        )
    strange = next((name for name in shapes if role_by_name(name) is None), None)
    if strange is not None:
        raise UnsupportedError(f"rotate: it is not known what {strange} of a {kind} model reads; leave rotate out")
    return {name: _flow(name, config, shapes) for name in shapes}


def head_size(config: Mapping[str, Any], hidden: int) -> int:
    """Channels of one attention head. hidden: size of the hidden states."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None:
        return int(family.filled(config)["head_dim"])
    heads = config.get("num_attention_heads", HEADS.get(str(config.get("model_type"))))
    return int(config.get("head_dim") or hidden // heads)


def _known(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in (*FAMILIES, *BY_NAME)


def _offset(config: Mapping[str, Any]) -> float:
    family = FAMILIES.get(str(config["model_type"]))
    return family.norm_offset if family else 0.0


def _mlp_norm(names: Shapes, prefix: str = "") -> str:
    return next((name for name in MLP_NORMS if prefix + name in names), MLP_NORMS[-1])


def _behind_norms(config: Mapping[str, Any], shapes: Shapes) -> Iterator[Link]:
    for norm, pattern in ((INPUT_NORM, QKV), (_mlp_norm(shapes), MLP_READERS)):
        consumers = tuple(name for name in shapes if pattern.fullmatch(name))
        if norm in shapes and consumers:
            yield Link("norm", norm, consumers, offset=_offset(config))


def _behind_linears(config: Mapping[str, Any], shapes: Shapes) -> Iterator[Link]:
    for name, shape in shapes.items():
        if name.endswith("experts.gate_up_proj"):
            half = (shape[1] // 2, shape[1])
            down = name.replace("gate_up_proj", "down_proj")
            yield from (Link("linear", name, (down,), expert=expert, rows=half) for expert in range(shape[0]))
        for producer, consumer in PAIRS:
            reader = name.removesuffix(f"{producer}.weight") + f"{consumer}.weight"
            if name.endswith(f"{producer}.weight") and reader in shapes:
                yield _pair(config, shapes, name, reader)


def _pair(config: Mapping[str, Any], shapes: Shapes, producer: str, consumer: str) -> Link:
    out_features, (hidden, in_features) = shapes[producer][0], shapes[consumer]
    if out_features == in_features:
        return Link("linear", producer, (consumer,))
    head = head_size(config, hidden)
    return Link("linear", producer, (consumer,), repeats=in_features // out_features, head=head)


def _flow(name: str, config: Mapping[str, Any], shapes: Shapes) -> Flow:
    layer = _LAYER.fullmatch(name)
    if layer is not None:
        return _flow_in_layer(layer["local"], layer["prefix"], config, shapes)
    if name.endswith(EMBEDDING):
        return Flow("reads")
    if name == OUTPUT:
        return Flow("reads", next(n for n in shapes if n in FINAL_NORMS), _offset(config))
    return Flow("norm", offset=_offset(config))


def _flow_in_layer(local: str, prefix: str, config: Mapping[str, Any], shapes: Shapes) -> Flow:
    offset, mlp_norm = _offset(config), _mlp_norm(shapes, prefix)
    if local in (INPUT_NORM, mlp_norm):
        return Flow("norm", offset=offset)
    if QKV.fullmatch(local):
        return Flow("reads", prefix + INPUT_NORM, offset, "rows" if "v_proj" in local else None)
    if MLP_READERS.fullmatch(local):
        return Flow("reads", prefix + mlp_norm, offset)
    if WRITERS.fullmatch(local):
        return Flow("writes", values="columns" if local == "self_attn.o_proj.weight" else None)
    return Flow(values="rows" if local == "self_attn.v_proj.bias" else None)
