"""Imported before the rest of the room: what the extra `train` brings is there, or the error says how to get it."""

from importlib.util import find_spec

from fewbits.errors import UnsupportedError

NEEDED = ("accelerate", "peft")

for name in NEEDED:
    if find_spec(name) is None:
        raise UnsupportedError(f"training needs {name}, which is not installed: pip install 'fewbits[train]'")
