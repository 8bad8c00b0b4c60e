"""SignRound: gradients by differences and by hand, the block's error only falls, codes are those it measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from format_checks import same, weights
from training import draw, mlp

from fewbits.errors import FormatError, UnsupportedError
from fewbits.formats import FORMATS, Affine, Format, Grouped, QTensor, format_named
from fewbits.methods import METHODS, Block
from fewbits.methods._windows import batches
from fewbits.methods.fake_quant import Rescaling, Rounding
from fewbits.methods.gptq import GPTQ
from fewbits.methods.products import product_type
from fewbits.methods.rtn import RoundToNearest
from fewbits.methods.signround import Descent, SignRound
from fewbits.stats import InputStatistics

FAMILIES = list({type(f): f for f in FORMATS.values() if isinstance(f, Grouped)}.values())
RTN = RoundToNearest()
QUICK = SignRound(steps=20, batch=3, start=RTN)


def nearest(w: torch.Tensor, format: Format) -> QTensor:
    return RTN.quantize(w, format, {})


def error(block: Block, solved: dict[str, QTensor]) -> float:
    """Mean squared error of the block's outputs with these matrices, over all windows."""
    x, target = torch.stack(list(block.inputs)), torch.stack(list(block.targets))
    return float((block.run(x, {name: q.dequantize() for name, q in solved.items()}) - target).square().mean())


@pytest.mark.parametrize("format", FAMILIES, ids=str)
def test_it_starts_at_the_codes_it_is_given(format: Grouped) -> None:
    w = weights(6, 256)
    start = nearest(w, format)
    rounding = Rounding(w, start)
    assert torch.equal(rounding.weights(), start.dequantize())
    assert torch.equal(rounding.tensor(rounding.choice).codes, start.codes)
    assert same(rounding.choice.params, start.params)


@pytest.mark.parametrize("format", FAMILIES, ids=str)
def test_codes_that_are_not_the_nearest_are_kept_as_a_start(format: Grouped) -> None:
    w = weights(6, 256)
    other = QTensor(format, format.round(1.3 * w.flip(0), (p := nearest(w, format).params)), p)
    assert torch.equal(Rounding(w, other).weights(), other.dequantize())


@pytest.mark.parametrize("format", FAMILIES, ids=str)
def test_the_longest_shift_moves_to_the_neighbouring_level_and_no_further(format: Grouped) -> None:
    w, levels = weights(6, 256), format.levels
    assert levels is not None
    start = nearest(w, format)
    rounding = Rounding(w, start)
    rounding.descend(-torch.ones_like(w), rate=1.0, scale_rate=0.0)
    moved = rounding.weights() - start.dequantize()
    assert float(moved.min()) >= 0
    widest = float(levels.diff().max()) / float(levels[-1] - levels[0])
    span = format.decode(start.codes, start.params)
    assert float(moved.max()) <= 2.01 * widest * 2 * float(span.abs().max())
    inside = (w > start.dequantize()) & (w < span.max())
    assert (moved > 0)[inside].float().mean() > 0.5 or len(levels) == 2


def test_a_shift_by_hand() -> None:
    """Levels −2 … 1 at scale 0.5; a weight of 0.2 lies on level 0 (0.4 levels up) and 0.1 more brings it to level 1."""
    format = Affine(bits=2, group="row")
    w = torch.tensor([[0.2, -0.2, 0.5, -1.0]])
    start = QTensor(format, torch.tensor([[0, 0, 1, -2]], dtype=torch.int8), {"scale": torch.tensor([[0.5]])})
    rounding = Rounding(w, start)
    rounding.descend(torch.tensor([[-1.0, -1.0, 1.0, 0.0]]), rate=0.11, scale_rate=0.0)
    assert rounding.weights().tolist() == [[0.5, 0.0, 0.5, -1.0]]
    rounding.descend(torch.tensor([[0.0, 9.0, 0.0, 0.0]]), rate=0.22, scale_rate=0.0)
    assert rounding.weights().tolist() == [[0.5, -0.5, 0.5, -1.0]]


