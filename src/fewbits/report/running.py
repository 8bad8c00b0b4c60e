"""How a checkpoint is run, by its kind: tools, and what to type."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace

TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""
WITH_FEWBITS = "import fewbits  # teaches transformers these files\n" + TRANSFORMERS
VLLM = "vllm serve {name}"
FEWBITS = 'fewbits generate {name} --prompt "Once upon a time"'
LLAMA = 'llama-cli -m {name} -p "Once upon a time"'
MLX = 'mlx_lm.generate --model {name} --prompt "Once upon a time"'


@dataclass(frozen=True)
class Way:
    """A tool, the language of what is typed, and that with {name} for the checkpoint."""

    tool: str
    language: str
    text: str


_OWN = Way("fewbits", "sh", FEWBITS)
_PLAIN = Way("transformers", "python", TRANSFORMERS)
_TAUGHT = Way("transformers", "python", WITH_FEWBITS)
_VLLM = Way("vLLM", "sh", VLLM)

WAYS: dict[str, tuple[Way, ...]] = {
    "gguf": (Way("llama.cpp", "sh", LLAMA), _OWN),
    "compressed-tensors": (_PLAIN, _VLLM, _OWN),
    "gptq": (_TAUGHT, _VLLM, _OWN),
    "gptq-v2": (_TAUGHT, _VLLM, _OWN),
    "awq": (_TAUGHT, _VLLM, _OWN),
    "bitsandbytes": (_PLAIN, _VLLM, _OWN),
    "fp8": (_PLAIN, _VLLM, _OWN),
    "bitnet": (_PLAIN, _OWN),
    "mlx": (Way("MLX", "sh", MLX), _OWN),
    "huggingface": (_PLAIN, _VLLM, _OWN),
    "fewbits": (_OWN,),
}
"""Kind of checkpoint -> ways to run it; kinds that are not here are run by fewbits."""

LIBRARIES = {"gguf": "gguf", "mlx": "mlx", "fewbits": "fewbits"}
"""What the hub calls the library that loads a kind, where it is not transformers."""


def ways(kind: str, name: str) -> list[Way]:
    """The ways for a kind, with the checkpoint's name, quoted as each language does it."""
    quoted = {"sh": shlex.quote(name), "python": json.dumps(name)}
    return [replace(way, text=way.text.format(name=quoted[way.language])) for way in WAYS.get(kind, (_OWN,))]


def library(kind: str) -> str:
    return LIBRARIES.get(kind, "transformers")
