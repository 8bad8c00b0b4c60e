"""What logits are made of: states of the last call's wanted rows, the same by all runners."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_model

from fewbits.engine.composing import compose
from fewbits.engine.transformers_runner import TransformersRunner
from fewbits.runtime.compiled import CompiledRunner, compiled
from fewbits.runtime.reference import ReferenceRunner

TOKENS = np.array([5, 9, 60, 2, 2, 7, 31, 33], np.int32)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_states(model_type: str, tmp_path: Path) -> None:
    """Rows of two texts, of which three are wanted, against transformers' last hidden states.

    1e-3 of a state's length: weights are exact here, and float32 sums have another order.
    """
    model = save_model(tmp_path / "m", model_type)
    program = compose(tmp_path / "m", lambda weight: weight).program
    exact = ReferenceRunner(program, 2, 16, "f32", exact=True)
    runners = [exact, TransformersRunner(tmp_path / "m", slots=2, reason="a test")]
    rows = (np.array([0] * 5 + [1] * 3, np.int32), np.array([*range(5), *range(3)], np.int32))
    wanted = np.array([2, 4, 7], np.int32)
    with torch.no_grad():
        texts = [torch.tensor([TOKENS[:5].tolist()]), torch.tensor([TOKENS[5:].tolist()])]
        first, second = (model.model(ids).last_hidden_state[0].float().numpy() for ids in texts)
    expected = np.stack([first[2], first[4], second[2]])
    for runner in runners:
        runner.forward(TOKENS, *rows, wanted)
        found = runner.states(3)
        assert np.abs(found - expected).max() < 1e-3 * np.linalg.norm(expected, axis=-1).max(), type(runner)
        assert (runner.states(2) == found[:2]).all()
    if compiled() is None:
        return
    fast, plain = CompiledRunner(program, 2, 16), ReferenceRunner(program, 2, 16)
    for runner in (fast, plain):
        runner.forward(TOKENS, *rows, wanted)
    np.testing.assert_allclose(fast.states(3), plain.states(3), atol=1e-3 * np.abs(plain.states(3)).max())
    with pytest.raises(ValueError, match="more rows than the last run was asked for"):
        fast.states(4)
