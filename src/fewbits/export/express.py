"""The nodes of quantized layers as ONNX's operators. W lies as [in_features, out_features], as MatMul reads it.

    weights alone      x · DequantizeLinear(codes, scale, zero)
                       per row and tensor on axis 1, groups as blocks along axis 0
      for onnxruntime  MatMulNBits(x, codes, scale, zero), com.microsoft, where weights share scales in groups
    + static inputs    DequantizeLinear(QuantizeLinear(x, s)) · DequantizeLinear(codes, scale, zero)
    + dynamic inputs   s = max(max|x| / 127, smallest), q = Cast(Clip(Round(x / s)))
                       Cast(MatMulInteger(q, codes, 0, zero)) · s · scale
    embeddings         DequantizeLinear(Gather(codes, ids), Gather(scale, ids), Gather(zero, ids))

Dynamic inputs are written out because ONNX's DynamicQuantizeLinear is another rounding: unsigned, with a zero-point,
one scale for the whole batch. Rows of embeddings are gathered as codes, so that a call decodes the rows that it reads
and not the table; Gather takes no 4-bit type in onnxruntime, so codes of embeddings take a byte.

Tensors of the file are lazy: each reads its weight when it is written. One that stays in 16 bits is cast to float32
behind the Gather that reads it, or else where it is used, which onnxruntime does once, when it loads the file.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from fewbits.checkpoint import input_scale
from fewbits.engine.weights import Weight
from fewbits.export.blocks import CONTRIB, fits, packed_blocks, packed_zeros
from fewbits.export.integers import Integers, Layout, integers, layout
from fewbits.export.tracing import DOMAIN, Traced
from fewbits.formats import ActivationFormat, Float
from fewbits.formats.activations import SMALLEST

Array: TypeAlias = NDArray[Any]
Way: TypeAlias = Literal["portable", "onnxruntime"]
"""Operators of the standard alone, or onnxruntime's own where it has faster ones."""
FLOAT, INT8 = 1, 3  # TensorProto.DataType
PREFIX = "model."  # in front of the parameters' names in the traced graph
SIXTEEN = {torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}


def express(model: Traced, way: Way = "portable") -> Any:
    """The finished graph (onnx_ir.Model) of a traced model; its tensors are read when they are written."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript import optimizer

    _number(model)
    graph = model.graph
    optimizer.optimize_ir(graph, should_fold=lambda node: False if _reads(node, model.kept) else None)
    for name, weight in model.kept.items():
        _keep_in_16_bits(graph.graph, name, weight)
    made: dict[str, Any] = {}
    for node in [node for node in graph.graph if node.domain == DOMAIN]:
        name = node.attributes["weight"].value
        place = _Place(graph.graph, node, made)
        write = _linear if node.op_type == "Linear" else _embedding
        made_of = write(place, node.inputs[0], name, model.quantized[name], way)
        made_of.type, made_of.shape = node.outputs[0].type, node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(made_of, replace_graph_outputs=True)
        graph.graph.remove(node, safe=True)
    graph.graph.outputs[0].name = model.output
    graph.opset_imports.pop(DOMAIN, None)
    if any(node.domain == CONTRIB for node in graph.graph):
        graph.opset_imports[CONTRIB] = 1
    ClearMetadataAndDocStringPass()(graph)  # half a kilobyte a node of where it came from
    return graph


@dataclass(frozen=True)
class _Place:
    """Where new nodes go: in front of `node`. made: values of weights that several nodes share, by name."""

    graph: Any
    node: Any
    made: dict[str, Any]

    def op(
        self,
        kind: str,
        *inputs: Any,
        attributes: Mapping[str, int] | None = None,
        name: str | None = None,
        domain: str = "",
    ) -> Any:
        """The output of a new node."""
        import onnx_ir as ir

        made = ir.node(kind, inputs, dict(attributes or {}), domain=domain, name=name)
        self.graph.insert_before(self.node, made)
        if name is not None:
            made.outputs[0].name = name
        return made.outputs[0]

    def tensor(self, name: str, dtype: str, shape: Sequence[int], make: Callable[[], Array]) -> Any:
        """A tensor of the file, in which `make`'s array is written; 4-bit numbers are given as bytes of one each."""
        if name not in self.made:
            self.made[name] = _tensor(self.graph, name, dtype, shape, make)
        return self.made[name]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, the same for every node that asks by this name."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]


def _reads(node: Any, names: Container[str]) -> bool:
    """Whether a node's input is a tensor of one of these names: what is computed from it would get another."""
    return any(value is not None and value.name in names for value in node.inputs)


def _tensor(graph: Any, name: str, dtype: str, shape: Sequence[int], make: Callable[[], Array]) -> Any:
    import onnx_ir as ir

    kind = ir.DataType[dtype]
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
    value.const_value = ir.LazyTensor(lambda: _given(make(), kind), kind, ir.Shape(shape), name=name)
    graph.register_initializer(value)
    return value


