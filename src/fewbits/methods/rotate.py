"""Rotate: the same model in a basis in which no channel stands out.

Between layers a model passes on hidden states h, and everything that reads them does so behind an RMS norm. Turn h by
an orthogonal matrix R: if all writers write h·R and all readers undo it, nothing else changes, because an RMS norm
without weights divides by the length of h, which R preserves. Outliers of single channels spread over all of them,
weights of a row become alike, and both are easier to round. Two rotations vanish into the weights, so that nothing is
left to do when the model runs (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, sections 3 and 4; R1 and R2 of
SpinQuant, Liu et al. 2024, arXiv:2405.16406, section 3):

    R1, hidden × hidden     a reader behind a norm with weights γ:  W → W·diag(γ)·R1, and γ → 1
                            an embedding, whose rows are hidden states:  E → E·R1
                            a writer:  W → R1ᵀ·W, b → b·R1
    R2, head × head         each head of values:  V → R2ᵀ·V, b → b·R2
                            what reads them:  O → O·R2, head by head

The projection to the vocabulary takes up the last norm's γ, so it is the embedding's transpose no longer: tied weights
come apart, and the output has one matrix more.

R is a randomized Hadamard matrix, random signs times H/√n with H of ±1 and orthogonal rows: every output channel is a
sum of all input channels, with signs, so no single one can dominate. H exists for n = 2^k (Sylvester) and for q + 1 or
2·(q + 1) where q is a prime that leaves 3, or 1, when divided by 4 (Paley); the Kronecker product of two is one again,
which covers the sizes of all common models (768 = 64·12, 3584 = 128·28, 5120 = 256·20) and makes the product cheap:
n·(a + b) operations for n = a·b instead of n². Where no such factor exists, a random orthogonal matrix takes its place.
Products are computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import UnsupportedError
from fewbits.formats import Format
from fewbits.methods.base import Transform
from fewbits.methods.block import Block, Stats
from fewbits.models import Flow

SLAB = 1 << 20
"""Numbers that are multiplied at a time."""
LARGEST_FACTOR = 256
"""Size up to which a factor of the Kronecker product is multiplied as one matrix."""


@dataclass(frozen=True)
class Rotate(Transform):
    """seed: of the signs. It rewrites the model as it is read, before any block is formed."""

    seed: int = 0

    summary: ClassVar[str] = "the model in a rotated basis without outliers; nothing is left to do when it runs"
    rewrites: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "rotate"

    def transform(self, block: Block, plan: Mapping[str, Format], stats: Stats) -> None:
        """Nothing: a rotation of one block alone would change the model. `pipeline` shows the whole model rotated."""

    def rotations(self, hidden: int, head: int) -> Rotations:
        """The two rotations for a model with this many channels, and this many in a head."""
        return Rotations(Rotation.random(hidden, self.seed), Rotation.random(head, self.seed + 1))


@dataclass(frozen=True, eq=False)
class Rotation:
    """The orthogonal matrix diag(signs)·(A ⊗ B ⊗ …), float64, n × n."""

    signs: Tensor
    factors: tuple[Tensor, ...]

    @classmethod
    def random(cls, n: int, seed: int) -> Rotation:
        """A randomized Hadamard matrix of size n, or what comes closest where there is none."""
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (n,), generator=generator, dtype=torch.float64) * 2 - 1
        return cls(signs, tuple(_orthogonal(size, generator) for size in _sizes(n)))

    @property
    def size(self) -> int:
        return len(self.signs)

    def columns(self, w: Tensor, factors: Tensor | None = None) -> Tensor:
        """w·diag(factors)·R, of w [..., n] (or several times n: each part by itself), float32."""
        out = torch.empty_like(w, dtype=torch.float32)
        for part, target in _slabs(w, out, 0 if w.dim() == 1 else -2):
            target.copy_(self._product(part, factors))
        return out

    def rows(self, w: Tensor) -> Tensor:
        """Rᵀ·w, of w [..., n, K] (or several times n), float32."""
        out = torch.empty_like(w, dtype=torch.float32)
        for part, target in _slabs(w, out, -1):
            target.copy_(self._product(part.mT).mT)
        return out

    def _product(self, w: Tensor, factors: Tensor | None = None) -> Tensor:
        sizes = [len(factor) for factor in self.factors]
        signs = self.signs.to(w.device) if factors is None else self.signs.to(w.device) * factors
        x: Tensor = (w.double().unflatten(-1, (-1, self.size)) * signs).unflatten(-1, sizes)
        for axis, factor in enumerate(self.factors, start=-len(sizes)):
            x = torch.tensordot(x, factor.to(w.device), dims=([axis], [0])).movedim(-1, axis)
        return x.reshape(w.shape)


@dataclass(frozen=True, eq=False)
class Rotations:
    """The rotation of the residual stream, and that of each head's values."""

    hidden: Rotation
    head: Rotation

    def rotated(self, w: Tensor, flow: Flow, gamma: Tensor | None = None) -> Tensor:
        """A parameter as it is in the rotated model, float32. gamma: weights of the norm that `flow` names, stored.

        Rows of a parameter may be given alone if `whole(flow)` is false.
        """
        if flow.kind == "norm":
            return torch.full_like(w, 1.0 - flow.offset, dtype=torch.float32)
        if flow.values is not None:
            w = self.head.rows(w) if flow.values == "rows" and w.dim() > 1 else self.head.columns(w)
        if flow.kind == "writes":
            return self.hidden.columns(w) if w.dim() == 1 else self.hidden.rows(w)
        if flow.kind == "reads":
            return self.hidden.columns(w, None if gamma is None else gamma.double() + flow.offset)
        return w.float()

    @staticmethod
    def whole(flow: Flow) -> bool:
        """Whether a row of the rotated parameter depends on more than the same row of the original."""
        return flow.kind == "writes" or flow.values == "rows"


