"""Mixtral: Jiang et al. 2024 (arXiv:2401.04088). Mistral with experts, chosen for each token."""

from __future__ import annotations

from fewbits.engine.families._decoder import ACTIVATIONS, Composition
from fewbits.engine.families.mistral import Mistral
from fewbits.runtime.ops import Experts


class Mixtral(Mistral):
    """Mistral with experts in every layer."""

    model_type = "mixtral"

    def feed_forward(self, c: Composition, name: str, layer: int, x: str) -> None:
        self.experts(c, name, x, count=int(c.config.num_local_experts), normalise=True)

    def experts(self, c: Composition, name: str, x: str, *, count: int, normalise: bool) -> None:
        """Add to x what each token's experts make of h."""
        c.linear("h", {"r": (f"{name}.gate", None)})
        gate, up, down = (c.parameters.experts(f"{name}.experts", part, count) for part in ("gate", "up", "down"))
        activation = ACTIVATIONS[self.activation_name(c.config)]
        c.add(Experts("h", "r", x, gate, up, down, int(c.config.num_experts_per_tok), normalise, activation))
