"""fewbits, by the rules of the peers. Its seconds include reading the model and writing the files.

Options: `method`, a recipe as on the command line; `steps` of its solver, where that has steps; `minutes` for auto;
`held_out`, how many of the windows, the last ones, the guard looks at (the peers have none).
"""

from __future__ import annotations

from dataclasses import replace

import fewbits
from fewbits.evals import Windows
from fewbits.methods import Recipe, recipe_named
from fewbits.methods.auto import AUTO
from fewbits.methods.signround import SignRound
from peers.harness import Prepared, Request, main


def prepare(request: Request) -> Prepared:
    held_out = int(request.options.get("held_out", 0))
    windows = Windows(request.ids, "the windows given")
    calibration = fewbits.Calibration(windows, windows=len(request.ids) - held_out, held_out=held_out)
    method = AUTO[0] if request.options.get("method") == "auto" else recipe(request)

    def quantize() -> None:
        fewbits.quantize(
            request.model,
            request.out,
            format=f"int{request.bits}-g{request.group}",
            method=method,
            calibration=calibration if method.calibrated else None,
            minutes=float(request.options["minutes"]) if "minutes" in request.options else None,
            prove=False,
        )

    return quantize


def recipe(request: Request) -> Recipe:
    found = recipe_named(request.options.get("method", "gptq"))
    if "steps" not in request.options:
        return found
    if not isinstance(found.solver, SignRound):
        raise SystemExit(f"{found.name} has no solver with steps; leave the option out")
    return replace(found, solver=replace(found.solver, steps=int(request.options["steps"])))


if __name__ == "__main__":
    main("fewbits", prepare)
