"""LoRA on quantized layers: PEFT takes them, gradients are those of the decoded model, nothing is merged in silence."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint

import fewbits
from fewbits.errors import UnsupportedError
from fewbits.formats import FORMATS, QTensor
from fewbits.kernels import Packed, linear
from fewbits.nn import PackedWeight, QuantizedLinear
from fewbits.train.lora import LoraQuantizedLinear, adapted, linear_layers, register, start_at_residual

TINY = Path(fewbits.__file__).parent / "bundled" / "tiny"
IDS = torch.arange(40, 80).view(2, 20)
UNIT = 2.0**-24


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "nf4"
    fewbits.quantize(TINY, out, format="nf4-dq", kind="fewbits", prove=False)
    return out


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["nf4-dq", "int4-g32", "q4_k", "int8-tensor", "fp8-e4m3"])
def test_the_way_back_through_a_packed_weight(name: str) -> None:
    format, w = FORMATS.get(name, FORMATS["int8"]), 0.02 * draw(300, 256, seed=1)
    codes, params = format.plain(w)
    q = QTensor(format, codes, params)
    x, bias, slope = draw(2, 5, 256, seed=2), draw(300, seed=3), draw(2, 5, 300, seed=4)
    x.requires_grad_(True)
    y = linear(x, Packed.of(q), bias)
    with torch.no_grad():
        assert (
            torch.equal(y, linear(x, Packed.of(q), bias))
            or float((y - linear(x, Packed.of(q), bias)).abs().max()) < 1e-5
        )
    (y * slope).sum().backward()
    expected = slope.double() @ q.dequantize().double()
    size = slope.abs().double() @ q.dequantize().abs().double()
    assert x.grad is not None
    assert bool(((x.grad - expected).abs() <= 300 * UNIT * size).all())  # sums of 300 in float32


def test_large_weights_are_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["fewbits.kernels.linear"]
    w = 0.02 * draw(50, 64, seed=1)
    codes, params = FORMATS["int4-g32"].plain(w)
    weight = Packed.of(QTensor(FORMATS["int4-g32"], codes, params))
    found = []
    for together, block in ((1 << 22, 1 << 18), (20 * 64, 7 * 64), (64, 64)):
        monkeypatch.setattr(module, "TOGETHER", together)
        monkeypatch.setattr(module, "BLOCK", block)
        monkeypatch.setattr(sys.modules["fewbits.kernels.decode"], "BLOCK", block)
        x = draw(3, 64, seed=2).requires_grad_(True)
        y = linear(x, weight)
        y.sum().backward()
        found.append((y.detach(), x.grad))
    for y, slope in found[1:]:
        assert slope is not None
        assert found[0][1] is not None
        assert float((y - found[0][0]).abs().max()) < 1e-5
        assert float((slope - found[0][1]).abs().max()) < 1e-5


def test_a_packed_weight_is_not_kept_decoded() -> None:
    """What the way back needs is the bytes: no float tensor of the matrix's size is saved."""
    format, w = FORMATS["nf4"], 0.02 * draw(512, 512, seed=1)
    codes, params = format.plain(w)
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    x = draw(3, 512, seed=2).requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear(x, Packed.of(QTensor(format, codes, params)))
    assert all(count < w.numel() for count in saved)


def test_peft_takes_a_quantized_model(quantized: Path, tmp_path: Path) -> None:
    """`get_peft_model` itself; what is saved and loaded again gives the same predictions."""
    register()
    model = fewbits.load(quantized)
    layers = linear_layers(model)
    found = get_peft_model(model, LoraConfig(r=4, target_modules=layers, task_type="CAUSAL_LM"))
    wrapped = [m for m in found.modules() if isinstance(m, LoraQuantizedLinear)]
    assert len(wrapped) == len(layers)
    with torch.no_grad():
        for module in wrapped:
            module.lora_B["default"].weight.copy_(0.02 * draw(*module.lora_B["default"].weight.shape, seed=5))
        expected = found(input_ids=IDS).logits
    found.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(fewbits.load(quantized), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, expected)


def test_gradients_are_those_of_the_decoded_model(quantized: Path) -> None:
    found = []
    for packed in (True, False):
        torch.manual_seed(0)
        model = fewbits.load(quantized, packed=packed)
        config = LoraConfig(
            r=4, target_modules=linear_layers(model), task_type="CAUSAL_LM", init_lora_weights="gaussian"
        )
        whole = adapted(model, config, "tiny")
        with torch.no_grad():
            for i, p in enumerate(p for p in whole.parameters() if p.requires_grad):
                p.copy_(0.05 * draw(*p.shape, seed=i))
        whole(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in whole.named_parameters() if p.requires_grad})
    packed_slopes, decoded_slopes = found
    assert packed_slopes.keys() == decoded_slopes.keys()
    assert len(packed_slopes) > 0
    for name, slope in decoded_slopes.items():
        assert slope is not None
        assert float((packed_slopes[name] - slope).abs().max()) <= 1e-3 * float(slope.abs().max()), name


