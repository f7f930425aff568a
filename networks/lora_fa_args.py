"""What `--network_args` says to networks.lora_fa: as networks.lora, without LoRA+. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

from networks import lora_args
from networks.lora_args import UNET_25, BlockLayout, LoraArgs

KEYS = tuple(key for key in lora_args.KEYS if not key.startswith("loraplus_"))


def parse(args: Mapping[str, str], layout: BlockLayout = UNET_25) -> LoraArgs:
    """The arguments as values. Raises: UserError: see `lora_args.parse`."""
    return lora_args.parse(args, layout, module="networks.lora_fa", keys=KEYS)


def check(
    args: Mapping[str, str], *, ranks_from_file: bool, dim: int | None = None, layout: BlockLayout = UNET_25
) -> list[str]:
    """As `lora_args.check`."""
    parse(args, layout)
    ignored = lora_args.unknown(args, KEYS, "networks.lora_fa")
    return [*ignored, *lora_args.without_effect(args, ranks_from_file=ranks_from_file)]
