"""`--network_module networks.oft_flux`: rotations of output rows in FLUX.1's transformer."""

from __future__ import annotations

from networks.registry import NUMBERED_OFT
from networks.selections.oft import OftSelection
from networks.spec import NetworkModule

MODULE = NetworkModule(name=__name__, type=NUMBERED_OFT, selection=OftSelection, lora_plus=False)
