"""How codes are chosen. METHODS is the registry: a new method is one file that ends in a tuple, and one line here."""

from __future__ import annotations

from difflib import get_close_matches

from fewbits.errors import UnsupportedError
from fewbits.methods.base import Method, TensorMethod
from fewbits.methods.rtn import RTN

METHODS: dict[str, Method] = {method.name: method for method in (*RTN,)}


def method_named(name: str) -> Method:
    """The method of that name. Raises UnsupportedError if there is none."""
    if name not in METHODS:
        close = get_close_matches(name, METHODS, n=3) or list(METHODS)
        raise UnsupportedError(f"method '{name}' is not known; did you mean {', '.join(close)}? See `fewbits methods`")
    return METHODS[name]


__all__ = ["METHODS", "Method", "TensorMethod", "method_named"]
