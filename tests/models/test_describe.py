"""Roles: by name for the known families, by module for everything else, and both agree."""

from __future__ import annotations

import pytest
import torch
from tiny import SHAPE, read_config, read_weights, save_model
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from fewbits.errors import UnsupportedError
from fewbits.models import FAMILIES, Role, cache_shape, describe, unfused
from fewbits.models._modules import describe_modules
from fewbits.models.describe import BY_NAME

MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}


def shapes_in(folder):
    return {name: tuple(w.shape) for name, w in read_weights(folder).items()}


@pytest.mark.parametrize("kind", [*FAMILIES, *BY_NAME])
def test_names_and_modules_agree(tmp_path, kind):
    save_model(tmp_path, kind, **(MOE if kind in BY_NAME else {}))
    config, shapes = read_config(tmp_path), shapes_in(tmp_path)
    by_name, by_module = describe(config, shapes), describe_modules(config, shapes)
    assert by_name.family == kind
    assert by_module.family is None
    assert by_name.roles == by_module.roles
    assert by_name.tied == by_module.tied
    assert Role.OTHER not in by_name.roles.values()


def test_experts_and_routers_of_a_mixture(tmp_path):
    save_model(tmp_path, "qwen2_moe", **MOE)
    roles = describe(read_config(tmp_path), shapes_in(tmp_path)).roles
    layer = "model.layers.0.mlp."
    assert roles[layer + "gate.weight"] is Role.ROUTER
    assert roles[layer + "shared_expert_gate.weight"] is Role.ROUTER
    assert roles[layer + "shared_expert.up_proj.weight"] is Role.LINEAR
    assert roles[layer + "experts.3.down_proj.weight"] is Role.LINEAR
    fused = {layer + "experts.gate_up_proj": (4, 32, 32)}
    assert describe({"model_type": "qwen2_moe"}, fused).roles == {layer + "experts.gate_up_proj": Role.EXPERTS}


def test_tied_embeddings():
    shapes = {"model.embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4)}
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    assert describe({"model_type": "llama", "tie_word_embeddings": True}, shapes).tied == tied
    assert describe({"model_type": "llama"}, shapes).tied == {}
    assert describe({"model_type": "gemma"}, {"model.embed_tokens.weight": (8, 4)}).tied == tied


@pytest.mark.parametrize("kind", ["gpt_neox", "phi3", "bert", "gpt2"])
def test_any_other_architecture_is_described_by_its_modules(tmp_path, kind):
    config = CONFIG_MAPPING[kind](**SHAPE | {"vocab_size": 50, "n_embd": 32, "n_head": 4, "n_layer": 2})
    auto = AutoModel if kind == "bert" else AutoModelForCausalLM
    model = auto.from_config(config)
    model.save_pretrained(tmp_path)
    shapes = shapes_in(tmp_path)
    found = describe(read_config(tmp_path), shapes)
    assert found.roles.keys() == shapes.keys()
    linear = {name for name, role in found.roles.items() if role is Role.LINEAR}
    modules = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    output = model.get_output_embeddings() if auto is AutoModelForCausalLM else None
    modules -= {f"{name}.weight" for name, module in model.named_modules() if module is output}
    assert {name.removeprefix("model.") for name in linear} == {name.removeprefix("model.") for name in modules}
    norms = [name for name, role in found.roles.items() if role is Role.NORM]
    assert norms
    assert all(len(shapes[name]) == 1 for name in norms)
    assert Role.EMBEDDING in found.roles.values()


def test_llama_with_a_classifier_keeps_what_it_cannot_place():
    config = SHAPE | {"model_type": "llama", "vocab_size": 8, "architectures": ["LlamaForCausalLM"]}
    roles = describe(config, {"model.embed_tokens.weight": (8, 32), "my.matrix": (4, 4)}).roles
    assert roles == {"model.embed_tokens.weight": Role.EMBEDDING, "my.matrix": Role.OTHER}


def test_unknown_architectures_are_refused_and_their_code_is_not_run():
    with pytest.raises(UnsupportedError, match=r"'mystery'.*auto_map"):
        describe({"model_type": "mystery", "auto_map": {"AutoModel": "evil.Model"}}, {"w": (1, 1)})


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "llama4_text"])
def test_unfused_experts_are_what_the_model_multiplies_with(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "moe_intermediate_size": 12}
    config = CONFIG_MAPPING[kind](**SHAPE | MOE | sizes | {"num_attention_heads": 2, "intermediate_size_mlp": 12})
    experts = _experts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    settings = {"model_type": kind, "hidden_size": 8}
    matrices = {}
    for name, parameter in experts.named_parameters():
        for piece in unfused(f"mlp.experts.{name}", tuple(parameter.shape), settings):
            w = parameter[piece.expert]
            w = w.T if piece.transposed else w
            w = w[slice(*piece.rows)] if piece.rows else w
            assert tuple(w.shape) == piece.shape
            matrices[piece.name] = w
    assert len(matrices) == 4 * 3
    x = torch.randn(3, 8)
    for expert in range(4):
        gate, up, down = (matrices[f"mlp.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        assert torch.allclose(_one_expert(kind, experts, x, expert), expected, atol=1e-5)


def _experts(config):
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config)
    return next(module for module in model.modules() if type(module).__name__.endswith("Experts"))


def _one_expert(kind, experts, x, expert):
    if kind == "llama4_text":
        inputs = torch.zeros(4, *x.shape)
        inputs[expert] = x
        return experts(inputs.flatten(0, 1)).view(4, *x.shape)[expert]
    chosen = torch.full((x.shape[0], 1), expert)
    return experts(x, chosen, torch.ones(x.shape[0], 1))


def test_experts_by_name_and_shape():
    pieces = unfused(
        "model.layers.1.mlp.experts.gate_up_proj", (2, 10, 6), {"model_type": "qwen3_moe", "hidden_size": 6}
    )
    assert [(p.name, p.shape, p.expert, p.rows) for p in pieces] == [
        ("model.layers.1.mlp.experts.0.gate_proj.weight", (5, 6), 0, (0, 5)),
        ("model.layers.1.mlp.experts.0.up_proj.weight", (5, 6), 0, (5, 10)),
        ("model.layers.1.mlp.experts.1.gate_proj.weight", (5, 6), 1, (0, 5)),
        ("model.layers.1.mlp.experts.1.up_proj.weight", (5, 6), 1, (5, 10)),
    ]
    text = {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "hidden_size": 6}}
    (first, *_) = unfused("feed_forward.experts.down_proj", (2, 5, 6), text)
    assert (first.shape, first.transposed, first.rows) == ((6, 5), True, None)


