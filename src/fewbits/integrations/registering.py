"""`import fewbits` makes transformers know it, without importing transformers.

transformers keeps its quantizers in two dictionaries of one module, `transformers.quantizers.auto`. If that module has
been imported already, ours are put in at once; otherwise when it is: until then a finder waits in `sys.meta_path` that
answers for this one name, and leaves when it is asked for it. In the same way PEFT learns of our layers once a model
has been loaded into them. No other module's import is touched.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

BEHIND = {"transformers.quantizers.auto": "fewbits.integrations.registered", "peft": "fewbits.train"}
"""Somebody else's module -> ours whose import registers with it."""


def watch_transformers() -> None:
    """Register our quantizer as soon as there is something to register it with."""
    _watch("transformers.quantizers.auto")


def watch_peft() -> None:
    """The same for adapters on our layers."""
    _watch("peft")


def _watch(name: str) -> None:
    if name in sys.modules:
        import_module(BEHIND[name])
    elif not any(isinstance(finder, Waiting) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, Waiting(name))


class Waiting(MetaPathFinder):
    """Finds one module as everybody would, to be followed by the import of ours."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, BEHIND[name])
        return spec


class _Then(Loader):
    """Loads with another loader, then imports a module."""

    def __init__(self, loader: Loader, behind: str) -> None:
        self._loader, self._behind = loader, behind

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        import_module(self._behind)
