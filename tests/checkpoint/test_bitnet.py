"""bitnet: transformers unpacks what we wrote to exactly what we meant, and its layers compute what fewbits does."""

from __future__ import annotations

import json
import re

import pytest
import torch
from folders import foreign, quantized, same, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import save_model
from transformers import AutoModelForCausalLM
from transformers.integrations.bitnet import AutoBitLinear, pack_weights
from transformers.quantizers.quantizers_utils import should_convert_module

import fewbits
from fewbits.checkpoint import KINDS, Entry, bitnet, open_checkpoint
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import ACTIVATIONS, FORMATS, Float, QTensor
from fewbits.nn import W8A8Linear

KIND = KINDS["bitnet"]
TERNARY, INT8 = FORMATS["ternary-tensor"], ACTIVATIONS["int8-token"]
NORM = QTensor(Float(torch.float16), torch.ones(12).half(), {})
IDS = torch.arange(2, 66).view(1, 64)


@pytest.fixture(autouse=True)
def eager():
    """transformers compiles these functions for every shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def matrix(rows, columns, seed=0):
    return quantized(TERNARY, torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def put(path, tensors):
    """Write entries, the ternary ones with the inputs that the kind demands."""
    marks = {name: INT8 for name, q in tensors.items() if q.format == TERNARY}
    return write(KIND, path, tensors, inputs=marks)


def configuration(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def configure(path, **changes):
    whole = json.loads((path / "config.json").read_text())
    whole["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(whole))


def rewrite(path, **arrays):
    file = path / "model.safetensors"
    save_file(load_file(file) | arrays, file, {"format": "pt"})


def test_bytes_worked_out_by_hand(tmp_path):
    """Eight rows: row 0's byte has rows 0, 2, 4, 6 from its lowest bits on, each as code + 1."""
    codes = torch.tensor([[-1, 0], [1, 1], [0, 0], [1, -1], [1, 0], [0, 0], [-1, 1], [-1, 0]], dtype=torch.int8)
    q = QTensor(TERNARY, codes, {"scale": torch.tensor([[0.3]])})
    put(tmp_path / "out", {"m.weight": q, "norm.weight": NORM})
    arrays = load_file(tmp_path / "out/model.safetensors")
    assert {name: (a.dtype, tuple(a.shape)) for name, a in arrays.items()} == {
        "m.weight": (torch.uint8, (2, 2)),
        "m.weight_scale": (torch.float32, (1,)),
        "norm.weight": (torch.float16, (12,)),
    }
    assert arrays["m.weight"].tolist() == [[0b00_10_01_00, 0b10_01_01_01], [0b00_01_10_10, 0b01_01_00_10]]
    assert torch.equal(arrays["m.weight_scale"], torch.tensor([0.3]))
    assert configuration(tmp_path / "out") == {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head", "decoder"],
    }


