"""LoRA for FLUX.1: on the transformer, CLIP-L and T5. See `networks.lora_flux_args`."""

from __future__ import annotations

from functools import partial

from networks import lora_dit
from networks.lora_dit import load as load
from networks.lora_files import read as read
from networks.lora_flux_args import LAYOUT

create = partial(lora_dit.create, LAYOUT)
from_weights = partial(lora_dit.from_weights, LAYOUT)
