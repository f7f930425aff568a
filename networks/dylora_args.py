"""What `--network_args` says to networks.dylora. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.errors import UserError
from networks.lora_args import LoraArgs, Reader

# fmt: off
KEYS = (
    "unit", "conv_dim", "conv_alpha",
    "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio",
)
# fmt: on


@dataclass(frozen=True)
class DyLoraArgs(LoraArgs):
    unit: int = 1  # ranks that are trained together


def parse(args: Mapping[str, str]) -> DyLoraArgs:
    """The arguments as values. Raises: UserError: every problem at once: unknown keys, values that are no numbers."""
    reader = Reader(args)
    reader.only(KEYS, "networks.dylora")
    plus = reader.number("loraplus_lr_ratio", float, above=0)
    unet_plus = reader.number("loraplus_unet_lr_ratio", float, above=0)
    text_plus = reader.number("loraplus_text_encoder_lr_ratio", float, above=0)
    parsed = DyLoraArgs(
        unit=reader.number("unit", int, least=1) or 1,
        conv_dim=reader.number("conv_dim", int, least=1),
        denoiser_plus=plus if unet_plus is None else unet_plus,
        text_plus=plus if text_plus is None else text_plus,
    )
    if reader.problems:
        raise UserError(*reader.problems)
    return parsed


def check(args: Mapping[str, str], *, ranks_from_file: bool) -> list[str]:
    """What can be said about the arguments without a model: a warning for each that has no effect."""
    parse(args)
    lines = ["--network_args: networks.dylora gives convolutions --network_alpha; conv_alpha has no effect"]
    return lines if "conv_alpha" in args else []
