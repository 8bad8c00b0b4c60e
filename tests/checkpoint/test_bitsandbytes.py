"""bitsandbytes: bytes worked out by hand, the library's numbers where it is installed, refusals, damage."""

from __future__ import annotations

import json
import math

import pytest
import torch
from folders import foreign, quantized, same, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import save_model
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

import fewbits
from fewbits.checkpoint import KINDS, Entry, open_checkpoint
from fewbits.checkpoint.bitsandbytes import BLOCKS, STATE
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import FORMATS, Float, QTensor
from fewbits.formats.codebook import NF4, Fp4, NormalFloat
from fewbits.formats.llm_int8 import STEP

KIND = KINDS["bitsandbytes"]
NORM = QTensor(Float(torch.float16), torch.ones(12).half(), {})
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
IDS = torch.arange(2, 66).view(1, 64)


def matrix(name, rows, columns, seed=0):
    return quantized(FORMATS[name], torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def configuration(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def configure(path, quantization):
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))


def rewrite(path, remove=(), **arrays):
    file = path / "model.safetensors"
    kept = {name: a for name, a in load_file(file).items() if name not in remove}
    save_file(kept | arrays, file, {"format": "pt"})


def as_json(**facts):
    return torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)


def four_bits(codes, block, kind="nf4", nested=None):
    """Arrays of a weight 'a.weight' as bitsandbytes would store them, with scales 1, 2, 3, … of its blocks."""
    flat = codes.flatten()
    flat = torch.cat([flat, flat.new_zeros(flat.numel() % 2)])
    blocks = math.ceil(codes.numel() / block)
    facts = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(codes.shape)}
    table = {"nf4": NormalFloat, "fp4": Fp4}[kind].table
    return {
        "a.weight": (flat[::2] << 4 | flat[1::2]).unsqueeze(1),
        "a.weight.absmax": torch.arange(1.0, blocks + 1),
        "a.weight.quant_map": torch.tensor(table),
        f"a.weight{STATE}{kind}": as_json(**facts, **(nested or {})),
    }


def folder_of(path, arrays, quantization=FOUR):
    path.mkdir(exist_ok=True)
    save_file(arrays | {"norm.weight": torch.ones(12)}, path / "model.safetensors")
    configure(path, quantization)
    return path


