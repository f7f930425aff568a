"""References to functions and classes whose modules are imported only when they are called, yet checked at once."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

P, R = ParamSpec("P"), TypeVar("R")


@dataclass(frozen=True)
class EntryPoint(Generic[P, R]):
    """A function or class as "module:name", which is imported when it is first called.

    Raises: TypeError: on construction, where the module's source does not define that name.
    """

    value: str

    def __post_init__(self) -> None:
        module, _, name = self.value.partition(":")
        found = find_spec(module)
        source = Path(found.origin).read_text(encoding="utf-8") if found and found.origin else ""
        if not name or not re.search(rf"^(def|class) {name}\b", source, re.MULTILINE):
            raise TypeError(f"{self.value}: {f'{module} does not define {name}' if found else 'no such module'}")

    def load(self) -> Callable[P, R]:
        module, _, name = self.value.partition(":")
        return getattr(importlib.import_module(module), name)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.load()(*args, **kwargs)
