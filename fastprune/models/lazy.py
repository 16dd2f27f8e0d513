"""Lets `import fastprune` make per-layer checkpoints loadable without importing transformers.

Importing torch and transformers takes seconds, and `fastprune --help` needs neither. So the model
types are registered when AutoConfig is first asked for a config, which every way of loading a
checkpoint begins with. Registering as soon as transformers is imported would be too early: its
own modules are half-loaded then.

transformers (5.24) offers no entry point by which an installed package announces model types; one
would make this file unnecessary, and so would importing transformers in `fastprune/__init__.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODULE = "transformers.models.auto.configuration_auto"


def register_on_first_use() -> None:
    """Have `AutoConfig.from_pretrained` register the per-layer model types on its first call."""
    if MODULE in sys.modules:
        _wrap(sys.modules[MODULE])
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds one module as usual, and has AutoConfig wrapped once that is executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _wrap(module)

        spec.loader.exec_module = exec_module
        return spec


def _wrap(module: ModuleType) -> None:
    auto = module.AutoConfig
    original = auto.__dict__["from_pretrained"]

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        auto.from_pretrained = original
        from fastprune.models.modeling import register

        register()
        return cls.from_pretrained(*args, **kwargs)

    auto.from_pretrained = classmethod(from_pretrained)