def test_bytes_worked_out_by_hand(tmp_path):
    """Codes 0 … 15 twice a row, the first of two in the high nibble; a scale for each block of 32."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 2)
    q = QTensor(FORMATS["nf4-g32"], codes, {"scale": torch.tensor([[0.5], [2.0]])})
    write(KIND, tmp_path / "out", {"m.weight": q, "norm.weight": NORM}, config={"dtype": "bfloat16"})
    arrays = load_file(tmp_path / "out/model.safetensors")
    state = arrays.pop("m.weight.quant_state.bitsandbytes__nf4")
    assert json.loads(bytes(state.tolist())) == {
        "quant_type": "nf4",
        "blocksize": 32,
        "dtype": "bfloat16",
        "shape": [2, 32],
    }
    assert {name: (a.dtype, tuple(a.shape)) for name, a in arrays.items()} == {
        "m.weight": (torch.uint8, (32, 1)),
        "m.weight.absmax": (torch.float32, (2,)),
        "m.weight.quant_map": (torch.float32, (16,)),
        "norm.weight": (torch.float16, (12,)),
    }
    assert arrays["m.weight"].flatten().tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 4
    assert arrays["m.weight.absmax"].tolist() == [0.5, 2.0]
    assert arrays["m.weight.quant_map"].tolist() == list(NF4)
    found = configuration(tmp_path / "out")
    assert (found["load_in_4bit"], found["load_in_8bit"], found["bnb_4bit_quant_type"]) == (True, False, "nf4")
    assert found["llm_int8_skip_modules"] == ["lm_head", "decoder"]


def test_eight_bits_by_hand(tmp_path):
    """absmax 3: the largest is ±127, and −1.5 is −63.5, which rounds to the even −64."""
    q = quantized(FORMATS["llm-int8"], torch.tensor([[3.0, -1.5, 0.0], [0.0, 0.0, -0.25]]))
    write(KIND, tmp_path / "out", {"m.weight": q, "norm.weight": NORM})
    arrays = load_file(tmp_path / "out/model.safetensors")
    assert arrays["m.weight"].tolist() == [[127, -64, 0], [0, 0, -127]]
    assert arrays["m.SCB"].tolist() == [3.0, 0.25]
    assert (arrays["m.weight_format"].dtype, arrays["m.weight_format"].tolist()) == (torch.uint8, 0)
    expected = arrays["m.weight"] * arrays["m.SCB"].view(-1, 1) * 7.874015718698502e-3
    assert torch.equal(KIND.open(tmp_path / "out").read("m.weight").dequantize(), expected)


def test_eight_bits_round_twice():
    """(code · absmax) · step is another number than code · (absmax · step) for one weight in three."""
    q = matrix("llm-int8", 32, 64)
    once = q.codes * (q.params["absmax"] * STEP)
    assert 0.1 < float((once != q.dequantize()).float().mean()) < 0.6


@pytest.mark.parametrize("name", ["nf4", "nf4-g32", "nf4-g128", "fp4", "llm-int8"])
def test_our_reader_gives_everything_back(tmp_path, name):
    tensors = {"a.weight": matrix(name, 6, 256), "b.weight": matrix(name, 4, 128, 1), "norm.weight": NORM}
    digests = write(KIND, tmp_path / "out", tensors, rows=2)
    kind, reader = open_checkpoint(tmp_path / "out")
    assert kind is KIND
    assert "quantization_config" not in reader.config
    assert reader.entries == {n: Entry(n, q.shape, q.format) for n, q in tensors.items()}
    assert all(same(reader.read(n), q) for n, q in tensors.items())
    part, whole = reader.read("a.weight", slice(1, 4)), tensors["a.weight"]
    assert torch.equal(part.dequantize(), whole.dequantize()[1:4])
    assert reader.read("a.weight", slice(3, 3)).shape == (0, 256)
    assert KIND.rehash(tmp_path / "out") == digests
    with pytest.raises(CheckpointError, match="not a run of rows"):
        reader.read("a.weight", slice(0, 4, 2))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    block=st.sampled_from(BLOCKS[:4]),
    kind=st.sampled_from(["nf4", "fp4"]),
    data=st.data(),
)
def test_blocks_run_on_from_row_to_row(tmp_path_factory, rows, columns, block, kind, data):
    """Whatever block and shape, each weight has the scale of the block that its place in the flat matrix is in."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    quantization = FOUR | {"bnb_4bit_quant_type": kind}
    folder = folder_of(tmp_path_factory.mktemp("b") / "x", four_bits(codes, block, kind), quantization)
    table = torch.tensor({"nf4": NormalFloat, "fp4": Fp4}[kind].table)
    scale = torch.arange(rows * columns) // block + 1.0
    expected = table[codes.int()] * scale.view(rows, columns)
    reader = KIND.open(folder)
    assert torch.equal(reader.read("a.weight").codes, codes)
    assert torch.equal(reader.read("a.weight").dequantize(), expected)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    assert torch.equal(reader.read("a.weight", slice(start, stop)).dequantize(), expected[start:stop])


def test_double_quantization_by_hand(tmp_path):
    """Scale of block i: map[absmax_i] · nested_absmax[i // 256] + offset."""
    codes = torch.full((300, 64), 15, dtype=torch.uint8)
    arrays = four_bits(codes, 64, nested={"nested_blocksize": 256, "nested_offset": 0.5, "nested_dtype": "float32"})
    table = torch.linspace(-1, 1, 256)
    arrays |= {
        "a.weight.absmax": torch.arange(300).to(torch.uint8),
        "a.weight.nested_absmax": torch.tensor([0.25, 0.125]),
        "a.weight.nested_quant_map": table,
    }
    reader = KIND.open(folder_of(tmp_path / "x", arrays))
    found = reader.read("a.weight")
    assert found.format is not None
    assert reader.entries["a.weight"].format == FORMATS["nf4"]
    expected = torch.cat([table * 0.25 + 0.5, table[:44] * 0.125 + 0.5])
    assert torch.equal(found.dequantize()[:, 0], expected)
    assert torch.equal(reader.read("a.weight", slice(250, 260)).dequantize()[:, 0], expected[250:260])


def test_other_types_of_the_same_bytes(tmp_path):
    """bnb_4bit_quant_storage: the codes as bfloat16, for FSDP."""
    codes = torch.arange(128, dtype=torch.uint8).remainder(16).view(2, 64)
    arrays = four_bits(codes, 64)
    arrays["a.weight"] = arrays["a.weight"].flatten().view(torch.bfloat16).unsqueeze(1)
    assert torch.equal(KIND.open(folder_of(tmp_path / "x", arrays)).read("a.weight").codes, codes)


