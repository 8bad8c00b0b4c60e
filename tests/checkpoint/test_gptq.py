"""gptq: codes and zero-points lie where GPTQModel looks for them, and nothing it writes is read otherwise."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from importlib.metadata import version

import pytest
import torch
from folders import foreign, quantized, rows_of, same, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import save_model

import fewbits
from fewbits.checkpoint import KINDS, Entry, open_checkpoint
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import ACTIVATIONS, FORMATS, Affine, Float, QTensor
from fewbits.formats.act_order import ActOrder

V1, V2 = KINDS["gptq"], KINDS["gptq-v2"]
NORM = QTensor(Float(torch.float16), torch.ones(12).half(), {})


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(bits, group, *, symmetric, shape=(32, 64), seed=0):
    """Codes and params of every value, scales that FP16 holds, zero-points from 1."""
    format, draw = Affine(bits=bits, symmetric=symmetric, group=group), torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, shape, generator=draw)
    groups = format.groups(shape)
    params = {"scale": torch.randn(groups, generator=draw).half().float()}
    if symmetric:
        return QTensor(format, (codes - (1 << bits - 1)).to(torch.int8), params)
    zero = torch.randint(1, 1 << bits, groups, generator=draw).float()
    return QTensor(format, codes.to(torch.uint8), params | {"zero": zero})


def act_order(bits=4, *, symmetric=False, shape=(32, 64), group=16):
    q = integers(bits, group, symmetric=symmetric, shape=shape)
    order = (torch.randperm(shape[1], generator=torch.Generator().manual_seed(1)) // group).int()
    return QTensor(ActOrder(q.format), q.codes, q.params | {"order": order})


def configuration(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def configure(path, **changes):
    whole = json.loads((path / "config.json").read_text())
    whole["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(whole))


def rewrite(path, without=(), **arrays):
    file = path / "model.safetensors"
    kept = {name: array for name, array in load_file(file).items() if name not in without}
    save_file(kept | {name.replace("__", "."): array for name, array in arrays.items()}, file, {"format": "pt"})


@pytest.mark.parametrize(("kind", "stored"), [(V1, 0x21), (V2, 0x32)])
def test_bytes_worked_out_by_hand(tmp_path, kind, stored):
    """Eight outputs, sixteen inputs: word 0 of output 0 has inputs 0 … 7 from its lowest bits on."""
    format = FORMATS["int4-asym-g16"]
    codes = torch.arange(8 * 16).view(8, 16).remainder(16).to(torch.uint8)
    codes[1] = 15
    zero = torch.tensor([[2.0], [3.0], *6 * [[8.0]]])
    scale = torch.arange(1, 9).view(8, 1) / 8
    q = QTensor(format, codes, {"scale": scale, "zero": zero})
    write(kind, tmp_path / "out", {"m.weight": q, "norm.weight": NORM})
    arrays = load_file(tmp_path / "out/model.safetensors")
    assert {name: (a.dtype, tuple(a.shape)) for name, a in arrays.items()} == {
        "m.qweight": (torch.int32, (2, 8)),
        "m.qzeros": (torch.int32, (1, 1)),
        "m.scales": (torch.float16, (1, 8)),
        "m.g_idx": (torch.int32, (16,)),
        "norm.weight": (torch.float16, (12,)),
    }
    assert arrays["m.qweight"][:, 0].tolist() == [0x76543210, 0xFEDCBA98 - (1 << 32)]
    assert arrays["m.qweight"][:, 1].tolist() == [-1, -1]
    assert int(arrays["m.qzeros"]) & 0xFF == stored
    assert int(arrays["m.qzeros"]) >> 8 & 0xF == (7 if kind is V1 else 8)
    assert arrays["m.scales"][0].tolist() == scale.flatten().tolist()
    assert arrays["m.g_idx"].tolist() == [0] * 16


@pytest.mark.parametrize("kind", [V1, V2])
@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_zero_points_are_the_usual_words(tmp_path, kind, bits, word):
    write(kind, tmp_path / "out", {"m.weight": integers(bits, 32, symmetric=True)})
    found = load_file(tmp_path / "out/model.safetensors")["m.qzeros"]
    step = sum(1 << at for at in range(0, 32, bits))
    expected = word if kind is V1 else word + step
    assert {int(each) & 0xFFFFFFFF for each in found.flatten()} == {expected}


def test_three_bits_are_a_stream(tmp_path):
    """The layer of GPTQModel takes code 10 from bits 30, 31 of one word and bit 0 of the next."""
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, 10], codes[0, 21] = 0b101, 0b110
    params = {"scale": torch.ones(32, 1), "zero": torch.ones(32, 1)}
    write(V2, tmp_path / "out", {"m.weight": QTensor(FORMATS["int3-asym-g32"], codes, params)})
    words = load_file(tmp_path / "out/model.safetensors")["m.qweight"][:, 0]
    assert [int(w) & 0xFFFFFFFF for w in words] == [0b01 << 30, 0b1 | 0b0 << 31, 0b11]


@pytest.mark.parametrize("kind", [V1, V2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 64, "row"])
def test_everything_comes_back(tmp_path, kind, bits, symmetric, group):
    tensors = {"a.weight": integers(bits, group, symmetric=symmetric, shape=(96, 128)), "norm.weight": NORM}
    digests = write(kind, tmp_path / "out", tensors, rows=7)
    found, reader = open_checkpoint(tmp_path / "out")
    assert found is kind
    assert "quantization_config" not in reader.config
    assert {name: (e.shape, e.format) for name, e in reader.entries.items()} == {
        name: (q.shape, q.format) for name, q in tensors.items()
    }
    assert all(same(reader.read(name), q) for name, q in tensors.items())
    for rows in (slice(0, 1), slice(5, 40), slice(31, 33), slice(64, 96), slice(95, 200)):
        assert same(reader.read("a.weight", rows), rows_of(tensors["a.weight"], rows)), rows
    assert kind.rehash(tmp_path / "out") == digests


@pytest.mark.parametrize("kind", [V1, V2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_in_another_order_come_back(tmp_path, kind, symmetric):
    q = act_order(symmetric=symmetric)
    write(kind, tmp_path / "out", {"m.weight": q})
    assert configuration(tmp_path / "out")["desc_act"] is True
    reader = kind.open(tmp_path / "out")
    found = reader.read("m.weight")
    assert same(found, q)
    assert torch.equal(found.params["order"], q.params["order"])
    plain, order = q.format.integers, q.params["order"].long()
    sorted_columns = order.argsort(stable=True)
    params = {key: p for key, p in q.params.items() if key != "order"}
    expected = plain.decode(q.codes[:, sorted_columns], params)
    assert torch.equal(found.dequantize()[:, sorted_columns], expected)
    with pytest.raises(CheckpointError, match="read it whole"):
        reader.read("m.weight", slice(0, 2))


def test_an_order_that_changes_nothing_is_the_plain_format(tmp_path):
    q = integers(4, 16, symmetric=True)
    write(V1, tmp_path / "out", {"m.weight": q})
    configure(tmp_path / "out", desc_act=True)
    assert V1.open(tmp_path / "out").entries["m.weight"].format == q.format


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, False), (2, False)])
def test_without_a_list_groups_are_neighbours(tmp_path, bits, symmetric):
    q = integers(bits, 16, symmetric=symmetric)
    write(V1, tmp_path / "out", {"m.weight": q})
    rewrite(tmp_path / "out", without=["m.g_idx"])
    assert same(V1.open(tmp_path / "out").read("m.weight"), q)


def test_scales_of_16_bits_keep_their_type(tmp_path):
    format = Affine(bits=4, group=32, group_scale=torch.bfloat16)
    q = quantized(format, random(32, 64))
    write(V1, tmp_path / "out", {"m.weight": q})
    assert load_file(tmp_path / "out/model.safetensors")["m.scales"].dtype == torch.bfloat16
    reader = V1.open(tmp_path / "out")
    assert reader.entries["m.weight"].format == format
    assert same(reader.read("m.weight"), q)


def test_version_1_refuses_a_zero_point_of_0_and_offers_version_2(tmp_path):
    q = integers(4, 16, symmetric=False)
    q.params["zero"][3, 1] = 0
    with pytest.raises(UnsupportedError, match=r"m\.weight: a zero-point is 0.*write gptq-v2 instead"):
        write(V1, tmp_path / "out", {"m.weight": q})
    assert not (tmp_path / "out").exists()
    write(V2, tmp_path / "out", {"m.weight": q})
    assert same(V2.open(tmp_path / "out").read("m.weight"), q)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_version_1_is_read_as_gptqmodel_adds_1(tmp_path, caplog, bits):
    """It subtracts whole words when it saves and adds them when it loads, so a zero-point of 0 borrows and returns."""
    q = integers(bits, 16, symmetric=False)
    q.params["zero"][3, 1] = 0
    write(V2, tmp_path / "out", {"m.weight": q})
    step = sum(1 << at for at in range(0, 32, bits))
    stored = load_file(tmp_path / "out/model.safetensors")["m.qzeros"]
    rewrite(tmp_path / "out", m__qzeros=stored - step)
    configure(tmp_path / "out", checkpoint_format="gptq")
    assert same(V1.open(tmp_path / "out").read("m.weight"), q)
    assert "a zero-point of 0 in version 1" in caplog.text


def test_scales_that_are_no_float16_numbers_are_refused(tmp_path):
    q = quantized(FORMATS["int4"], random(32, 64))
    with pytest.raises(UnsupportedError, match=r"one a row, are no float16 numbers.*-g128"):
        write(V1, tmp_path / "out", {"m.weight": q})


def test_which_formats_it_holds():
    held = {f.name for f in FORMATS.values() if V1.admits(Entry("m.weight", (32, 128), f)) is None}
    ends = [f"{zero}{group}" for zero in ("", "-asym") for group in ("", "-g16", "-g32", "-g64", "-g128")]
    assert held == {"fp32", "fp16", "bf16"} | {f"int{bits}{end}" for bits in (2, 3, 4, 8) for end in ends}


@pytest.mark.parametrize(
    ("name", "shape", "format", "message"),
    [
        ("m.weight", (32, 64), "nf4", "integers of 2, 3, 4, 8 bits with 16-bit scales, not nf4"),
        ("m.weight", (32, 64), "int5-g32", "not int5-g32"),
        ("m.weight", (32, 64), "int4-tensor", "not one a matrix"),
        ("m.weight", (32, 72), "int4-g16", "in_features 72 is no multiple of int4-g16's group of 16"),
        ("m.weight", (32, 100), "int4", "in_features 100 times 4 bits is no multiple of 32"),
        ("m.weight", (30, 64), "int4-g32", "out_features 30 times 4 bits is no multiple of 32"),
        ("m.weight", (16, 64), "int3-g32", "out_features 16 times 3 bits"),
        ("model.embed_tokens.weight", (32, 64), "int4-g32", "quantizes linear layers"),
        ("experts", (2, 32, 64), "int4-g32", "quantizes linear layers"),
    ],
)
def test_refusals(tmp_path, name, shape, format, message):
    entry = Entry(name, shape, FORMATS[format])
    assert message in V1.admits(entry)
    with pytest.raises(UnsupportedError, match=re.escape(name)):
        V1.create(tmp_path / "out", [entry], tmp_path, {})


def test_rounded_inputs_are_refused():
    entry = Entry("m.weight", (32, 64), FORMATS["int8"], ACTIVATIONS["int8-token"])
    assert "cannot say that inputs are rounded to int8-token" in V1.admits(entry)


def test_the_configuration_of_one_scheme(tmp_path):
    write(V1, tmp_path / "out", {"a.weight": integers(4, 32, symmetric=True), "lm_head.weight": NORM})
    assert configuration(tmp_path / "out") == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"fewbits:{version('fewbits')}"]},
    }


def test_the_configuration_of_several(tmp_path):
    kept = QTensor(Float(torch.float16), random(32, 64).half(), {})
    tensors = {f"layers.{i}.{p}.weight": integers(4, 32, symmetric=True) for i in range(3) for p in ("q", "up")}
    tensors |= {"layers.1.q.weight": integers(8, 16, symmetric=False), "layers.2.up.weight": kept}
    tensors |= {"lm_head.weight": integers(8, "row", symmetric=True), "embed_tokens.weight": kept}
    write(V2, tmp_path / "out", tensors)
    found = configuration(tmp_path / "out")
    assert found["checkpoint_format"] == "gptq_v2"
    assert found["lm_head"] is True
    eight = {"bits": 8, "group_size": 16, "sym": False, "desc_act": False}
    assert found["dynamic"] == {
        r"-:^layers\.2\.up$": {},
        r"+:^layers\.1\.q$": eight,
        r"+:^lm_head$": {"bits": 8, "group_size": -1, "sym": True, "desc_act": False},
    }
    reader = V2.open(tmp_path / "out")
    assert all(same(reader.read(name), q) for name, q in tensors.items())


def test_a_folder_without_quantized_layers_is_plain(tmp_path):
    write(V1, tmp_path / "out", {"a.weight": NORM})
    assert open_checkpoint(tmp_path / "out")[0].name == "huggingface"


def test_the_file_that_came_before_the_configuration_is_read(tmp_path):
    q = integers(4, 32, symmetric=True)
    write(V1, tmp_path / "out", {"m.weight": q})
    whole = json.loads((tmp_path / "out/config.json").read_text())
    old = {key: whole["quantization_config"][key] for key in ("bits", "group_size", "desc_act", "sym")}
    del whole["quantization_config"]
    (tmp_path / "out/config.json").write_text(json.dumps(whole))
    (tmp_path / "out/quantize_config.json").write_text(json.dumps(old))
    kind, reader = open_checkpoint(tmp_path / "out")
    assert kind is V1
    assert same(reader.read("m.weight"), q)


@pytest.mark.skipif(V1.decoder is None, reason="needs gptqmodel")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its temporary folders, left behind
@pytest.mark.parametrize("kind", [V1, V2])
def test_gptqmodel_decodes_every_matrix_bit_for_bit(tmp_path, kind):
    tensors = {
        f"{bits}{symmetric}.weight": integers(bits, 16, symmetric=symmetric)
        for bits in (2, 3, 4, 8)
        for symmetric in (True, False)
    } | {"order.weight": act_order(), "norm.weight": NORM}
    write(kind, tmp_path / "out", tensors)
    decoded = foreign(kind, tmp_path / "out")
    assert decoded.keys() == tensors.keys()
    assert all(torch.equal(decoded[name], q.dequantize()) for name, q in tensors.items())


@pytest.mark.parametrize("format", ["int4-g32", "int8-asym-g16"])
def test_models_are_written_read_and_run(tmp_path, format):
    save_model(tmp_path / "source", "llama", hidden_size=64, intermediate_size=128)
    made = fewbits.quantize(tmp_path / "source", tmp_path / "out", format=format, kind="gptq-v2")
    assert {t.format for t in made.tensors if "proj" in t.name} == {format}
    assert fewbits.verify(tmp_path / "out", tmp_path / "source").passed
    fewbits.quantize(tmp_path / "source", tmp_path / "ours", format=format, kind="fewbits")
    ids = torch.arange(2, 34).view(1, 32)
    with torch.inference_mode():
        logits = [fewbits.load(tmp_path / path)(ids).logits for path in ("out", "ours")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", ["gptq", "gptq-v2"])
def test_what_only_a_scale_a_row_would_fit_is_kept(tmp_path, kind):
    """72 columns fit no group, and a scale a row, in FP32, is no 16-bit number: GPTQ stores those only."""
    save_model(tmp_path / "source", "llama", hidden_size=64, intermediate_size=72)
    made = fewbits.quantize(tmp_path / "source", tmp_path / "out", format="int8-g64", kind=kind)
    formats = {t.name.split(".")[-2]: (t.format, t.reason) for t in made.tensors if "proj" in t.name}
    assert formats.pop("down_proj")[0] == "fp32"
    assert {format for format, _ in formats.values()} == {"int8-g64"}
    for t in made.tensors:
        assert "down_proj" not in t.name or "in_features 72 is no multiple of int8-g64" in t.reason


def test_a_model_with_its_columns_in_another_order_runs(tmp_path):
    save_model(tmp_path / "source", "llama", hidden_size=64, intermediate_size=128)
    reader = open_checkpoint(tmp_path / "source")[1]
    tensors, plain = {}, {}
    for name in reader.entries:
        whole = reader.read(name)
        tensors[name] = act_order(shape=whole.shape) if "proj" in name else whole
        plain[name] = QTensor(Float(torch.float32), tensors[name].dequantize(), {})
    write(V1, tmp_path / "out", tensors, config=reader.config)
    write(KINDS["huggingface"], tmp_path / "plain", plain, config=reader.config)
    ids = torch.arange(2, 34).view(1, 32)
    with torch.inference_mode():
        ours, expected = (fewbits.load(tmp_path / path)(ids).logits for path in ("out", "plain"))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_biases_of_zeros_that_the_model_has_no_place_for_are_left_out(tmp_path):
    """AutoGPTQ gave every layer a bias."""
    save_model(tmp_path / "source", "llama", hidden_size=64, intermediate_size=128)
    fewbits.quantize(tmp_path / "source", tmp_path / "out", format="int4-g32", kind="gptq")
    ids = torch.arange(2, 34).view(1, 32)
    with torch.inference_mode():
        before = fewbits.load(tmp_path / "out")(ids).logits
        rewrite(tmp_path / "out", model__layers__0__mlp__up_proj__bias=torch.zeros(128).half())
        assert torch.equal(fewbits.load(tmp_path / "out")(ids).logits, before)
    rewrite(tmp_path / "out", model__layers__0__mlp__up_proj__bias=torch.ones(128).half())
    with pytest.raises(CheckpointError, match="no parameter for model"):
        fewbits.load(tmp_path / "out")


def test_version_1_with_zero_points_is_written_with_a_warning(tmp_path, caplog):
    """GPTQModel looks for its own name in the file before it loads one."""
    write(V1, tmp_path / "symmetric", {"m.weight": integers(4, 16, symmetric=True)})
    assert not caplog.text
    write(V1, tmp_path / "out", {"m.weight": integers(4, 16, symmetric=False)})
    assert "it loads gptq-v2" in caplog.text


@pytest.fixture
def folder(tmp_path):
    write(V1, tmp_path / "out", {"m.weight": integers(4, 16, symmetric=True), "norm.weight": NORM})
    return tmp_path / "out"


def read_all(path):
    reader = open_checkpoint(path)[1]
    for name in reader.entries:
        reader.read(name).dequantize()


I32 = torch.int32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"m__qweight": torch.zeros(8, 31, dtype=I32)}, r"'m\.qweight' is torch.int32 \[8, 31\]|needs"),
        ({"m__qweight": torch.zeros(9, 32, dtype=I32)}, r"\[9, 32\], but int4-g16 \[32, 64\], as config.json"),
        ({"m__qweight": torch.zeros(32, dtype=I32)}, "must be a matrix"),
        ({"m__qweight": torch.zeros(8, 32)}, "is torch.float32"),
        ({"m__qzeros": torch.zeros(3, 4, dtype=I32)}, "qzeros"),
        ({"m__scales": torch.zeros(4, 32, dtype=I32)}, "must be floating point"),
        ({"m__scales": torch.full((4, 32), torch.inf).half()}, "scales that are not finite"),
        ({"m__scales": torch.ones(5, 32).half()}, r"'m\.scales' is"),
        ({"m__g_idx": torch.zeros(0, dtype=I32)}, "g_idx is empty"),
        ({"m__g_idx": torch.tensor(0, dtype=I32)}, "g_idx is empty"),
        ({"m__g_idx": torch.zeros(64, dtype=torch.int64)}, "must be int32"),
        ({"m__g_idx": torch.full((64,), 4, dtype=I32)}, "g_idx has group 4 to 4, but group_size 16 of config"),
        ({"m__g_idx": torch.full((64,), -1, dtype=I32)}, "g_idx has group -1"),
        ({"m__g_idx": torch.arange(64, dtype=I32).flip(0) // 16}, "says desc_act false"),
        ({"m__qzeros": torch.zeros(4, 4, dtype=I32)}, "says sym, so every zero-point is 8, but qzeros holds 1"),
        ({"m__weight": torch.zeros(32, 64)}, "beside its quantized form"),
        ({"embed_tokens__qweight": torch.zeros(8, 32, dtype=I32)}, "quantized embedding"),
    ],
)
def test_damage_is_named(folder, arrays, message):
    rewrite(folder, **arrays)
    with pytest.raises(CheckpointError, match=message):
        read_all(folder)


@pytest.mark.parametrize("name", ["m.qzeros", "m.scales"])
def test_missing_arrays_are_named(folder, name):
    rewrite(folder, without=[name])
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is missing"):
        read_all(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, r"'m\.qweight' is torch.int32 \[8, 32\], but int8-g16 .* as config.json describes it"),
        ({"group_size": 32}, r"'m\.\w+' is|g_idx"),
        ({"group_size": 0}, "group_size 0"),
        ({"bits": 5}, "bits 5"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"pack_dtype": "int16"}, "words of 'int16'"),
        ({"dynamic": {"-:^m$": {}}}, r"says that it is not quantized \('-:\^m\$'\), but 'm.qweight' is there"),
        ({"dynamic": {"(": {}}}, "no valid expression"),
        ({"dynamic": {"-:(?i)M": {}}}, "says that it is not quantized"),
        ({"dynamic": [1]}, "must have an object"),
        ({"dynamic": {"m": 3}}, "must have an object"),
    ],
)
def test_configurations_that_disagree_are_named(folder, changes, message):
    configure(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_all(folder)


@pytest.mark.parametrize("expression", [r"-:^(\w+\.?)*!$", "+:(.*)*(.*)*x$", "(a+)+$"])
def test_an_expression_that_backtracks_without_end_is_matched_all_the_same(tmp_path, expression):
    """By Python's own `re` the first would take 2^60 steps on this name."""
    name = "model." + "a" * 60
    write(V1, tmp_path / "out", {f"{name}.weight": integers(4, 32, symmetric=True, shape=(32, 32))})
    configure(tmp_path / "out", dynamic={expression: {"bits": 2}})
    assert KINDS["gptq"].open(tmp_path / "out").read(f"{name}.weight").shape == (32, 32)


