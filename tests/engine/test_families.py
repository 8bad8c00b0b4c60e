"""Programs of every family, run by the references, against transformers' own logits in float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, GEMMA, LONG, A, B, keep, rows, two_texts
from tiny import save_model
from transformers import AutoModelForCausalLM

from fewbits.engine import load
from fewbits.engine.composing import compose
from fewbits.engine.families import FAMILIES, family_of
from fewbits.engine.families.gemma import Gemma
from fewbits.engine.families.gemma2 import Gemma2
from fewbits.engine.parameters import Parameters, longest
from fewbits.engine.repacked import Repacked
from fewbits.engine.skeleton import configuration
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.pipeline import quantize
from fewbits.runtime.reference import ReferenceRunner

DEPTH, WIDTH = 20, 64
TOLERANCE = DEPTH * WIDTH**0.5 * 2.0**-24
"""Of the largest logit: DEPTH products one behind the other, of up to WIDTH terms whose rounding errors, 2^-24 each,
add up as those of independent numbers do. What a wrong constant anywhere does is a hundred times as large and more.
"""


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    model.set_attn_implementation("eager")  # the default one leaves out Gemma 2's bound on scores
    with torch.inference_mode():
        logits: np.ndarray = model(input_ids=torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()
    return logits


def exact(made: Repacked) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the two texts, by the references in float32."""
    return two_texts(ReferenceRunner(made.program, 2, 32, "f32", exact=True))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_transformers(case, tmp_path):
    kind, settings = copy.deepcopy(CASES[case])  # configurations write into the dicts that they are made of
    model = save_model(tmp_path, kind, **settings)
    for found, tokens in zip(exact(compose(tmp_path, keep)), (A, B), strict=True):
        expected = their_logits(model, tokens)
        assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_every_family_has_a_case():
    assert {kind for kind, _ in CASES.values()} == {family.model_type for family in FAMILIES}


@pytest.mark.parametrize("kind", ["fewbits", "gguf"])
def test_quantized_checkpoints_run_by_their_own_numbers(kind, llama, tmp_path):
    """Of a GGUF file, whose rows lie in another order, and of our own: against the decoded weights in transformers."""
    out = tmp_path / ("m.gguf" if kind == "gguf" else "m")
    quantize(llama, out, format="q4_1" if kind == "gguf" else "int4-asym-g32", prove=False)
    expected = their_logits(load(out, packed=False), A)
    found, _ = exact(compose(out, keep))
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_quantized_experts_run_by_their_own_numbers(kind, tmp_path):
    save_model(tmp_path / "m", kind, **next(settings for name, settings in CASES.values() if name == kind))
    quantize(tmp_path / "m", tmp_path / "q", format="int8-g16", prove=False)
    expected = their_logits(load(tmp_path / "q", packed=False), A)
    found, _ = exact(compose(tmp_path / "q", keep))
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_inputs_that_are_to_be_rounded_are_rounded_more_finely(llama, tmp_path):
    """W8A8: the reference's logits are nearer to the unrounded ones than rounding by token is."""
    quantize(llama, tmp_path / "q", format="int8", inputs="int8-token", prove=False)
    made = compose(tmp_path / "q", keep)
    unrounded, _ = exact(made)
    slots, at = rows(0, 0, len(A))
    ours = ReferenceRunner(made.program, 1, 32, "f32").forward(A, slots, at, at)
    by_token = their_logits(load(tmp_path / "q"), A)
    assert 0 < np.abs(ours - unrounded).mean() < np.abs(by_token - unrounded).mean()


def test_books_writes_what_transformers_writes(shared_models):
    """64 tokens, greedily; keys and values in FP16."""
    made = compose(shared_models / "books", keep)
    model = AutoModelForCausalLM.from_pretrained(shared_models / "books", dtype=torch.float32).eval()
    tokens = [839, 322, 260, 1145, 875, 13, 283]
    with torch.inference_mode():
        expected = model.generate(torch.tensor([tokens]), max_new_tokens=64, do_sample=False)[0].tolist()
    runner = ReferenceRunner(made.program, 1, 128, "f16", exact=True)
    slots, at = rows(0, 0, len(tokens))
    logits = runner.forward(np.array(tokens, np.int32), slots, at, at[-1:])
    while len(tokens) < len(expected):
        tokens.append(int(logits[0].argmax()))
        logits = runner.forward(np.array(tokens[-1:], np.int32), *rows(0, len(tokens) - 1, len(tokens)), at[:1])
    assert tokens == expected


def config(**values: Any) -> Any:
    return configuration(Path("config.json"), {"model_type": "llama", **values})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is none"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"hidden_size": 36, "num_attention_heads": 3}, "heads of 12"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_what_is_not_composed_is_refused_with_the_reason(values, reason):
    with pytest.raises(UnsupportedError, match=reason):
        family_of(config(**values))


def test_a_parameter_that_no_op_uses_is_refused(tmp_path):
    save_model(tmp_path, "gemma2", **GEMMA)

    class Forgetful(Gemma2):
        post_norms = Gemma.post_norms

    with pytest.raises(UnsupportedError, match=r"4 parameters .*\.0\.post_feedforward_layernorm"):
        Forgetful().compose(Parameters(tmp_path))


def test_longrope_is_run_up_to_where_its_angles_change():
    original = {**LONG, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "partial_rotary_factor": 1.0}
    shape = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128}
    assert longest(config(**shape, rope_parameters=original)) == 64
    assert longest(config(**shape, rope_parameters={**original, "long_factor": [1.0] * 4})) == 128


def test_a_missing_weight_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    save_model(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*shard"):
        compose(tmp_path, keep)
