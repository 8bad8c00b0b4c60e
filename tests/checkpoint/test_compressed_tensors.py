"""compressed-tensors: the library and transformers decode what we wrote to exactly what we meant."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from folders import foreign, quantized, rows_of, same, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fewbits.checkpoint import KINDS, Entry, _ct_foreign, _expressions, open_checkpoint
from fewbits.checkpoint._ct_targets import compact
from fewbits.checkpoint.compressed_tensors import CompressedTensors
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import FORMATS, Float, QTensor, format_named

KIND = KINDS["compressed-tensors"]
BOTH = [CompressedTensors(), CompressedTensors(int8_layout="int-quantized")]
SHAPE = (70, 256)  # rows that are no multiple of 32, over which zero-points are packed


def admitted(shape):
    return {f.name: f for f in FORMATS.values() if KIND.admits(Entry("m.weight", shape, f)) is None}


def tensors_in(formats, shape=SHAPE):
    torch.manual_seed(0)
    return {f"layers.{i}.proj.weight": quantized(f, torch.randn(shape)) for i, f in enumerate(formats)}


def config_of(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def test_which_formats_it_holds():
    groups = ["", "-g16", "-g32", "-g64", "-g128", "-tensor"]
    affine = {f"int{b}{a}{g}" for b in (8, 6, 5, 4, 3, 2) for a in ("", "-asym") for g in groups}
    assert admitted(SHAPE).keys() == affine | {"fp8-e4m3", "fp8-e4m3-tensor", "mxfp4", "nvfp4", "fp32", "fp16", "bf16"}
    whole = {name for name in affine if "-g" not in name} | {"fp8-e4m3", "fp8-e4m3-tensor", "fp32", "fp16", "bf16"}
    assert admitted((64, 172)).keys() == whole


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("shape", [SHAPE, (64, 172), (32, 256), (1, 128), (33, 64)])
def test_the_library_decodes_every_format_bit_for_bit(tmp_path, monkeypatch, kind, shape):
    monkeypatch.setattr(_ct_foreign, "FOREIGN_PART", 1)  # as few rows at a time as can be
    tensors = tensors_in(admitted(shape).values(), shape)
    digests = write(kind, tmp_path / "out", tensors)
    decoded = foreign(kind, tmp_path / "out")
    assert decoded.keys() == tensors.keys()
    for name, w in decoded.items():
        assert w.dtype == torch.float32
        assert torch.equal(w, tensors[name].dequantize()), tensors[name].format
    assert kind.rehash(tmp_path / "out") == digests


@pytest.mark.parametrize("kind", BOTH)
def test_our_reader_returns_the_codes(tmp_path, kind):
    formats = [*admitted(SHAPE).values(), FORMATS["int4-g32"].with_scales_in(torch.bfloat16)]
    tensors = tensors_in(formats)
    write(kind, tmp_path / "out", tensors)
    found_kind, reader = open_checkpoint(tmp_path / "out")
    assert found_kind.name == kind.name
    assert "quantization_config" not in reader.config
    for name, q in tensors.items():
        found = reader.read(name)
        assert (found.format, reader.entries[name].shape) == (q.format, q.shape)
        assert same(found, q), q.format
        if q.format.rowwise:
            assert same(reader.read(name, slice(37, 69)), rows_of(q, slice(37, 69))), q.format


@pytest.mark.parametrize("rows", [1, 33])
def test_slabs_make_the_same_bytes_as_the_whole(tmp_path, rows):
    tensors = tensors_in(admitted(SHAPE).values())
    assert write(KIND, tmp_path / "slabs", tensors, rows=rows) == write(KIND, tmp_path / "whole", tensors)


def test_bytes_worked_out_by_hand(tmp_path):
    """Codes −8 … 7 with scale 0.5 per row: nibbles 0 … 15, lowest first."""
    w = torch.arange(-8, 8).mul(0.5).view(1, 16)
    q = QTensor(FORMATS["int4"], (w / 0.5).to(torch.int8), {"scale": torch.tensor([[0.5]])})
    asymmetric = QTensor(
        FORMATS["int4-asym"], q.codes.add(8).to(torch.uint8), q.params | {"zero": torch.tensor([[8.0]])}
    )
    write(KIND, tmp_path / "out", {"m.weight": q, "n.weight": asymmetric})
    file = load_file(tmp_path / "out/model.safetensors")
    words = torch.tensor([[0x76543210, 0xFEDCBA98 - (1 << 32)]], dtype=torch.int32)
    assert torch.equal(file["m.weight_packed"], words)
    assert torch.equal(file["n.weight_packed"], words)
    assert file["n.weight_zero_point"].tolist() == [[8]]
    assert file["m.weight_shape"].tolist() == [1, 16]
    assert file["m.weight_scale"].tolist() == [[0.5]]
    assert "m.weight_zero_point" not in file


@pytest.mark.parametrize(
    ("name", "shape", "format", "message"),
    [
        ("m.weight", (8, 172), "int4-g32", "172 is not a multiple of int4-g32's group of 32"),
        ("m.weight", (8, 64), "int4-g128", "64 is not a multiple"),
        ("m.weight", (8, 24), "nvfp4", "not a multiple"),
        ("m.weight", (8, 64), "nf4", "no layout for nf4; write the fewbits kind"),
        ("m.weight", (8, 64), "ternary", "no layout for ternary"),
        ("m.weight", (8, 64), "binary", "no layout for binary"),
        ("m.weight", (8, 64), "q4_0", "no layout for q4_0"),
        ("m.weight", (8, 64), "fp8-e5m2", "no layout for fp8-e5m2"),
        ("model.embed_tokens.weight", (8, 64), "int8", "keeps embeddings in floating point"),
        ("transformer.wte.weight", (8, 64), "int8", "keeps embeddings"),
        ("mlp.experts", (2, 8, 64), "int8", "split fused experts"),
        ("l.0.mlp.experts.3.up_proj.weight", (8, 64), "int4-asym", "drops the zero-points"),
        ("l.0.mlp.experts.3.up_proj.weight", (8, 64), "nvfp4", "drops the global scales"),
        ("l.0.mlp.experts.3.up_proj.weight", (8, 64), "int8-tensor", "packed experts only"),
    ],
)
def test_refusals(tmp_path, name, shape, format, message):
    entry = Entry(name, shape, FORMATS[format])
    assert re.search(message, KIND.admits(entry))
    with pytest.raises(UnsupportedError, match=re.escape(name)):
        KIND.create(tmp_path / "out", [entry], tmp_path, {})


def test_one_scheme_targets_linear_and_ignores_the_rest(tmp_path):
    tensors = tensors_in([FORMATS["int4-g32"]] * 2)
    kept = {"model.embed_tokens.weight": (8, 4), "mlp.gate.weight": (2, 4), "norm.weight": (4,), "l.0.bias": (4,)}
    tensors |= {name: QTensor(Float(torch.float16), torch.ones(shape).half(), {}) for name, shape in kept.items()}
    write(KIND, tmp_path / "out", tensors)
    config = config_of(tmp_path / "out")
    assert config["format"] == "pack-quantized"
    assert [g["targets"] for g in config["config_groups"].values()] == [["Linear"]]
    assert {"model.embed_tokens", "mlp.gate", "lm_head"} <= set(config["ignore"])
    assert not {"layers.0.proj", "norm"} & set(config["ignore"])


def test_mixed_schemes_target_by_name(tmp_path):
    tensors = tensors_in([format_named(n) for n in ("int4-g32", "int8", "int4-g32", "fp8-e4m3")])
    write(KIND, tmp_path / "out", tensors)
    config = config_of(tmp_path / "out")
    assert config["format"] == "mixed-precision"
    found = {g["targets"][0]: (g["format"], g["weights"]["num_bits"]) for g in config["config_groups"].values()}
    assert found == {
        r"re:^layers\.(?:0|2)\.proj$": ("pack-quantized", 4),
        r"re:^layers\.1\.proj$": ("pack-quantized", 8),
        r"re:^layers\.3\.proj$": ("float-quantized", 8),
    }


def test_scales_of_rows_do_not_split_a_scheme(tmp_path):
    """with_scales_in changes nothing that a format per row stores."""
    formats = [FORMATS["int8"], FORMATS["int8"].with_scales_in(torch.bfloat16)]
    write(KIND, tmp_path / "out", tensors_in(formats))
    assert len(config_of(tmp_path / "out")["config_groups"]) == 1


def _module_names():
    layers = [f"model.layers.{i}" for i in range(12)]
    return [
        *(f"{m}.self_attn.{p}_proj" for m in layers for p in "qkvo"),
        *(f"{m}.mlp.experts.{e}.{p}_proj" for m in layers for e in range(16) for p in ("up", "down")),
        "lm_head",
    ]


@pytest.mark.parametrize("seed", range(8))
def test_compacted_targets_match_exactly_their_modules(seed):
    names = _module_names()
    draw = torch.Generator().manual_seed(seed)
    choose = {
        0: lambda n: 0,
        1: lambda n: int("down" in n),
        2: lambda n: int(n.startswith("model.layers.1.")),
        3: lambda n: int(n.split(".")[2] in ("0", "11")) if "layers" in n else 2,
        4: lambda n: int(".experts.3." in n or ".experts.5." in n),
    }.get(seed, lambda n: int(torch.randint(3, (1,), generator=draw)))
    lists = [[], [], []]
    for name in names:
        lists[choose(name)].append(name)
    lists = [part for part in lists if part]
    for part, targets in zip(lists, compact(lists), strict=True):
        expressions = [re.compile(t.removeprefix("re:")) for t in targets]
        assert {n for n in names if any(e.match(n) for e in expressions)} == set(part)
        assert len(targets) <= (12 if seed < 5 else len(part))


def test_damaged_shape_and_unknown_scheme(tmp_path):
    write(KIND, tmp_path / "out", tensors_in([FORMATS["int4-g32"]]))
    path = tmp_path / "out/config.json"
    sound = path.read_text()
    for old, new, message in (
        ('"num_bits": 4', '"num_bits": 3', "needs torch.int32"),
        ('"pack-quantized"', '"marlin-24"', "stored as marlin-24"),
        ('"Linear"', '"re:nothing"', "no group of quantization_config targets it"),
        ('"config_groups"', '"groups"', "must have config_groups"),
    ):
        path.write_text(sound.replace(old, new))
        with pytest.raises(CheckpointError, match=message):
            KIND.open(tmp_path / "out")


def test_scales_lying_across_and_targets_that_cannot_be_matched(tmp_path, monkeypatch):
    write(KIND, tmp_path / "out", tensors_in([FORMATS["int8"]]))
    file, config = tmp_path / "out/model.safetensors", tmp_path / "out/config.json"
    arrays, sound = load_file(file), config.read_text()
    (scale,) = (name for name in arrays if name.endswith("weight_scale"))
    save_file(arrays | {scale: arrays[scale].reshape(-1)}, file)
    read = KIND.open(tmp_path / "out").read(scale.removesuffix("_scale"))
    assert torch.equal(read.params["scale"], arrays[scale])
    save_file(arrays | {scale: arrays[scale].reshape(1, -1)}, file)
    with pytest.raises(CheckpointError, match=r"'.*weight_scale' is torch.float32"):
        KIND.open(tmp_path / "out")
    save_file(arrays, file)
    config.write_text(sound.replace('"Linear"', r'"re:(\\w*\\.?)*!$"'))
    with pytest.raises(CheckpointError, match="no group of quantization_config targets it"):
        KIND.open(tmp_path / "out")
    monkeypatch.setattr(_expressions, "SECONDS", 1e-6)
    config.write_text(sound.replace('"Linear"', '"re:' + 8 * "(.*)" + '[!?]$"'))
    with pytest.raises(CheckpointError, match="cannot be matched"):
        KIND.open(tmp_path / "out")


LIBRARY = {
    "pack4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, torch.bfloat16),
    "pack4-asym": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, None),
    "pack3-row": ("pack-quantized", {"num_bits": 3, "strategy": "channel"}, torch.float16),
    "pack8-fp32-groups": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 64}, None),
    "int8-row": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, torch.bfloat16),
    "int8-tensor-asym": ("int-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": False}, None),
    "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, torch.bfloat16),
    "fp8-row": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, torch.float16),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_files_that_the_library_wrote_are_read(tmp_path, name):
    """Compressed by the library itself, scales in any type: our reader gives what its decompressor gives."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    compression, arguments, dtype = LIBRARY[name]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments), format=compression)
    torch.manual_seed(0)
    w = torch.randn(SHAPE)
    cut = {"tensor": w.reshape(1, -1), "channel": w, "group": w.unflatten(-1, (-1, arguments.get("group_size", 1)))}
    groups = cut[arguments["strategy"]]
    low, high = groups.amin(-1, keepdim=arguments["strategy"] == "channel"), groups.amax(-1)
    scale, zero = calculate_qparams(low, high.reshape(low.shape), scheme.weights)
    state = {"weight": w, "weight_scale": scale.to(dtype or torch.float32), "weight_zero_point": zero}
    packed = BaseCompressor.get_value_from_registry(compression).compress(state, scheme)
    save_file({f"m.{key}": array.contiguous() for key, array in packed.items()}, tmp_path / "model.safetensors")
    group = {"targets": ["Linear"], "weights": json.loads(scheme.weights.model_dump_json()), "format": compression}
    config = {"quant_method": "compressed-tensors", "format": compression, "config_groups": {"group_0": group}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))

    kind, reader = open_checkpoint(tmp_path)
    assert list(reader.entries) == ["m.weight"]
    (decoded,) = foreign(kind, tmp_path).values()
    # Half of the largest step (E4M3's is 32 below 448), and less than a step for the scale's own rounding and for the
    # end of the range, which the library clips.
    step = scale.float().abs().amax() * (32 if "fp8" in name else 1)
    assert (decoded - w).abs().amax() < 1.5 * step
    assert torch.equal(reader.read("m.weight").dequantize(), decoded)


