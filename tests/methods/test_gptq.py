"""GPTQ against its own definition worked out another way, and on Hessians that are hard to factor."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fewbits.errors import FormatError, UnsupportedError
from fewbits.formats import Format, QTensor, format_named
from fewbits.methods import METHODS, Block, quantize_tensor
from fewbits.methods._hessian import BLOCK, PROBES, coefficients, factored, solving_order
from fewbits.methods.gptq import GPTQ, SHRINKING, _correction

N, K = 24, 96


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


W = normal(N, K) * 0.02
X = normal(512, K, seed=1) @ normal(K, K, seed=2)
H = hessian_of(X)
DAMPED = H + 0.01 * H.diagonal().median() * torch.eye(K)


def objective(q: QTensor, w: Tensor, h: Tensor) -> Tensor:
    """Squared error of every output, float64 [N]."""
    e = (q.dequantize() - w).double()
    return ((e @ h.double()) * e).sum(-1)


def solve(w: Tensor = W, h: Tensor = H, format: str = "int4-g32", **settings: float) -> QTensor:
    return GPTQ(**settings).quantize(w, format_named(format), {"hessian": h})  # type: ignore[arg-type]


def rounded(w: Tensor, h: Tensor, format: str) -> QTensor:
    return quantize_tensor(w, format, importance=h.diagonal())


def by_the_inverse(w: Tensor, h: Tensor, format: Format, scale: Tensor, order: Tensor) -> Tensor:
    """GPTQ as its paper has it (algorithm 1 without lazy batches): the inverse, an upper Cholesky factor of it, and
    every later column moved after each; float64. What the codes stand for, [N, K]."""
    h, w = h.double()[order][:, order], w.double()[:, order].clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    found = torch.empty_like(w)
    for j in range(w.shape[1]):
        params = {"scale": scale.double()}
        codes = (w[:, j : j + 1] / params["scale"]).round().clamp(-128, 127)
        found[:, j : j + 1] = codes * params["scale"]
        error = (w[:, j : j + 1] - found[:, j : j + 1]) / upper[j, j]
        w[:, j:] -= error @ upper[j : j + 1, j:]
    return found[:, order.argsort()]


def test_codes_are_those_of_the_papers_algorithm() -> None:
    """A rounding tie may fall either way in float32, so that a code here or there may be the neighbour."""
    q = solve(format="int8", sweeps=0)
    expected = by_the_inverse(W, DAMPED, q.format, q.params["scale"], solving_order(H.diagonal(), None))
    steps = ((q.dequantize() - expected) / q.params["scale"]).round()
    assert (steps == 0).double().mean() > 0.97
    assert torch.allclose(objective(q, W, H).sum(), objective_of(expected), rtol=0.01)


def objective_of(found: Tensor) -> Tensor:
    e = found - W.double()
    return ((e @ H.double()) * e).sum()


def test_columns_and_groups_come_in_falling_order() -> None:
    importance = torch.tensor([1.0, 5, 2, 2, 9, 1, 0, 30])
    assert solving_order(importance, None).tolist() == [7, 4, 1, 2, 3, 0, 5, 6]
    # Sums of the groups of three: 8, 12 and (ragged) 30.
    assert solving_order(importance, 3).tolist() == [7, 6, 4, 3, 5, 1, 2, 0]


@pytest.mark.parametrize("format", ["int4-g32", "int3-asym-g64", "int4", "ternary-g64", "nf4", "q4_1", "nvfp4"])
def test_every_sweep_lowers_the_error_of_every_row(format: str) -> None:
    """Of the damped objective, which is the one that is solved, in each row by itself."""
    errors = [objective(solve(format=format, sweeps=sweeps), W, DAMPED) for sweeps in (0, 1, 2, 3)]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-4)).all()
    assert errors[1].sum() < 0.97 * errors[0].sum()


def test_after_many_sweeps_no_single_code_can_be_better() -> None:
    q = solve(sweeps=40)
    e = W.double() - q.dequantize().double()
    slope = e @ DAMPED.double()
    scale = q.params["scale"].repeat_interleave(32, -1).double()
    for step in (-1, 1):
        allowed = (q.codes.int() + step).clamp(-8, 7) == q.codes.int() + step
        gain = 2 * step * scale * slope - scale.square() * DAMPED.diagonal()
        assert (gain[allowed] <= 1e-6 * float(objective(q, W, DAMPED).mean())).all()


def test_a_ragged_last_group() -> None:
    w, h = W[:, :75], H[:75, :75]
    q = solve(w, h)
    assert q.params["scale"].shape == (N, 3)
    assert objective(q, w, h).sum() < 0.7 * objective(rounded(w, h, "int4-g32"), w, h).sum()


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_rows_do_not_see_how_many_others_are_solved_with_them(rows: int) -> None:
    """To the last bit of FP32 scales, though a matrix product of few columns is summed in another order."""
    whole = solve(format="nf4-g32")
    parts = [solve(W[i : i + rows], format="nf4-g32") for i in range(0, N, rows)]
    assert torch.equal(torch.cat([q.params["scale"] for q in parts]), whole.params["scale"])
    assert torch.equal(torch.cat([q.codes for q in parts]), whole.codes)


def test_experts_are_solved_under_their_own_hessians() -> None:
    """One that saw no token is rounded; the others come out as they would alone."""
    w, h = torch.stack([W, W * 2, W.flip(0)]), torch.stack([H, torch.zeros_like(H), H.flip(0, 1)])
    for format in ("int4-g32", "int4-tensor", "nvfp4", "nf4-dq"):
        q = solve(w, h, format)
        for i in range(3):
            alone = solve(w[i], h[i], format)
            assert torch.equal(q.codes[i], alone.codes)
            assert all(torch.equal(q.params[key][i], alone.params[key]) for key in alone.params)
        assert torch.equal(QTensor.from_arrays(q.format, q.pack(), q.shape).dequantize(), q.dequantize())
    unseen, plain = (solve(w, h).dequantize()[1], rounded(w[1], torch.eye(K), "int4-g32").dequantize())
    assert (unseen - w[1]).square().sum() <= (plain - w[1]).square().sum()


HARD = {
    "one sample": hessian_of(normal(1, K)),
    "constant input": torch.ones(K, K),
    "fewer samples than channels": hessian_of(normal(K // 3, K)),
    "nothing seen": torch.zeros(K, K),
    "dead channels": H * torch.outer(*2 * [torch.arange(K) % 3 != 0]),
    "tiny": H * 1e-30,
    "huge": H * 1e30,
    "an outlier": H * torch.outer(*2 * [1 + 1e3 * (torch.arange(K) == 5)]),
    "slightly indefinite": H - 0.02 * torch.linalg.eigvalsh(H)[-1] * torch.eye(K),
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("format", ["int4-g32", "int2-g16", "ternary"])
def test_hard_hessians_are_survived(kind: str, format: str) -> None:
    q, plain = solve(h=HARD[kind], format=format), rounded(W, HARD[kind].abs(), format)
    assert q.dequantize().isfinite().all()
    if kind != "slightly indefinite":  # where the error is no error
        assert objective(q, W, HARD[kind]).sum() <= objective(plain, W, HARD[kind]).sum()
    if kind != "an outlier":  # which the other channels must follow. Nor is a channel given up on that was not used
        assert (q.dequantize() - W).square().sum() < W.square().sum()


@pytest.mark.parametrize("bad", [H * torch.nan, H * torch.inf, -H, 10 - 9 * torch.eye(K)])
def test_what_is_no_hessian_is_refused(bad: Tensor) -> None:
    with pytest.raises(UnsupportedError, match="gptq: the Hessian"):
        solve(h=bad)


def test_the_target_makes_up_for_inputs_that_changed() -> None:
    """With x̂ = x·M the weights that give the same outputs are W·M⁻ᵀ, whatever the Hessian of x̂."""
    mix = torch.eye(K) + 0.05 * normal(K, K, seed=3)
    changed = X @ mix
    stats = {
        "hessian": hessian_of(changed),
        "drift": W @ (X - changed).T @ changed / len(X),
        "scatter": ((X - changed) @ W.T).square().mean(0),
        "tokens": torch.tensor([1e6]),
    }
    found = GPTQ(damping=1e-4).quantize(W, format_named("int8"), stats)
    blind = GPTQ(damping=1e-4).quantize(W, format_named("int8"), {"hessian": stats["hessian"]})

    def error(q: QTensor) -> float:
        return float((changed @ q.dequantize().T - X @ W.T).square().mean())

    assert error(found) < 0.02 * error(blind)


def test_matrices_with_one_input_come_out_as_they_would_alone() -> None:
    block = {"q": W, "k": W[:7] * 2, "down": normal(5, 64) * 0.02}
    small = hessian_of(X[:, :64])
    stats = {"q": {"hessian": H}, "k": {"hessian": H}, "down": {"hessian": small}}
    plan = dict.fromkeys(block, format_named("int4-g32"))
    found = GPTQ().quantize_block(Block.of(block), plan, stats)
    for name, w in block.items():
        assert torch.equal(found[name].dequantize(), solve(w, stats[name]["hessian"]).dequantize())


def test_what_is_missing_is_said() -> None:
    with pytest.raises(UnsupportedError, match="needs the Hessian"):
        METHODS["gptq"].quantize(W, format_named("int4-g32"), {})  # type: ignore[attr-defined]
    with pytest.raises(FormatError, match="not a multiple of its block"):
        solve(W[:, :70], H[:70, :70], "q4_0")


def test_a_format_that_has_no_columns_is_refused() -> None:
    whole = type("Whole", (type(format_named("int4-g32")),), {"columnwise": False})
    with pytest.raises(FormatError, match="one column at a time, as gptq does; use rtn or hqq"):
        GPTQ().quantize(W, whole(bits=4, group=32), {"hessian": H})


def noisy(tokens: int, signal: float) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics of so many tokens whose outputs are off by W·signal and unit noise, and what the outputs should be."""
    x, noise = normal(tokens, K, seed=7), normal(tokens, len(W), seed=8)
    wanted = W * signal
    moved = x @ wanted.T + noise
    stats = {
        "hessian": x.T @ x / tokens,
        "drift": moved.T @ x / tokens,
        "scatter": moved.square().mean(0),
        "tokens": torch.tensor([float(tokens)]),
    }
    return stats, wanted


