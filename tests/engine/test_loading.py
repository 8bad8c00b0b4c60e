"""Loading: float folders bit for bit as transformers loads them, quantized ones as their decoded weights say."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import save_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from fewbits.checkpoint import KINDS, Entry, open_checkpoint
from fewbits.engine import load
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import FORMATS, Float, QTensor
from fewbits.nn import QuantizedEmbedding, QuantizedLinear

IDS = torch.tensor([[1, 5, 9, 60, 2, 2, 7]])
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS = {
    "llama, tied": ("LlamaForCausalLM", TINY | {"tie_word_embeddings": True}),
    "llama, long rope": (
        "LlamaForCausalLM",
        TINY
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2, biases": ("Qwen2ForCausalLM", TINY | {"tie_word_embeddings": False}),
    "gemma3, scaled embedding": ("Gemma3ForCausalLM", TINY | {"head_dim": 8, "sliding_window": 4}),
    "qwen3-moe, fused experts": ("Qwen3MoeForCausalLM", TINY | EXPERTS | {"head_dim": 8}),
    "mixtral, renamed experts": ("MixtralForCausalLM", TINY | {"num_local_experts": 4}),
    "gpt2, transposed": (
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "bert, encoder": ("BertForMaskedLM", TINY),
    "bert, no head": ("BertModel", TINY),
    "t5, two stacks": ("T5EncoderModel", {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}),
}


def build(name: str, folder: Path) -> Path:
    """A random model of that kind, saved by transformers."""
    architecture, values = MODELS[name]
    cls = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = cls(cls.config_class(**values))
    for parameter in model.parameters():  # norms and biases start as constants, which would hide a swap
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def outputs(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids)[0]


def quantize(
    source: Path, out: Path, kind: str, format_name: str, chosen=lambda name: name.endswith("proj.weight")
) -> Path:
    """Every chosen matrix in that format, the rest as it is."""
    _, reader = open_checkpoint(source)
    tensors = {}
    for name in reader.entries:
        tensors[name] = reader.read(name)
        if chosen(name):
            format, w = FORMATS[format_name], tensors[name].dequantize()
            params = format.fit(w)
            tensors[name] = QTensor(format, format.round(w, params), params)
    entries = [Entry(name, tensor.shape, tensor.format) for name, tensor in tensors.items()]
    with KINDS[kind].create(out, entries, source, reader.config) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit({"tensors": []})
    return out


def decoded_folder(quantized: Path, source: Path, out: Path) -> Path:
    """A float folder that holds what the quantized one decodes to, for transformers to load."""
    _, reader = open_checkpoint(quantized)
    out.mkdir()
    save_file({name: reader.read(name).dequantize() for name in reader.entries}, out / "model.safetensors")
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    return out


def theirs(folder: Path, **options) -> PreTrainedModel:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_float_folder_gives_transformers_logits_bit_for_bit(name, tmp_path):
    folder = build(name, tmp_path)
    model = load(folder)
    assert type(model).__name__ == MODELS[name][0]
    assert not model.training
    assert torch.equal(outputs(model), outputs(theirs(folder)))


def test_a_bound_on_scores_is_not_left_out(tmp_path):
    """transformers' default attention does leave it out: eager is what computes Gemma 2's."""
    model = save_model(tmp_path, "gemma2", head_dim=16, attn_logit_softcapping=0.5, query_pre_attn_scalar=1)
    without = outputs(model)
    model.set_attn_implementation("eager")
    assert torch.equal(outputs(load(tmp_path)), outputs(model))
    assert (outputs(model) - without).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["stories260K", "babyllama", "books"])
def test_real_models_in_every_dtype(name, dtype, shared_models):
    path = shared_models / name
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model = load(path, dtype=dtype)
    assert model.dtype == dtype
    assert torch.equal(outputs(model), outputs(reference))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()


def test_parameters_that_must_stay_in_float32_do(tmp_path):
    folder = build("t5, two stacks", tmp_path)
    model = load(folder, dtype=torch.float16)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert model.encoder.block[0].layer[1].DenseReluDense.wi.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("kind", "format_name"),
    [
        ("compressed-tensors", "int4-g32"),
        ("compressed-tensors", "int8"),
        ("fewbits", "int3-g32"),
        ("fewbits", "nf4-dq"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_quantized_checkpoint_computes_with_its_decoded_weights(kind, format_name, packed, tmp_path):
    source = build("llama, tied", tmp_path / "source")
    path = quantize(source, tmp_path / "out", kind, format_name)
    model = load(path, packed=packed)
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, QuantizedLinear if packed else torch.nn.Linear)
    reference = theirs(decoded_folder(path, source, tmp_path / "decoded"))
    # One block holds each of these small matrices, so even the order of additions is torch's.
    assert torch.equal(outputs(model), outputs(reference))


def test_packed_weights_take_the_files_memory(tmp_path):
    source = build("llama, tied", tmp_path / "source")
    model = load(quantize(source, tmp_path / "out", "compressed-tensors", "int4-g32"))
    layer = model.model.layers[0].mlp.gate_proj
    assert sum(buffer.nbytes for buffer in layer.buffers()) == FORMATS["int4-g32"].nbytes((64, 32))


def test_a_tied_quantized_embedding_is_shared_with_the_output(tmp_path):
    source = build("llama, tied", tmp_path / "source")
    path = quantize(source, tmp_path / "out", "fewbits", "int8", lambda name: "embed" in name)
    model = load(path)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.lm_head.store is model.model.embed_tokens.store
    reference = theirs(decoded_folder(path, source, tmp_path / "decoded"))
    assert torch.equal(outputs(model), outputs(reference))


def test_a_tied_embedding_of_gemmas_is_decoded_once_and_shared(tmp_path, caplog):
    source = build("gemma3, scaled embedding", tmp_path / "source")
    path = quantize(source, tmp_path / "out", "fewbits", "int8", lambda name: "embed" in name)
    with caplog.at_level(logging.INFO, logger="fewbits"):
        model = load(path)
    assert "decoded to torch.float32, having no packed form in transformers: model.embed_tokens.weight" in caplog.text
    assert model.lm_head.weight is model.model.embed_tokens.weight
    reference = theirs(decoded_folder(path, source, tmp_path / "decoded"))
    assert torch.equal(outputs(model), outputs(reference))


@pytest.mark.parametrize("name", ["qwen3-moe, fused experts", "mixtral, renamed experts"])
def test_experts_stored_one_by_one_are_decoded_into_the_fused_parameter(name, tmp_path, caplog):
    source = build(name, tmp_path / "source")
    path = quantize(source, tmp_path / "out", "fewbits", "int4-g32", lambda name: ".experts." in name)
    with caplog.at_level(logging.INFO, logger="fewbits"):
        model = load(path)
    assert "experts.gate_up_proj" in caplog.text
    reference = theirs(decoded_folder(path, source, tmp_path / "decoded"))
    assert torch.equal(outputs(model), outputs(reference))


def test_a_large_tensor_is_read_in_slabs(tmp_path, monkeypatch):
    from fewbits.engine import weights

    source = build("qwen2, biases", tmp_path / "source")
    path = quantize(source, tmp_path / "out", "fewbits", "int4-g32")
    whole = outputs(load(path))
    monkeypatch.setattr(weights, "SLAB", 5 * 32)  # five rows of 32; 96 and 64 rows leave a rest
    assert torch.equal(outputs(load(path)), whole)


def test_generate_copy_and_state_dict(tmp_path):
    source = build("llama, tied", tmp_path / "source")
    path = quantize(source, tmp_path / "out", "compressed-tensors", "int4-g32")
    model = load(path)
    packed = model.generate(IDS, max_new_tokens=8, do_sample=False)
    plain = load(path, packed=False).generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(packed, plain)
    assert packed.shape == (1, IDS.shape[1] + 8)
    twin = copy.deepcopy(model)
    for buffer in twin.model.layers[0].mlp.up_proj.buffers():
        buffer.zero_()
    assert not torch.equal(outputs(twin), outputs(model))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(outputs(twin), outputs(model))


def test_transformers_own_tying_and_saving(tmp_path):
    source = build("llama, tied", tmp_path / "source")
    model = load(quantize(source, tmp_path / "out", "fewbits", "int8", lambda name: "embed" in name))
    before = outputs(model)
    model.tie_weights()
    assert torch.equal(outputs(model), before)
    with pytest.raises(UnsupportedError, match="packed=False"):
        model.save_pretrained(tmp_path / "saved")
    load(tmp_path / "out", packed=False).save_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(theirs(tmp_path / "saved")), before)


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_entry_is_named(tmp_path):
    folder = build("qwen2, biases", tmp_path)
    edit(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"Qwen2ForCausalLM needs model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_a_missing_norm_is_named_although_its_constructor_filled_it(tmp_path):
    folder = build("qwen2, biases", tmp_path)
    edit(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"needs model\.norm\.weight"):
        load(folder)


def test_an_unexpected_entry_is_named(tmp_path):
    folder = build("qwen2, biases", tmp_path)
    edit(folder, lambda t: t.update({"model.layers.7.extra.weight": torch.zeros(2, 2)}))
    with pytest.raises(CheckpointError, match=r"no parameter for model\.layers\.7\.extra\.weight"):
        load(folder)


def test_rotary_frequencies_of_old_checkpoints_are_ignored(tmp_path):
    folder = build("qwen2, biases", tmp_path)
    before = outputs(load(folder))
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert torch.equal(outputs(load(folder)), before)


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path):
    folder = build("qwen2, biases", tmp_path)
    edit(folder, lambda t: t.update({"model.norm.weight": torch.zeros(16)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[16\] .* asks for \[32\]"):
        load(folder)


def test_an_unknown_architecture_is_named(tmp_path):
    folder = build("qwen2, biases", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen99"}))
    with pytest.raises(UnsupportedError, match="'qwen99' is not in the installed transformers"):
        load(folder)


def test_untied_in_the_file_stays_untied(tmp_path, caplog):
    folder = build("llama, tied", tmp_path)
    edit(folder, lambda t: t.update({"lm_head.weight": torch.randn(96, 32)}))
    with caplog.at_level(logging.INFO, logger="fewbits"):
        model = load(folder)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert "differ in the file" in caplog.text


def test_an_equal_copy_of_a_tied_weight_is_tied(tmp_path):
    folder = build("llama, tied", tmp_path)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_float_parameters_are_entries_like_any_other(tmp_path):
    """The helper above relies on it."""
    folder = build("llama, tied", tmp_path)
    _, reader = open_checkpoint(folder)
    assert all(isinstance(entry.format, Float) for entry in reader.entries.values())
