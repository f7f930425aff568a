"""`--network_module networks.boft`: BOFT on inputs, in blocks of --network_dim, as PEFT has it."""

from __future__ import annotations

from networks.registry import INPUT_BOFT
from networks.selections.rotated import RotatedSelection
from networks.spec import NetworkModule

MODULE = NetworkModule(name=__name__, type=INPUT_BOFT, selection=RotatedSelection, lora_plus=False)
