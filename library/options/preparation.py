"""What all scripts that prepare pictures and captions have in common."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.base import opt
from library.options.logging import ConsoleOptions


@dataclass(frozen=True, kw_only=True)
class WorkOptions(ConsoleOptions, group="work", title="Messages and failures"):
    strict: bool = opt(False, "end with status 1 if any picture failed; without it, only if all of them did")