def layer_with(**options: Any) -> LoraQuantizedLinear:
    """An NF4 layer [48, 64] whose adapters, `default` and what `also` names, are not zero."""
    also = options.pop("also", ())
    format = FORMATS["nf4"]
    codes, params = format.plain(0.02 * draw(48, 64, seed=1))
    base = QuantizedLinear(PackedWeight.of(QTensor(format, codes, params)), draw(48, seed=2))
    config = LoraConfig(r=8, lora_alpha=12, **options)
    layer = LoraQuantizedLinear(base, "default", config=config, r=8, lora_alpha=12)
    for name in also:
        layer.update_layer(name, 8, 12, config=config)
    layer.set_adapter(["default", *also])
    for i, parameter in enumerate(p for p in layer.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    return layer


def way(layer: LoraQuantizedLinear, x: torch.Tensor, *, ours: bool) -> list[torch.Tensor]:
    """The output of the layer, its slopes by x (where it has one) and by what is trained."""
    x = x.detach().requires_grad_(x.requires_grad)
    layer.zero_grad()
    y = layer(x) if ours else super(LoraQuantizedLinear, layer).forward(x)
    y.float().mul(draw(*y.shape, seed=9)).sum().backward()
    slopes = [x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    return [y.detach(), *(slope for slope in slopes if slope is not None)]


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("slope_by_x", [False, True])
def test_a_plain_adapter_is_pefts_in_fewer_operations(
    monkeypatch: pytest.MonkeyPatch, lower: bool, slope_by_x: bool
) -> None:
    layer, x = layer_with(), draw(2, 40, 64, seed=3).requires_grad_(slope_by_x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower):
        expected = way(layer, x, ours=False)
        monkeypatch.setattr(layer.lora_A["default"], "forward", lambda _: pytest.fail("PEFT's way was taken"))
        found = way(layer, x, ours=True)
    assert len(found) == len(expected) == 3 + slope_by_x
    unit = 2.0**-7 if lower else 80 * UNIT  # four roundings of BF16 on the way; sums of 80 in float32
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).float().norm()) <= unit * float(theirs.float().norm())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower):
        assert float((layer(x) - expected[0]).float().norm()) <= unit * float(expected[0].float().norm())


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.5}, {"lora_bias": True}, {"also": ("second",)}, {"use_dora": True}]
)
def test_other_adapters_are_pefts_own(options: dict[str, Any]) -> None:
    layer, x = layer_with(**options), draw(2, 5, 64, seed=3)
    torch.manual_seed(0)
    expected = super(LoraQuantizedLinear, layer).forward(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), expected)
    assert float((expected - layer.base_layer(x)).detach().abs().max()) > 0.01


def test_adapters_can_be_switched_off_and_mixed() -> None:
    layer, x = layer_with(), draw(2, 5, 64, seed=3)
    mixed = layer(x, adapter_names=["__base__", "default"])
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(mixed[0], layer.base_layer(x)[0])
    assert not torch.equal(mixed[1], layer.base_layer(x)[1])


def test_an_adapter_in_float32_beside_16_bits_is_not_rounded() -> None:
    """PEFT multiplies A and B in their own type where no autocast says otherwise."""
    layer, x = layer_with(), draw(2, 5, 64, seed=3).bfloat16()
    layer.base_layer.bfloat16()
    assert torch.equal(layer(x), super(LoraQuantizedLinear, layer).forward(x))


def test_layers_of_another_kind_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that shards A and B gathers them when they are called."""

    class Sharded(torch.nn.Linear):
        pass

    layer, called = layer_with(), []
    sharded = Sharded(64, 8, bias=False)
    layer.lora_A["default"] = sharded
    sharded.register_forward_hook(lambda *_: called.append(True))
    layer(draw(2, 5, 64, seed=3))
    assert called


def test_checkpointing_changes_nothing() -> None:
    layer, x = layer_with(), draw(2, 5, 64, seed=3).requires_grad_(True)
    expected = way(layer, x, ours=True)
    layer.zero_grad()
    y = checkpoint(layer, x, use_reentrant=False)
    y.mul(draw(*y.shape, seed=9)).sum().backward()
    found = [y, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    for ours, other in zip(found, expected, strict=True):
        assert torch.equal(ours, other)


def test_merging_is_refused(quantized: Path) -> None:
    model = fewbits.load(quantized)
    whole = adapted(model, LoraConfig(r=4, target_modules=linear_layers(model), task_type="CAUSAL_LM"), "tiny")
    before = copy.deepcopy(whole.state_dict())
    with pytest.raises(UnsupportedError, match="cannot be merged into a packed weight"):
        whole.merge_and_unload()
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())


def test_it_begins_at_what_the_format_lost() -> None:
    w = 0.02 * draw(96, 64, seed=7)
    codes, params = FORMATS["int2-g32"].plain(w)
    layer = QuantizedLinear(PackedWeight.of(QTensor(FORMATS["int2-g32"], codes, params)))
    model = torch.nn.Module()
    model.layer = layer
    module = LoraQuantizedLinear(layer, "default", config=LoraConfig(r=8, lora_alpha=4), r=8, lora_alpha=4)
    model.layer = module
    start_at_residual(model, lambda name: w)  # type: ignore[arg-type]
    lost = w - layer.weight
    u, s, v = torch.linalg.svd(lost.double())
    best = (u[:, :8] * s[:8]) @ v[:8]
    assert float((module.get_delta_weight("default").detach() - best).norm()) < 1e-4 * float(best.norm())