def _slabs(w: Tensor, out: Tensor, dim: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Parts of both along a dimension, small enough that float64 beside them does not count; a vector whole."""
    step = w.shape[0] if w.dim() == 1 else max(1, SLAB * w.shape[dim] // max(1, w.numel()))
    return zip(w.split(step, dim), out.split(step, dim), strict=True)


def changes(flow: Flow) -> bool:
    """Whether a parameter is another one in the rotated model."""
    return flow.kind is not None or flow.values is not None


def _sizes(n: int) -> list[int]:
    """Factors of n, of about LARGEST_FACTOR at most: one that is not a power of two, and powers of two."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    base = odd
    if odd > 1:
        sizes = (odd << k for k in range(2, 9) if n % (odd << k) == 0)
        base = next((size for size in sizes if _paley_prime(size)), odd)
    powers, rest = [], n // base
    while rest > LARGEST_FACTOR:
        powers.append(1 << (math.isqrt(rest).bit_length() - 1))
        rest //= powers[-1]
    return [size for size in (base, *powers, rest) if size > 1] or [1]


def _orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """H/√n of size n, float64; a random orthogonal matrix where no construction here has that size."""
    if n & (n - 1) == 0:
        return _sylvester(n) / math.sqrt(n)
    if _paley_prime(n):
        return _paley(n) / math.sqrt(n)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    found: Tensor = q * r.diagonal().sign()
    return found


def _sylvester(n: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def _paley_prime(n: int) -> int | None:
    """The prime q of Paley's first (n = q + 1) or second (n = 2·(q + 1)) construction."""
    for q, remainder in ((n - 1, 3), (n // 2 - 1, 1)):
        if n % 4 == 0 and q % 4 == remainder and q > 2 and all(q % d for d in range(2, math.isqrt(q) + 1)):
            return q
    return None


def _paley(n: int) -> Tensor:
    """Hadamard matrix of size n from the squares of a prime field (Paley 1933)."""
    q = _paley_prime(n)
    if q is None:
        raise UnsupportedError(f"size {n}: Paley's constructions have no Hadamard matrix of it; use a random rotation")
    character = -torch.ones(q, dtype=torch.float64)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    index = torch.arange(q)
    jacobsthal = character[(index.unsqueeze(1) - index) % q]
    bordered = torch.ones(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 0], bordered[1:, 1:] = 0, jacobsthal
    if q % 4 == 3:
        bordered[1:, 0] = -1
        return bordered + torch.eye(q + 1, dtype=torch.float64)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(bordered, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)


ROTATE = (Rotate(),)