JUNK = st.sampled_from([None, -1, 0, 3.5, 10**30, True, "x", "re:(", [], [[]], {}, {"a": 1}])


def _leaves(value, path=()):
    yield path
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _leaves(child, (*path, key))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "out"
    write(KIND, path, tensors_in([FORMATS[n] for n in ("int4-asym-g32", "int8-tensor", "fp8-e4m3", "nvfp4")], (2, 64)))
    return path, (path / "config.json").read_text()


@settings(max_examples=200, deadline=None)
@given(data=st.data(), junk=JUNK)
def test_a_damaged_configuration_raises_nothing_else(small, data, junk):
    path, sound = small
    config = json.loads(sound)
    *way, last = data.draw(st.sampled_from([leaf for leaf in _leaves(config) if leaf]))
    parent = config
    for key in way:
        parent = parent[key]
    parent[last] = junk
    (path / "config.json").write_text(json.dumps(config))
    try:
        reader = open_checkpoint(path)[1]
        for name in reader.entries:
            reader.read(name).dequantize()
    except CheckpointError:
        pass


def llama(folder, *, tied, intermediate):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def requantized(source, choose):
    """Every entry of a folder, in the format that `choose(name)` gives, or as it is."""
    reader = open_checkpoint(source)[1]
    tensors = {}
    for entry in reader.entries.values():
        name = choose(entry.name) if len(entry.shape) == 2 else None
        q = reader.read(entry.name)
        tensors[entry.name] = quantized(format_named(name), q.dequantize()) if name else q
    return reader.config, tensors


