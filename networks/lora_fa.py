"""`--network_module networks.lora_fa`: LoRA whose down matrices stay as they were drawn."""

from __future__ import annotations

from networks.registry import LORA_FA
from networks.selections.unet import UnetSelection
from networks.spec import NetworkModule

MODULE = NetworkModule(name=__name__, type=LORA_FA, selection=UnetSelection, lora_plus=False)
