"""Rounded inputs and caches in a running model: against transformers with compressed-tensors' own rounding."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from fewbits.checkpoint import KINDS, Entry, cache_scales, input_scale, open_checkpoint
from fewbits.engine import attentions, load, watched_caches
from fewbits.engine.cache import round_cache
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import ACTIVATIONS, FORMATS, QTensor
from fewbits.nn import W8A8Linear
from fewbits.stats import Collector, observer_named

IDS = torch.tensor([[1, 5, 9, 60, 2, 2, 7, 33, 12, 80, 41, 3]])
PROJECTIONS = "proj.weight"
WEIGHTS = {"int8": "int8", "fp8": "fp8-e4m3"}


def logits(model, ids=IDS, **options):
    with torch.inference_mode():
        return model(input_ids=ids, **options).logits


def observed(folder: Path) -> tuple[dict, dict]:
    """Observers of each linear layer's input, and of each attention's keys and values, on IDS."""
    model = load(folder)
    parameters = {n: p for n, p in model.named_parameters() if n.endswith(PROJECTIONS)}
    caches = {name: [observer_named("minmax")() for _ in range(2)] for name in attentions(model)}
    watchers = {model.get_submodule(name): (k.add, v.add) for name, (k, v) in caches.items()}
    collector = Collector(parameters, (), tokens=IDS.numel(), observer=observer_named("minmax"))
    with watched_caches(watchers), collector:
        logits(model)
    inputs = {site.parameter: seen.observer for site, seen in collector.statistics().items()}
    return inputs, caches


def quantize(source: Path, out: Path, inputs: str | None, cache: str | None = None, kind="compressed-tensors") -> Path:
    """Every projection in 8 bits, with inputs rounded to `inputs` and a cache in `cache`."""
    _, reader = open_checkpoint(source)
    seen, caches = observed(source)
    tensors, entries = {}, []
    for name in reader.entries:
        tensors[name], mark = reader.read(name), None
        if name.endswith(PROJECTIONS) and inputs is not None:
            mark = ACTIVATIONS[inputs]
            tensors[name] = rounded(tensors[name].dequantize(), WEIGHTS[mark.element])
        entries.append(Entry(name, tensors[name].shape, tensors[name].format, mark))
        scale = input_scale(entries[-1])
        if scale is not None:
            entries.append(scale)
            tensors[scale.name] = QTensor(scale.format, seen[name].scale(mark), {})
    for attention, observers in caches.items() if cache else ():
        for entry, observer in zip(cache_scales(attention, ACTIVATIONS[cache]), observers, strict=True):
            entries.append(entry)
            tensors[entry.name] = QTensor(entry.format, observer.scale(entry.inputs), {})
    with KINDS[kind].create(out, entries, source, reader.config) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit({"tensors": []})
    return out


def rounded(w, name):
    format = FORMATS[name]
    params = format.fit(w)
    return QTensor(format, format.round(w, params), params)


def theirs(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def dynamic_int8_by_127(monkeypatch):
    """compressed-tensors simulates dynamic INT8 with max / 127.5; vLLM's kernels, and we, divide by 127."""
    from compressed_tensors.quantization.lifecycle import forward

    original = forward.compute_dynamic_scales_and_zp

    def by_127(value, args, **options):
        scale, zero = original(value=value, args=args, **options)
        return (scale * (127.5 / 127) if args.type == "int" else scale), zero

    monkeypatch.setattr(forward, "compute_dynamic_scales_and_zp", by_127)


def noise(a, b):
    return float((a - b).norm())


