"""Training of an added network such as LoRA."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from library.options.base import Options, opt
from library.options.method import MethodOptions
from library.options.nearest import did_you_mean
from library.options.optimizer import not_pairs, repeated
from library.runtime.packages import remedy

if TYPE_CHECKING:
    from library.types import FamilyTraits

LARGEST_RANK = 1 << 15  # no layer of these models is wider
DEFAULT_RANK = 4
_OURS = ("networks.dylora", "networks.lora_fa", "networks.oft", "networks.control_net_lllite")


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(MethodOptions, title="Network"):
    usual_rate: ClassVar[str] = "it is made for whole models, a LoRA usually wants 1e-4"

    network_module: str | None = opt(
        None,
        "module of the network type: networks.lora, networks.lora_flux, networks.lora_sd3, or another such as "
        "lycoris.kohya",
    )
    network_dim: int | None = opt(
        None, "rank of the network; the module's own default if not given", at_least=1, at_most=LARGEST_RANK
    )
    network_alpha: float = opt(
        1, "scale of the network, whose output is multiplied by alpha / rank; 0 means alpha = rank", at_least=0
    )
    network_dropout: float | None = opt(None, "dropout probability inside the network", at_least=0, below=1, off=0)
    network_args: list[str] | None = opt(None, "further arguments of the network as name=value, e.g. conv_dim=4")
    network_weights: str | None = opt(None, "network file to continue training from", exists="file")
    dim_from_weights: bool = opt(False, "take the ranks from --network_weights")
    network_train_unet_only: bool = opt(False, "train only the denoiser's part of the network")
    network_train_text_encoder_only: bool = opt(False, "train only the text encoders' part of the network")
    unet_lr: float | None = opt(None, "learning rate of the denoiser's part; --learning_rate if not given")
    text_encoder_lr: list[float] | None = opt(
        None, "learning rate of the text encoders' part, one for all or one for each; --learning_rate if not given"
    )
    scale_weight_norms: float | None = opt(None, "scale down weights with a norm above this, e.g. 1", above=0, off=0)
    training_comment: str | None = opt(None, "comment in the file's metadata")
    base_weights: list[str] | None = opt(None, "networks merged into the base model first")
    base_weights_multiplier: list[float] | None = opt(None, "strengths of --base_weights, in the same order")

    @property
    def needs_common_rate(self) -> bool:
        """Whether a part is trained with --learning_rate."""
        denoiser = not self.network_train_text_encoder_only and self.unet_lr is None
        return denoiser or (not self.network_train_unet_only and not self.text_encoder_lr)

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from self._check_module()
        yield from not_pairs("--network_args", self.network_args)
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            yield "--network_train_unet_only: cannot be used with --network_train_text_encoder_only; use one of them"
        if self.dim_from_weights and not self.network_weights:
            yield "--dim_from_weights: needs --network_weights, the file to take the ranks from"

    def _check_module(self) -> Iterator[str]:
        name = self.network_module
        if not name:
            yield "--network_module: missing; networks.lora trains a LoRA"
        elif name in _OURS and not find_module(name):
            yield f"--network_module: not available yet ({name})"
        elif not find_module(resolved_module(name)):
            yield f"--network_module: there is no module {name!r}{what_to_do(name)}"

    def text_rates(self, count: int) -> list[float | None]:
        """Learning rates of `count` text encoders: those without one take the last; surplus ones have no effect.

        None: no rate is given, so that --learning_rate counts.
        """
        listed = self.text_encoder_lr or [None]
        return [listed[min(index, len(listed) - 1)] for index in range(count)]

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from repeated("--network_args", self.network_args)
        name = self.network_module
        if name and resolved_module(name) != name:
            yield f"--network_module: {name} is not installed; {resolved_module(name)} is used in its place"
        encoders, rates = len(traits.text_encoders), self.text_encoder_lr or []
        if any(rate != rates[encoders - 1] for rate in rates[encoders:]):
            yield (
                f"--text_encoder_lr: {traits.label} has {encoders} text encoder{'s' if encoders > 1 else ''}; the "
                f"first {f'{encoders} rates count' if encoders > 1 else 'rate counts'} of {len(rates)}"
            )
        if len(self.base_weights_multiplier or ()) > len(self.base_weights or ()):
            yield "--base_weights_multiplier: there are more values than --base_weights; the first ones are used"
        if self.network_train_unet_only and self.text_encoder_lr:
            yield "--text_encoder_lr: has no effect with --network_train_unet_only"
        if self.network_train_text_encoder_only and self.unet_lr is not None:
            yield "--unet_lr: has no effect with --network_train_text_encoder_only"


NATIVE_MODULES = {"lycoris.kohya": "networks.lycoris"}  # ours, which take the same arguments


def resolved_module(name: str) -> str:
    """The network module that is used for a name: ours in place of one that is not installed."""
    return NATIVE_MODULES[name] if name in NATIVE_MODULES and not find_module(name) else name


def what_to_do(name: str) -> str:
    """What to do about a module that is not found, after a semicolon: a name like it, or how to install its package."""
    folder = Path(__file__).resolve().parents[2] / "networks"
    ours = [f"networks.{path.stem}" for path in folder.glob("*.py") if "\nMODULE = " in path.read_text("utf-8")]
    near = did_you_mean(name, [*ours, *NATIVE_MODULES], cutoff=0.85)
    return near or f"; {remedy(name.split('.')[0]) or 'check the name, or install its package'}"


def find_module(name: str) -> bool:
    """Whether there is such a module, in the current folder too. Imports nothing but our own package above it.

    Inside another's package its files are looked for, so that none of its code runs.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # last, so that a user's file never hides a package
    try:
        if name.startswith("networks."):
            return importlib.util.find_spec(name) is not None
        top, *inner = name.split(".")
        spec, path = importlib.util.find_spec(top), top
        for part in inner:
            path = f"{path}.{part}"
            folders = spec.submodule_search_locations if spec is not None else None
            spec = PathFinder.find_spec(path, folders) if folders is not None else None
        return spec is not None
    except (ImportError, ValueError):
        return False
