"""`--network_module networks.lora_sd3`: LoRA on the transformer of SD3 and 3.5, CLIP-L, CLIP-G and T5."""

from __future__ import annotations

from networks.registry import SPLIT_LORA
from networks.selections.sd3 import Sd3Selection
from networks.spec import NetworkModule

MODULE = NetworkModule(name=__name__, type=SPLIT_LORA, selection=Sd3Selection)
