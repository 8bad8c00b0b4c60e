"""Which tensor gets which format without data."""

from __future__ import annotations

import pytest
import torch

from fewbits.formats import format_named
from fewbits.plan.rules import Choice, Rules, Tensor


def choice(format: str, role: str, shape: tuple[int, ...]) -> Choice:
    rules = Rules(format_named(format), admits=lambda *_: None, gguf=True)
    return rules.choose(Tensor("t", role, shape, torch.float16))


@pytest.mark.parametrize(
    ("format", "instead"),
    [
        ("q6_k", "q8_0"),
        ("q5_k", "q5_1"),
        ("q4_k", "q5_0"),
        ("q3_k", "iq4_nl"),
        ("q2_k", "iq4_nl"),
        ("iq4_xs", "iq4_nl"),
    ],
)
def test_rows_that_are_no_super_blocks_get_blocks_of_32(format: str, instead: str) -> None:
    """As llama-quantize does it, but for q3_k and q2_k: it has come to take q4_0, which errs more at the same size."""
    assert choice(format, "linear", (8, 512)).format.name == format
    narrow = choice(format, "linear", (8, 352))
    assert narrow.format.name == instead
    assert narrow.reason is not None
    assert "352 is not a multiple of its block of 256" in narrow.reason
    assert choice(format, "linear", (8, 350)).format.name == "fp16"


@pytest.mark.parametrize(
    ("format", "output"), [("q4_k", "q6_k"), ("q6_k", "q6_k"), ("q4_0", "q8_0"), ("q8_0", "q8_0"), ("tq1_0", "q8_0")]
)
def test_the_projection_to_the_vocabulary_is_finer(format: str, output: str) -> None:
    assert choice(format, "output", (8, 512)).format.name == output
    assert choice(format, "embedding", (8, 512)).format.name == format
