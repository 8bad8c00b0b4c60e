"""The decoder that all families are variations of, as a program.

    x = embed(tokens)
    for each layer:   x += attend(norm(x))      x += feed_forward(norm(x))
    logits = output(norm(x))

Biases and norms of queries and keys are used where the checkpoint has them, so that they need no case here. In the last
layer only the tokens whose logits were asked for go on behind attention: of a prompt that is one.

Buffers: x the residual stream, h normed, q, k, v and a around attention, g and u around the gate, t what goes through a
norm of its own before it is added, r the router's logits, e, f, s and w a shared expert and its share. Behind the
selection x is y, and a is b.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fewbits.engine.parameters import Parameters, rotary_trouble
from fewbits.runtime.ops import (
    Activation,
    Attend,
    Embed,
    Gate,
    Linear,
    Norm,
    Op,
    Program,
    Rotary,
    Select,
    Softcap,
    Vector,
)

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""transformers' names of the functions that gates go through."""
HEADS = range(8, 257, 8)
"""Sizes of a head that the attention kernels take."""


@dataclass
class Composition:
    """A program being composed: ops in order, and the widths of the buffers that they write."""

    parameters: Parameters
    ops: list[Op] = field(default_factory=list)
    buffers: dict[str, int] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.parameters.config

    def add(self, op: Op, **widths: int) -> None:
        """Append an op, and say how wide the buffers are that it makes."""
        self.ops.append(op)
        for name, width in widths.items():
            assert self.buffers.setdefault(name, width) == width, name

    def linear(self, x: str, outs: dict[str, tuple[str, range | None]], *, accumulate: bool = False) -> None:
        """x times matrices that read it together: buffer -> (parameter without its `.weight`, rows of it)."""
        p = self.parameters
        weights = tuple(p.matrix(f"{name}.weight", rows) for name, rows in outs.values())
        biases = tuple(p.vector(f"{name}.bias") if p.has(f"{name}.bias") else None for name, _ in outs.values())
        widths = {out: weight.rows for out, weight in zip(outs, weights, strict=True)}
        self.add(Linear(x, weights, tuple(outs), biases, accumulate), **widths)

    def program(self) -> Program:
        """The finished program. Raises UnsupportedError where it leaves a parameter of the checkpoint unused."""
        self.parameters.require_all_used()
        layers = [op for op in self.ops if isinstance(op, Attend)]
        vocabulary = self.buffers["logits"]
        return Program(tuple(self.ops), self.buffers, vocabulary, len(layers), layers[0].kv_heads, layers[0].head_dim)