@pytest.mark.parametrize("name", ["nf4", "nf4-g128", "fp4", "llm-int8"])
@pytest.mark.parametrize("part", [1, 1 << 22])
def test_the_library_reads_the_same(tmp_path, monkeypatch, name, part):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("fewbits.checkpoint.bitsandbytes.FOREIGN_PART", part)
    tensors = {"a.weight": matrix(name, 6, 256), "norm.weight": NORM}
    write(KIND, tmp_path / "out", tensors)
    decoded = foreign(KIND, tmp_path / "out")
    assert decoded.keys() == tensors.keys()
    assert all(torch.equal(decoded[n], q.dequantize()) for n, q in tensors.items())


def test_which_formats_it_holds():
    held = {f.name for f in FORMATS.values() if KIND.admits(KIND.entry("m.weight", (32, 256), f)) is None}
    four = {f"{table}{group}" for table in ("nf4", "fp4") for group in ("", "-g32", "-g128", "-g256")}
    assert held == four | {"llm-int8", "fp32", "fp16", "bf16"}
    assert KIND.file_bytes(FORMATS["llm-int8"], (32, 256)) == 32 * 256 + 32 * 4 + 1


@pytest.mark.parametrize(
    ("name", "shape", "format", "message"),
    [
        ("m.weight", (8, 64), "int4-g64", "holds nf4, fp4 and llm-int8, not int4-g64"),
        ("m.weight", (8, 64), "nf4-dq", "another map"),
        ("m.weight", (8, 172), "nf4", "172 is not a multiple of 64"),
        ("model.embed_tokens.weight", (8, 64), "nf4", "linear layers"),
        ("l.mlp.experts.3.up_proj.weight", (8, 64), "nf4", "transformers fuses experts"),
        ("mlp.experts", (2, 8, 64), "nf4", "linear layers"),
    ],
)
def test_refusals(tmp_path, name, shape, format, message):
    entry = Entry(name, shape, FORMATS[format])
    assert message in KIND.admits(entry)
    with pytest.raises(UnsupportedError, match=message):
        KIND.create(tmp_path / "out", [entry], tmp_path, {})


def test_one_type_in_a_folder(tmp_path):
    entries = [Entry("a.weight", (8, 64), FORMATS["nf4"]), Entry("b.weight", (8, 64), FORMATS["llm-int8"])]
    with pytest.raises(UnsupportedError, match=r"a\.weight is nf4 and b\.weight is llm-int8"):
        KIND.create(tmp_path / "out", entries, tmp_path, {})


@pytest.mark.parametrize("name", ["nf4", "fp4", "llm-int8"])
def test_transformers_takes_the_configuration(tmp_path, name):
    """It replaces exactly the modules that are packed, with the type they are packed in."""
    save_model(tmp_path / "source", "llama", hidden_size=64, intermediate_size=128)
    made = fewbits.quantize(tmp_path / "source", tmp_path / "out", format=name, kind="bitsandbytes")
    found = configuration(tmp_path / "out")
    config = BitsAndBytesConfig.from_dict(found)
    assert config.quantization_method() == {"llm-int8": "llm_int8"}.get(name, name)
    packed = {t.name.removesuffix(".weight") for t in made.tensors if t.format == name}
    every = {t.name.removesuffix(".weight") for t in made.tensors if len(t.shape) == 2} | {"lm_head"}
    skipped = found["llm_int8_skip_modules"]
    assert packed
    assert {m for m in every if should_convert_module(m, skipped)} - {"model.embed_tokens"} == packed


@pytest.fixture
def folder(tmp_path):
    codes = torch.arange(256, dtype=torch.uint8).remainder(16).view(2, 128)
    return folder_of(tmp_path / "x", four_bits(codes, 64))