def correction(stats: dict[str, Tensor], damping: float = 0.01) -> Tensor:
    """[N, K], in the order of the columns."""
    hessian, tokens, found = stats["hessian"], float(stats["tokens"]), torch.empty_like(W).T
    with factored(hessian, solving_order(hessian.diagonal(), None), damping) as (objective, factors):
        free, scatter = coefficients(objective, factors), float(stats["scatter"].sum())
        found[objective.columns] = _correction(objective, factors, stats["drift"], scatter, tokens, free)
    return found.T


@pytest.mark.parametrize("tokens", [K // 2, K, 4 * K])
def test_a_correction_that_is_noise_is_not_made(tokens) -> None:
    """Without shrinking it would be about 1/√n a weight: the noise of a regression on n tokens."""
    stats, _ = noisy(tokens, 0.0)
    made = correction(stats, 0.01 + SHRINKING * K / tokens)
    assert float(made.square().mean().sqrt()) < 0.3 / tokens**0.5


def test_a_correction_that_is_there_is_kept() -> None:
    stats, wanted = noisy(64 * K, 100.0)
    assert float((correction(stats) - wanted).norm() / wanted.norm()) < 0.05


def test_free_coefficients_are_the_trace() -> None:
    """Hutchinson's estimate has a variance of 2·‖M‖² a probe, off the diagonal: five deviations."""
    with factored(H, solving_order(H.diagonal(), None), 0.5) as (objective, factors):
        found, damping = coefficients(objective, factors), objective.damping
    inverse = torch.linalg.inv(H.double() + damping * torch.eye(K))
    off = inverse - inverse.diag().diag()
    deviation = damping * float((2 * off.square().sum() / PROBES).sqrt())
    assert abs(found - float((H.double() @ inverse).trace())) < 5 * deviation + 1e-3


@pytest.mark.parametrize("width", [1, 5, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
def test_factors_are_those_of_the_damped_hessian(width: int) -> None:
    x = normal(2 * width, width, seed=3) * normal(width, seed=4).exp()
    hessian = hessian_of(x)
    hessian = (hessian + hessian.T) / 2
    before, order = hessian.clone(), solving_order(hessian.diagonal(), None)
    with factored(hessian, order, 0.01) as (objective, factors):
        columns, whole = objective.columns, slice(0, width)
        damped = before.double() + objective.damping * torch.eye(width)
        unit = factors.within(whole).T.double() + torch.eye(width)
        made = unit @ factors.cost.double().diag() @ unit.T
        assert torch.equal(columns, order.flip(0))
        # float32, backward stable: k·u·(|L|·|L|ᵀ), and every row of L is as long as the root of its pivot's diagonal.
        size = damped.diagonal()[columns].sqrt()
        assert ((made - damped[columns][:, columns]).abs() <= 2.0**-22 * (width + 1) * size * size[:, None]).all()
        assert torch.allclose(objective.rows(whole).double(), damped[columns][:, columns], rtol=1e-6, atol=0)
        assert torch.equal(objective.rows(slice(width // 2, width)), objective.rows(whole)[width // 2 :])
        b = normal(width, 3, seed=5)
        solved, exact = factors.solve_(b.clone()), torch.linalg.solve(made, b.double())
        # Triangular solves are backward stable: off by the condition number times k·u, of each of two factors.
        bound = 2 * width * 2.0**-24 * float(torch.linalg.cond(made))
        assert float((solved - exact).norm() / exact.norm()) <= bound + 2.0**-22
    assert torch.equal(hessian, before)


def test_a_hessian_that_cannot_be_factored_at_once_is_put_back() -> None:
    hessian = H - 0.05 * H.diagonal().mean() * torch.eye(K)
    before = hessian.clone()
    with factored(hessian, solving_order(hessian.diagonal(), None), 0.001) as (objective, _):
        assert objective.damping > 0.002 * float(hessian.diagonal().median())
    assert torch.equal(hessian, before)
    hessian = -H + 2 * H.diagonal().diag()
    before = hessian.clone()
    with pytest.raises(UnsupportedError, match="large negative eigenvalues"):
        solve(h=hessian)
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("format", ["int4-g32", "int3-asym", "nf4"])
def test_rows_a_few_at_a_time(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of several heights, cut across their borders."""
    others = [W, normal(5, K, seed=9) * 0.02, normal(31, K, seed=10) * 0.02]
    stats = [{"hessian": H}] * 3
    whole = GPTQ().quantize_together(others, format_named(format), stats)
    monkeypatch.setattr(GPTQ, "slab", 10 * K)
    for found, expected in zip(GPTQ().quantize_together(others, format_named(format), stats), whole, strict=True):
        assert found.codes.shape == expected.codes.shape
        assert (found.codes == expected.codes).float().mean() > 0.99  # sums in another order, seldom another level
        assert all(found.params[key].shape == expected.params[key].shape for key in expected.params)
