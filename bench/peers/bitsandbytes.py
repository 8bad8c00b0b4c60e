"""bitsandbytes: NF4, sixteen quantiles of a normal distribution scaled by each block's largest number; no data.

Options: `double` also quantizes the scales, to 8 bits (`bnb_4bit_use_double_quant`).
"""

from __future__ import annotations

from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from peers.harness import Decode, Prepared, Request, linears, main


def prepare(request: Request) -> Prepared:
    if request.bits != 4:
        raise SystemExit(f"bitsandbytes quantizes to 4 bits (or 8), not {request.bits}")
    model = request.load()
    double = request.flag("double", False)

    def quantize() -> Decode:
        made = {
            name: quantize_4bit(
                linear.weight.data, blocksize=request.group, quant_type="nf4", compress_statistics=double
            )
            for name, linear in linears(model).items()
        }
        return lambda: {f"{name}.weight": dequantize_4bit(codes, state) for name, (codes, state) in made.items()}

    return quantize


if __name__ == "__main__":
    main("bitsandbytes", prepare)
