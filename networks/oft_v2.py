"""`--network_module networks.oft_v2`: OFT on inputs, in blocks of --network_dim, as PEFT has it."""

from __future__ import annotations

from networks.registry import INPUT_OFT
from networks.selections.rotated import RotatedSelection
from networks.spec import NetworkModule

MODULE = NetworkModule(name=__name__, type=INPUT_OFT, selection=RotatedSelection, lora_plus=False, usual_dim=32)
