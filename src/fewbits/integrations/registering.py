"""`import fewbits` makes transformers know it, without importing transformers.

transformers keeps its quantizers in two dictionaries of one module, `transformers.quantizers.auto`. If that module has
been imported already, ours are put in at once; otherwise when it is: until then a finder waits in `sys.meta_path` that
answers for this one name, and leaves when it is asked for it. Nothing else of transformers is touched, and where that
module should move one day, the first use of `fewbits.Config` still registers or says what is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def watch() -> None:
    """Register as soon as transformers can be registered with."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    from fewbits.integrations.registered import register

    register()


class _Waiting(MetaPathFinder):
    """Finds the registry's module as everybody would, to be followed by `_register`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Loads with another loader, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
