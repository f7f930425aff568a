"""What `--network_args` says to networks.dylora. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.errors import UserError
from networks import lora_args
from networks.lora_args import LoraArgs, Reader, lora_plus

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
    reader.only_lora(KEYS, "networks.dylora")
    denoiser_plus, text_plus = lora_plus(reader)
    parsed = DyLoraArgs(
        unit=reader.number("unit", int, least=1) or 1,
        conv_dim=reader.number("conv_dim", int, least=0) or None,
        denoiser_plus=denoiser_plus,
        text_plus=text_plus,
    )
    if reader.problems:
        raise UserError(*reader.problems)
    return parsed


def require_one_rank(args: DyLoraArgs, dim: int) -> None:
    """Raises: UserError: convolutions are to have another rank than the other layers."""
    if args.conv_dim not in (None, dim):
        raise UserError(f"--network_args: conv_dim={args.conv_dim}: must be --network_dim, {dim}, in networks.dylora")


def check(args: Mapping[str, str], *, ranks_from_file: bool, dim: int | None = None) -> list[str]:
    """What can be said about the arguments without a model: a warning for each that has no effect.

    Raises: UserError: arguments that `networks.dylora.create` would refuse.
    """
    parsed = parse(args)
    if dim is not None and not ranks_from_file:
        require_one_rank(parsed, dim)
    lines = lora_args.unknown(args, KEYS, "networks.dylora")
    if "conv_alpha" in args:
        lines.append("--network_args: networks.dylora gives convolutions --network_alpha; conv_alpha has no effect")
    return lines
