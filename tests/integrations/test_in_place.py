"""Torch modules quantized in place: which layers, what they compute, what is refused before anything changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.errors import FormatError, UnsupportedError
from fewbits.methods import quantize_tensor
from fewbits.nn import QuantizedEmbedding, QuantizedLinear


class Tied(nn.Module):
    """An embedding, two layers and a projection that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 64)
        self.body = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False))
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids)))


IDS = torch.arange(20).view(2, 10)


@torch.no_grad()
def decoded(module: nn.Module, formats: dict[str, str]) -> nn.Module:
    """A copy with these layers' weights rounded by torch's own means: the numbers of the format, in float32."""
    made = copy.deepcopy(module)
    for name, format in formats.items():
        w = made.get_submodule(name).weight
        w.copy_(quantize_tensor(w.detach().clone(), format).dequantize())
    return made


def test_a_format_is_for_every_linear_layer():
    module = Tied()
    expected = decoded(module.body, {"0": "int4-g32", "2": "int4-g32"})
    reports = fewbits.quantize_(module, "int4-g32")
    assert isinstance(module.body[0], QuantizedLinear)
    assert isinstance(module.head, QuantizedLinear)
    assert isinstance(module.embed, nn.Embedding)
    x = torch.randn(3, 64)
    assert torch.allclose(module.body(x), expected(x), atol=1e-5)  # a module in training multiplies by decoded weights
    by_name = {report.name: report for report in reports}
    assert by_name["body.0.weight"].fate == "quantized"
    assert by_name["body.0.weight"].nbytes == 96 * 64 // 2 + 96 * 2 * 2  # codes, and two scales of FP16 a row
    assert by_name["embed.weight"].fate == "kept"
    assert by_name["embed.weight"].reason == "an embedding; give a function to quantize it"


def test_errors_are_those_of_the_numbers():
    module = Tied()
    w = module.body[2].weight.detach().clone()
    (report,) = [r for r in fewbits.quantize_(module, "int3-g32", method="rtn-plain") if r.name == "body.2.weight"]
    assert report.error == pytest.approx(float((module.body[2].weight - w).norm() / w.norm()), rel=1e-4)
    assert report.method == "rtn-plain"


def test_a_function_chooses_and_what_is_shared_stays_shared():
    module = Tied()
    chosen = {"body.0": "nf4", "embed": "int8", "head": "int8"}
    expected = decoded(module, {"body.0": "nf4", "embed": "int8"})
    asked: list[str] = []

    def choose(name: str, layer: nn.Module) -> str | None:
        assert isinstance(layer, nn.Linear | nn.Embedding)
        asked.append(name)
        return chosen.get(name)

    fewbits.quantize_(module, choose)
    assert asked == ["embed", "body.0", "body.2", "head"]
    assert isinstance(module.embed, QuantizedEmbedding)
    assert module.embed.store is module.head.store
    assert type(module.body[2]) is nn.Linear
    assert torch.allclose(module(IDS), expected(IDS), atol=1e-5)


def test_a_state_dict_goes_into_another_module_quantized_alike():
    module, other = Tied(), Tied()
    fewbits.quantize_(module, "nf4-dq")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    fewbits.quantize_(other, "nf4-dq")
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(IDS), other(IDS))
    with torch.no_grad():  # out of tiles it is the same
        module.eval()(IDS)
    assert all(torch.equal(a, module.state_dict()[name]) for name, a in other.state_dict().items())


def test_a_layer_that_stands_in_two_places():
    shared = nn.Linear(32, 32)
    module = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(32, 8)})
    fewbits.quantize_(module, "int8")
    assert module["a"].store is module["b"].store
    assert module["a"].bias is module["b"].bias


def test_layers_of_a_subclass_are_kept_and_named():
    module = nn.MultiheadAttention(32, 4)
    module.register_module("more", nn.Linear(32, 32))
    reports = {report.name: report for report in fewbits.quantize_(module, "int8")}
    assert reports["out_proj.weight"].reason.startswith("a NonDynamicallyQuantizableLinear")
    assert reports["more.weight"].fate == "quantized"
    with pytest.raises(UnsupportedError, match="out_proj, a NonDynamicallyQuantizableLinear, cannot be swapped"):
        fewbits.quantize_(nn.MultiheadAttention(32, 4), lambda name, layer: "int8")


@pytest.mark.parametrize(
    ("format", "error", "message"),
    [
        ("int4-g33", FormatError, "'int4-g33' is not known"),
        (lambda name, layer: "int44" if name == "head" else "int8", FormatError, "'int44' is not known"),
        ("bf16", UnsupportedError, "floating-point type"),
        ("q4_k", FormatError, "body.0"),
        (lambda name, layer: {"embed": "int8", "head": "int4-g32"}.get(name), UnsupportedError, "share a weight"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(format, error, message):
    module = Tied()
    with pytest.raises(error, match=message):
        fewbits.quantize_(module, format)
    assert not [m for m in module.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]


def test_a_layer_alone_cannot_be_swapped_in_place():
    with pytest.raises(UnsupportedError, match="the module itself cannot be swapped"):
        fewbits.quantize_(nn.Linear(32, 32), "int8")


def test_nan_is_named():
    module = Tied()
    with torch.no_grad():
        module.body[2].weight[3, 4] = math.nan
    with pytest.raises(FormatError, match=r"body\.2: .*1 of"):
        fewbits.quantize_(module, "int8")


def test_methods_that_need_a_text_are_refused():
    with pytest.raises(UnsupportedError, match="method gptq needs a text"):
        fewbits.quantize_(Tied(), "int4-g32", method="gptq")


@settings(max_examples=30, deadline=None)
@given(
    format=st.sampled_from(
        ["int4-g32", "int8", "int2-asym-g16", "nf4", "nf4-dq", "fp8-e4m3", "ternary-g64", "int4-tensor"]
    ),
    rows=st.integers(1, 40),
    columns=st.integers(1, 5).map(lambda n: 32 * n),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_slabs_make_what_the_whole_makes(format, rows, columns, dtype):
    """The same bytes as the method makes of the whole matrix at once, whatever the slabs, in every type."""
    module = nn.Sequential(nn.Linear(columns, rows, dtype=dtype))
    w = module[0].weight.detach().clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.integrations.rounding.SLAB", 3 * columns)
        fewbits.quantize_(module, format)
    whole = quantize_tensor(w, module[0].store.format).pack()
    packed = module[0].store.view().arrays
    assert whole.keys() == packed.keys()
    assert all(torch.equal(whole[name].view(torch.uint8), packed[name].view(torch.uint8)) for name in whole)
    assert module[0].weight.dtype == dtype
