"""transformers loads into fewbits' layers: while quantizing, from what is quantized already, and back into files."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import warnings
import weakref
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny import save_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GptOssConfig,
    GPTQConfig,
    PreTrainedModel,
)

import fewbits
from fewbits.errors import FormatError, UnsupportedError
from fewbits.formats import format_named
from fewbits.integrations.quantizer import FewbitsQuantizer
from fewbits.methods import quantize_tensor
from fewbits.nn import PackedExperts, QuantizedEmbedding, QuantizedLinear
from fewbits.runtime.tiles import INPUT_GROUP

IDS = torch.arange(5, 69).view(2, 32)
MOE = {"mixtral": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64}}


def load(folder: Path, cls: type = AutoModelForCausalLM, **how) -> PreTrainedModel:
    return cls.from_pretrained(folder, quantization_config=fewbits.Config(**how), dtype=torch.float32)


def plain(folder: Path, cls: type = AutoModelForCausalLM) -> PreTrainedModel:
    return cls.from_pretrained(folder, dtype=torch.float32)


def layers(model: torch.nn.Module, kind: type[torch.nn.Module]) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


@torch.no_grad()
def rounded_copy(folder: Path, names: list[str], format: str, cls: type = AutoModelForCausalLM) -> PreTrainedModel:
    """The original with these parameters replaced by what the format makes of them, decoded."""
    model = plain(folder, cls)
    for name in names:
        w = model.get_parameter(name)
        w.copy_(quantize_tensor(w.detach(), format).dequantize())
    return model


@torch.no_grad()
def same_predictions(ours: PreTrainedModel, theirs: PreTrainedModel, ids: torch.Tensor = IDS) -> bool:
    """Whether logits are as near as inputs rounded to INT8 by 128 columns allow: within some percent of their spread.

    A rounded input is off by up to 1/254 of its group's largest number, a normal one's by 1/254 · 3 / √12 ≈ 0.35 % in
    the root mean square, and a logit goes through some ten such products.
    """
    a, b = ours(ids)[0], theirs(ids)[0]
    assert INPUT_GROUP == 128
    return bool((a - b).std() < 0.03 * b.std())


@torch.no_grad()
def same_numbers(ours: PreTrainedModel, theirs: PreTrainedModel) -> bool:
    """Whether logits agree but for the order of float32 sums: a model in training multiplies by decoded weights.

    A router that chooses another expert, for a rounded input, changes a token's logits by more than any bound.
    """
    a, b = ours.train()(IDS).logits, theirs(IDS).logits
    ours.eval()
    return bool((a - b).abs().max() < 1e-4 * b.abs().max())


def matrices(model: PreTrainedModel) -> list[str]:
    return [f"{name}.weight" for name in layers(model, QuantizedLinear)]


@pytest.fixture(scope="module")
def in_4_bits(llama: Path) -> PreTrainedModel:
    return load(llama, load_in_4bit=True)


def test_every_linear_layer_but_the_output_is_quantized_while_loading(llama, in_4_bits):
    linear = [name for name, m in plain(llama).named_modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(layers(in_4_bits, QuantizedLinear)) == sorted(set(linear) - {"lm_head"})
    assert {report.format for report in in_4_bits.hf_quantizer.reports.values()} == {"int4-g32"}
    assert in_4_bits.is_quantized
    assert in_4_bits.get_memory_footprint() < plain(llama).get_memory_footprint()


def test_no_more_than_one_matrix_is_there_in_floating_point(llama, monkeypatch):
    seen: list[weakref.ref] = []
    put = FewbitsQuantizer.put

    def counting(self, model, name, w):
        gc.collect()
        assert not [ref for ref in seen if ref() is not None]
        seen.append(weakref.ref(w))
        return put(self, model, name, w)

    monkeypatch.setattr(FewbitsQuantizer, "put", counting)
    model = load(llama, load_in_4bit=True)
    assert len(seen) == len(layers(model, QuantizedLinear)) == 14


def test_packed_numbers_are_those_of_the_method(llama, in_4_bits):
    original = plain(llama)
    for name, layer in layers(in_4_bits, QuantizedLinear).items():
        w = original.get_parameter(f"{name}.weight").detach()
        q = quantize_tensor(w, "int4-g32")
        assert torch.equal(layer.weight, q.dequantize())
        error = float((q.dequantize() - w).norm() / w.norm())
        assert in_4_bits.hf_quantizer.reports[f"{name}.weight"].error == pytest.approx(error, rel=1e-4)


def test_predictions_are_those_of_the_rounded_original(llama, in_4_bits):
    decoded = rounded_copy(llama, matrices(in_4_bits), "int4-g32")
    assert same_predictions(in_4_bits, decoded)
    assert not same_predictions(in_4_bits, plain(llama))  # 4 bits cost more than the bound


def test_it_generates(llama, in_4_bits):
    found = in_4_bits.generate(IDS[:1, :8], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert found.shape == (1, 14)
    decoded = rounded_copy(llama, matrices(in_4_bits), "int4-g32")
    assert torch.equal(found[:, :9], decoded.generate(IDS[:1, :8], max_new_tokens=1, do_sample=False))


@pytest.mark.parametrize(
    ("how", "format"),
    [({"load_in_8bit": True}, "int8"), ({"format": "nf4-dq"}, "nf4-dq"), ({"format": "q4_0"}, "q4_0")],
)
def test_other_formats(llama, how, format):
    model = load(llama, **how)
    assert same_predictions(model, rounded_copy(llama, matrices(model), format))
    assert next(iter(layers(model, QuantizedLinear).values())).store.format == format_named(format)


def test_overrides_and_modules_that_are_skipped(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was asked for needs no warning
        model = load(llama, load_in_4bit=True, overrides={"q_proj": "int8", "k_proj": "keep"}, skip=["layers.1.mlp"])
    formats = {name: str(layer.store.format) for name, layer in layers(model, QuantizedLinear).items()}
    assert formats["model.layers.0.self_attn.q_proj"] == "int8"
    assert "model.layers.0.self_attn.k_proj" not in formats
    assert not [name for name in formats if "layers.1.mlp" in name]
    assert formats["model.layers.0.mlp.up_proj"] == "int4-g32"


def test_a_pattern_that_matches_nothing_is_an_error(llama):
    with pytest.raises(UnsupportedError, match="override 'nowhere' matches no tensor"):
        load(llama, load_in_4bit=True, skip=["nowhere"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_vocabulary_stays_tied(tmp_path, tied):
    save_model(tmp_path / "m", "llama", hidden_size=64, tie_word_embeddings=tied)
    model = load(tmp_path / "m", load_in_4bit=True, vocabulary="int8")
    assert isinstance(model.lm_head, QuantizedLinear)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert (model.lm_head.store is model.model.embed_tokens.store) is tied
    names = [*matrices(model), "model.embed_tokens.weight"]
    decoded = rounded_copy(tmp_path / "m", [name for name in names if "lm_head" not in name], "int4-g32")
    original = plain(tmp_path / "m")
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            q = quantize_tensor(original.get_parameter(name).detach(), "int8")
            decoded.get_parameter(name).copy_(q.dequantize())
    assert same_predictions(model, decoded)


def test_a_plan_says_each_tensors_format(llama, tmp_path):
    plan = fewbits.make_plan(llama, fewbits.Budget(bpw=14), target="vllm")
    from fewbits.plan.planned import write_plan

    write_plan(plan, tmp_path / "plan.json")
    model = load(llama, plan=tmp_path / "plan.json")
    planned = {name: format for name, format in plan.tensors().items() if format.name not in ("fp32", "fp16", "bf16")}
    found = {f"{name}.weight": layer.store.format for name, layer in layers(model, QuantizedLinear).items()}
    assert found == planned
    assert len({format.name for format in found.values()}) > 1


def test_layers_of_another_make_are_named(tmp_path):
    save_model(tmp_path / "m", "mamba", hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.warns(UserWarning, match=r"leaves 2 matrices .*conv1d.weight \(Conv1d \[48, 1, 4\] is neither"):
        model = load(tmp_path / "m", load_in_4bit=True)
    assert layers(model, QuantizedLinear)


def test_a_model_without_linear_layers_is_refused(tmp_path):
    save_model(tmp_path / "m", "gpt2", n_embd=32, n_layer=1, n_head=4, n_positions=128)
    with pytest.raises(UnsupportedError, match="no linear layers"):
        load(tmp_path / "m", load_in_4bit=True)


def test_saved_in_a_standard_format_that_transformers_loads_alone(in_4_bits, llama, tmp_path):
    in_4_bits.save_pretrained(tmp_path / "out")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    theirs = plain(tmp_path / "out")
    decoded = rounded_copy(llama, matrices(in_4_bits), "int4-g32")
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, decoded(IDS).logits, atol=1e-4)
    assert fewbits.verify(tmp_path / "out", llama).passed
    assert (tmp_path / "out" / "generation_config.json").is_file()


@pytest.mark.parametrize("how", [{"format": "nf4-dq"}, {"load_in_4bit": True, "vocabulary": "int8"}])
def test_saved_in_our_own_kind_it_loads_without_a_word(llama, tmp_path, how):
    model = load(llama, **how)
    model.save_pretrained(tmp_path / "out")
    again = plain(tmp_path / "out")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert fewbits.verify(tmp_path / "out", llama).passed
    assert same_predictions(fewbits.load(tmp_path / "out"), again)


def test_saving_again_takes_the_place_of_older_files(in_4_bits, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (out / "notes.txt").write_text("mine")
    in_4_bits.save_pretrained(out)
    in_4_bits.save_pretrained(out)
    assert not (out / "model-00001-of-00002.safetensors").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert fewbits.verify(out).passed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_hub_gets_the_same_files(in_4_bits, tmp_path, monkeypatch):
    hub, uploaded = "transformers.utils.hub", []
    repository = SimpleNamespace(repo_id="me/out")
    monkeypatch.setattr(f"{hub}.hf_api", lambda: SimpleNamespace(create_repo=lambda *a, **k: repository))
    monkeypatch.setattr(f"{hub}.create_and_tag_model_card", lambda *a, **k: SimpleNamespace(save=lambda path: None))
    monkeypatch.setattr(
        PreTrainedModel,
        "_upload_modified_files",
        lambda self, folder, *a, **k: uploaded.append({p.name: p.read_bytes() for p in Path(folder).iterdir()}),
    )
    in_4_bits.save_pretrained(tmp_path / "out", push_to_hub=True)
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert uploaded == [written]
    assert "fewbits.json" in written


def test_the_kind_that_was_asked_for_is_written_or_refused(llama, tmp_path):
    load(llama, format="nf4", kind="bitsandbytes").save_pretrained(tmp_path / "bnb")
    quantization = json.loads((tmp_path / "bnb" / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "bitsandbytes"
    model = load(llama, format="nf4-dq", kind="fewbits")
    model.config.quantization_config.kind = "gptq"
    with pytest.raises(UnsupportedError, match="cannot be saved as it is"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gptq", "awq", "gptq-v2"])
def test_gptq_and_awq_load_with_no_further_package(llama, tmp_path, kind):
    if find_spec("gptqmodel"):
        pytest.skip("gptqmodel is installed, and transformers loads these by it")
    format = "int4-asym-g32" if kind == "awq" else "int4-g32"
    fewbits.quantize(llama, tmp_path / "q", format=format, kind=kind, prove=False)
    model = plain(tmp_path / "q")
    assert same_predictions(model, fewbits.load(tmp_path / "q", packed=False))
    assert layers(model, QuantizedLinear)


def test_to_quantize_by_gptq_while_loading_is_still_transformers_own(llama):
    if find_spec("optimum"):
        pytest.skip("optimum is installed")
    with pytest.raises(ImportError, match="optimum"):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=GPTQConfig(bits=4))


@pytest.mark.parametrize(
    ("kind", "format"), [("compressed-tensors", "int4-g32"), ("bitsandbytes", "nf4"), ("bitsandbytes", "llm-int8")]
)
def test_a_checkpoint_of_another_tool_by_an_explicit_configuration(llama, tmp_path, kind, format):
    fewbits.quantize(llama, tmp_path / "q", format=format, kind=kind, prove=False)
    model = load(tmp_path / "q")
    assert {str(layer.store.format) for layer in layers(model, QuantizedLinear).values()} == {format}
    assert same_predictions(model, fewbits.load(tmp_path / "q", packed=False))


def test_rounded_inputs_are_rounded(llama, tmp_path):
    fewbits.quantize(llama, tmp_path / "q", format="int8", inputs="int8-token", prove=False)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "q")(IDS).logits, fewbits.load(tmp_path / "q")(IDS).logits)


def test_what_only_load_adds_is_refused(llama, tmp_path):
    fewbits.quantize(llama, tmp_path / "q", format="int4-g32", cache="fp8", prove=False)
    with pytest.raises(UnsupportedError, match="rounds its key-value cache"):
        load(tmp_path / "q")
    fewbits.quantize(llama, tmp_path / "a", format="int4-g32", prove=False)
    adapted = get_peft_model(plain(llama), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "a" / "adapter")
    with pytest.raises(UnsupportedError, match="has an adapter inside"):
        load(tmp_path / "a")


def test_what_is_quantized_already_is_not_quantized_again(llama, tmp_path):
    fewbits.quantize(llama, tmp_path / "q", format="int4-g32", prove=False)
    with pytest.raises(UnsupportedError, match="quantized already, and int8 was asked for"):
        load(tmp_path / "q", load_in_8bit=True)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, UnsupportedError, "load_in_4bit and load_in_8bit were given"),
        ({"format": "int4-g33"}, FormatError, "int4-g33"),
        ({"load_in_4bit": True, "vocabulary": "int99"}, FormatError, "int99"),
        ({"load_in_4bit": True, "kind": "zip"}, UnsupportedError, "file type 'zip' is not known"),
        ({"load_in_4bit": True, "method": "gptq"}, UnsupportedError, "method gptq needs a text"),
        ({}, UnsupportedError, "says no format"),
    ],
)
def test_contradictions_are_refused(llama, how, error, message):
    with pytest.raises(error, match=message):
        load(llama, **how)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=300, num_labels=3
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("cls", [AutoModel, AutoModelForSequenceClassification])
def test_encoders(bert, tmp_path, cls):
    model = load(bert, cls, load_in_8bit=True)
    names = matrices(model)
    assert len(names) == 12 + 1  # of two layers, and the pooler; a classifier follows the model and stays
    assert same_predictions(model, rounded_copy(bert, names, "int8", cls))
    model.save_pretrained(tmp_path / "out")
    assert same_predictions(load(tmp_path / "out", cls), model)


@pytest.mark.parametrize("kind", MOE)
@pytest.mark.parametrize("format", ["int4-g32", "nf4-dq"])
def test_fused_experts_are_quantized_too(tmp_path, kind, format):
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_experts_per_tok": 2, **MOE[kind]}
    save_model(tmp_path / "m", kind, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(tmp_path / "m", format=format)
    experts = layers(model, PackedExperts)
    assert len(experts) == 2 * 2
    decoded = rounded_copy(tmp_path / "m", matrices(model), format)
    with torch.no_grad():
        for name in experts:
            for w in decoded.get_parameter(name):
                w.copy_(quantize_tensor(w, format).dequantize())
    assert same_numbers(model, decoded)
    assert model.generate(IDS[:1, :5], max_new_tokens=3, min_new_tokens=3).shape == (1, 8)
    model.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_experts_that_lie_across_with_biases(tmp_path):
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=300,
        layer_types=["full_attention"],
        max_position_embeddings=128,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    original.save_pretrained(tmp_path / "m")
    model = load(tmp_path / "m", load_in_8bit=True)
    assert len(layers(model, PackedExperts)) == 2
    decoded = rounded_copy(tmp_path / "m", matrices(model), "int8")
    with torch.no_grad():
        for name in layers(model, PackedExperts):
            for w in decoded.get_parameter(name):
                w.copy_(quantize_tensor(w.T.contiguous(), "int8").dequantize().T)
    assert same_numbers(model, decoded)
    with pytest.raises(UnsupportedError, match="no kind of checkpoint holds that"):
        model.save_pretrained(tmp_path / "out")


def test_adapters_train_on_it(llama):
    model = load(llama, load_in_4bit=True)
    names = matrices(model)
    with torch.no_grad():
        before = model(IDS).logits
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapted.train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    slopes = [p.grad for name, p in adapted.named_parameters() if "lora_" in name]
    assert slopes
    assert all(slope is not None and bool(slope.any()) for slope in slopes)
    decoded = rounded_copy(llama, names, "int4-g32")
    reference = get_peft_model(decoded, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    reference.load_state_dict({k: v for k, v in adapted.state_dict().items() if "lora_" in k}, strict=False)
    reference.train()
    reference(input_ids=IDS, labels=IDS).loss.backward()
    theirs = [p.grad for name, p in reference.named_parameters() if "lora_" in name]
    for ours, other in zip(slopes, theirs, strict=True):
        assert (ours - other).norm() < 1e-3 * other.norm()
    with torch.no_grad(), adapted.disable_adapter():
        adapted.eval()
        assert torch.allclose(adapted(IDS).logits, before)


RUN = """
import sys
{first}
assert "fewbits.integrations.registered" not in sys.modules or "transformers.quantizers.auto" in sys.modules
{second}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
print(type(model.model.layers[0].mlp.up_proj).__module__)
"""


@pytest.mark.parametrize(
    "order", [("import fewbits", "import transformers"), ("import transformers.quantizers", "import fewbits")]
)
def test_importing_fewbits_is_enough(llama, tmp_path, order):
    fewbits.quantize(llama, tmp_path / "q", format="nf4-dq", prove=False)
    text = RUN.format(first=order[0], second=order[1], folder=str(tmp_path / "q"))
    out = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["fewbits.nn.modules"]


def test_importing_fewbits_imports_neither_torch_nor_transformers():
    text = "import sys, fewbits; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_registry_has_us_once():
    from transformers.quantizers import auto

    from fewbits.integrations.registered import register

    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    register()
    assert before == auto.AUTO_QUANTIZER_MAPPING
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["fewbits"] is fewbits.Config
    assert transformers.quantizers.auto is auto
