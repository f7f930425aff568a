"""`--network_module networks.lora_flux`: LoRA on FLUX.1's transformer, CLIP-L and T5."""

from __future__ import annotations

from networks.registry import PERTURBED_LORA
from networks.selections.flux import FluxSelection
from networks.spec import NetworkModule

MODULE = NetworkModule(name=__name__, type=PERTURBED_LORA, selection=FluxSelection)