@pytest.mark.usefixtures("dynamic_int8_by_127")
@pytest.mark.parametrize("inputs", ACTIVATIONS)
def test_transformers_rounds_inputs_to_the_same(llama, tmp_path, inputs):
    """The two sum in another order, so an input within 1e-6 of a tie may have the neighbouring code there.

    At about 100 steps a number that is one in 10^4; its difference of a step, against the rounding noise of step/√12 on
    all, leaves √(12 · 10⁻⁴) = 3.5 % of the noise: a tenth is allowed.
    """
    folder = quantize(llama, tmp_path / "out", inputs)
    ours, others = load(folder), theirs(folder)
    for name, module in ours.named_modules():
        if isinstance(module, W8A8Linear):
            assert torch.equal(module.weight, weight_of(folder, name)), name
    decoded = load_decoded(folder)
    effect = noise(logits(decoded), logits(others))
    assert effect > 1e-4 * float(logits(decoded).norm())  # what rounding inputs does at all
    assert noise(logits(ours), logits(others)) < 0.1 * effect


def weight_of(folder, module):
    _, reader = open_checkpoint(folder)
    return reader.read(f"{module}.weight").dequantize()


def load_decoded(folder):
    """The same weights with inputs as they are."""
    model = load(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, W8A8Linear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight.data = module.weight
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
    return model


@pytest.mark.parametrize("inputs", ["int8-token", "fp8-static"])
def test_decoding_weights_leaves_inputs_rounded(llama, tmp_path, inputs):
    """packed=False, as evaluate loads models, is the same arithmetic; so is the own file type."""
    folder = quantize(llama, tmp_path / "out", inputs)
    expected = logits(load(folder))
    decoded = load(folder, packed=False)
    assert sum(isinstance(m, W8A8Linear) for m in decoded.modules()) == 14
    assert torch.equal(logits(decoded), expected)
    assert torch.equal(logits(load(quantize(llama, tmp_path / "own", inputs, kind="fewbits"))), expected)
    assert not torch.equal(logits(load_decoded(folder)), expected)


@pytest.mark.parametrize("element", ["int8", "fp8"])
def test_static_is_dynamic_where_the_range_is_the_same(llama, tmp_path, element):
    """Scales observed on the very input that is run: per-tensor dynamic ones are the same, bit for bit, layer by layer.

    The first layer reads the same; later ones read what rounding left, so only the first block is compared.
    """
    static, dynamic = (load(quantize(llama, tmp_path / s, f"{element}-{s}")) for s in ("static", "tensor"))
    caught = []
    for model in (static, dynamic):
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, y: caught.append(y))
        logits(model)
    assert torch.equal(*caught)


@pytest.mark.parametrize("cache", ["fp8-static", "int8-static"])
@pytest.mark.parametrize("inputs", [None, "int8-token"])
@pytest.mark.usefixtures("dynamic_int8_by_127")
def test_transformers_rounds_the_cache_to_the_same(llama, tmp_path, cache, inputs):
    folder = quantize(llama, tmp_path / "out", inputs, cache)
    without = logits(load(quantize(llama, tmp_path / "without", inputs)))
    ours, others = logits(load(folder)), logits(theirs(folder))
    effect = noise(ours, without)
    assert effect > 1e-4 * float(without.norm())
    assert noise(ours, others) < 0.1 * effect  # see test_transformers_rounds_inputs_to_the_same


@pytest.fixture
def rounding(llama, tmp_path):
    return load(quantize(llama, tmp_path / "out", None, "int8-static"), packed=False)


def test_the_cache_is_rounded_with_a_cache_and_without_one(rounding):
    whole = logits(rounding, use_cache=False)
    assert torch.equal(logits(rounding, use_cache=True), whole)
    cache = DynamicCache(config=rounding.config)
    first = logits(rounding, IDS[:, :7], past_key_values=cache)
    rest = logits(rounding, IDS[:, 7:], past_key_values=cache)
    assert cache.get_seq_length() == IDS.shape[1]
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    keys = cache.layers[0].keys
    attention = rounding.model.layers[0].self_attn
    hook = next(iter(attention._forward_pre_hooks.values()))
    codes = keys / hook.keys.scale
    assert (codes - codes.round()).abs().max() < 1e-4  # multiples of the scale stand in the cache
    assert len(keys.unique()) <= 256


