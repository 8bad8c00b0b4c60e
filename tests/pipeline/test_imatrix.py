"""Importance matrices: measured as hooks on transformers' modules measure them, and used as quantize_tensor does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.checkpoint import open_checkpoint
from fewbits.checkpoint.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from fewbits.errors import CheckpointError, OutputError, UnsupportedError
from fewbits.evals import Windows
from fewbits.models.base import interleaved_order
from fewbits.pipeline._verify import read_ledger

GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def text() -> Windows:
    return Windows(torch.randint(2, 300, (6, 16), generator=torch.Generator().manual_seed(0)), "drawn by lot")


def gguf_name(module: str, *, tied: bool) -> str:
    if module == "lm_head":
        return "token_embd.weight" if tied else "output.weight"
    _, _, layer, inside = module.split(".", 3)
    return f"blk.{layer}.{GGUF[inside]}.weight"


def hooked(folder: Path, ids: Tensor, *, tied: bool) -> dict[str, Tensor]:
    """Mean x² of what every linear layer of transformers' model reads, in float64."""
    # eager: transformers' default attention leaves Gemma 2's bound on scores out
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    found: dict[str, Tensor] = {}

    def seen(name: str) -> Any:
        return lambda module, args: found.update({name: args[0].detach().square().flatten(0, 1).mean(0)})

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(seen(gguf_name(name, tied=tied)))
    with torch.inference_mode():
        model(input_ids=ids)
    return found


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 8}),
        ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}),
    ],
)
def test_it_is_what_hooks_see(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    tied = settings.get("tie_word_embeddings", False)
    save_model(tmp_path / "model", kind, **settings)
    made = fewbits.imatrix(tmp_path / "model", tmp_path / "im.gguf", calibration=fewbits.Calibration(text()))
    expected = hooked(tmp_path / "model", text().ids, tied=tied)
    found = read_imatrix(tmp_path / "im.gguf")
    assert set(made.tensors) == found.importance.keys() == expected.keys()
    assert (found.chunks, found.chunk, found.datasets) == (6, 16, ("drawn by lot",))
    assert made.calibration.digest == text().digest
    for name, means in found.importance.items():
        # 96 squares are added one batch after the other, each of a number that float32 has rounded a few dozen times
        assert torch.allclose(means.double(), expected[name], rtol=200 * 2**-23, atol=0), name


def test_the_output_is_whole_or_not_there(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("It was")
    with pytest.raises(CheckpointError, match="too few for a window"):
        fewbits.imatrix(llama, tmp_path / "im.gguf", calibration=tmp_path / "short.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
    (tmp_path / "im.gguf").touch()
    with pytest.raises(OutputError, match="exists"):
        fewbits.imatrix(llama, tmp_path / "im.gguf")


def by_hand(path: Path, changed: Mapping[str, Tensor | None]) -> Path:
    """An importance matrix for the model `llama`, with entries changed or (None) left out."""
    generator = torch.Generator().manual_seed(1)
    names = [f"blk.{layer}.{name}.weight" for layer in (0, 1) for name in GGUF.values()]
    found = {name: torch.rand(192 if "down" in name else 128, generator=generator) ** 8 for name in names}
    found |= {"output.weight": torch.rand(128, generator=generator) ** 8}
    kept = {name: means for name, means in (found | dict(changed)).items() if means is not None}
    write_imatrix(path, ImportanceMatrix(kept, 1, 1))
    return path


@pytest.mark.parametrize(("out", "format"), [("out.gguf", "q4_0"), ("out", "int3-g32"), ("out", "nf4")])
def test_errors_are_weighed_as_quantize_tensor_weighs_them(llama: Path, tmp_path: Path, out: str, format: str) -> None:
    file = by_hand(tmp_path / "im.gguf", {"blk.1.ffn_up.weight": None})
    made = fewbits.quantize(llama, tmp_path / out, format=format, imatrix=file)
    _, reader = open_checkpoint(tmp_path / out)
    source, importance = load_file(llama / "model.safetensors"), read_imatrix(file).importance
    weighed = 0
    for line in (line for line in made.tensors if line.format == format and line.source != "model.embed_tokens.weight"):
        module = line.source.removesuffix(".weight")
        entry, w = gguf_name(module, tied=False), source[line.source]
        if out.endswith(".gguf") and module.endswith(("q_proj", "k_proj")):
            w = w[interleaved_order(len(w), 4 if "q_proj" in module else 2)]
        alike, expected = (fewbits.quantize_tensor(w, format, importance=h) for h in (None, importance.get(entry)))
        found = reader.read(line.name).dequantize()
        assert torch.equal(found, expected.dequantize()), line.name
        if entry in importance:
            weighed += not torch.equal(found, alike.dequantize())
            assert line.reason is None
        else:
            assert line.reason == "its columns count alike, because im.gguf has no entry for it"
    assert weighed == 13  # 7 matrices in each of two layers, but for the one left out
    assert fewbits.verify(tmp_path / out, llama, logits=False).passed


def test_reasons_add_up(llama: Path, tmp_path: Path) -> None:
    file = by_hand(tmp_path / "im.gguf", {"output.weight": None})
    fewbits.quantize(llama, tmp_path / "out.gguf", format="q4_0", imatrix=file)
    lines = read_ledger(tmp_path / "out.gguf")["tensors"]
    assert lines["output.weight"]["reason"] == (
        "output projection: its error goes straight into the logits; its columns count alike, because im.gguf has no "
        "entry for it"
    )
    assert "im.gguf" not in lines["output_norm.weight"]["reason"]  # kept


def test_a_matrix_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    file = by_hand(tmp_path / "im.gguf", {"blk.1.ffn_up.weight": torch.ones(96)})
    for out in ("out", "out.gguf"):
        with pytest.raises(CheckpointError, match=r"'blk.1.ffn_up.weight' has shape \[96\], must be \[128\] for"):
            fewbits.quantize(llama, tmp_path / out, format="q4_0", imatrix=file)
    write_imatrix(tmp_path / "other.gguf", ImportanceMatrix({"blk.7.ffn_up.weight": torch.ones(128)}, 1, 1))
    with pytest.raises(CheckpointError, match="none of its 1 entries belongs to a tensor of this model"):
        fewbits.quantize(llama, tmp_path / "out", imatrix=tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("gptq", "also needs their hessian"),
        ("awq+rtn", "also needs their"),
        ("rotate+rtn", "makes them read something else"),
        ("rtn+tune", "runs the model on text"),
        ("hqq", "weighs all columns alike"),
        ("rtn-plain", "weighs all columns alike"),
        ("auto", "method auto needs one"),
    ],
)
def test_methods_that_cannot_use_it_refuse_it(llama: Path, tmp_path: Path, method: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        fewbits.quantize(llama, tmp_path / "out", method=method, imatrix=by_hand(tmp_path / "im.gguf", {}))
    assert [path.name for path in tmp_path.iterdir()] == ["im.gguf"]


def test_it_stands_for_a_text(llama: Path, tmp_path: Path) -> None:
    file = by_hand(tmp_path / "im.gguf", {})
    with pytest.raises(UnsupportedError, match="a calibration is given; leave out one of the two"):
        fewbits.quantize(llama, tmp_path / "out", calibration="self", imatrix=file)
    with pytest.raises(UnsupportedError, match="static scales are found on one"):
        fewbits.quantize(llama, tmp_path / "out", format="int8", inputs="int8-static", imatrix=file)


def test_a_model_without_names_in_gguf(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "olmo2")
    with pytest.raises(UnsupportedError, match="architecture 'olmo2' cannot be written to GGUF"):
        fewbits.imatrix(tmp_path / "model", tmp_path / "im.gguf", calibration=fewbits.Calibration(text()))
    with pytest.raises(UnsupportedError, match="this model has no such names"):
        fewbits.quantize(tmp_path / "model", tmp_path / "out", imatrix=by_hand(tmp_path / "im.gguf", {}))