def _given(array: Array, kind: Any) -> Any:
    """An array as onnx_ir's tensor; two numbers of 4 bits a byte, the first one low."""
    import onnx_ir as ir

    if kind.bitwidth == 4:
        flat = np.append(array.reshape(-1).view(np.uint8) & 15, np.zeros(array.size % 2, np.uint8))
        return ir.PackedTensor(flat[::2] | flat[1::2] << 4, kind, shape=array.shape)
    return ir.Tensor(array, dtype=kind)


def _number(model: Traced) -> None:
    """Give the kept parameters their numbers, in float32."""
    for value in list(model.graph.graph.initializers.values()):
        name = value.name.removeprefix(PREFIX)
        if name in model.kept:
            del model.graph.graph.initializers[value.name]
            dtype = "FLOAT" if value.dtype.is_floating_point() else value.dtype.name
            numbers = partial(numbers_of, model.kept[name], torch.float32)
            new = _tensor(model.graph.graph, name, dtype, value.shape.numpy(), numbers)
            value.replace_all_uses_with(new)


def numbers_of(weight: Weight, dtype: torch.dtype) -> Array:
    """A tensor that is not quantized, in a floating-point type; integers stay what they are."""
    numbers = weight.numbers(dtype, torch.device("cpu"))
    if dtype == torch.bfloat16:
        import ml_dtypes

        return numbers.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return numbers.numpy()


def _keep_in_16_bits(graph: Any, name: str, weight: Weight) -> None:
    """A tensor of the file in the 16 bits that the checkpoint has it in, if it has."""
    format = weight.entry.format
    assert isinstance(format, Float)
    changed = weight.restored is not None and bool(weight.restored.added)
    if name not in graph.initializers or format.dtype not in SIXTEEN or changed:
        return
    wide = graph.initializers.pop(name)
    make = partial(numbers_of, weight, format.dtype)
    narrow = _tensor(graph, name, SIXTEEN[format.dtype], wide.shape.numpy(), make)
    widened: list[Any] = []
    for user, index in list(wide.uses()):
        if user.op_type == "Gather" and index == 0:
            user.replace_input_with(0, narrow)
            out = _widened(graph, user.outputs[0], after=user)
            out.producer().inputs[0].name = f"{out.name}_16_bits"
        else:
            widened = widened or [_widened(graph, narrow, after=None)]
            user.replace_input_with(index, widened[0])


def _widened(graph: Any, value: Any, after: Any) -> Any:
    """`value` cast to float32: behind the node `after`, for all who read it, or at the start of the graph."""
    import onnx_ir as ir

    cast = ir.node("Cast", [value], {"to": FLOAT})
    out = cast.outputs[0]
    out.name, out.dtype, out.shape = f"{value.name}_float32", ir.DataType.FLOAT, value.shape
    if after is None:
        graph.insert_before(graph[0], cast)
        return out
    graph.insert_after(after, cast)
    for user, index in list(value.uses()):
        if user is not cast:
            user.replace_input_with(index, out)
    value.dtype = after.inputs[0].dtype
    return out


def _linear(place: _Place, x: Any, name: str, weight: Weight, way: Way) -> Any:
    inputs, plan = weight.entry.inputs, layout(name, weight.entry.format)
    if inputs is None and way == "onnxruntime" and fits(plan):
        return _blocks(place, x, name, weight, plan)
    if inputs is None or inputs.static:
        x = x if inputs is None else _rounded(place, x, name, weight, inputs)
        return place.op("MatMul", x, place.once(name, lambda: _decoded(place, name, weight, plan)))
    return _product(place, x, name, weight, _wide(plan), inputs)


def _decoded(place: _Place, name: str, weight: Weight, plan: Layout) -> Any:
    """W in float32, [K, N], of codes."""
    rows, columns = weight.entry.shape
    shape = {"tensor": (), "row": (rows,)}.get(str(plan.group), (plan.groups(columns), rows))
    attributes = {"axis": 0, "block_size": plan.group} if isinstance(plan.group, int) else {"axis": 1}
    made = [
        place.tensor(f"{name}.codes", plan.dtype, (columns, rows), lambda: _transposed(integers(weight).codes)),
        place.tensor(f"{name}.scale", "FLOAT", shape, lambda: _params(weight, "scale", shape)),
    ]
    if plan.zero:
        made.append(place.tensor(f"{name}.zero", plan.dtype, shape, lambda: _params(weight, "zero", shape)))
    return place.op("DequantizeLinear", *made, name=f"{name}.decoded", attributes=attributes)


def _transposed(matrix: torch.Tensor) -> Array:
    return np.ascontiguousarray(matrix.numpy().T)


def _params(weight: Weight, key: Literal["scale", "zero"], shape: tuple[int, ...]) -> Array:
    """A param, [N, G], transposed into a shape."""
    found = getattr(integers(weight), key)
    return _transposed(found).reshape(shape)


