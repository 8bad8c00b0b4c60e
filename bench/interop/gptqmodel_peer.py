"""GPTQModel's side: checkpoints that it makes, and what it makes of checkpoints, for `compare.py` to compare with ours.

Runs in GPTQModel's own environment, which has nothing of fewbits:

    python bench/interop/gptqmodel_peer.py write MODEL TEXT OUT    quantizes MODEL in every setting, saves OUT/<setting>
    python bench/interop/gptqmodel_peer.py run FOLDER ...          loads folders that fewbits wrote

Both write what they decode to <folder>.safetensors: the weights of its own layers by their own `dequantize_weight`
(AWQ: `dequantize_gemm`), with scales widened to float32, since the layers otherwise round each product to 16 bits.
`run` adds `logits` at the tokens 2, 3, …, 65 of the model as it loads it, then computed in float32: its layers for GPTQ
do that, those for AWQ do not, so plain layers with the weights that they decode stand in for them.

GPTQModel quantizes to AWQ on GPUs only. `run` takes folders by anybody, AutoRound's (`auto_awq`) for one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pool asks for two even on machines with fewer cores
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq-4": {"bits": 4, "group_size": 32},
    "gptq-4-asym": {"bits": 4, "group_size": 32, "sym": False},
    "gptq-4-asym-v2": {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"},
    "gptq-4-actorder": {"bits": 4, "group_size": 32, "desc_act": True, "act_group_aware": False},
    "gptq-4-columns": {"bits": 4, "group_size": -1, "act_group_aware": False},
    "gptq-2-v2": {"bits": 2, "group_size": 64, "format": "gptq_v2"},
    "gptq-3": {"bits": 3, "group_size": 64},
    "gptq-3-asym-v2": {"bits": 3, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "gptq-8": {"bits": 8, "group_size": 64},
    "gptq-8-asym": {"bits": 8, "group_size": 64, "sym": False},
    "gptq-dynamic": {
        "bits": 4,
        "group_size": 32,
        "lm_head": False,
        "dynamic": {r".*\.down_proj$": {"bits": 8, "group_size": 64}, r"-:.*layers\.0\..*up_proj": {}},
    },
    "awq": {"bits": 4, "group_size": 64, "quant_method": "awq", "format": "gemm"},
    "awq-sym": {"bits": 4, "group_size": 32, "quant_method": "awq", "format": "gemm", "sym": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    write = verbs.add_parser("write")
    for name in ("model", "text", "out"):
        write.add_argument(name, type=Path)
    write.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    verbs.add_parser("run").add_argument("folders", type=Path, nargs="+")
    given = parser.parse_args()
    if given.verb == "run":
        for folder in given.folders:
            save_file(decoded(folder) | {"logits": logits(folder)}, f"{folder}.safetensors")
        return
    for name in given.only:
        try:
            quantize(given.model, given.text, given.out / name, SETTINGS[name])
        except Exception as error:  # one setting that GPTQModel cannot do must not hide the others
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        save_file(decoded(given.out / name), given.out / f"{name}.safetensors")
        print(json.dumps({"written": name}), flush=True)


def logits(folder: Path) -> Tensor:
    """[tokens, vocabulary] in float32."""
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model.float()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "AwqTorchLinear":
            model.set_submodule(name, plain(module))
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.arange(2, 66)[None]).logits
    return found[0].float()


def plain(layer: Any) -> torch.nn.Linear:
    """An AWQ layer as torch's own, in float32."""
    linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    arrays = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales")}
    linear.weight.data = dequantized(arrays, int(layer.bits), layer.group_size).T
    if layer.bias is not None:
        linear.bias.data = layer.bias.float()
    return linear


def quantize(model: Path, text: Path, out: Path, setting: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    loaded = GPTQModel.load(str(model), QuantizeConfig(**setting, offload_to_disk=False), device="cpu")
    words = text.read_text(encoding="utf-8").split()
    windows = [" ".join(words[at : at + 200]) for at in range(0, 3200, 200)]
    loaded.quantize(windows, batch_size=1)
    loaded.save(str(out))


def decoded(folder: Path) -> dict[str, Tensor]:
    """Module + '.weight' -> [N, K] in float32, of every quantized layer."""
    from gptqmodel.quantization import QuantizeConfig

    config = QuantizeConfig.from_pretrained(str(folder))
    arrays: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            arrays |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    modules = [name.removesuffix(".qweight") for name in arrays if name.endswith(".qweight")]
    make = of_awq if config.quant_method == "awq" else of_gptq
    return {f"{module}.weight": make(module, arrays, config).T.contiguous() for module in modules}


def of_gptq(module: str, arrays: dict[str, Tensor], config: Any) -> Tensor:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    bits, group = (config.dynamic_get(module, key, getattr(config, key)) for key in ("bits", "group_size"))
    found = {key: arrays[f"{module}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
    shape = {"in_features": len(found["g_idx"]), "out_features": found["scales"].shape[1]}
    layer = TorchLinear(
        bits=int(bits), group_size=group, sym=config.sym, desc_act=config.desc_act, register_buffers=True, **shape
    )
    for key, array in found.items():
        assert array.shape == getattr(layer, key).shape, f"{module}.{key}"
        setattr(layer, key, array)
    if config.format == "gptq":
        convert_gptq_v1_to_v2_format_module(layer, int(bits), torch.int32)
    layer.scales = layer.scales.float()
    weight: Tensor = layer.dequantize_weight()
    return weight


def of_awq(module: str, arrays: dict[str, Tensor], config: Any) -> Tensor:
    found = {key: arrays[f"{module}.{key}"] for key in ("qweight", "qzeros", "scales")}
    return dequantized(found, int(config.bits), config.group_size)


def dequantized(arrays: dict[str, Tensor], bits: int, group_size: int) -> Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    wide = arrays | {"scales": arrays["scales"].float()}
    weight: Tensor = dequantize_gemm(**wide, bits=bits, group_size=group_size)
    return weight


if __name__ == "__main__":
    main()
