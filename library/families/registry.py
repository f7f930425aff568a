"""The model families. A new one is a package beside this module, with its `spec.py`, and one line here. No torch."""

from __future__ import annotations

from library.families.flux.spec import SPEC as FLUX
from library.families.sd.spec import SPEC as SD
from library.families.sd3.spec import SPEC as SD3
from library.families.sdxl.spec import SPEC as SDXL

FAMILIES = {spec.name: spec for spec in (SD, SDXL, SD3, FLUX)}
TOOLS = {script: group for spec in FAMILIES.values() for script, group in spec.tools.items()}  # and their options