@pytest.mark.parametrize(
    "name", ["int4-g32", "int3-asym-g16", "nf4", "fp8-e4m3", "ternary-g64", "q4_0", "q4_1", "q4_k", "iq4_xs"]
)
def test_the_slope_of_a_scale_at_fixed_codes_is_the_derivative(name: str) -> None:
    """Σ g·ŵ over a group against the difference of g·ŵ between two scales near the start, at the same codes."""
    format = format_named(name)
    assert isinstance(format, Grouped)
    w, g = weights(4, 256), draw(4, 256, seed=7)
    start = nearest(w, format)
    rescaling = Rescaling(start)
    rescaling.weights()
    step, values = 1 / 64, []
    for factor in (1 + step, 1 - step):
        params = format.rescaled(start.params, torch.full_like(format.scale_at(start.params), factor))
        values.append(format.grouped(format.decode(start.codes, params) * g).sum(-1))
    found = rescaling.slope(g)
    # Scales of 16 bits are half a unit off, 2⁻¹¹ or, of subnormal ones, 2⁻²⁵ in all; so are offsets stored apart.
    least = min(float(p.abs().min()) for key, p in start.params.items() if key in ("factor", "minimum_factor", "scale"))
    unit = max(2**-11, 2**-25 / least)
    stored_apart = start.params.keys() & {"offset", "minimum_factor"}
    offset = format.offset_at(start.params).unsqueeze(-1) if stored_apart else torch.zeros(())
    parts = (format.grouped(start.dequantize()) - offset).abs() + offset.abs()
    size = (parts * format.grouped(g).abs()).sum(-1)
    assert torch.all(((values[0] - values[1]) / (2 * step) - found).abs() <= size * unit / step)


@pytest.mark.parametrize("name", ["int4", "int3-asym", "nf4"])
def test_the_slope_of_a_scale_is_the_derivative_of_many_roundings(name: str) -> None:
    """Rounding a fine ramp of weights: in the mean over it, ŵ follows w inside the range and the scale outside of it.

    So the straight-through derivative of Σ g·ŵ is the real one, up to the weights that one step of the scale moves over
    an edge of their cell: less than a level's width of the ramp at every one of the levels.
    """
    format = format_named(name)
    assert isinstance(format, Grouped)
    wide = replace(format, group="row") if name == "nf4" else format
    w = torch.linspace(-1, 1, 1 << 16)[None]
    params = wide.fit(0.8 * w)
    start = QTensor(wide, wide.round(w, params), params)
    rounding = Rounding(w, start)
    rounding.weights()
    step = 1 / 64
    near = [wide.rescaled(params, torch.full_like(params["scale"], f)) for f in (1 + step, 1 - step)]
    sums = [float(wide.decode(wide.round(w, p), p).abs().sum()) for p in near]
    difference = (sums[0] - sums[1]) / (2 * step)
    assert abs(float(rounding.slope(w.sign())) / difference - 1) < 0.05


def test_scales_move_against_the_slope_and_stay_storable() -> None:
    format = format_named("int4-g32-bf16")
    assert isinstance(format, Grouped)
    w = weights(4, 64)
    start = nearest(w, format)
    rounding = Rounding(w, start)
    rounding.weights()
    slope = format.ungrouped(rounding._moving(), start.shape)  # so that every group's is a sum of squares
    rounding.descend(slope, rate=0.0, scale_rate=0.1)
    rounding.weights()
    scale = rounding.choice.params["scale"]
    assert torch.all((scale / start.params["scale"] - 0.9).abs() <= 2**-8)
    assert torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize("name", ["int4-g32", "int3-g32", "int2-g16", "int2-asym-g32", "nf4", "q4_1", "nvfp4"])
def test_a_block_returns_more_nearly_what_it_should(name: str) -> None:
    block = mlp(drift=0.05)
    plan = dict.fromkeys(block.slots, format_named(name))
    before = {key: p.clone() for key, p in block.parameters.items()}
    start = RTN.quantize_block(block, plan, {})
    solved = QUICK.quantize_block(block, plan, {})
    assert error(block, solved) < 0.9 * error(block, start)
    assert all(torch.equal(p, before[key]) for key, p in block.parameters.items())


