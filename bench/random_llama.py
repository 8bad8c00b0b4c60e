"""Make a Llama of any shape with random weights, for benchmarks of size and speed.

The folder is what transformers would save: FP16 safetensors, one shard a block, config and a byte-level tokenizer whose
vocabulary is filled up with made-up merges. Weights are normal with the usual spread of a trained model (0.02), so that
rounding them costs what it costs on real ones. One block is in memory at a time.

    python bench/random_llama.py OUT [--hidden 2048 --layers 16 --ffn 8192 --vocabulary 128256]         # Llama-3.2-1B
    python bench/random_llama.py OUT --layers 22 --ffn 5632 --vocabulary 32000 --kv-heads 4 --untied    # TinyLlama-1.1B
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

HEAD = 64


def config(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "hidden_size": args.hidden,
        "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // HEAD,
        "num_key_value_heads": args.kv_heads or max(1, args.hidden // HEAD // 4),
        "head_dim": HEAD,
        "vocab_size": args.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": not args.untied,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def shards(args: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """Embeddings and final norm, then one block each."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(0.02).half()

    def norm() -> Tensor:
        return torch.ones(args.hidden, dtype=torch.float16)

    key_value = config(args)["num_key_value_heads"] * HEAD
    outside = {"model.embed_tokens.weight": matrix(args.vocabulary, args.hidden), "model.norm.weight": norm()}
    yield outside | ({"lm_head.weight": matrix(args.vocabulary, args.hidden)} if args.untied else {})
    for layer in range(args.layers):
        block = {
            "input_layernorm": norm(),
            "self_attn.q_proj": matrix(args.hidden, args.hidden),
            "self_attn.k_proj": matrix(key_value, args.hidden),
            "self_attn.v_proj": matrix(key_value, args.hidden),
            "self_attn.o_proj": matrix(args.hidden, args.hidden),
            "post_attention_layernorm": norm(),
            "mlp.gate_proj": matrix(args.ffn, args.hidden),
            "mlp.up_proj": matrix(args.ffn, args.hidden),
            "mlp.down_proj": matrix(args.hidden, args.ffn),
        }
        yield {f"model.layers.{layer}.{name}.weight": w for name, w in block.items()}


def tokenizer(vocabulary: int) -> Tokenizer:
    """Byte-level BPE whose merges are all pairs of bytes, then pairs with a third one, until the vocabulary is full."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ((a, b) for a in alphabet for b in alphabet)
    triples = ((a + b, c) for a in alphabet for b in alphabet for c in alphabet)
    merges = list(islice(chain(pairs, triples), vocabulary - len(alphabet) - 2))
    tokens = ["<s>", "</s>", *alphabet, *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return made


def write(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True)
    where: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards(args), start=1):
        name = f"model-{i:05}-of-{args.layers + 1:05}.safetensors"
        save_file(shard, args.out / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
        total += sum(w.nbytes for w in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index))
    (args.out / "config.json").write_text(json.dumps(config(args), indent=2))
    tokenizer(args.vocabulary).save(str(args.out / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (args.out / "tokenizer_config.json").write_text(json.dumps(special))
    print(f"{args.out}: {total / 2 / 1e9:.2f} billion weights, {total / 1e9:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--kv-heads", type=int, help="heads of keys and values, of 64 numbers (default: a quarter)")
    parser.add_argument("--untied", action="store_true", help="an output projection of its own")
    write(parser.parse_args())


if __name__ == "__main__":
    main()
