"""`--network_module networks.lora`: LoRA on U-Nets and their text encoders, and on the blocks of other models."""

from __future__ import annotations

from networks.registry import LORA
from networks.selections.unet import UnetSelection
from networks.spec import NetworkModule

MODULE = NetworkModule(name=__name__, type=LORA, selection=UnetSelection)
