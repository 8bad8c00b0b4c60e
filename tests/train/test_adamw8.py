"""AdamW in 8 bits: its levels by hand, its steps against torch's AdamW, its state saved and taken up again."""

from __future__ import annotations

import pytest
import torch

from fewbits.train.adamw8 import BLOCK, MEAN, SMALL, SQUARE, AdamW8bit, levels


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_levels_by_hand() -> None:
    """The decade of 1e-6 has one level with a sign, at 0.55e-6; the next two, the middles of (0.1, 0.55, 1)·1e-5."""
    signed, unsigned = levels(signed=True), levels(signed=False)
    assert len(signed) == len(unsigned) == 256
    assert len(signed.unique()) == len(unsigned.unique()) == 256
    assert signed[127].item() == 0
    assert signed[128:131].tolist() == pytest.approx([0.55e-6, 3.25e-6, 7.75e-6])
    assert torch.equal(signed[:127], -signed[128:255].flip(0))
    assert unsigned[:3].tolist() == pytest.approx([0, 0.325e-6, 0.775e-6])
    assert signed[255].item() == unsigned[255].item() == 1


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_a_round_trip(count: int) -> None:
    """The error is at most half the widest gap, of the top decade: 0.9 / 64 / 2 with a sign, 0.9 / 128 / 2 without."""
    numbers = draw(count, seed=1) * torch.logspace(-5, 0, count)
    for blocks, values, gap in ((MEAN, numbers, 0.9 / 64), (SQUARE, numbers.square(), 0.9 / 128)):
        codes, scales = blocks.round(values)
        assert (codes.dtype, codes.shape, len(scales)) == (torch.uint8, values.shape, -(-count // BLOCK))
        most = scales.repeat_interleave(BLOCK)[:count]
        assert bool(((blocks.decode(codes, scales) - values).abs() <= most * (gap / 2) * (1 + 1e-5)).all())
        again = blocks.round(blocks.decode(codes, scales))
        assert torch.equal(again[0], codes)


def test_a_square_is_never_rounded_to_nothing() -> None:
    numbers = torch.tensor([1.0, 1e-30, 0.0])
    codes, scales = SQUARE.round(numbers)
    assert (SQUARE.decode(codes, scales) > 0).tolist() == [True, True, False]
    assert SQUARE.decode(*SQUARE.round(torch.zeros(5))).tolist() == [0.0] * 5


def test_small_parameters_step_as_torchs() -> None:
    mine, theirs = (torch.nn.Parameter(draw(8, 9, seed=2)) for _ in range(2))
    ours = AdamW8bit([mine], lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    torchs = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    for seed in range(5):
        mine.grad = draw(8, 9, seed=seed)
        theirs.grad = mine.grad.clone()
        ours.step()
        torchs.step()
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_large_ones_come_to_the_same_place() -> None:
    """A regression: both end near the noise, whose power is 0.01."""
    x, truth = draw(512, 80, seed=3), draw(64, 80, seed=4)
    y = x @ truth.T + 0.1 * draw(512, 64, seed=5)
    losses = []
    for kind in (AdamW8bit, torch.optim.AdamW):
        w = torch.nn.Parameter(torch.zeros(64, 80))
        assert w.numel() > SMALL
        optimizer = kind([w], lr=0.05, weight_decay=0.0)  # type: ignore[call-arg,operator]
        for _ in range(200):
            optimizer.zero_grad()
            loss = (x @ w.T - y).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 1.1 * losses[1]
    assert losses[1] < 0.02


def test_a_saved_state_goes_on_to_the_same_bits() -> None:
    def run(split: bool) -> torch.Tensor:
        w = torch.nn.Parameter(draw(100, 60, seed=6))
        optimizer = AdamW8bit([w], lr=0.01)
        for seed in range(6):
            if split and seed == 3:
                saved = optimizer.state_dict()
                optimizer = AdamW8bit([w], lr=0.01)
                optimizer.load_state_dict(saved)
                assert optimizer.state[w]["mean_codes"].dtype == torch.uint8
            w.grad = draw(100, 60, seed=seed)
            optimizer.step()
        state = optimizer.state[w]
        held = sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))
        assert held < 0.26 * 8 * w.numel()  # of two moments in FP32: two bytes, and a scale for 256 of each
        return w.detach()

    assert torch.equal(run(split=False), run(split=True))