@settings(max_examples=50, deadline=None)
@given(quarter=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_packing_is_transformers_and_comes_back(quarter, columns, seed):
    codes = torch.randint(-1, 2, (4 * quarter, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = bitnet.pack(codes)
    assert torch.equal(packed, pack_weights(codes.clone()))
    assert torch.equal(bitnet.unpack(packed), codes)


@pytest.mark.parametrize("part", [1, 1 << 22])
def test_transformers_unpacks_every_matrix_bit_for_bit(tmp_path, monkeypatch, part):
    monkeypatch.setattr(bitnet, "FOREIGN_PART", part)
    tensors = {"a.weight": matrix(4, 12), "b.weight": matrix(36, 7, 1), "norm.weight": NORM}
    digests = put(tmp_path / "out", tensors)
    decoded = foreign(KIND, tmp_path / "out")
    assert decoded.keys() == tensors.keys()
    assert all(torch.equal(decoded[name], q.dequantize()) for name, q in tensors.items())
    assert KIND.rehash(tmp_path / "out") == digests


def test_our_reader_gives_everything_back(tmp_path):
    tensors = {"a.weight": matrix(4, 12), "norm.weight": NORM}
    put(tmp_path / "out", tensors)
    kind, reader = open_checkpoint(tmp_path / "out")
    assert kind is KIND
    assert "quantization_config" not in reader.config
    assert reader.entries == {
        "a.weight": Entry("a.weight", (4, 12), TERNARY, INT8),
        "norm.weight": Entry("norm.weight", (12,), Float(torch.float16)),
    }
    assert all(same(reader.read(name), q) for name, q in tensors.items())
    with pytest.raises(CheckpointError, match="read it whole"):
        reader.read("a.weight", slice(0, 2))
    with pytest.raises(CheckpointError, match="'other' is missing"):
        reader.read("other")


def test_which_formats_it_holds():
    held = {f.name for f in FORMATS.values() if KIND.admits(KIND.entry("m.weight", (32, 64), f)) is None}
    assert held == {"ternary-tensor", "fp32", "fp16", "bf16"}
    assert KIND.file_bytes(TERNARY, (32, 64)) == 32 * 64 / 4 + 4
    assert KIND.file_bytes(Float(torch.float16), (32, 64)) == 2 * 32 * 64


@pytest.mark.parametrize(
    ("name", "shape", "format", "inputs", "message"),
    [
        ("m.weight", (8, 12), "ternary", "int8-token", "ternary has more scales, so choose ternary-tensor"),
        ("m.weight", (8, 64), "ternary-g64", "int8-token", "more scales"),
        ("m.weight", (8, 12), "int2-tensor", "int8-token", "int2-tensor is another format"),
        ("m.weight", (8, 12), "ternary-tensor", None, "round their inputs to int8-token, so they cannot be left as"),
        ("m.weight", (8, 12), "ternary-tensor", "int8-static", "cannot be rounded to int8-static; leave --inputs out"),
        ("m.weight", (10, 12), "ternary-tensor", "int8-token", "10 rows are no multiple of 4"),
        ("model.embed_tokens.weight", (8, 12), "ternary-tensor", "int8-token", "keep embeddings and the projection"),
        ("lm_head.weight", (8, 12), "ternary-tensor", "int8-token", "keep embeddings and the projection"),
        ("l.mlp.experts.3.up_proj.weight", (8, 12), "ternary-tensor", "int8-token", "transformers fuses experts"),
        ("mlp.experts", (2, 8, 12), "ternary-tensor", "int8-token", r"matrices named '….weight', not \[2, 8, 12\]"),
        ("m.weight", (8, 12), "fp16", "int8-token", "rounded inputs need rounded weights"),
    ],
)
def test_refusals(tmp_path, name, shape, format, inputs, message):
    entry = Entry(name, shape, FORMATS[format], None if inputs is None else ACTIVATIONS[inputs])
    assert re.search(message, KIND.admits(entry))
    with pytest.raises(UnsupportedError, match=re.escape(name)):
        KIND.create(tmp_path / "out", [entry], tmp_path, {})


def test_a_layer_with_a_bias_is_refused(tmp_path):
    entry, bias = Entry("m.weight", (8, 12), TERNARY, INT8), Entry("m.bias", (8,), Float(torch.float32))
    assert KIND.admits(entry) is None
    with pytest.raises(UnsupportedError, match="multiplies its bias by the weight's scale"):
        KIND.create(tmp_path / "out", [entry, bias], tmp_path, {})


def test_transformers_multiplies_the_bias_by_the_scale():
    """The reason for refusing it."""
    layer = AutoBitLinear(4, 8, bias=True)
    layer.weight.data, layer.bias.data, layer.weight_scale = torch.zeros(8, 4), torch.ones(8), torch.tensor([0.25])
    assert torch.equal(layer(torch.ones(1, 4)), torch.full((1, 8), 0.25))


def test_the_layers_round_inputs_as_the_entry_says():
    """Their step is max|x| / 127, computed by another division: but for ties, the same numbers."""
    q = matrix(8, 64)
    layer = AutoBitLinear(64, 8, bias=False)
    layer.weight.data, layer.weight_scale = q.codes.float(), q.params["scale"].reshape(1)
    x = torch.randn(33, 64, generator=torch.Generator().manual_seed(1))
    ours = W8A8Linear(q, INT8)
    expected = x @ q.dequantize().T
    with torch.no_grad():
        effect = (ours(x) - expected).norm()
        assert effect > 1e-3 * expected.norm()
        assert (layer(x) - ours(x)).norm() < 1e-3 * effect  # the same codes: float32's own error is 1e-4 of that


NAMES = [f"model.layers.{i}.{part}_proj" for i in range(12) for part in ("self_attn.q", "mlp.up", "mlp.down")]


@pytest.mark.parametrize(
    ("kept", "count"),
    [
        (lambda n: "q_proj" in n, 1),
        (lambda n: n.startswith("model.layers.1.") and "up" in n, 1),
        (lambda n: "layers.1." in n, 3),
        (lambda n: False, 0),
        (lambda n: NAMES.index(n) % 4 == 0, 9),
    ],
)
def test_transformers_converts_exactly_the_ternary_modules(kept, count):
    left, converted = [n for n in NAMES if kept(n)], [n for n in NAMES if not kept(n)]
    found = bitnet.patterns(left, converted)
    assert len(found) <= count
    assert [n for n in NAMES if should_convert_module(n, found)] == converted


def test_a_name_that_means_others_too_becomes_an_expression():
    found = bitnet.patterns(["head"], ["head.one", "fore.head"])
    assert found == ["head$"]
    assert not should_convert_module("head", found)
    assert should_convert_module("head.one", found)
    assert bitnet.patterns(["a.head"], ["b.head"]) == ["a.head"]


@pytest.mark.parametrize(
    ("family", "kept"),
    [
        ("llama", ()),
        ("qwen2", ("q_proj", "k_proj", "v_proj")),  # they have biases
        ("bitnet", ()),  # the architecture of the original, with norms inside its blocks
        ("mixtral", ("w1", "w2", "w3", "gate")),
    ],
)
def test_transformers_loads_it_and_predicts_the_same(tmp_path, family, kept):
    save_model(tmp_path / "source", family, hidden_size=64, intermediate_size=128)
    made = fewbits.quantize(tmp_path / "source", tmp_path / "out", format="ternary-tensor", kind="bitnet")
    assert made.verified_with == "transformers"
    floating = {t.name.split(".")[-2] for t in made.tensors if "layers" in t.name and t.format == "fp32"}
    assert {name for name in floating if "norm" not in name} == set(kept)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours = fewbits.load(tmp_path / "out").eval()
    layers = {name for name, module in theirs.named_modules() if isinstance(module, AutoBitLinear)}
    assert layers == {name for name, module in ours.named_modules() if isinstance(module, W8A8Linear)} != set()
    seen = {}
    for name in layers:
        theirs.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.inference_mode():
        theirs(IDS)
        for name, (x, expected) in seen.items():
            layer = ours.get_submodule(name)
            effect = float((torch.nn.functional.linear(x, layer.weight) - expected).norm())
            assert effect > 1e-3 * float(expected.norm())
            # An input within 1e-7 of a tie, one in 10⁵, may have the neighbouring code: 1 % of the rounding noise.
            assert float((layer(x) - expected).norm()) < 0.02 * effect
    found = fewbits.verify(tmp_path / "out", tmp_path / "source")
    assert found.passed
    assert found.stack.startswith("transformers")


@pytest.fixture
def folder(tmp_path):
    put(tmp_path / "out", {"a.weight": matrix(8, 12), "norm.weight": NORM})
    return tmp_path / "out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_class_that_divides_by_its_scale_is_read(folder, dtype):
    """As transformers' own converter and the first models on the hub have it."""
    original = KIND.open(folder).read("a.weight")
    inverse = (1 / original.params["scale"]).reshape(1).to(dtype)
    rewrite(folder, **{"a.weight_scale": inverse, "a.bias": torch.ones(8)})
    configure(folder, linear_class="bitlinear")
    reader = KIND.open(folder)
    assert torch.equal(reader.read("a.weight").codes, original.codes)
    assert torch.equal(reader.read("a.weight").params["scale"], (1 / inverse.float()).reshape(1, 1))
    assert torch.equal(foreign(KIND, folder)["a.weight"], reader.read("a.weight").dequantize())
    assert torch.equal(reader.read("a.bias").codes, torch.ones(8))
    configure(folder, linear_class="autobitlinear")
    with pytest.raises(CheckpointError, match=r"'a\.bias' is multiplied by the weight's scale"):
        KIND.open(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_class": "linear"}, "linear_class is 'linear', must be autobitlinear or bitlinear"),
        ({"quantization_mode": "online"}, "rounded at every use"),
        ({"use_rms_norm": True}, "a norm of its own in front"),
    ],
)
def test_what_is_computed_otherwise_is_refused(folder, changes, message):
    configure(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        KIND.open(folder)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a.weight": torch.zeros(0, 12, dtype=torch.uint8)}, r"must be a matrix \[N/4, K\]"),
        ({"a.weight": torch.zeros(12, dtype=torch.uint8)}, r"must be a matrix \[N/4, K\]"),
        ({"a.weight_scale": torch.ones(2)}, "must be one floating-point number"),
        ({"a.weight_scale": torch.ones(1, dtype=torch.int32)}, "must be one floating-point number"),
        ({"a.weight": torch.full((2, 12), 0b1100, dtype=torch.uint8)}, "holds the code 3"),
        ({"a.weight_scale": torch.tensor([float("nan")])}, "not finite"),
    ],
)
def test_damage_is_named(folder, arrays, message):
    rewrite(folder, **arrays)
    with pytest.raises(CheckpointError, match=message):
        KIND.open(folder).read("a.weight")


def test_a_packed_embedding_is_refused(folder):
    arrays = load_file(folder / "model.safetensors")
    renamed = {name.replace("a.weight", "embed_tokens.weight"): array for name, array in arrays.items()}
    save_file(renamed, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'embed_tokens\.weight' is packed, but int8-token inputs belong to"):
        KIND.open(folder)


JUNK = st.sampled_from([None, -1, 0, 3.5, 10**30, True, "x", "offline", "bitlinear", [], [[]], {}, {"a": 1}])


@settings(max_examples=100, deadline=None)
@given(key=st.sampled_from(["quant_method", "linear_class", "quantization_mode", "use_rms_norm"]), junk=JUNK)
def test_a_damaged_configuration_raises_nothing_else(shared_folder, key, junk):
    path, sound = shared_folder
    (path / "config.json").write_text(sound)
    configure(path, **{key: junk})
    try:
        reader = open_checkpoint(path)[1]
        for name in reader.entries:
            reader.read(name).dequantize()
    except CheckpointError:
        pass


@settings(max_examples=100, deadline=None)
@given(data=st.binary(min_size=24, max_size=24), scale=st.floats(width=32))
def test_any_bytes_are_ternary_or_an_error(shared_folder, data, scale):
    path, sound = shared_folder
    (path / "config.json").write_text(sound)
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(2, 12)
    rewrite(path, **{"a.weight": packed, "a.weight_scale": torch.tensor([scale])})
    try:
        found = open_checkpoint(path)[1].read("a.weight")
    except CheckpointError as error:
        assert re.search("code 3|not finite", str(error))  # noqa: PT017
        return
    assert set(found.codes.unique().tolist()) <= {-1, 0, 1}
    assert torch.equal(bitnet.pack(found.codes), packed)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "out"
    put(path, {"a.weight": matrix(8, 12), "norm.weight": NORM})
    return path, (path / "config.json").read_text()
