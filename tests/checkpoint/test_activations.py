"""Activations on disk: what compressed-tensors' own classes read in our configuration, and our reader gives back."""

from __future__ import annotations

import json
import re

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from folders import foreign, quantized, same, write
from safetensors.torch import load_file, save_file

from fewbits.checkpoint import KINDS, Entry, cache_scales, input_scale, is_scale, open_checkpoint
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import ACTIVATIONS, FORMATS, Float, QTensor

COMPRESSED, OWN = KINDS["compressed-tensors"], KINDS["fewbits"]
FP32 = Float(torch.float32)
PAIRS = [
    (weight, inputs)
    for element, weights in {"int8": ("int8", "int8-tensor"), "fp8": ("fp8-e4m3", "fp8-e4m3-tensor")}.items()
    for weight in weights
    for inputs in (f"{element}-token", f"{element}-tensor", f"{element}-static")
]
ATTENTION = "model.layers.0.self_attn"
SCALE = 0.037


def scale(value=SCALE):
    return QTensor(FP32, torch.tensor([value]), {})


def model_of(weight, inputs, module="model.layers.0.mlp.up_proj"):
    """(tensors, inputs) of a matrix whose inputs are rounded, its scale if it has one, and a norm."""
    torch.manual_seed(0)
    format = ACTIVATIONS[inputs]
    tensors = {f"{module}.weight": quantized(FORMATS[weight], torch.randn(24, 64))}
    marks = {f"{module}.weight": format}
    if format.static:
        tensors[f"{module}.input_scale"], marks[f"{module}.input_scale"] = scale(), format
    tensors["model.norm.weight"] = QTensor(FP32, torch.ones(64), {})
    return tensors, marks


def cached(tensors, marks, format="fp8-static"):
    """The same with scales for the cache of an attention."""
    for number, entry in enumerate(cache_scales(ATTENTION, ACTIVATIONS[format])):
        tensors[entry.name], marks[entry.name] = scale(0.5 + number), entry.inputs
    return tensors, marks


