"""Presets against what llama-quantize wrote.

llama_quantize.json holds the types that llama-quantize (of llama-cpp-python 0.3.36) gave the matrices of random models
in three shapes, read back from its files. A part of a block has one type in all layers, or types with the number of
layers that they cover, first to last. `… imatrix` is a preset that chose otherwise with an importance matrix.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.errors import FewbitsError, UnsupportedError
from fewbits.formats import FORMATS
from fewbits.plan.presets import PRESETS, preset_formats
from fewbits.plan.rules import Tensor

SEEN: dict[str, Any] = json.loads(Path(__file__).with_name("llama_quantize.json").read_text(encoding="utf-8"))
HEAD = 8  # rows


def tensors(model: dict[str, Any]) -> list[Tensor]:
    """The tensors of the model that llama-quantize was given; all it looks at is names and lengths of rows."""
    rows = {"attn_q": model["heads"] * HEAD, "attn_k": model["kv_heads"] * HEAD, "attn_v": model["kv_heads"] * HEAD}
    columns = {"attn_output": 256, "ffn_down": model["ffn"]}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {part: (rows.get(part, HEAD), columns.get(part, model["hidden"])) for part in parts}
    made = [matrix("token_embd.weight", "output" if model["tied"] else "embedding", (32, model["hidden"]))]
    for layer in range(model["layers"]):
        made.append(matrix(f"blk.{layer}.attn_norm.weight", "norm", (model["hidden"],)))
        made += [matrix(f"blk.{layer}.{part}.weight", "linear", shape) for part, shape in shapes.items()]
    return made if model["tied"] else [*made, matrix("output.weight", "output", (32, model["hidden"]))]


def matrix(name: str, role: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name, role, shape, torch.float16)


def by_tensor(types: dict[str, str], layers: int) -> dict[str, str]:
    """The fixture's line on a preset, a type for each tensor."""
    spread = {f"{part}.weight": types[part] for part in ("token_embd", "output") if part in types}
    for part in types.keys() - {"token_embd", "output"}:
        runs = [run.split("×") if "×" in run else [layers, run] for run in types[part].split()]
        each = [type for n, type in runs for _ in range(int(n))]
        spread |= {f"blk.{layer}.{part}.weight": type for layer, type in enumerate(each)}
    return spread


@pytest.mark.parametrize("imatrix", [False, True])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("shape", SEEN)
def test_every_matrix_gets_the_type_that_llama_quantize_gave_it(shape: str, name: str, imatrix: bool) -> None:
    model, seen = SEEN[shape]["model"], SEEN[shape]["types"]
    types = seen.get(f"{name} imatrix", seen[name]) if imatrix else seen[name]
    chosen = preset_formats(name, tensors(model), model, imatrix=imatrix)
    ours = {tensor: "F16" if format.name == "fp16" else format.name.upper() for tensor, format in chosen.items()}
    assert ours == by_tensor(types, model["layers"])


def test_the_fixture_has_what_presets_differ_by() -> None:
    assert all(set(PRESETS) <= set(shape["types"]) for shape in SEEN.values())
    with_matrix = {name for shape in SEEN.values() for name in shape["types"] if name.endswith(" imatrix")}
    assert with_matrix == {f"{name} imatrix" for name in ("Q4_0", "Q5_0", "IQ4_XS", "IQ4_NL")}
    types = {type for shape in SEEN.values() for line in shape["types"].values() for type in line.values()}
    assert "F16" in types


def test_a_llama_of_80_layers_has_finer_values_only_where_heads_share_them() -> None:
    """Qwen 2 has them in any case, Qwen 3 in none: llama.cpp's name for a size decides it."""
    assert values("llama", kv_heads=4) == "q5_k"
    assert values("mistral", kv_heads=4) == "q5_k"
    assert values("llama", kv_heads=8) == "q3_k"
    assert values("qwen2", kv_heads=8) == "q5_k"
    assert values("qwen3", kv_heads=4) == "q3_k"
    assert values("llama", kv_heads=4, layers=79) == "q3_k"


def values(model_type: str, kv_heads: int, layers: int = 80) -> str:
    model = {"layers": layers, "heads": 8, "kv_heads": kv_heads, "hidden": 256, "ffn": 256, "tied": True}
    return preset_formats("Q3_K_S", tensors(model), {"model_type": model_type})["blk.40.attn_v.weight"].name


def test_names_in_lower_case_are_known_and_others_are_refused_with_the_list() -> None:
    model = SEEN["80 layers, eight heads share"]["model"]
    assert preset_formats("q4_k_m", tensors(model), model) == preset_formats("Q4_K_M", tensors(model), model)
    with pytest.raises(FewbitsError, match=r"preset 'Q4_K_XL' is not known; there are Q2_K, .*Q8_0"):
        preset_formats("Q4_K_XL", [], {})


def test_experts_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="Q4_K_M: its rules for experts"):
        preset_formats("q4_k_m", [matrix("blk.0.ffn_down_exps.weight", "experts", (8, 256, 256))], {})


def test_every_format_named_by_a_preset_is_one() -> None:
    named = {format for preset in PRESETS.values() for rules in preset.finer.values() for format in rules.values()}
    assert named | {preset.base for preset in PRESETS.values()} <= set(FORMATS)
