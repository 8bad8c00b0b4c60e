"""What benchmarks time products with: that it goes through all weights, and refuses what does not fit."""

from __future__ import annotations

import numpy as np
import pytest

from fewbits.runtime.compiled import compiled, kernel_weight, targets
from fewbits.runtime.tiles import Direct, Tiles

core = compiled()
pytestmark = pytest.mark.skipif(core is None, reason="the kernels were not compiled")


def weight(rows: int, columns: int) -> object:
    panels, blocks = rows // 16, columns // 32
    codes = np.zeros((panels, blocks, 256), np.uint8)
    return kernel_weight(Tiles(rows, columns, 4, 32, 8, codes, Direct(np.ones((panels, blocks, 16), np.float16))))


@pytest.mark.parametrize("target", targets())
def test_seconds_of_a_product(target: str) -> None:
    for rows in (1, 8):
        assert 0 < core.time_multiply(target, 2, [weight(32, 64), weight(32, 64)], rows, 2) < 1


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        core.time_multiply("", 1, [weight(32, 64), weight(64, 32)], 1, 1)
    for weights, rows, rounds in (([], 1, 1), ([weight(16, 32)], 0, 1), ([weight(16, 32)], 1, 0)):
        with pytest.raises(ValueError, match="must be there"):
            core.time_multiply("", 1, weights, rows, rounds)
