"""`--network_module networks.oft`: rotations of output rows in the denoisers of SD1/2, SDXL and SD3."""

from __future__ import annotations

from networks.registry import KOHYA_OFT
from networks.selections.oft import OftSelection
from networks.spec import NetworkModule

MODULE = NetworkModule(name=__name__, type=KOHYA_OFT, selection=OftSelection, lora_plus=False)
