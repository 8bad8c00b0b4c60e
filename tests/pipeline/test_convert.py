"""Conversions: the same numbers in other bytes, by others' decoders on both sides, or a refusal that leaves nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from tiny import TEXT, save_model, sentencepiece
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

import fewbits
from fewbits.checkpoint import KINDS, open_checkpoint
from fewbits.errors import CheckpointError, OutputError, UnsupportedError, VerificationError
from fewbits.evals import Windows
from fewbits.formats import FORMATS, QTensor
from fewbits.models import interleaved_order
from fewbits.pipeline import _convert, convert

DOWN = "model.layers.0.mlp.down_proj"
IDS = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(0))


def quantized(model: Path, out: Path, format: str, **options: object) -> Path:
    fewbits.quantize(model, out, format=format, prove=False, threads=2, **options)  # type: ignore[arg-type]
    return out


def formats(result: fewbits.Conversion) -> dict[str, set[str]]:
    """Format before -> formats after, of the matrices."""
    found: dict[str, set[str]] = {}
    for tensor in result.tensors:
        if len(tensor.shape) > 1:
            found.setdefault(tensor.before, set()).add(tensor.after)
    return found


def left(folder: Path, *known: str) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


@pytest.fixture(scope="module")
def q4_0(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(llama, tmp_path_factory.mktemp("sources") / "q4_0.gguf", "q4_0")


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model one of whose matrices is ½ · (code − 8), code (row + column) mod 16: Q4_0 of it is exact."""
    folder = tmp_path_factory.mktemp("steps") / "model"
    save_model(folder, "llama", hidden_size=32, intermediate_size=64)
    weights = load_file(folder / "model.safetensors")
    codes = (torch.arange(32)[:, None] + torch.arange(64)) % 16
    save_file(
        weights | {f"{DOWN}.weight": 0.5 * (codes - 8.0)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


def words(*numbers: int) -> list[int]:
    """32-bit words as torch shows them."""
    return [number - (1 << 32) if number >> 31 else number for number in numbers]


def test_bytes_by_hand(steps: Path, tmp_path: Path) -> None:
    """One group from GGUF's block into GPTQ's columns and from there into AWQ's words."""
    source = quantized(steps, tmp_path / "source.gguf", "q4_0")
    block = next(t for t in GGUFReader(source).tensors if t.name == "blk.0.ffn_down.weight").data[0][:18]
    # d = 0.5; code j low and code j + 16 high in byte j, and they are the same
    assert bytes(block) == b"\x00\x38" + bytes(j | j << 4 for j in range(16))
    convert(source, tmp_path / "gptq", to="gptq")
    arrays = load_file(tmp_path / "gptq" / "model.safetensors")
    # codes 0 … 15 of row 0 down column 0, eight to a word; zero-points 8 stored as 7
    assert arrays[f"{DOWN}.qweight"][:4, 0].tolist() == words(0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98)
    assert arrays[f"{DOWN}.qweight"][0, 3].item() == words(0xA9876543)[0]
    assert arrays[f"{DOWN}.scales"].tolist() == [[0.5] * 32] * 2
    assert arrays[f"{DOWN}.qzeros"].unique().tolist() == words(0x77777777)
    assert arrays[f"{DOWN}.g_idx"].tolist() == [0] * 32 + [1] * 32
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, True, False)
    convert(tmp_path / "gptq", tmp_path / "awq", to="awq")
    arrays = load_file(tmp_path / "awq" / "model.safetensors")
    # at input 0 output n has code n mod 16; a word's nibbles, the lowest first, are outputs 0, 2, 4, 6, 1, 3, 5, 7
    assert arrays[f"{DOWN}.qweight"][0, :2].tolist() == words(0x75316420, 0xFDB9ECA8)
    assert arrays[f"{DOWN}.qzeros"].unique().tolist() == words(0x88888888)
    assert arrays[f"{DOWN}.scales"].tolist() == [[0.5] * 32] * 2


def by_gguf_py(file: Path) -> dict[str, Tensor]:
    """Every tensor by transformers' names, rows of q and k put back as transformers has them: no code of ours."""
    shapes = {t.name: tuple(reversed(t.shape.tolist())) for t in GGUFReader(file).tensors}
    fields = GGUFReader(file).fields
    heads = {kind: int(fields[f"llama.attention.head_count{kind}"].contents()) for kind in ("", "_kv")}
    found = {}
    for tensor in GGUFReader(file).tensors:
        w = torch.from_numpy(dequantize(np.array(tensor.data), tensor.tensor_type).astype(np.float32))
        w = w.reshape(shapes[tensor.name])
        for name, kind in (("attn_q", ""), ("attn_k", "_kv")):
            if name in tensor.name:
                order = interleaved_order(len(w), heads[kind])
                w = torch.empty_like(w).index_copy_(0, order, w)
        found[transformers_name(tensor.name)] = w
    return found


PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def transformers_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.weight"
    _, layer, part = module.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.weight"


def by_the_library(folder: Path) -> dict[str, Tensor]:
    """Every tensor as the kind's own library decodes it."""
    parts: dict[str, list[Tensor]] = {}
    for name, _, rows in open_checkpoint(folder)[0].foreign(folder) or ():
        parts.setdefault(name, []).append(rows)
    return {name: torch.cat(rows) if rows[0].dim() else rows[0] for name, rows in parts.items()}


@pytest.mark.parametrize("format", ["q4_0", "q5_0", "q8_0", "q6_k", "iq4_nl", "mxfp4"])
def test_gguf_to_compressed_tensors_by_both_libraries(tmp_path: Path, format: str) -> None:
    model = tmp_path / "model"
    save_model(model, "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    source = quantized(model, tmp_path / "source.gguf", format)
    result = convert(source, tmp_path / "out", to="compressed-tensors")
    before, after = by_gguf_py(source), by_the_library(tmp_path / "out")
    assert result.verified_with == "compressed-tensors"
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(fewbits.load(source)(IDS).logits, fewbits.load(tmp_path / "out")(IDS).logits)


MOVES = {
    "q4_0.gguf": {"gptq": "int4-g32", "gptq-v2": "int4-g32", "awq": "int4-asym-g32", "compressed-tensors": "int4-g32",
                  "mlx": "mlx4-g32", "fewbits": "q4_0", "hf": "fp32"},
    "q5_0.gguf": {"compressed-tensors": "int5-g32", "mlx": "mlx5-g32", "gptq": "int8-g32"},
    "q4_1.gguf": {"mlx": "mlx4-g32"},
    "q8_0.gguf": {"gptq": "int8-g32", "compressed-tensors": "int8-g32", "mlx": "mlx8-g32"},
    "int4-g64": {"gguf": "q4_0", "gptq": "int4-g64", "awq": "int4-asym-g64", "mlx": "mlx4-g64", "fewbits": "int4-g64"},
    "int3-g64": {"gguf": "q4_0", "gptq": "int3-g64", "awq": "int4-asym-g64", "mlx": "mlx3-g64"},
    "int8-g64": {"gguf": "q8_0", "gptq": "int8-g64", "mlx": "mlx8-g64"},
    "int4-asym-g64": {"gguf": "q5_0", "gptq-v2": "int4-asym-g64", "awq": "int4-asym-g64", "mlx": "mlx4-g64-fp32"},
    "nf4": {"bitsandbytes": "nf4", "hf": "fp32"},
    "fp8-e4m3": {"fewbits": "fp8-e4m3"},
    "ternary-g64": {"gguf": "q4_0", "gptq": "int2-g64", "compressed-tensors": "int2-g64"},
}  # fmt: skip


@pytest.mark.parametrize(("source", "to"), [(source, to) for source, found in MOVES.items() for to in found])
def test_each_move_finds_its_format(llama: Path, tmp_path: Path, source: str, to: str) -> None:
    """Without --format; proven inside, against the ledger and from the command line's `verify`."""
    made = quantized(llama, tmp_path / source, source.removesuffix(".gguf"))
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    result = convert(made, out, to=to, threads=2)
    assert formats(result)[source.removesuffix(".gguf")] >= {MOVES[source][to]}
    assert not result.rounded
    assert open_checkpoint(out)[0].name == (to if to != "hf" else "huggingface")
    assert fewbits.verify(out, made, logits=False).passed


def test_all_the_way_round(q4_0: Path, tmp_path: Path) -> None:
    """Through five kinds and back: the matrices' blocks are those of the file it began with."""
    at = q4_0
    for to in ("gptq", "awq", "mlx", "compressed-tensors", "gptq-v2", "fewbits"):
        convert(at, tmp_path / to, to=to, threads=2)
        at = tmp_path / to
    convert(at, tmp_path / "back.gguf", to="gguf", threads=2)
    before, after = ({t.name: t for t in GGUFReader(file).tensors} for file in (q4_0, tmp_path / "back.gguf"))
    assert before.keys() == after.keys()
    blocks = [name for name, t in before.items() if t.tensor_type.name == "Q4_0" and "blk" in name]
    assert len(blocks) == 14
    for name in blocks:
        assert after[name].tensor_type == before[name].tensor_type
        assert np.array_equal(after[name].data, before[name].data)
    keys = [k for k in GGUFReader(q4_0).fields if k.startswith(("llama.", "tokenizer."))]
    fields = [GGUFReader(file).fields for file in (q4_0, tmp_path / "back.gguf")]
    assert all(fields[0][key].contents() == fields[1][key].contents() for key in keys)


FAMILIES = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "mistral": {"num_key_value_heads": 4, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", FAMILIES)
def test_gguf_and_back_is_the_model_it_was(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Weights to the bit in their own type, found by itself; the same tokens, settings and template; transformers'
    own logits.
    """
    folder, name = tmp_path / "model", str(dtype).removeprefix("torch.")
    tokenizer = sentencepiece() if kind == "mistral" else None
    ids = {"bos_token_id": 1, "eos_token_id": 2} if tokenizer else {}
    model = save_model(folder, kind, tokenizer, **FAMILIES[kind] | ids)  # type: ignore[arg-type]
    if kind.startswith("gemma"):  # norms that GGUF's 1 + w holds: those of 8 bits, not smaller than 2^-15
        with torch.no_grad():
            for parameter in (p for n, p in model.named_parameters() if "norm" in n):
                parameter.copy_((parameter * 64).round() / 64)
    model.to(dtype).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages }}!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(folder, tmp_path / "made.gguf", to="gguf", threads=2)
    result = convert(tmp_path / "made.gguf", tmp_path / "back", to="hf", threads=2)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert not result.rounded
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    configs = [AutoConfig.from_pretrained(path, local_files_only=True) for path in (folder, tmp_path / "back")]
    assert str(configs[1].dtype).removeprefix("torch.") == name
    left, right = (AutoTokenizer.from_pretrained(path, local_files_only=True) for path in (folder, tmp_path / "back"))
    assert left(TEXT).input_ids == right(TEXT).input_ids
    assert left.chat_template == right.chat_template
    assert (left.bos_token_id, left.eos_token_id) == (right.bos_token_id, right.eos_token_id)
    assert (tmp_path / "back" / "generation_config.json").is_file()
    x, y = (fewbits.load(path, dtype=torch.float32)(IDS).logits for path in (folder, tmp_path / "back"))
    assert torch.equal(x, y)


def test_floating_point_of_a_type_that_was_asked_for(q4_0: Path, tmp_path: Path) -> None:
    assert formats(convert(q4_0, tmp_path / "a", to="hf", format="f32"))["q4_0"] == {"fp32"}
    with pytest.raises(UnsupportedError, match=r"bf16: \d+ of \d+ numbers would change, the first from .* or --allow"):
        convert(q4_0, tmp_path / "b", to="hf", format="bf16")
    assert not (tmp_path / "b").exists()
    with pytest.raises(UnsupportedError, match="choose f32, bf16 or f16"):
        convert(q4_0, tmp_path / "b", to="hf", format="int4-g32")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config


def test_what_no_numbers_can_be_is_refused_by_name(llama: Path, q4_0: Path, tmp_path: Path) -> None:
    """The first tensor, how many more, the value, the requirement, what to do; nothing is left."""
    k = quantized(llama, tmp_path / "k.gguf", "q4_1")
    with pytest.raises(UnsupportedError) as refused:
        convert(k, tmp_path / "out", to="awq")
    message = str(refused.value)
    assert message.startswith("model.layers.0.self_attn.k_proj.weight (q4_1) and 13 more cannot move to awq")
    assert "int4-asym-g32: " in message
    assert "Take --to fewbits, which holds them, or --allow-rounding" in message
    asked = "int4-g64: .*numbers would change"
    with pytest.raises(UnsupportedError, match=asked):
        convert(q4_0, tmp_path / "out", to="gptq", format="int4-g64")
    assert left(tmp_path, "k.fewbits.json", "k.gguf", "k.Modelfile") == []


def test_a_zero_point_of_0_takes_version_2(llama: Path, tmp_path: Path) -> None:
    """Version 1 stores z − 1. A wider format, in which the numbers would fit, is not taken instead."""
    model = tmp_path / "model"
    weights = load_file(llama / "model.safetensors")
    weights[f"{DOWN}.weight"] = weights[f"{DOWN}.weight"].abs()  # the range begins at 0, so the zero-point is 0
    save_folder(llama, model, weights)
    source = quantized(model, tmp_path / "source", "int4-asym-g64", kind="compressed-tensors")
    with pytest.raises(UnsupportedError, match=rf"{DOWN}.*a zero-point is 0.*Take --to gptq-v2"):
        convert(source, tmp_path / "out", to="gptq")
    assert formats(convert(source, tmp_path / "out", to="gptq-v2"))["int4-asym-g64"] == {"int4-asym-g64"}
    assert int(open_checkpoint(tmp_path / "out")[1].read(f"{DOWN}.weight").params["zero"].min()) == 0


def save_folder(source: Path, folder: Path, weights: Mapping[str, Tensor]) -> Path:
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_scales_of_rows_must_fit(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path / "source", "int8")
    with pytest.raises(UnsupportedError, match=r"scales, one a row, are no float16 numbers.*Take --to compressed"):
        convert(source, tmp_path / "out", to="gptq")


def test_rounding_is_reported_tensor_by_tensor(q4_0: Path, llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path / "source.gguf", "q4_1")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    result = convert(source, tmp_path / "out", to="gptq-v2", allow_rounding=True, text=text)
    assert len(result.rounded) == 14
    (format,) = {t.after for t in result.rounded}
    assert format.startswith("int4-")
    ledger = json.loads((tmp_path / "out" / "fewbits.json").read_text())["tensors"]
    before, (_, made) = by_gguf_py(source), open_checkpoint(tmp_path / "out")
    for tensor in result.rounded:
        w, found = before[tensor.name], made.read(tensor.name).dequantize()
        error = float((found - w).norm() / w.norm())
        assert tensor.error == pytest.approx(error, rel=1e-4)
        assert 0 < error < 0.1
        assert next(line for line in ledger if line["name"] == tensor.name)["error"] == tensor.error
        assert tensor.reason
    assert result.divergence is not None
    assert result.divergence.against == str(source)
    assert 0 < result.divergence.mean_kld.value < 0.1
    assert fewbits.verify(tmp_path / "out", source, logits=False).passed
    exact = convert(q4_0, tmp_path / "exact", to="gptq", allow_rounding=True)
    assert exact.divergence is None


def test_measured_against_another_model(q4_0: Path, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    found = convert(q4_0, tmp_path / "out", to="gptq", against=llama, text=text).divergence
    assert found is not None
    assert found.against == str(llama)
    same = fewbits.evaluate(q4_0, llama, text=text, length=128).mean_kld.value
    assert found.mean_kld.value == pytest.approx(same, rel=1e-3)  # the same weights, multiplied in another order


def test_other_requests_are_refused(llama: Path, q4_0: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="that is `fewbits quantize`"):
        convert(llama, tmp_path / "out", to="gptq")
    with pytest.raises(UnsupportedError, match="'onnx' is no kind"):
        convert(llama, tmp_path / "out", to="onnx")
    with pytest.raises(UnsupportedError, match=r"name ends in \.gguf"):
        convert(q4_0, tmp_path / "out", to="gguf")
    with pytest.raises(UnsupportedError, match="makes a folder"):
        convert(q4_0, tmp_path / "out.gguf", to="gptq")
    with pytest.raises(UnsupportedError, match="floating point are --to hf"):
        convert(q4_0, tmp_path / "out", to="gptq", format="f16")
    with pytest.raises(OutputError, match="exists already"):
        convert(q4_0, q4_0.parent, to="gptq")
    with pytest.raises(CheckpointError, match="no such file"):
        convert(tmp_path / "nothing", tmp_path / "out", to="gptq")
    assert left(tmp_path) == []


def test_rounded_inputs_go_along_or_are_said(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path / "source", "int8", inputs="int8-token")
    result = convert(source, tmp_path / "kept", to="fewbits")
    assert not result.notes
    found = open_checkpoint(tmp_path / "kept")[1].entries[f"{DOWN}.weight"].inputs
    assert found is not None
    assert found.name == "int8-token"
    with pytest.raises(UnsupportedError, match=r"inputs are rounded to int8-token.*--to hf writes its weights alone"):
        convert(source, tmp_path / "out", to="gptq", allow_rounding=True)
    result = convert(source, tmp_path / "floats", to="hf")
    assert result.notes == ("the source rounds inputs of matrices to int8-token; the output does not",)


def test_scales_of_keys_and_values_go_along(llama: Path, tmp_path: Path) -> None:
    calibration = fewbits.Calibration(text=Windows(IDS, "drawn by lot"), windows=1, length=16, held_out=1, limit=100.0)
    source = quantized(llama, tmp_path / "source", "int8", inputs="int8-static", cache="int8", calibration=calibration)
    convert(source, tmp_path / "out", to="fewbits")
    (_, a), (_, b) = (open_checkpoint(path) for path in (source, tmp_path / "out"))
    scales = [name for name in a.entries if name.endswith("_scale")]
    assert len(scales) == 18
    assert all(torch.equal(a.read(name).codes, b.read(name).codes) for name in scales)
    with pytest.raises(UnsupportedError, match=r"--to hf writes its weights alone"):
        convert(source, tmp_path / "out.gguf", to="gguf")
    convert(source, tmp_path / "floats", to="hf")
    assert not any(name.endswith("_scale") for name in open_checkpoint(tmp_path / "floats")[1].entries)


def test_columns_in_gptqs_own_order(q4_0: Path, tmp_path: Path) -> None:
    """They move between GPTQ's versions and to floating point; nothing else has a list of groups."""
    source = tmp_path / "source"
    convert(q4_0, source, to="gptq")
    arrays = load_file(source / "model.safetensors")
    order = torch.randperm(192, generator=torch.Generator().manual_seed(3)).int() // 32
    save_file(arrays | {f"{DOWN}.g_idx": order}, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (source / "config.json").write_text(json.dumps(config))
    w = open_checkpoint(source)[1].read(f"{DOWN}.weight").dequantize()
    for to in ("gptq-v2", "hf"):
        convert(source, tmp_path / to, to=to)
        assert torch.equal(open_checkpoint(tmp_path / to)[1].read(f"{DOWN}.weight").dequantize(), w)
    with pytest.raises(UnsupportedError, match=r"ffn_down.*actorder\).*not in groups of neighbours.*Take --to gptq"):
        convert(source, tmp_path / "out.gguf", to="gguf")


def test_from_gguf_to_gguf(tmp_path: Path) -> None:
    """Wider blocks with the same numbers; metadata and rotary factors are the file's own."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    save_model(tmp_path / "model", "llama", rope_parameters=rope, hidden_size=64, intermediate_size=96)
    source = quantized(tmp_path / "model", tmp_path / "source.gguf", "q4_0")
    result = convert(source, tmp_path / "out.gguf", to="gguf", format="q8_0")
    assert formats(result)["q4_0"] == {"q4_0", "q8_0"}  # embeddings stay as they are
    before, after = (by_type(file) for file in (source, tmp_path / "out.gguf"))
    assert before.keys() == after.keys()
    assert "rope_freqs.weight" in before
    assert all(np.array_equal(before[name], after[name]) for name in before)


def by_type(file: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(np.array(t.data), t.tensor_type) for t in GGUFReader(file).tensors}


def test_ternary_models_move_between_transformers_and_llama_cpp(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_model(model, "llama", hidden_size=256, intermediate_size=256)
    weights = load_file(model / "model.safetensors")
    signs = {name: 0.03125 * w.sign() * (w.abs() > 0.1) for name, w in weights.items() if "proj" in name}
    save_file(weights | signs, model / "model.safetensors", metadata={"format": "pt"})
    source = quantized(model, tmp_path / "bitnet", "ternary-tensor", kind="bitnet")
    out = convert(source, tmp_path / "out.gguf", to="gguf", format="tq2_0")
    assert formats(out)["ternary-tensor"] == {"tq2_0"}
    assert out.notes == ("the source rounds inputs of matrices to int8-token; the output does not",)
    found = by_gguf_py(tmp_path / "out.gguf")
    assert all(torch.equal(found[name], w) for name, w in signs.items())
    back = convert(tmp_path / "out.gguf", tmp_path / "back", to="bitnet")
    assert formats(back)["tq2_0"] == {"ternary-tensor"}
    assert back.notes == ("engines of bitnet files round inputs of matrices to int8-token",)
    (_, a), (_, b) = (open_checkpoint(path) for path in (source, tmp_path / "back"))
    assert all(torch.equal(a.read(name).codes, b.read(name).codes) for name in signs)


def test_norms_of_gemma_are_exact_or_refused(tmp_path: Path) -> None:
    """1 + w of a random FP32 w has bits that FP32 has no room for."""
    save_model(tmp_path / "model", "gemma3_text", head_dim=16, query_pre_attn_scalar=16)
    with pytest.raises(UnsupportedError, match=r"norm\.weight and 12 more norms: GGUF stores 1 more"):
        convert(tmp_path / "model", tmp_path / "out.gguf", to="gguf")
    result = convert(tmp_path / "model", tmp_path / "out.gguf", to="gguf", allow_rounding=True)
    assert result.notes == ("last bits of 13 norms are lost, because GGUF stores 1 more than they are",)


def test_experts_of_a_fused_matrix(tmp_path: Path) -> None:
    """Ours keeps them fused, compressed-tensors has one matrix for each."""
    model = tmp_path / "model"
    save_model(model, "qwen3_moe", hidden_size=64, moe_intermediate_size=32, num_experts=3, num_experts_per_tok=2,
               head_dim=16)  # fmt: skip
    weights = load_file(model / "model.safetensors")
    fused = {
        f"model.layers.{i}.mlp.experts.{part}": torch.stack(
            [torch.cat([weights[f"model.layers.{i}.mlp.experts.{e}.{x}.weight"] for x in whole]) for e in range(3)]
        )
        for i in range(2)
        for part, whole in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",)))
    }
    plain = {name: w for name, w in weights.items() if ".experts." not in name}
    save_file(plain | fused, model / "model.safetensors", metadata={"format": "pt"})
    source = quantized(model, tmp_path / "source", "int4-g32", kind="fewbits")
    result = convert(source, tmp_path / "out", to="compressed-tensors")
    assert formats(result)["int4-g32"] == {"int4-g32"}
    whole = open_checkpoint(source)[1].read("model.layers.1.mlp.experts.gate_up_proj").dequantize()
    up = open_checkpoint(tmp_path / "out")[1].read("model.layers.1.mlp.experts.2.up_proj.weight").dequantize()
    assert torch.equal(up, whole[2, 32:])


def test_a_wrong_number_is_found(q4_0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof reads the files again: one code that is another one is enough."""
    exact = _convert.part_in

    def other(*given: object) -> QTensor:
        found = exact(*given)  # type: ignore[arg-type]
        if found.format.name == "int4-g32":
            found.codes[-1, -1] ^= 1
        return found

    monkeypatch.setattr(_convert, "part_in", other)
    with pytest.raises(VerificationError, match=r"14 tensors.*weight: 1 of its numbers are not the source's"):
        convert(q4_0, tmp_path / "out", to="gptq")


@pytest.mark.parametrize("label", ["choose", "model.layers"])
def test_stopped_by_hand_nothing_is_left(q4_0: Path, tmp_path: Path, label: str) -> None:
    def stop(done: int, total: int, text: str) -> None:
        if text.startswith(label):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(q4_0, tmp_path / "out", to="gptq", progress=stop)
    assert left(tmp_path) == []


def test_a_full_disk_is_said_before(q4_0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match="free"):
        convert(q4_0, tmp_path / "out", to="gptq")
    assert left(tmp_path) == []


@pytest.mark.parametrize("format", [name for name in FORMATS if name.startswith(("q", "iq4", "tq")) and name != "q8_k"])
def test_every_block_of_gguf_becomes_floating_point(tmp_path: Path, format: str) -> None:
    """By gguf-py: every number of the folder is one that it decodes, in the smallest type that holds all."""
    model = tmp_path / "model"
    save_model(model, "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    source = quantized(model, tmp_path / "source.gguf", format)
    convert(source, tmp_path / "out", to="hf")
    before, after = by_gguf_py(source), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name].float()) for name in before)


@pytest.mark.parametrize("model", ["stories260K", "books"])
def test_trained_models(shared_models: Path, tmp_path: Path, model: str) -> None:
    """There and back, with the same predictions as the source's."""
    source = quantized(shared_models / model, tmp_path / "source.gguf", "q4_0")
    convert(source, tmp_path / "gptq", to="gptq")
    back = convert(tmp_path / "gptq", tmp_path / "back.gguf", to="gguf", against=source)
    assert back.divergence is not None
    assert back.divergence.mean_kld.value < 1e-6  # what storing the reference's predictions in 16 bits costs
    left, right = ({t.name: t for t in GGUFReader(file).tensors} for file in (source, tmp_path / "back.gguf"))
    same = [np.array_equal(t.data, right[n].data) for n, t in left.items() if t.tensor_type.name == "Q4_0"]
    assert all(same)
    assert len(same) > 10


def test_the_names_of_targets() -> None:
    from fewbits.cli.convert import KINDS as OFFERED
    from fewbits.pipeline._conversion import NAMES

    assert set(OFFERED) == set(NAMES)
    assert set(NAMES.values()) == {name for name, kind in KINDS.items() if kind.written}