def test_models_that_round_can_be_copied_cast_and_generate(rounding):
    expected = logits(rounding)
    assert torch.equal(logits(copy.deepcopy(rounding)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(rounding))), expected)
    half = logits(copy.deepcopy(rounding).to(torch.bfloat16))
    assert noise(half.float(), expected) < 0.1 * float(expected.norm())
    generated = rounding.generate(IDS, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, IDS.shape[1] + 3)
    assert generated[0, IDS.shape[1]] == expected[0, -1].argmax()


def test_keys_are_watched_after_rotary_embedding(llama):
    model = load(llama)
    seen = {}
    attention = model.model.layers[0].self_attn
    with watched_caches({attention: (lambda k: seen.update(k=k), lambda v: seen.update(v=v))}):
        cache = logits_cache(model)
    assert torch.equal(seen["k"], cache.layers[0].keys)
    assert torch.equal(seen["v"], cache.layers[0].values)
    seen.clear()
    logits(model)
    assert not seen  # the hooks are gone


def logits_cache(model):
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=True).past_key_values


def test_scales_of_no_attention_are_refused(llama, tmp_path):
    with pytest.raises(UnsupportedError, match="Linear has scales for a key-value cache"):
        round_cache(torch.nn.Linear(2, 2), ACTIVATIONS["int8-static"], torch.ones(1), torch.ones(1))
    folder = quantize(llama, tmp_path / "out", None, "int8-static")
    arrays = load_file(folder / "model.safetensors")
    arrays["elsewhere.k_scale"] = torch.ones(1)
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"elsewhere\.k_scale: belongs to no attention"):
        load(folder)


def test_a_model_that_rounds_its_inputs_cannot_be_saved_as_something_else(llama, tmp_path):
    model = load(quantize(llama, tmp_path / "out", "int8-token"), packed=False)
    with pytest.raises(UnsupportedError, match="save_pretrained would write"):
        model.save_pretrained(tmp_path / "saved")


def test_layers_that_cannot_round_their_input_are_refused(llama, tmp_path):
    """A file of the own kind that says so of an embedding: nothing may be left out in silence."""
    folder = quantize(llama, tmp_path / "out", "int8-token", kind="fewbits")
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    declared = json.loads(metadata["fewbits"])
    embedding = "model.embed_tokens.weight"
    arrays = load_file(folder / "model.safetensors")
    q = rounded(arrays.pop(f"{embedding}.weight"), "int8")
    arrays |= {f"{embedding}.{name}": array for name, array in q.pack().items()}
    declared["entries"][embedding] = {"format": "int8", "shape": list(q.shape), "inputs": "int8-token"}
    save_file(arrays, folder / "model.safetensors", metadata | {"fewbits": json.dumps(declared)})
    with pytest.raises(UnsupportedError, match=r"embed_tokens is a Embedding; only a plain Linear can round"):
        load(folder)


def test_planted_outliers_cost_what_per_channel_factors_would_save(llama, tmp_path):
    """One channel of a norm 64 times as large, the next layers' columns as much smaller: the same model in FP32.

    Powers of two, so not one bit of its predictions may change. In the inputs the one channel takes the levels from
    all others; in the weights only its own column has few left. Moving factors back is what SmoothQuant does.
    """
    planted = tmp_path / "planted"
    shutil.copytree(llama, planted)
    arrays = load_file(planted / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        arrays[f"{prefix}post_attention_layernorm.weight"][3] *= 64
        for name in ("gate_proj", "up_proj"):
            arrays[f"{prefix}mlp.{name}.weight"][:, 3] /= 64
    save_file(arrays, planted / "model.safetensors", {"format": "pt"})
    original = logits(load(llama))
    assert torch.equal(logits(load(planted)), original)
    inputs, weights = {}, {}
    for source in (llama, planted):
        folder = quantize(source, tmp_path / f"{source.name}-int8", "int8-token")
        decoded = logits(load_decoded(folder))
        weights[source] = noise(decoded, original)
        inputs[source] = noise(logits(load(folder)), decoded)
    assert inputs[planted] > 3 * inputs[llama]
    assert weights[planted] < 2 * weights[llama]
