"""The whole model in somebody else's hands: logits of transformers or llama.cpp against fewbits' own reading.

The two cannot agree bit for bit. transformers multiplies codes by scales in the scales' own 16-bit type; llama.cpp
rounds activations to 8 bits before each product. What must agree is what they predict, so the measure is the mean KL
divergence between their next-token distributions on one fixed window, and its limits are set by that rounding, far
below the divergence that a misplaced or misread tensor causes (nats, not thousandths of one).
"""

from __future__ import annotations

from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint import Kind, Reader
from fewbits.checkpoint.activations import is_scale
from fewbits.checkpoint.adapter import adapter_inside
from fewbits.engine.skeleton import attention
from fewbits.errors import VerificationError
from fewbits.formats.llm_int8 import LlmInt8

WINDOW = 64  # tokens in the probe
LOGIT_KLD = {
    "huggingface": 1e-6,
    "compressed-tensors": 1e-4,
    "bitnet": 1e-6,
    "bitsandbytes": 1e-4,
    "fp8": 1e-6,
    "gguf": 1e-2,
}
"""Largest mean KL divergence (nats) that the arithmetic of each file type's independent stack explains. Measured on
models of 0.26 M to 1.2 G weights: 0 for the first two in FP32, 2e-7 for GGUF in F16 and up to 7e-4 quantized.
bitsandbytes multiplies 4-bit weights in 16 bits on some processors, whatever the model's type: 2e-5 on books."""
ROUNDED_INPUTS_KLD = 1e-2
"""The same where inputs are rounded: whoever sums in another order rounds some of them to the neighbouring code, and so
does a stack that divides by 127.5 where fewbits and vLLM divide by 127. Measured on books: up to 1.3e-3,
and 9e-5 in BitNet layers."""


NEEDED = {
    "gguf": ("llama_cpp", "llama-cpp-python is not installed (pip install fewbits[llama-cpp])"),
    "bitnet": ("accelerate", "transformers needs accelerate for BitNet layers (pip install fewbits[train])"),
    "bitsandbytes": ("bitsandbytes", "transformers needs bitsandbytes for its layers (pip install bitsandbytes)"),
    "fp8": ("accelerate", "transformers needs accelerate for FP8 (pip install fewbits[train])"),
    "adapted": ("peft", "the adapter inside needs PEFT (pip install fewbits[train])"),
}
"""Kind -> the package that its independent stack cannot do without, and what to say where it is not installed."""
ALONE = {
    "fewbits": "only fewbits loads its own file type",
    "mlx": "mlx-lm is not run from here",
} | dict.fromkeys(("gptq", "gptq-v2", "awq"), "GPTQModel, which transformers runs it with, has no 32-bit layers")
"""Kinds without a stack that the predictions could be compared with, and why."""


def logit_limit(kind: Kind, reader: Reader) -> float:
    """Largest mean KL divergence that is no sign of damage."""
    rounded = any(
        (entry.inputs is not None and not is_scale(entry)) or isinstance(entry.format, LlmInt8)
        for entry in reader.entries.values()
    )
    return ROUNDED_INPUTS_KLD if rounded else LOGIT_KLD[kind.name]


def compare_logits(kind: Kind, out: Path) -> tuple[str | None, float | None, str | None]:
    """(stack, mean KL divergence, note): who ran the model and how far apart the predictions are.

    Where there is no independent stack, stack and divergence are None and the note says why. Raises VerificationError
    if there is one and it cannot run the model.
    """
    if kind.name in ALONE:
        return None, None, f"logits not compared: {ALONE[kind.name]}"
    package, why = NEEDED.get("adapted" if adapter_inside(out) else kind.name, (None, None))
    if package is not None and find_spec(package) is None:
        return None, None, f"logits not compared: {why}"
    from fewbits.engine import load  # here, because it imports transformers, which writing files has no need of

    model = load(out)
    tokens = _probe(model.config.get_text_config().vocab_size)
    ours = _output(model, tokens)
    del model  # one model in memory at a time
    try:
        stack, theirs = _llama_cpp(out, tokens) if kind.name == "gguf" else _transformers(out, tokens)
    except Exception as error:  # whatever it is, the user's program would meet it as well
        who = "llama.cpp" if kind.name == "gguf" else "transformers"
        raise VerificationError(f"{out}: {who} cannot run it ({type(error).__name__}: {error})") from error
    return stack, _mean_kld(ours, theirs), None


def _probe(vocabulary: int) -> Tensor:
    """A fixed window of tokens; any will do, since both stacks get the same."""
    return torch.randint(vocabulary, (WINDOW,), generator=torch.Generator().manual_seed(0))


def _output(model: Any, tokens: Tensor) -> Tensor:
    """Logits [tokens, vocabulary]; of a model without them (an encoder) its first output stands in."""
    inputs = {"input_ids": tokens.unsqueeze(0)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.inference_mode():
        outputs = model(**inputs)
    logits: Tensor = getattr(outputs, "logits", outputs[0])[0].float()
    return logits


def _mean_kld(ours: Tensor, theirs: Tensor) -> float:
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _transformers(out: Path, tokens: Tensor) -> tuple[str, Tensor]:
    import transformers

    config, adapter = load_config(out), adapter_inside(out)
    auto: Any = getattr(transformers, config.architectures[0])
    settings: dict[str, Any] = attention(config)
    quantization = getattr(config, "quantization_config", None)
    if quantization and (adapter is not None or quantization.get("quant_method") == "fp8"):
        quantization["dequantize"] = True  # PEFT reads the weights of its layers; FP8 layers need a GPU
        settings["config"] = config
    with torch.compiler.set_stance("force_eager"):  # BitNet layers compile themselves, which takes longer than a run
        with redirect_stderr(StringIO()):  # several progress bars; what goes wrong is raised
            model = auto.from_pretrained(out, dtype=torch.float32, local_files_only=True, **settings)
            if adapter is not None:
                model.load_adapter(str(adapter))
        return f"transformers {transformers.__version__}", _output(model, tokens)


def load_config(out: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(out, local_files_only=True)


def _llama_cpp(out: Path, tokens: Tensor) -> tuple[str, Tensor]:
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(str(out), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False)
    model.eval(tokens.tolist())
    scores = np.array(model.scores[:WINDOW], dtype=np.float32)
    model.close()
    return f"llama.cpp (llama-cpp-python {llama_cpp.__version__})", torch.from_numpy(scores)