def _blocks(place: _Place, x: Any, name: str, weight: Weight, plan: Layout) -> Any:
    """MatMulNBits, its products in float32."""
    (rows, columns), group = weight.entry.shape, int(plan.group)
    count = plan.groups(columns)

    def array(make: Callable[[Integers, Layout], Array]) -> Array:
        return make(integers(weight), plan)

    bytes_ = (rows, count, group * plan.bits // 8)
    made = [
        place.tensor(f"{name}.codes", "UINT8", bytes_, partial(array, packed_blocks)),
        place.tensor(f"{name}.scale", "FLOAT", (rows, count), partial(_rows_of, weight, "scale", (rows, count))),
    ]
    if plan.zero:
        zeros = (rows, -(-count * plan.bits // 8))
        made.append(place.tensor(f"{name}.zero", "UINT8", zeros, partial(array, packed_zeros)))
    sizes = {"K": columns, "N": rows, "bits": plan.bits, "block_size": group, "accuracy_level": 1}
    return place.op("MatMulNBits", x, *made, domain=CONTRIB, attributes=sizes)


def _rounded(place: _Place, x: Any, name: str, weight: Weight, inputs: ActivationFormat) -> Any:
    """x rounded to INT8 by a fixed scale, and decoded again."""
    entry = input_scale(weight.entry)
    assert entry is not None
    stored = weight.reader.read(entry.name).dequantize().numpy().reshape(())
    scale = place.tensor(f"{name}.input_scale", "FLOAT", (), lambda: stored)
    zero = place.tensor("int8_zero", "INT8", (), lambda: np.zeros((), np.int8))
    return place.op("DequantizeLinear", place.op("QuantizeLinear", x, scale, zero), scale, zero)


def _product(place: _Place, x: Any, name: str, weight: Weight, plan: Layout, inputs: ActivationFormat) -> Any:
    """A product of integers, the input's scale measured as the graph runs."""
    rows, columns = weight.entry.shape
    shape = () if plan.group == "tensor" else (rows,)
    codes = place.tensor(f"{name}.codes", plan.dtype, (columns, rows), lambda: _transposed(integers(weight).codes))
    scale = place.tensor(f"{name}.scale", "FLOAT", shape, lambda: _params(weight, "scale", shape))
    key = f"{x.name} as {inputs.name}"
    q, step = place.once(key, lambda: _measured(place, x, inputs))
    operands = [q, codes]
    if plan.zero:
        zero = place.tensor(f"{name}.zero", plan.dtype, shape, lambda: _params(weight, "zero", shape))
        operands += [place.tensor("int8_zero", "INT8", (), lambda: np.zeros((), np.int8)), zero]
    total = place.op("Cast", place.op("MatMulInteger", *operands), attributes={"to": FLOAT})
    return place.op("Mul", place.op("Mul", total, step), scale)


def _measured(place: _Place, x: Any, inputs: ActivationFormat) -> tuple[Any, Any]:
    """Codes of x, INT8, and their scale: [..., 1] of each token, or one number."""

    def number(name: str, value: float) -> Any:
        return place.tensor(name, "FLOAT", (), lambda: np.array(value, np.float32))

    magnitude = place.op("Abs", x)
    if inputs.scope == "token":
        axis = place.tensor("last_axis", "INT64", (1,), lambda: np.array([-1]))
        peak = place.op("ReduceMax", magnitude, axis, attributes={"keepdims": 1})
    else:
        peak = place.op("ReduceMax", magnitude, attributes={"keepdims": 0})
    step = place.op("Max", place.op("Div", peak, number("int8_highest", 127.0)), number("smallest_step", SMALLEST))
    rounded = place.op("Round", place.op("Div", x, step))
    clipped = place.op("Clip", rounded, number("int8_lowest", -128.0), number("int8_highest", 127.0))
    return place.op("Cast", clipped, attributes={"to": INT8}), step


def _embedding(place: _Place, ids: Any, name: str, weight: Weight, way: Way) -> Any:
    """Rows of a table, decoded after they were gathered."""
    plan, (rows, columns) = _wide(layout(name, weight.entry.format)), weight.entry.shape
    count = plan.groups(columns)
    keys = ("scale", "zero") if plan.zero else ("scale",)
    dtypes = {"scale": "FLOAT", "zero": plan.dtype}
    codes = place.tensor(
        f"{name}.codes", plan.dtype, (rows, columns), partial(_rows_of, weight, "codes", (rows, columns))
    )
    gathered = [place.op("Gather", codes, ids)]
    for key in keys:
        shape = () if plan.group == "tensor" else (rows, count)
        param = place.tensor(f"{name}.{key}", dtypes[key], shape, partial(_rows_of, weight, key, shape))
        gathered.append(place.op("Gather", param, ids) if shape else param)
    group = plan.group if isinstance(plan.group, int) else columns
    blocks = {} if plan.group == "tensor" else {"axis": -1, "block_size": group}
    return place.op("DequantizeLinear", *gathered, attributes=blocks)


def _rows_of(weight: Weight, key: str, shape: tuple[int, ...]) -> Array:
    """Codes, [N, K], or a param, [N, G] or one number."""
    found: Array = getattr(integers(weight), key).numpy().reshape(shape)
    return found


def _wide(plan: Layout) -> Layout:
    """The same with a byte for each code."""
    return Layout(8, plan.signed, plan.zero, plan.group, plan.first, plan.step, plan.lowest)