def mixed(name):
    if "embed" in name or "lm_head" in name or "layers.1.mlp.down" in name:
        return None
    if "q_proj" in name:
        return "int8"
    return "fp8-e4m3" if "layers.1.mlp" in name else "int4-asym-g32" if "v_proj" in name else "int4-g32"


def everywhere(format):
    return lambda name: None if "embed" in name or "lm_head" in name else format


LOADABLE = [
    *((f, everywhere(f), 172) for f in ("int8", "int8-asym", "int8-tensor", "int3", "int4-asym-tensor", "fp8-e4m3")),
    *((f, everywhere(f), 192) for f in ("int4-g32", "int4-asym-g32", "int5-g64")),
    ("mixed", mixed, 192),
    ("lm_head", lambda name: None if "embed" in name else "int4-g32", 192),
]


@pytest.mark.parametrize(("name", "choose", "intermediate"), LOADABLE, ids=[n for n, _, _ in LOADABLE])
def test_transformers_loads_exactly_these_weights(tmp_path, name, choose, intermediate):
    from transformers import AutoModelForCausalLM

    llama(tmp_path / "source", tied=name not in ("mixed", "lm_head"), intermediate=intermediate)
    config, tensors = requantized(tmp_path / "source", choose)
    write(KIND, tmp_path / "out", tensors, source=tmp_path / "source", config=config)
    assert (tmp_path / "out/generation_config.json").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, output_loading_info=True
        )
    assert not any(info.values()), info
    model(torch.arange(8)[None])  # the first call decompresses
    state = model.state_dict()
    for entry, q in tensors.items():
        assert torch.equal(state[entry], q.dequantize()), entry


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_transformers_loads_fp4_in_bfloat16(tmp_path, format):
    """The library decodes FP4 in BF16 whatever the model's type: these weights, rounded once."""
    from transformers import AutoModelForCausalLM

    llama(tmp_path / "source", tied=True, intermediate=192)
    config, tensors = requantized(tmp_path / "source", everywhere(format))
    write(KIND, tmp_path / "out", tensors, source=tmp_path / "source", config=config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    model(torch.arange(8)[None])
    state = model.state_dict()
    for entry, q in tensors.items():
        assert torch.equal(state[entry], q.dequantize().bfloat16()), entry


def test_transformers_fuses_experts_to_exactly_these_weights(tmp_path):
    """It decompresses experts in the type of their scales, FP16 here; a 4-bit code times a scale is exact in FP32."""
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3, vocab_size=96)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "source")
    choose = lambda name: "int8" if "attn" in name else "int4-g32" if ".experts." in name else None  # noqa: E731
    config, tensors = requantized(tmp_path / "source", choose)
    experts = {name: q for name, q in tensors.items() if ".experts." in name}
    assert len(experts) == 9
    write(KIND, tmp_path / "out", tensors, source=tmp_path / "source", config=config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model(torch.arange(8)[None])
    fused = next(p for n, p in model.named_parameters() if "experts" in n and "down" in n)
    for i in range(3):
        (expected,) = (q for name, q in experts.items() if f".experts.{i}.w2." in name)
        assert torch.equal(fused[i], expected.dequantize().half())
