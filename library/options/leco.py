"""Concept editing from prompts alone: its options, and how the shared groups differ where there are no images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from library.options.base import Options, opt
from library.options.data import DataOptions
from library.options.large_models import BlockSwapOptions, LargeModelOptions, SplitModeOptions
from library.options.loss import LossOptions, NoiseOptions
from library.options.network import LARGEST_RANK, NetworkOptions
from library.options.sampling import ValidationOptions

if TYPE_CHECKING:
    from library.types import FamilyTraits

_OF_IMAGES = ("cache_latents", "cache_latents_to_disk", "train_batch_size", "max_data_loader_n_workers")
_OF_IMAGES += ("persistent_data_loader_workers",)


@dataclass(frozen=True, kw_only=True)
class LecoOptions(NetworkOptions, title="Concept editing", without=("text_encoder_lr",)):
    usual_rate: ClassVar[str] = "it is made for whole models, concept editing usually wants 1e-4 to 1e-3"

    prompts_file: str | None = opt(
        None, "TOML file of prompts: pairs ([[prompts]]), or sliders ([[targets]])", exists="file"
    )
    max_denoising_steps: int = opt(
        40,
        "steps in which an image would be made; each training step makes some of them, at least one and not all",
        at_least=2,
        at_most=1000,
    )
    leco_denoise_guidance_scale: float = opt(3.0, "guidance scale of these steps")
    network_module: str | None = opt(
        "networks.lora", "module of the network type: networks.lora, or another such as networks.loha or lycoris.kohya"
    )
    network_dim: int | None = opt(4, "rank of the network", at_least=1, at_most=LARGEST_RANK)
    network_alpha: float = opt(
        1.0, "scale of the network, whose output is multiplied by alpha / rank; 0 means alpha = rank", at_least=0
    )
    network_train_unet_only: bool = opt(False, "train only the denoiser's part of the network; always so here")
    network_train_text_encoder_only: bool = opt(False, "refused, as only the denoiser's part can be trained here")

    @property
    def needs_common_rate(self) -> bool:
        return self.unet_lr is None

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.network_train_text_encoder_only:
            yield "--network_train_text_encoder_only: only the denoiser can be trained here; leave it out"
            return
        if not self.prompts_file:
            yield "--prompts_file: missing; name a TOML file with [[prompts]] or [[targets]]"
        yield from super().check(opts, traits)


@dataclass(frozen=True, kw_only=True)
class LecoData(DataOptions, without=[field.name for field in fields(DataOptions) if field.name not in _OF_IMAGES]):
    of_images: ClassVar[bool] = False

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        return ()

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        values = opts.flat()
        given = [name for name in _OF_IMAGES if name in opts.explicit and values[name]]
        defaults = {"train_batch_size": 1, "max_data_loader_n_workers": 8}
        given = [name for name in given if values[name] != defaults.get(name)]
        if given:
            named = ", ".join(f"--{name}" for name in given)
            yield f"{named}: {'have' if len(given) > 1 else 'has'} no effect, as nothing is trained on images here"


class LecoLoss(LossOptions, without=("masked_loss", "prior_loss_weight")):
    pass


@dataclass(frozen=True, kw_only=True)
class LecoNoise(NoiseOptions, without=("show_timesteps", "show_timesteps_resolution", "show_timesteps_offset")):
    """Of the noise that images are made from, and of the times at which predictions are compared."""

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().warnings(opts, traits)
        for name in ("ip_noise_gamma", "adaptive_noise_scale"):
            if getattr(self, name):
                yield f"--{name}: has no effect, as no images are noised here"


class NoValidation(ValidationOptions, without=[field.name for field in fields(ValidationOptions)]):
    pass


LECO_GROUPS = (LecoOptions, LecoData, LecoLoss, LecoNoise, NoValidation)
LARGE_LECO_GROUPS = (LargeModelOptions, BlockSwapOptions)
SPLIT_LECO_GROUPS = (LargeModelOptions, SplitModeOptions)
