"""GGUF's names, hyper-parameters and transforms: against transformers' numbers and llama.cpp's own ones."""

from __future__ import annotations

import math

import pytest
import torch
from gguf import GGUFReader
from tiny import SHAPE, export, read_config, read_weights, save_model, sentencepiece
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fewbits.checkpoint.gguf import Gguf
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import format_named
from fewbits.models import (
    FAMILIES,
    Role,
    from_gguf,
    gguf_dropped,
    gguf_extras,
    gguf_metadata,
    gguf_pieces,
    gguf_supported,
    halved_order,
    interleaved_order,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
MODELS = {
    "llama": ("llama", {}),
    "llama with biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, yarn with its own attention factor": (
        "qwen3",
        {"head_dim": 16, "rope_parameters": YARN | {"attention_factor": 1.3}},
    ),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma 2": ("gemma2", GEMMA),
    "gemma 3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    "gemma 3, linear": ("gemma3_text", GEMMA | {"num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE}),
}


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    """A folder and its model."""
    kind, settings = MODELS[request.param]
    return tmp_path / "model", save_model(tmp_path / "model", kind, **settings)


def logits(model, tokens):
    with torch.inference_mode():
        return model(tokens.unsqueeze(0)).logits[0]


def test_a_written_file_gives_the_same_model_back(model, tmp_path):
    folder, original = model
    export(folder, tmp_path / "m.gguf")
    reader = Gguf().open(tmp_path / "m.gguf")
    factors = reader.read("rope_freqs.weight").codes.tolist() if "rope_freqs.weight" in reader.entries else None
    config, restored = from_gguf(reader.config, reader.entries, factors)
    weights = {}
    for name, piece in restored.items():
        w = reader.read(piece.source).dequantize()
        order = piece.row_order(w.shape[0])
        weights[name] = (w if order is None else w[order]) + piece.added
    source = read_weights(folder)
    assert weights.keys() == source.keys()
    for name, w in weights.items():
        # 1 + w was rounded to FP32 once: half a step of a number below 4
        assert torch.allclose(w, source[name], rtol=0, atol=2**-23 if "norm" in name else 0), name
    again = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config)).eval()
    again.load_state_dict(weights, strict=False)
    again.tie_weights()
    tokens = torch.arange(100) * 7 % original.config.vocab_size
    theirs, ours = logits(original, tokens), logits(again, tokens)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_llama_cpp_computes_the_same(model, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    folder, original = model
    export(folder, tmp_path / "m.gguf")
    tokens = torch.arange(100) * 7 % original.config.vocab_size
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=128, n_batch=128, logits_all=True, verbose=False)
    theirs.eval(tokens.tolist())
    q = torch.tensor(theirs.scores[: len(tokens)]).double().log_softmax(-1)
    theirs.close()
    p = logits(original, tokens).double().log_softmax(-1)
    # llama.cpp keeps keys and values in FP16 and rounds queries to it: 2⁻¹¹ relative, which squared is about 1e-6 nats.
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 5e-5


