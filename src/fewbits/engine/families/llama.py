"""Llama: Touvron et al. 2023 (arXiv:2302.13971). SmolLM, SmolLM2, TinyLlama and many others call themselves so too."""

from __future__ import annotations

from fewbits.engine.families._decoder import Decoder


class Llama(Decoder):
    """The shape that the others are variations of."""

    model_type = "llama"