def configuration(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def edit(path, change):
    """Change the quantization_config of a folder."""
    whole = json.loads((path / "config.json").read_text())
    change(whole["quantization_config"])
    (path / "config.json").write_text(json.dumps(whole))


@pytest.mark.parametrize("kind", [COMPRESSED, OWN])
@pytest.mark.parametrize(("weight", "inputs"), PAIRS)
def test_both_kinds_give_everything_back(tmp_path, kind, weight, inputs):
    tensors, marks = cached(*model_of(weight, inputs), f"{inputs.split('-')[0]}-static")
    digests = write(kind, tmp_path / "out", tensors, inputs=marks, rows=5)
    found, reader = open_checkpoint(tmp_path / "out")
    assert found.name == kind.name
    assert reader.entries.keys() == tensors.keys()
    for name, q in tensors.items():
        assert reader.entries[name] == Entry(name, q.shape, q.format, marks.get(name))
        assert same(reader.read(name), q)
    assert kind.rehash(tmp_path / "out") == digests
    assert {n for n, e in reader.entries.items() if is_scale(e)} == {n for n in tensors if n.endswith("_scale")}


@pytest.mark.parametrize(("weight", "inputs"), PAIRS)
def test_the_librarys_classes_read_the_scheme(tmp_path, weight, inputs):
    tensors, marks = model_of(weight, inputs)
    write(COMPRESSED, tmp_path / "out", tensors, inputs=marks)
    config = QuantizationConfig.model_validate(configuration(tmp_path / "out"))
    group = config.config_groups["group_0"]
    arguments, scope = group.input_activations, inputs.split("-")[1]
    assert group.format == config.format == ("int-quantized" if weight.startswith("int8") else "float-quantized")
    assert (arguments.num_bits, arguments.symmetric) == (8, True)
    assert arguments.type == group.weights.type == ("int" if weight.startswith("int8") else "float")
    assert arguments.strategy == ("token" if scope == "token" else "tensor")
    assert arguments.dynamic is (scope != "static")
    decoded = foreign(COMPRESSED, tmp_path / "out")
    assert decoded.keys() == tensors.keys()
    assert all(torch.equal(decoded[name], q.dequantize()) for name, q in tensors.items())


def test_arrays_as_engines_expect_them(tmp_path):
    tensors, marks = cached(*model_of("int8", "int8-static"))
    write(COMPRESSED, tmp_path / "out", tensors, inputs=marks)
    arrays = load_file(tmp_path / "out/model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    assert {n: (a.dtype, tuple(a.shape)) for n, a in arrays.items() if n != "model.norm.weight"} == {
        f"{module}.weight": (torch.int8, (24, 64)),
        f"{module}.weight_scale": (torch.float32, (24, 1)),
        f"{module}.input_scale": (torch.float32, (1,)),
        f"{ATTENTION}.k_scale": (torch.float32, (1,)),
        f"{ATTENTION}.v_scale": (torch.float32, (1,)),
    }
    assert arrays[f"{module}.input_scale"] == torch.tensor(SCALE)
    scheme = QuantizationConfig.model_validate(configuration(tmp_path / "out")).kv_cache_scheme
    assert (scheme.num_bits, scheme.type, scheme.strategy) == (8, "float", "tensor")
    assert (scheme.dynamic, scheme.symmetric) == (False, True)


def test_a_cache_alone_can_be_quantized(tmp_path):
    tensors, marks = cached({"model.norm.weight": QTensor(FP32, torch.ones(4), {})}, {})
    write(COMPRESSED, tmp_path / "out", tensors, inputs=marks)
    config = QuantizationConfig.model_validate(configuration(tmp_path / "out"))
    assert (config.format, config.config_groups) == ("dense", {})
    kind, reader = open_checkpoint(tmp_path / "out")
    assert kind.name == "compressed-tensors"
    assert reader.entries.keys() == tensors.keys()


def test_modules_with_and_without_rounded_inputs_are_two_groups(tmp_path):
    tensors, marks = model_of("int8", "int8-token")
    tensors["model.layers.0.mlp.down_proj.weight"] = quantized(FORMATS["int8"], torch.randn(8, 24))
    write(COMPRESSED, tmp_path / "out", tensors, inputs=marks)
    assert configuration(tmp_path / "out")["format"] == "mixed-precision"
    groups = configuration(tmp_path / "out")["config_groups"].values()
    found = {g["targets"][0].split("\\.")[-1].strip("$"): (g["format"], g["input_activations"]) for g in groups}
    assert found["down_proj"] == ("pack-quantized", None)
    assert found["up_proj"][0] == "int-quantized"
    assert found["up_proj"][1]["strategy"] == "token"
    _, reader = open_checkpoint(tmp_path / "out")
    assert {n: e.inputs and e.inputs.name for n, e in reader.entries.items() if "proj" in n} == {
        "model.layers.0.mlp.up_proj.weight": "int8-token",
        "model.layers.0.mlp.down_proj.weight": None,
    }


@pytest.mark.parametrize(
    ("kind", "name", "weight", "inputs", "message"),
    [
        ("compressed-tensors", "m.weight", "int8-g32", "int8-token", "one per group"),
        ("compressed-tensors", "m.weight", "int8-asym", "int8-token", "symmetric 8-bit weights, not int8-asym"),
        ("compressed-tensors", "m.weight", "int4", "int8-token", "symmetric 8-bit weights, not int4"),
        ("compressed-tensors", "m.weight", "fp8-e4m3", "int8-token", "multiplied by integers"),
        ("compressed-tensors", "m.weight", "fp32", "int8-token", "rounded inputs need rounded weights"),
        ("compressed-tensors", "model.embed_tokens.weight", "int8", "int8-token", "belong to linear layers"),
        ("compressed-tensors", "l.mlp.experts.3.up_proj.weight", "fp8-e4m3", "fp8-token", "experts into one step"),
        ("fewbits", "m.weight", "nf4", "int8-token", "multiplied by integers, not nf4"),
        ("fewbits", "model.embed_tokens.weight", "int8", "int8-token", "belong to linear layers"),
        ("fewbits", "m.input_scale", "fp32", "int8-token", "rounded inputs need rounded weights"),
        ("fewbits", "m.input_scale", "fp16", "int8-static", r"a static scale is float32 \[1\]"),
        ("gguf", "m.weight", "q8_0", "int8-token", "GGUF file cannot say"),
        ("huggingface", "m.weight", "fp32", "int8-token", "folder cannot say"),
    ],
)
def test_refusals(kind, name, weight, inputs, message):
    trouble = KINDS[kind].admits(Entry(name, (32, 64), FORMATS[weight], ACTIVATIONS[inputs]))
    assert re.search(message, trouble)
    assert trouble.startswith(name)


def test_the_own_kind_holds_what_only_fewbits_multiplies():
    for weight in ("int8-asym", "int4", "int3-asym-tensor"):
        assert OWN.admits(Entry("m.weight", (32, 64), FORMATS[weight], ACTIVATIONS["int8-token"])) is None


def test_scales_are_declared_with_what_they_are_scales_of(tmp_path):
    static = ACTIVATIONS["int8-static"]
    weight = Entry("m.weight", (32, 64), FORMATS["int8"], static)
    assert input_scale(weight) == Entry("m.input_scale", (1,), FP32, static)
    keys, values = cache_scales("a", static)
    for kind in (COMPRESSED, OWN):
        for entries, message in [
            ([weight], r"m\.input_scale is missing \(int8-static\)"),
            ([input_scale(weight)], r"m\.input_scale \(int8-static\) belongs to nothing"),
            ([keys], r"a\.v_scale is missing"),
            ([values], r"a\.k_scale is missing"),
            ([keys, values, *cache_scales("b", ACTIVATIONS["fp8-static"])], "belongs to nothing|is missing"),
        ]:
            with pytest.raises(UnsupportedError, match=message):
                kind.create(tmp_path / "out", entries, tmp_path, {})


@pytest.fixture
def static_folder(tmp_path):
    tensors, marks = cached(*model_of("int8", "int8-static"))
    write(COMPRESSED, tmp_path / "out", tensors, inputs=marks)
    return tmp_path / "out"


@pytest.mark.parametrize(
    "change",
    [
        {"symmetric": False},
        {"strategy": "group", "group_size": 32},
        {"dynamic": "local"},
        {"num_bits": 4},
        {"type": "float"},
    ],
)
def test_schemes_of_others_are_left_out_with_a_warning(static_folder, caplog, change):
    edit(static_folder, lambda c: c["config_groups"]["group_0"]["input_activations"].update(change))
    edit(static_folder, lambda c: c["kv_cache_scheme"].update(dynamic=True))
    _, reader = open_checkpoint(static_folder)
    assert {entry.inputs for entry in reader.entries.values()} == {None}
    assert not any(name.endswith("_scale") for name in reader.entries)
    assert "the input of Linear" in caplog.text
    assert "the key-value cache stays in floating point" in caplog.text


def test_sixteen_bit_scales_of_others_are_read(static_folder):
    arrays = load_file(static_folder / "model.safetensors")
    arrays |= {
        name: a.bfloat16().reshape(())
        for name, a in arrays.items()
        if name.endswith(("t_scale", "v_scale")) and a.numel() == 1
    }
    save_file(arrays, static_folder / "model.safetensors", {"format": "pt"})
    _, reader = open_checkpoint(static_folder)
    found = reader.read("model.layers.0.mlp.up_proj.input_scale").dequantize()
    assert found == torch.tensor(SCALE).bfloat16().float()
    assert is_scale(reader.entries["model.layers.0.mlp.up_proj.input_scale"])


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("up_proj.input_scale", r"'model\.layers\.0\.mlp\.up_proj\.input_scale' is missing"),
        ("self_attn.", "has a kv_cache_scheme, but the files have no"),
    ],
)
def test_missing_scales_are_named(static_folder, without, message):
    arrays = load_file(static_folder / "model.safetensors")
    save_file({n: a for n, a in arrays.items() if without not in n}, static_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(static_folder)


def test_a_scale_is_one_number(static_folder):
    arrays = load_file(static_folder / "model.safetensors")
    arrays[f"{ATTENTION}.k_scale"] = torch.ones(2)
    save_file(arrays, static_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"k_scale' is torch\.float32 \[2\], must be one"):
        open_checkpoint(static_folder)
