"""A checkpoint as a program, and the texts that a text engine needs beside it: what is kept in the cache.

Inputs that a checkpoint wants rounded (W8A8) are rounded here as all inputs are: to INT8 by groups of 128 columns
of each token, at scales of their own, where weights are integers, and not at all where they are floats. That is finer
than any checkpoint's rounding, which has one scale for a whole row or for all inputs; a line in the log says so.
"""

from __future__ import annotations

import logging
from pathlib import Path

from fewbits.checkpoint.adapter import adapter_inside
from fewbits.engine.families import family_of
from fewbits.engine.parameters import Keep, Parameters, longest
from fewbits.engine.repacked import Repacked
from fewbits.engine.skeleton import is_causal
from fewbits.engine.text_files import text_files
from fewbits.errors import UnsupportedError

log = logging.getLogger(__name__)


def compose(path: Path, keep: Keep) -> Repacked:
    """The program of a checkpoint; keep: what becomes of each weight, see `Parameters`.

    Raises UnsupportedError, with the reason, for an architecture that has no family here.
    """
    if adapter_inside(path) is not None:
        raise UnsupportedError("an adapter stays beside its layers")
    parameters = Parameters(path, keep)
    if not is_causal(parameters.config):
        raise UnsupportedError("no model that predicts the next token")
    if parameters.rounds_inputs:
        log.info("%s: inputs are rounded more finely than it says, each group at a scale of its own", path)
    program = family_of(parameters.config).compose(parameters)
    return Repacked(program, text_files(path) | {"longest": longest(parameters.config)})