@pytest.mark.parametrize("shape", [(2, 10, 6), (2, 6, 10)])
def test_layouts_of_qwen3_vl_are_told_apart_by_shape(shape):
    config = {"model_type": "qwen3_vl_moe_text", "hidden_size": 6}
    (first, *_) = unfused("experts.gate_up_proj", shape, config)
    assert (first.shape, first.transposed) == ((5, 6), shape[1] == 6)


@pytest.mark.parametrize(
    ("kind", "name", "shape", "why"),
    [
        ("gpt_oss", "experts.gate_up_proj", (2, 6, 10), "alternate"),
        ("qwen3_moe", "experts.gate_up_proj", (2, 6, 10), "hidden_size 6"),
        ("qwen3_vl_moe", "experts.gate_up_proj", (2, 6, 6), "both layouts fit"),
        ("granitemoe", "input_linear.weight", (2, 10, 6), "only 3-D"),
    ],
)
def test_layouts_that_are_not_certain_are_refused(kind, name, shape, why):
    with pytest.raises(UnsupportedError, match=why):
        unfused(name, shape, {"model_type": kind, "hidden_size": 6})


def test_cache_of_llama_3_8b_by_hand():
    config = {"model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    shape = cache_shape(config | {"hidden_size": 4096})
    assert (shape.layers, shape.kv_heads, shape.head_dim) == (32, 8, 128)
    assert 2 * shape.numbers(8192) == 1 << 30  # one GiB in 16 bits, as llama.cpp reports it


def test_cache_of_a_windowed_model_stops_growing():
    gemma = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=6, sliding_window=512).to_dict()
    shape = cache_shape(gemma)
    assert shape.windows == (512, 512, 512, 512, 512, None)
    assert shape.numbers(2000) == 2 * (5 * 512 + 2000) * 4 * 256
    other = {"model_type": "cohere2", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    other |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    assert cache_shape(other).windows == (8, None)
    with pytest.raises(UnsupportedError, match="num_hidden_layers"):
        cache_shape({"model_type": "mamba", "hidden_size": 32})
