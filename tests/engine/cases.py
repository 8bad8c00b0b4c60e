"""A tiny model of every family, and two texts to run them on."""

from __future__ import annotations

from typing import Any

import numpy as np

from fewbits.runtime.runner import Runner
from fewbits.runtime.tiles import Weight

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 3.0],
    "original_max_position_embeddings": 64,
    "factor": 2.0,
}
GEMMA: dict[str, Any] = {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biased-and-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 16}),
    "mistral-without-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("phi3", {"sliding_window": 6}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2}),
    "qwen3-moe": ("qwen3_moe", {**EXPERTS, "head_dim": 8, "mlp_only_layers": [0], "norm_topk_prob": True}),
}
A = np.array([5, 9, 60, 2, 2, 7, 101, 33, 250, 64, 3, 17, 90, 8, 44, 200], np.int32)
B = np.array([77, 4, 31, 150, 12, 6, 99, 210, 2], np.int32)


def keep(weight: Weight) -> Weight:
    return weight


def rows(slot: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    positions = np.arange(start, stop, dtype=np.int32)
    return np.full_like(positions, slot), positions


def two_texts(runner: Runner) -> tuple[np.ndarray, np.ndarray]:
    """Logits of A and B: prefill of both in one call, then A's and B's tokens together, one by one."""
    (slots_a, at_a), (slots_b, at_b) = rows(0, 0, 9), rows(1, 0, 2)
    tokens, slots, at = (np.concatenate(pair) for pair in ((B[:2], A[:9]), (slots_b, slots_a), (at_b, at_a)))
    first = runner.forward(tokens, slots, at, np.arange(11, dtype=np.int32))
    found_a, found_b = [first[2:]], [first[:2]]
    for i in range(7):
        one = (np.array(values, np.int32) for values in ((A[9 + i], B[2 + i]), (0, 1), (9 + i, 2 + i), (0, 1)))
        both = runner.forward(*one)
        found_a.append(both[:1])
        found_b.append(both[1:])
    return np.concatenate(found_a), np.concatenate(found_b)