def test_from_gptq_it_goes_on() -> None:
    block = mlp()
    plan = dict.fromkeys(block.slots, format_named("int3-g32"))
    stats = {}
    for name in block.slots:
        seen = InputStatistics(frozenset(GPTQ.needs))
        seen.add(draw(400, block.matrix(name).shape[-1], seed=8))
        stats[name] = seen.values()
    start, solved = (m.quantize_block(block, plan, stats) for m in (GPTQ(), replace(QUICK, start=GPTQ())))
    assert error(block, solved) < error(block, start)


def test_a_step_too_long_changes_nothing() -> None:
    """Where no step is better than the start, the start is the result."""
    block = mlp()
    plan = dict.fromkeys(block.slots, format_named("int8-g32"))
    wild = SignRound(steps=3, batch=2, rate=3.0, scale_rate=3.0, start=RTN)
    start, solved = RTN.quantize_block(block, plan, {}), wild.quantize_block(block, plan, {})
    assert error(block, solved) <= error(block, start)


def test_what_is_kept_is_what_was_measured() -> None:
    """The error of the tensors that come out is the one that the descent saw with their codes, bit for bit."""
    block = mlp()
    format = format_named("int2-g32")
    roundings = {name: Rounding(block.matrix(name), nearest(block.matrix(name), format)) for name in block.slots}
    descent = Descent(block, roundings, torch.float32)
    for _ in range(3):
        seen = descent.step([0, 1], 0.1, 0.01)
    found = {name: r.tensor(descent.last[name]).dequantize() for name, r in roundings.items()}
    x, target = (block.batch(kept, [0, 1]) for kept in (block.inputs, block.targets))
    assert torch.equal((block.run(x, found) - target).square().mean((1, 2)), seen)


def test_the_same_twice_and_another_seed() -> None:
    block = mlp()
    plan = dict.fromkeys(block.slots, format_named("int3-g32"))
    runs = [SignRound(steps=20, batch=2, start=RTN, seed=seed).quantize_block(block, plan, {}) for seed in (0, 0, 1)]
    assert all(torch.equal(runs[0][name].codes, runs[1][name].codes) for name in plan)
    assert not all(torch.equal(runs[0][name].codes, runs[2][name].codes) for name in plan)


def test_every_window_has_its_turn() -> None:
    order = batches(5, 2, seed=0)
    drawn = [i for _ in range(5) for i in next(order)]
    assert sorted(drawn) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert next(batches(3, 0, seed=0)) != []
    assert len(next(batches(3, 9, seed=0))) == 3


def test_formats_that_cannot_be_trained() -> None:
    block = mlp()
    kept = QUICK.quantize_block(block, dict.fromkeys(block.slots, format_named("bf16")), {})
    assert torch.equal(kept["up"].dequantize(), block.matrix("up").bfloat16().float())
    with pytest.raises(UnsupportedError, match="bf16: its numbers are not levels times a scale"):
        Rounding(block.matrix("up"), kept["up"])


def test_a_block_that_cannot_be_run_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="runs each block on calibration text"):
        QUICK.quantize_block(Block.of({"w": weights(4, 64)}), {"w": format_named("int4-g32")}, {})
    with pytest.raises(FormatError, match="NaN or Inf"):
        QUICK.quantize_block(Block.of({"w": weights(4, 64) / 0}), {"w": format_named("int4-g32")}, {})


def test_fine_formats_are_multiplied_in_float32() -> None:
    cpu = torch.device("cpu")
    assert product_type([format_named("int8")], cpu) == torch.float32
    assert product_type([format_named("int4-g128"), format_named("fp8-e4m3")], cpu) == torch.float32
    fast = any(torch.cpu.get_capabilities().get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
    assert product_type([format_named("int4-g128")], cpu) == (torch.bfloat16 if fast else torch.float32)


def test_it_is_registered() -> None:
    assert isinstance(METHODS["signround"], SignRound)
    assert METHODS["signround"].calibrated