def test_a_configuration_without_quantized_tensors(folder):
    rewrite(folder, without=["m.qweight"])
    with pytest.raises(CheckpointError, match="no tensor is named"):
        read_all(folder)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "out"
    write(V1, path, {"m.weight": integers(4, 16, symmetric=False), "norm.weight": NORM})
    return path, (path / "config.json").read_text(), load_file(path / "model.safetensors")


JUNK = st.sampled_from(
    [
        *(None, -1, 0, 1, 2, 3, 3.5, 2**31, 10**30, True, "x", "gptq_v2", "-:.*", [], [[]], {}, {"m": {}}, {"a": 1}),
        *({".*": {"bits": 2}}, {"+:m": {"group_size": 10**20}}, {"m": {"sym": True}}),
    ]
)
KEYS = ["quant_method", "checkpoint_format", "bits", "group_size", "sym", "desc_act", "dynamic", "pack_dtype"]


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(KEYS), JUNK, min_size=1, max_size=3))
def test_a_damaged_configuration_raises_nothing_else(shared_folder, changes):
    path, sound, arrays = shared_folder
    save_file(arrays, path / "model.safetensors")
    (path / "config.json").write_text(sound)
    configure(path, **changes)
    with suppress(CheckpointError):
        read_all(path)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["m.qweight", "m.qzeros", "m.scales", "m.g_idx"]),
    shape=st.lists(st.integers(0, 65), max_size=3),
    dtype=st.sampled_from([torch.int32, torch.float16, torch.int64, torch.uint8, torch.bfloat16]),
    value=st.sampled_from([-(2**31), -1, 0, 1, 3, 100]),
)
def test_damaged_arrays_raise_nothing_else(shared_folder, name, shape, dtype, value):
    path, sound, arrays = shared_folder
    (path / "config.json").write_text(sound)
    save_file(arrays | {name: torch.full(shape, value).to(dtype)}, path / "model.safetensors")
    with suppress(CheckpointError):
        read_all(path)