@pytest.mark.parametrize("format", ["fp16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_llama_cpp_loads_every_format(tmp_path, format):
    llama_cpp = pytest.importorskip("llama_cpp")
    save_model(tmp_path / "model", "llama", hidden_size=64, intermediate_size=96)
    export(tmp_path / "model", tmp_path / "m.gguf", format_named(format))
    loaded = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=32, verbose=False)
    loaded.eval([1, 2, 3])
    assert loaded.n_tokens == 3
    loaded.close()


def test_pieces_account_for_every_parameter(model):
    folder, _ = model
    shapes = {name: tuple(w.shape) for name, w in read_weights(folder).items()}
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (4,)
    config = read_config(folder)
    pieces, dropped = gguf_pieces(config, shapes), gguf_dropped(config, shapes)
    assert {piece.source for piece in pieces} | dropped.keys() == shapes.keys()
    assert len({piece.name for piece in pieces}) == len(pieces)
    assert [piece.name for piece in pieces if piece.role is Role.EMBEDDING] == (
        [] if config["tie_word_embeddings"] else ["token_embd.weight"]
    )


def test_copy_of_a_tied_output_is_dropped():
    config = SHAPE | {"model_type": "llama", "vocab_size": 8, "tie_word_embeddings": True}
    shapes = {"model.embed_tokens.weight": (8, 32), "lm_head.weight": (8, 32)}
    (piece,) = gguf_pieces(config, shapes)
    assert (piece.name, piece.role) == ("token_embd.weight", Role.OUTPUT)
    assert "tied" in gguf_dropped(config, shapes)["lm_head.weight"]


def test_hyper_parameters_of_a_gemma_3(tmp_path):
    kind, settings = MODELS["gemma 3, linear"]
    save_model(tmp_path / "model", kind, sentencepiece(), **settings, bos_token_id=1)
    export(tmp_path / "model", tmp_path / "m.gguf")
    fields = GGUFReader(tmp_path / "m.gguf").fields
    found = {
        key.removeprefix("gemma3."): field.contents() for key, field in fields.items() if key.startswith("gemma3.")
    }
    assert found == {
        "vocab_size": len(fields["tokenizer.ggml.tokens"].contents()),
        "block_count": 7,
        "context_length": 128,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.sliding_window": 16,
        "rope.dimension_count": 16,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }


def test_interleaving_by_hand():
    # two heads of four rows: halves (0 1 | 2 3) and (4 5 | 6 7)
    assert interleaved_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleaved_order(6, 1).tolist() == [0, 3, 1, 4, 2, 5]
    for rows, heads in ((8, 2), (6, 1), (48, 4)):
        order = interleaved_order(rows, heads)
        assert torch.equal(order[halved_order(rows, heads)], torch.arange(rows))


def test_llama_3_factors_by_hand():
    config = SHAPE | {"model_type": "llama", "vocab_size": 8, "head_dim": 4, "rope_parameters": LLAMA3}
    config["rope_parameters"] = LLAMA3 | {"rope_theta": 16.0}
    # Frequencies 1 and 1/4; 32 tokens make 32 / 2π ≈ 5.09 and 1.27 turns; fast above 4, slow below 1, blended between.
    smooth = (32 / (2 * math.pi) / 4 - 1) / (4 - 1)
    assert gguf_extras(config)["rope_freqs.weight"] == pytest.approx((1.0, 1 / ((1 - smooth) / 8 + smooth)))


def test_context_ends_where_a_missing_window_would_begin():
    config = SHAPE | {"model_type": "mistral", "vocab_size": 8, "sliding_window": 64}
    family = FAMILIES["mistral"]
    assert family.context_length(family.filled(config)) == 64
    assert family.context_length(family.filled(config | {"sliding_window": None})) == 128
    qwen = SHAPE | {"vocab_size": 8, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    assert FAMILIES["qwen2"].context_length(FAMILIES["qwen2"].filled(qwen)) == 64


@pytest.mark.parametrize("kind", FAMILIES)
def test_defaults_are_those_of_transformers(kind):
    theirs = CONFIG_MAPPING[kind]()
    for key, value in FAMILIES[kind].defaults.items():
        if key == "rope_theta":
            assert theirs.rope_parameters["full_attention"]["rope_theta"] == value
        elif key == "rope_local_base_freq":
            assert theirs.rope_parameters["sliding_attention"]["rope_theta"] == value
        elif key == "sliding_window" and "use_sliding_window" in FAMILIES[kind].defaults:
            assert type(theirs)(use_sliding_window=True).sliding_window == value
        else:
            assert getattr(theirs, key) == value, key


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("gpt2", {}, "architecture 'gpt2'.*llama, mistral, qwen2"),
        ("gemma3", {}, "architecture 'gemma3'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("qwen3", {"rope_parameters": LLAMA3}, "rope type 'llama3'"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast 16"),
        ("llama", {"rope_parameters": YARN | {"truncate": False}}, "truncate"),
        ("qwen2", {"head_dim": 16}, "head_dim 16"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings false"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar 100"),
        ("gemma2", {"head_dim": 256, "final_logit_softcapping": None}, "final_logit_softcapping None"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "windows"),
        ("gemma3_text", {"sliding_window_pattern": 2, "num_hidden_layers": 6}, "windows"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_by_name(tmp_path, kind, settings, named):
    config = SHAPE | {"model_type": kind, "vocab_size": 8} | settings
    with pytest.raises(UnsupportedError, match=named):
        gguf_metadata(config, tmp_path)


def test_foreign_parameters_and_tensors_are_refused_by_name():
    config = SHAPE | {"model_type": "llama", "vocab_size": 8}
    for name in ("score.weight", "model.layers.0.self_attn.q_norm.weight", "model.layers.9.mlp.up_proj.weight"):
        with pytest.raises(UnsupportedError, match=name):
            gguf_pieces(config, {name: (4, 4)})
    assert gguf_supported(config)
    assert not gguf_supported({"model_type": "phi3"})
    with pytest.raises(UnsupportedError, match="architecture 'falcon'"):
        from_gguf({"general.architecture": "falcon"}, [])


def test_incomplete_metadata_is_refused_by_key(tmp_path):
    save_model(tmp_path / "model", "llama")
    export(tmp_path / "model", tmp_path / "m.gguf")
    whole = Gguf().open(tmp_path / "m.gguf").config
    names = ["token_embd.weight"]
    assert from_gguf(whole, names)[1].keys() == {"model.embed_tokens.weight"}
    for key in ("llama.block_count", "llama.attention.head_count", "tokenizer.ggml.tokens"):
        part = {k: v for k, v in whole.items() if k != key}
        with pytest.raises(CheckpointError, match=key.removeprefix("llama.")):
            from_gguf(part, names)
    with pytest.raises(UnsupportedError, match="another kind"):
        from_gguf(whole | {"llama.attention.head_count_kv": [1, 2]}, names)
    with pytest.raises(UnsupportedError, match="dimension_count 4"):
        from_gguf(whole | {"llama.rope.dimension_count": 4}, names)
    with pytest.raises(UnsupportedError, match="rope_factors"):
        from_gguf(whole, ["rope_freqs.weight"])
    with pytest.raises(UnsupportedError, match=r"blk\.0\.ffn_gate_exps"):
        from_gguf(whole, ["blk.0.ffn_gate_exps.weight"])
