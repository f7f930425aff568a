"""The options of sdxl_minimal_inference.py. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from library.families.shared.minimal import MinimalOptions
from library.options.base import opt


@dataclass(frozen=True, kw_only=True)
class SdxlMinimalOptions(MinimalOptions):
    prompt2: str | None = opt(None, "what the second text encoder reads; the same as the first if not given")

    def generating(self) -> dict[str, Any]:
        return {**super().generating(), "sampler": "euler"}
