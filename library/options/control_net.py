"""Training of a ControlNet: the options of its scripts, and how the shared groups differ from those of a network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

from library.options.base import Options, opt
from library.options.data import DataOptions
from library.options.large_models import (
    BlockSwapOptions,
    FusedOptions,
    LargeModelOptions,
    OldBlockSwapOptions,
    TextCacheOptions,
)
from library.options.loss import LossOptions
from library.options.memory import MemoryOptions
from library.options.method import MethodOptions
from library.options.models import ModelOptions
from library.options.network import LARGEST_RANK
from library.options.saving import MetadataOptions, SavingOptions
from library.options.training import TrainingOptions

if TYPE_CHECKING:
    from library.types import FamilyTraits


@dataclass(frozen=True, kw_only=True)
class ControlOptions(MethodOptions):
    """What is the same for all networks that read control images."""

    trains_inpainting = False

    @property
    def start_from(self) -> str | None:
        """The network to continue training; None: a new one."""
        raise NotImplementedError

    @property
    def added_rate(self) -> float | None:
        """The learning rate of the layers that the base model does not have; None: the common one."""
        return None

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if not (opts.optimizer.learning_rate or self.added_rate):
            yield "--learning_rate: nothing would be trained with a rate of 0; set it above 0"


@dataclass(frozen=True, kw_only=True)
class ControlNetOptions(ControlOptions, title="ControlNet"):
    usual_rate: ClassVar[str] = "it is made for whole models, a ControlNet usually wants 1e-5 to 1e-4"
    can_be_sharded: ClassVar[bool] = True

    controlnet_model_name_or_path: str | None = opt(
        None,
        "ControlNet to continue training: file, Diffusers folder or hub id; made from the base model if not given",
    )

    @property
    def start_from(self) -> str | None:
        return self.controlnet_model_name_or_path


@dataclass(frozen=True, kw_only=True)
class TwoRateControlNetOptions(ControlNetOptions):
    control_net_lr: float = opt(
        1e-4,
        "learning rate of the layers that the base model does not have; --learning_rate is that of the copied ones",
    )

    @property
    def added_rate(self) -> float | None:
        return self.control_net_lr


@dataclass(frozen=True, kw_only=True)
class LlliteOptions(ControlOptions, title="ControlNet-LLLite"):
    usual_rate: ClassVar[str] = "it is made for whole models, a ControlNet-LLLite usually wants 1e-4 to 4e-4"

    cond_emb_dim: int | None = opt(
        None, "channels of the embedded control image; 32 if not given", at_least=2, at_most=LARGEST_RANK, off=0
    )
    network_dim: int | None = opt(
        None, "inner width of the networks; 64 if not given", at_least=1, at_most=LARGEST_RANK, off=0
    )
    network_dropout: float | None = opt(None, "dropout probability inside the networks", at_least=0, below=1, off=0)
    network_weights: str | None = opt(None, "file to continue training, which decides both widths", exists="file")

    @property
    def start_from(self) -> str | None:
        return self.network_weights

    @property
    def lllite_weights(self) -> str | None:
        return self.network_weights


@dataclass(frozen=True, kw_only=True)
class ControlNetData(DataOptions, without=("reg_data_dir",)):
    conditioning_data_dir: str | None = opt(
        None, "folder of the control images of those in --train_data_dir, with the same names", exists="folder"
    )

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().check(opts, traits)
        if not (self.conditioning_data_dir or self.dataset_config or self.dataset_class):
            yield (
                "--conditioning_data_dir: missing; name the folder of control images, or set it for each subset in a "
                "--dataset_config"
            )


@dataclass(frozen=True, kw_only=True)
class ControlNetSaving(SavingOptions):
    save_model_as: Literal["ckpt", "pt", "safetensors", "diffusers"] | None = opt(
        "safetensors", "file format of what is saved; diffusers: a folder for ControlNetModel.from_pretrained"
    )


@dataclass(frozen=True, kw_only=True)
class LlliteSaving(SavingOptions):
    save_model_as: Literal["ckpt", "pt", "safetensors"] | None = opt("safetensors", "file format of what is saved")


class ControlNetLoss(LossOptions, without=("prior_loss_weight", "masked_loss")):
    pass


class ControlNetModelOptions(ModelOptions, without=("no_half_vae",)):
    pass


class ControlNetTraining(TrainingOptions, without=("skip_until_initial_step", "initial_epoch", "initial_step")):
    pass


class ControlNetMemory(MemoryOptions, without=("fp8_base_unet", "cpu_offload_checkpointing")):
    pass


class NoMetadata(MetadataOptions, without=[field.name for field in fields(MetadataOptions)]):
    pass


class AllMetadata(MetadataOptions, without=("no_metadata",)):
    pass


@dataclass(frozen=True, kw_only=True)
class AliasedControlNetData(ControlNetData):
    skip_latents_validity_check: bool = opt(
        False, "the same as --skip_cache_check", alias_of="skip_cache_check", deprecated="--skip_cache_check"
    )


@dataclass(frozen=True, kw_only=True)
class AnyControlNetSaving(SavingOptions):
    save_model_as: Literal["ckpt", "safetensors", "diffusers", "diffusers_safetensors"] | None = opt(
        None, "file format of what is saved, safetensors if not given; diffusers: a folder for from_pretrained"
    )
    use_safetensors: bool = opt(False, "save as safetensors, as is done where --save_model_as is not given")
    mem_eff_save: bool = opt(False, "save tensor by tensor, without a copy of the weights in memory; always done")


class MaskedControlNetLoss(LossOptions, without=("prior_loss_weight",)):
    pass


class OffloadedControlNetMemory(MemoryOptions, without=("fp8_base_unet",)):
    pass


class LargeControlNetModel(LargeModelOptions, without=("no_half_vae",)):
    pass


_SHARED = (ControlNetData, ControlNetSaving, ControlNetLoss, ControlNetTraining, ControlNetMemory)
CONTROL_NET_GROUPS = (ControlNetOptions, ControlNetModelOptions, NoMetadata, *_SHARED)
LLLITE_GROUPS = (LlliteOptions, LlliteSaving, ControlNetData, ControlNetLoss, ControlNetTraining, ControlNetMemory)
ONE_RATE_CONTROL_NET_GROUPS = (LargeModelOptions, AllMetadata, TextCacheOptions, BlockSwapOptions)
LARGE_CONTROL_NET_GROUPS = (TwoRateControlNetOptions, *ONE_RATE_CONTROL_NET_GROUPS)
FUSED_CONTROL_NET_GROUPS = (
    *(LargeControlNetModel, AllMetadata, TextCacheOptions, OldBlockSwapOptions, FusedOptions),
    *(AliasedControlNetData, AnyControlNetSaving, MaskedControlNetLoss, OffloadedControlNetMemory),
)
