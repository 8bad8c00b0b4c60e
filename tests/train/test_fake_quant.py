"""Fake quantizers of every format: what the file holds is what was trained, and gradients are what is claimed."""

from __future__ import annotations

import pytest
import torch
from format_checks import allows, weights, width
from torch import Tensor

from fewbits.errors import UnsupportedError
from fewbits.formats import ACTIVATIONS, FORMATS, Format, Grouped, QTensor
from fewbits.methods.fake_quant import ends, per_number
from fewbits.train import FakeInputs, FakeQuantizer

TRAINED = [name for name, format in FORMATS.items() if isinstance(format, Grouped) and format.levels is not None]
STEP = 1e-3


def matrix(format: Format, rows: int = 6, columns: int = 70) -> Tensor:
    columns = width(format, columns)
    return weights(rows, columns if allows(format, (rows, columns)) else 256, seed=3)


def quantizer(name: str) -> tuple[FakeQuantizer, Tensor]:
    format = FORMATS[name]
    w = matrix(format)
    codes, params = format.plain(w)
    return FakeQuantizer(w, QTensor(format, codes, params)), w


def moved(found: FakeQuantizer, by: float) -> FakeQuantizer:
    """Some way into a training: weights and scales are others."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        found.latent += by * torch.randn(found.latent.shape, generator=generator)
        if found.change is not None:
            found.change += 0.1 * by * torch.randn(found.change.shape, generator=generator)
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_it_begins_as_what_it_is_given(name: str) -> None:
    """Also where the given codes are not the nearest ones, as GPTQ's are not."""
    format = FORMATS[name]
    assert isinstance(format, Grouped)
    w = matrix(format)
    codes, params = format.plain(w + 0.3 * w.abs().mean() * torch.randn_like(w))
    start = QTensor(format, codes, params)
    found = FakeQuantizer(w, start)
    assert torch.equal(found(), start.dequantize())
    assert torch.equal(found.tensor().dequantize(), start.dequantize())


@pytest.mark.parametrize("name", TRAINED)
def test_what_the_file_holds_is_what_was_trained(name: str) -> None:
    found, _ = quantizer(name)
    q = moved(found, 0.5).tensor()
    again = QTensor.from_arrays(q.format, q.pack(), q.shape)
    assert torch.equal(again.dequantize(), found())


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_those_of_the_surrogate(name: str) -> None:
    """Against central differences of w + s·r, with what rounding adds held fast, and of s·Q beyond the ends.

    Steps stay where a weight is on one side of its end, so the surrogate is linear in each and the differences are
    exact but for float64's rounding of float32 numbers.
    """
    found, _ = quantizer(name)
    moved(found, 0.5)
    slope = torch.randn(found().shape, generator=torch.Generator().manual_seed(2))
    (found() * slope).sum().backward()
    assert isinstance(found.format, Grouped)
    at = per_number(found.params())
    w, values = found.weights().double(), found.format.grouped(found().detach()).double()
    low, high = (end.double() for end in ends(found.format, at))
    inside = (w >= low) & (w <= high)
    weighed = found.format.grouped(slope).double()

    def surrogate(latent: Tensor, factor: Tensor) -> Tensor:
        """Numbers at other weights, and at scales `factor` times as large."""
        u = latent * found.get_buffer("unit").double()
        return torch.where(inside, u + factor * (values - w), factor * values)

    one = torch.ones_like(values)
    latent = found.latent.detach().double()
    by_weight = (surrogate(latent + STEP, one) - surrogate(latent - STEP, one)) / (2 * STEP) * weighed
    assert found.latent.grad is not None
    leads_back = ((w > high) & (weighed > 0)) | ((w < low) & (weighed < 0))
    expected = torch.where(leads_back, weighed * found.get_buffer("unit").double(), by_weight)
    scale = float(expected.abs().max())
    assert float((found.latent.grad - expected).abs().max()) <= 1e-5 * scale
    if found.change is None:
        return
    assert found.change.grad is not None
    by_scale = (surrogate(latent, one + STEP) - surrogate(latent, one - STEP)) / (2 * STEP) * weighed
    wanted = by_scale.sum(-1) / (1 + found.change.detach().double())
    magnitude = (weighed * values).abs().sum(-1)
    assert bool(((found.change.grad - wanted).abs() <= 1e-5 * magnitude + 1e-12).all())


def test_gradients_by_hand() -> None:
    """Ternary at scale 2: weights in the range pass their gradient, one beyond only where it leads back."""
    format = FORMATS["ternary"]
    start = QTensor(format, torch.tensor([[1, 0, 1, -1]], dtype=torch.int8), {"scale": torch.tensor([[2.0]])})
    found = FakeQuantizer(torch.tensor([[1.5, 0.5, 2.0, -2.0]]), start)
    with torch.no_grad():
        found.latent[0, 0, 2:] = torch.tensor([1.5, -1.5])  # 3 and −3, in units of the scale
    assert torch.equal(found(), torch.tensor([[2.0, 0.0, 2.0, -2.0]]))
    (found() * torch.tensor([[1.0, 1.0, -1.0, -1.0]])).sum().backward()
    assert found.latent.grad is not None
    assert found.change is not None
    assert found.change.grad is not None
    # In units of 2. The third is pushed further out, and stays; the fourth is pushed back into the range.
    assert found.latent.grad.flatten().tolist() == [2.0, 2.0, 0.0, -2.0]
    # 1·(2 − 1.5) + 1·(0 − 0.5) − 1·2 − 1·(−2)
    assert float(found.change.grad) == pytest.approx(0.0)


def test_formats_without_levels_are_refused() -> None:
    w = weights(4, 64)
    format = FORMATS["fp16"]
    with pytest.raises(UnsupportedError, match="levels times a scale"):
        FakeQuantizer(w, QTensor(format, w.half(), {}))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_rounded_inputs_and_their_gradients(name: str) -> None:
    format = ACTIVATIONS[name]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    scale = torch.tensor([float(x.abs().max()) / format.highest / 2]) if format.static else None
    found = FakeInputs(format, scale)
    x.requires_grad_(True)
    y = found(x)
    codes, used = format.quantize(x.detach(), scale)
    assert torch.equal(y, format.dequantize(codes, used))
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    (y * slope).sum().backward()
    assert x.grad is not None
    low, high = (128, 127) if format.element == "int8" else (448, 448)
    inside = (x.detach() >= -low * used) & (x.detach() <= high * used)
    assert torch.equal(x.grad, torch.where(inside, slope, 0.0) if format.static else slope)
    if found.change is None:
        return
    assert scale is not None
    assert found.change.grad is not None
    r = ((y - x) / scale).detach().double()

    def surrogate(factor: float) -> float:
        s = float(scale) * factor
        end = torch.where(x.detach() > 0, float(high), -float(low))
        numbers = torch.where(inside, x.detach() + s * r, end * s)
        return float((numbers * slope).sum())

    found_slope = (surrogate(1 + STEP) - surrogate(1 - STEP)) / (2 * STEP)
    assert float(found.change.grad) == pytest.approx(found_slope, rel=1e-4)
