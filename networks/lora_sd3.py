"""LoRA for Stable Diffusion 3 and 3.5: on the transformer, CLIP-L, CLIP-G and T5. See `networks.lora_sd3_args`."""

from __future__ import annotations

from functools import partial

from networks import lora_dit
from networks.lora_dit import load as load
from networks.lora_files import read as read
from networks.lora_sd3_args import LAYOUT

create = partial(lora_dit.create, LAYOUT)
from_weights = partial(lora_dit.from_weights, LAYOUT)