class Decoder:
    """Llama's shape; a family overrides what differs."""

    model_type: ClassVar[str]
    norm_offset: ClassVar[float] = 0.0
    """What is added to the stored weights of norms."""
    post_norms: ClassVar[bool] = False
    """Whether what attention and the gate give is normed before it is added to x."""

    def compose(self, parameters: Parameters) -> Program:
        """The program of a checkpoint of this family."""
        c = Composition(parameters)
        hidden, layers = int(c.config.hidden_size), int(c.config.num_hidden_layers)
        c.add(Embed(parameters.matrix("model.embed_tokens.weight"), "x", self.embed_scale(c.config)), x=hidden)
        x = "x"
        for layer in range(layers):
            x = self._layer(c, layer, last=layer == layers - 1)
        self.norm(c, x, "model.norm", "h")
        c.linear("h", {"logits": ("lm_head", None)})
        cap = getattr(c.config, "final_logit_softcapping", None)
        if cap is not None:
            c.add(Softcap("logits", float(cap)))
        return c.program()

    def trouble(self, config: Any) -> str | None:
        """Why a model of this family cannot be composed; None if it can."""
        size = self.head_dim(config)
        if size not in HEADS:
            return f"heads of {size} numbers; attention here takes multiples of 8 up to 256"
        if self.activation_name(config) not in ACTIVATIONS:
            return f"the gate's activation '{self.activation_name(config)}' is not among {', '.join(ACTIVATIONS)}"
        return rotary_trouble(config)

    def head_dim(self, config: Any) -> int:
        """Numbers of a head."""
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def embed_scale(self, config: Any) -> float:
        """What embeddings are multiplied with."""
        return 1.0

    def attention_scale(self, config: Any) -> float:
        """What scores are multiplied with."""
        return 1 / math.sqrt(self.head_dim(config))

    def softcap(self, config: Any) -> float | None:
        """Bound of the scores, if they have one."""
        return None

    def activation_name(self, config: Any) -> str:
        """transformers' name of the function that gates go through."""
        return str(config.hidden_act)

    def window(self, config: Any, layer: int) -> int | None:
        """Tokens that a layer sees, None for all."""
        return None

    def rotary(self, parameters: Parameters, layer: int) -> Rotary:
        """The angles of a layer."""
        return parameters.rotary()

    def norm(self, c: Composition, x: str, name: str, out: str, *, accumulate: bool = False) -> None:
        """out (+)= norm of x."""
        weight = c.parameters.vector(f"{name}.weight", self.norm_offset)
        c.add(Norm(x, weight, float(c.config.rms_norm_eps), out, accumulate), **{out: len(weight)})

    def queries_keys_values(self, c: Composition, name: str) -> None:
        """q, k and v from h."""
        c.linear("h", {out: (f"{name}.{out}_proj", None) for out in "qkv"})

    def feed_forward(self, c: Composition, name: str, layer: int, x: str) -> None:
        """Add to x, or write to t where that is normed first, what the gated layer makes of h."""
        self.gate_and_up(c, name)
        c.add(Gate("g", "u", "g", ACTIVATIONS[self.activation_name(c.config)]))
        c.linear("g", {x: (f"{name}.down_proj", None)}, accumulate=not self.post_norms)

    def gate_and_up(self, c: Composition, name: str) -> None:
        """g and u from h."""
        c.linear("h", {"g": (f"{name}.gate_proj", None), "u": (f"{name}.up_proj", None)})

    def _layer(self, c: Composition, layer: int, *, last: bool) -> str:
        """One layer; the name of the residual stream behind it."""
        name = f"model.layers.{layer}"
        self.norm(c, "x", f"{name}.input_layernorm", "h")
        self._attention(c, f"{name}.self_attn", layer)
        x, a = ("y", "b") if last else ("x", "a")
        if last:
            c.add(Select("x", "y"), y=c.buffers["x"])
            c.add(Select("a", "b"), b=c.buffers["a"])
        if not self.post_norms:
            c.linear(a, {x: (f"{name}.self_attn.o_proj", None)}, accumulate=True)
            self.norm(c, x, f"{name}.post_attention_layernorm", "h")
            self.feed_forward(c, f"{name}.mlp", layer, x)
            return x
        c.linear(a, {"t": (f"{name}.self_attn.o_proj", None)})
        self.norm(c, "t", f"{name}.post_attention_layernorm", x, accumulate=True)
        self.norm(c, x, f"{name}.pre_feedforward_layernorm", "h")
        self.feed_forward(c, f"{name}.mlp", layer, "t")
        self.norm(c, "t", f"{name}.post_feedforward_layernorm", x, accumulate=True)
        return x

    def _attention(self, c: Composition, name: str, layer: int) -> None:
        """a from h."""
        self.queries_keys_values(c, name)
        p, config = c.parameters, c.config
        attend = Attend(
            "q",
            "k",
            "v",
            "a",
            layer=layer,
            heads=int(config.num_attention_heads),
            kv_heads=int(config.num_key_value_heads),
            head_dim=self.head_dim(config),
            scale=self.attention_scale(config),
            rotary=self.rotary(p, layer),
            window=self.window(config, layer),
            softcap=self.softcap(config),
            q_norm=self._head_norm(p, f"{name}.q_norm.weight"),
            k_norm=self._head_norm(p, f"{name}.k_norm.weight"),
            eps=float(config.rms_norm_eps),
        )
        c.add(attend, a=attend.heads * attend.head_dim)

    def _head_norm(self, p: Parameters, name: str) -> Vector | None:
        return p.vector(name, self.norm_offset) if p.has(name) else None


def window_of_kind(config: Any, layer: int) -> int | None:
    """The window of a layer where config.json says of each which kind it is."""
    return int(config.sliding_window) if config.layer_types[layer] == "sliding_attention" else None


def window_of_all(config: Any) -> int | None:
    """The window that all layers share, if there is one."""
    return None if getattr(config, "sliding_window", None) is None else int(config.sliding_window)