def state(**changes):
    facts = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 128]}
    return {f"a.weight{STATE}nf4": as_json(**(facts | changes))}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a.weight": torch.zeros(127, 1, dtype=torch.uint8)}, "has 127 bytes"),
        ({"a.weight.absmax": torch.ones(3)}, r"must be 4 of torch\.float32"),
        ({"a.weight.absmax": torch.ones(4, dtype=torch.uint8)}, r"must be 4 of torch\.float32"),
        ({"a.weight.absmax": torch.tensor([1.0, 2.0, float("nan"), 4.0])}, "NaN or Inf"),
        ({"a.weight.quant_map": torch.linspace(-1, 1, 16)}, "not the table of nf4"),
        ({"a.weight.quant_map": torch.full((16,), float("nan"))}, "not the table of nf4"),
        (state(quant_type="fp4"), "quant_type is 'fp4'"),
        (state(shape=[2, 64]), "has 128 bytes"),
        (state(shape=[2**40, 2]), "must be .out_features, in_features."),
        (state(shape=[True, 2]), "must be .out_features, in_features."),
        (state(blocksize=48), "blocksize is 48"),
        (state(nested_blocksize=256), "nested_offset None"),
        (state(nested_blocksize=256, nested_offset=10**400), "must be a size and a number"),
        (state(nested_blocksize=256, nested_offset=0.5), "torch.uint8"),
        ({f"a.weight{STATE}nf4": torch.zeros(8, dtype=torch.uint8)}, "is not JSON"),
        ({f"a.weight{STATE}nf4": torch.zeros(1 << 17, dtype=torch.uint8)}, "a little JSON"),
        ({f"a.weight{STATE}fp4": as_json(a=1)}, "two states|quant_type is None"),
        ({"b.weight": torch.zeros(4, 1, dtype=torch.uint8)}, "says what its codes stand for"),
        ({"b.SCB": torch.ones(4)}, r"'b\.weight' is missing"),
        ({"b.SCB": torch.ones(4), "b.weight": torch.ones(4, 4)}, "belongs to an int8 matrix"),
        ({"b.SCB": torch.ones(3), "b.weight": torch.ones(4, 4).to(torch.int8)}, "one for each row"),
    ],
)
def test_damage_is_named(folder, arrays, message):
    rewrite(folder, **arrays)
    with pytest.raises(CheckpointError, match=message):
        KIND.open(folder).read("a.weight")


@pytest.mark.parametrize("part", ["absmax", "quant_map"])
def test_missing_parts_are_named(folder, part):
    rewrite(folder, remove=[f"a.weight.{part}"])
    with pytest.raises(CheckpointError, match=rf"a\.weight\.{part}' is missing"):
        KIND.open(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (EIGHT, "'a.weight' is nf4, but config.json says load_in_4bit False"),
        (FOUR | {"bnb_4bit_quant_type": "fp4"}, "'a.weight' is nf4, but config.json says bnb_4bit_quant_type fp4"),
    ],
)
def test_a_configuration_that_disagrees_is_named(folder, changes, message):
    configure(folder, changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_codes_in_an_old_order_are_refused(tmp_path):
    arrays = {"b.weight": torch.ones(4, 4).to(torch.int8), "b.SCB": torch.ones(4)}
    folder = folder_of(tmp_path / "x", arrays | {"b.weight_format": torch.tensor(2, dtype=torch.uint8)}, EIGHT)
    with pytest.raises(CheckpointError, match="weight_format"):
        KIND.open(folder)
    rewrite(folder, **{"b.weight_format": torch.tensor(0, dtype=torch.uint8)})
    assert KIND.open(folder).entries["b.weight"].format == FORMATS["llm-int8"]


def test_floating_point_under_such_a_configuration(tmp_path):
    with pytest.raises(CheckpointError, match="every tensor is in floating point"):
        open_checkpoint(folder_of(tmp_path / "x", {"a.weight": torch.ones(2, 2)}))


JUNK = st.sampled_from([None, -1, 0, 3.5, 10**30, True, False, "x", "fp4", [], [[]], {}, {"a": 1}, [2, 128], 64])
KEYS = st.sampled_from(["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset"])


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(KEYS, JUNK, max_size=3), config=st.dictionaries(st.sampled_from(list(FOUR)), JUNK))
def test_damaged_states_raise_nothing_else(tmp_path_factory, changes, config):
    codes = torch.arange(256, dtype=torch.uint8).remainder(16).view(2, 128)
    folder = folder_of(tmp_path_factory.mktemp("f") / "x", four_bits(codes, 64) | state(**changes), FOUR | config)
    read_all(folder)


@settings(max_examples=100, deadline=None)
@given(text=st.binary(max_size=40), absmax=st.lists(st.floats(width=32), min_size=4, max_size=4))
def test_any_bytes_are_read_or_an_error(tmp_path_factory, text, absmax):
    codes = torch.arange(256, dtype=torch.uint8).remainder(16).view(2, 128)
    arrays = four_bits(codes, 64) | {"a.weight.absmax": torch.tensor(absmax)}
    if text:
        arrays[f"a.weight{STATE}nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    read_all(folder_of(tmp_path_factory.mktemp("f") / "x", arrays))


def read_all(folder):
    try:
        reader = open_checkpoint(folder)[1]
        for name in reader.entries:
            reader.read(name).dequantize()
    except CheckpointError:
        pass
