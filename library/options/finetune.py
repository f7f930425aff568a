"""Training of whole models: the options of each script, and how the shared groups differ from those of a network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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
from library.options.saving import MetadataOptions, SavingOptions
from library.options.training import TrainingOptions

if TYPE_CHECKING:
    from library.types import FamilyTraits


@dataclass(frozen=True, kw_only=True)
class WholeModelOptions(MethodOptions, title="Training"):
    """The options of every script that trains whole models."""

    trains_model: ClassVar[bool] = True
    can_be_sharded: ClassVar[bool] = True

    learning_rate_te: float | None = opt(None, "learning rate of the text encoders; --learning_rate if not given")

    @property
    def text_encoder_stop(self) -> int | None:
        """Number of optimizer steps after which text encoders stay as they are; None: they are trained to the end."""
        raise NotImplementedError

    def text_rate(self, number: int) -> float | None:
        """The learning rate of the text encoder `number`, from 0; None: the common one."""
        return self.learning_rate_te

    def reads_cache_of(self, number: int) -> bool:
        """Whether cached outputs of the text encoder `number`, from 0, are used where there are some."""
        return True

    @property
    def block_rates(self) -> tuple[float, ...] | None:
        """Learning rates by block of the denoiser, where there are such."""
        return None

    @property
    def frozen_blocks(self) -> int:
        """The number of the denoiser's last blocks that are frozen."""
        return 0


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(WholeModelOptions, title="Fine-tuning"):
    """Images by metadata file; text encoders on request."""

    train_text_encoder: bool = opt(False, "train the text encoders too")
    diffusers_xformers: bool = opt(False, "the same as --xformers", alias_of="xformers", deprecated="--xformers")

    @property
    def text_encoder_stop(self) -> int | None:
        """Number of optimizer steps after which text encoders stay as they are; None: they are trained to the end."""
        return None if self.train_text_encoder else 0

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from _rates_of_untrained(self, ("learning_rate_te",))


@dataclass(frozen=True, kw_only=True)
class DreamBoothOptions(WholeModelOptions, title="DreamBooth"):
    """Images by folders; text encoders unless they are stopped."""

    stop_text_encoder_training: int | None = opt(
        None, "train only the denoiser from this optimizer step on; -1: the text encoders are never trained"
    )
    no_token_padding: bool = opt(False, "do not pad captions to 75 tokens")

    @property
    def text_encoder_stop(self) -> int | None:
        """Number of optimizer steps after which text encoders stay as they are; None: they are trained to the end."""
        stop = self.stop_text_encoder_training
        return None if stop is None else max(stop, 0)

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.learning_rate_te is not None and self.text_encoder_stop == 0:
            yield "--learning_rate_te: has no effect with --stop_text_encoder_training from the start"
        if self.no_token_padding and getattr(opts.family, "weighted_captions", False):
            yield "--no_token_padding: has no effect with --weighted_captions"


class FinetuneData(DataOptions, without=("reg_data_dir", "conditioning_data_dir")):
    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        for line in super().check(opts, traits):
            # Latents that were prepared have their sizes already.
            if not (self.in_json and line.startswith("--resolution: missing")):
                yield line
        if not (self.in_json or self.dataset_config or self.dataset_class):
            yield (
                "--in_json: missing; name a metadata file with it, or a data set with metadata_file with "
                "--dataset_config (train_db.py takes folders of images)"
            )


class DreamBoothData(DataOptions, without=("in_json", "dataset_repeats")):
    pass


class FinetuneLoss(LossOptions, without=("prior_loss_weight", "masked_loss")):
    pass


@dataclass(frozen=True, kw_only=True)
class WholeModelSaving(SavingOptions):
    save_model_as: Literal["ckpt", "safetensors", "diffusers", "diffusers_safetensors"] | None = opt(
        None, "file or folder format of what is saved; that of the base model if not given"
    )
    save_precision: Literal["float", "fp16", "bf16"] | None = opt(
        None, "dtype of single files; that of the base model's file if not given"
    )
    use_safetensors: bool = opt(
        False, "save as safetensors what would otherwise be .ckpt or .bin; --save_model_as takes precedence"
    )

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().warnings(opts, traits)
        if self.use_safetensors and self.save_model_as:
            yield "--use_safetensors: has no effect with --save_model_as"


class WholeModelTraining(TrainingOptions, without=("skip_until_initial_step", "initial_epoch", "initial_step")):
    pass


class WholeModelMemory(MemoryOptions, without=("fp8_base_unet", "quantize_base", "cpu_offload_checkpointing")):
    pass


class WholeModelMetadata(MetadataOptions, without=("no_metadata",)):
    pass


_WHOLE_MODEL = (WholeModelSaving, WholeModelTraining, WholeModelMemory, WholeModelMetadata)
FINETUNE_GROUPS = (FinetuneOptions, FinetuneData, FinetuneLoss, *_WHOLE_MODEL)
DREAMBOOTH_GROUPS = (DreamBoothOptions, DreamBoothData, *_WHOLE_MODEL)


# ---- models with several text encoders, and large ones


@dataclass(frozen=True, kw_only=True)
class TwoEncoderOptions(FinetuneOptions, without=("learning_rate_te",)):
    learning_rate_te1: float | None = opt(None, "learning rate of the first text encoder; --learning_rate if not given")
    learning_rate_te2: float | None = opt(
        None, "learning rate of the second text encoder; --learning_rate if not given"
    )
    block_lr: str | None = opt(
        None,
        "learning rates of the denoiser's blocks from input to output, separated by commas; 0 freezes a block",
        comma_list=True,
    )

    def text_rate(self, number: int) -> float | None:
        return (self.learning_rate_te1, self.learning_rate_te2)[number]

    @property
    def block_rates(self) -> tuple[float, ...] | None:
        return tuple(float(rate) for rate in self.block_lr.split(",")) if self.block_lr else None

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().check(opts, traits)
        yield from _cached_and_trained(self.train_text_encoder, opts)
        wanted = traits.block_layout.total if traits.block_layout else 0
        try:
            rates = self.block_rates or ()
        except ValueError:
            yield f"--block_lr: must be numbers separated by commas, got {self.block_lr}"
            return
        if rates and len(rates) != wanted:
            yield f"--block_lr: needs {wanted} rates, got {len(rates)}"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().warnings(opts, traits)
        yield from _rates_of_untrained(self, ("learning_rate_te1", "learning_rate_te2"))


@dataclass(frozen=True, kw_only=True)
class ThreeEncoderOptions(FinetuneOptions, without=("learning_rate_te", "diffusers_xformers")):
    learning_rate_te1: float | None = opt(None, "learning rate of the first text encoder; --learning_rate if not given")
    learning_rate_te2: float | None = opt(
        None, "learning rate of the second text encoder; --learning_rate if not given"
    )
    learning_rate_te3: float | None = opt(
        None, "learning rate of the third text encoder, T5; --learning_rate if not given"
    )
    text_encoder_lr1: float | None = opt(
        None, "as --learning_rate_te1", alias_of="learning_rate_te1", deprecated="--learning_rate_te1"
    )
    text_encoder_lr2: float | None = opt(
        None, "as --learning_rate_te2", alias_of="learning_rate_te2", deprecated="--learning_rate_te2"
    )
    text_encoder_lr3: float | None = opt(
        None, "as --learning_rate_te3", alias_of="learning_rate_te3", deprecated="--learning_rate_te3"
    )
    train_t5xxl: bool = opt(False, "train T5 too; needs --train_text_encoder")
    use_t5xxl_cache_only: bool = opt(False, "cache T5's outputs only, so that the other text encoders can be trained")
    num_last_block_to_freeze: int | None = opt(None, "freeze this many of the denoiser's last blocks", at_least=0)

    @property
    def frozen_blocks(self) -> int:
        return self.num_last_block_to_freeze or 0

    def reads_cache_of(self, number: int) -> bool:
        return number == _T5 or not self.use_t5xxl_cache_only

    def text_rate(self, number: int) -> float | None:
        if number == _T5 and not self.train_t5xxl:
            return 0.0
        return (self.learning_rate_te1, self.learning_rate_te2, self.learning_rate_te3)[number]

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().check(opts, traits)
        if self.train_t5xxl and not self.train_text_encoder:
            yield "--train_t5xxl: needs --train_text_encoder"
        yield from _cached_and_trained(self.train_t5xxl, opts)

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().warnings(opts, traits)
        yield from _rates_of_untrained(self, ("learning_rate_te1", "learning_rate_te2", "learning_rate_te3"))
        if self.use_t5xxl_cache_only and not opts.text_cache.in_use:
            yield "--use_t5xxl_cache_only: has no effect without --cache_text_encoder_outputs"


@dataclass(frozen=True, kw_only=True)
class DenoiserOnlyOptions(FinetuneOptions, without=("learning_rate_te", "train_text_encoder", "diffusers_xformers")):
    """Options of scripts that train no text encoder."""


_T5 = 2  # its number among three text encoders


def _cached_and_trained(trained: bool, opts: Options) -> Iterable[str]:
    if trained and opts.text_cache.in_use:
        yield "--cache_text_encoder_outputs: a text encoder whose outputs are cached cannot be trained; use one of them"


def _rates_of_untrained(options: FinetuneOptions, names: Iterable[str]) -> Iterable[str]:
    for name in names:
        if getattr(options, name) is not None and not options.train_text_encoder:
            yield f"--{name}: has no effect without --train_text_encoder"


class AnyData(DataOptions):
    """Data options of scripts that take folders or a metadata file."""

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        for line in super().check(opts, traits):
            if not (self.in_json and line.startswith("--resolution: missing")):  # prepared latents have their sizes
                yield line


@dataclass(frozen=True, kw_only=True)
class AnyDataAliased(AnyData):
    skip_latents_validity_check: bool = opt(
        False, "the same as --skip_cache_check", alias_of="skip_cache_check", deprecated="--skip_cache_check"
    )


class NoPriorLoss(LossOptions, without=("prior_loss_weight",)):
    pass


class LargeModelFinetune(LargeModelOptions, without=("no_half_vae",)):
    pass


class CheckpointOffload(MemoryOptions, without=("fp8_base_unet", "quantize_base")):
    pass


@dataclass(frozen=True, kw_only=True)
class EfficientSaving(WholeModelSaving):
    mem_eff_save: bool = opt(False, "save tensor by tensor, without a copy of the model in memory; always done")


_LARGE = (NoPriorLoss, TextCacheOptions, FusedOptions)
TWO_ENCODER_GROUPS = (TwoEncoderOptions, AnyData, LargeModelOptions, *_LARGE, BlockSwapOptions)
THREE_ENCODER_GROUPS = (ThreeEncoderOptions, AnyDataAliased, LargeModelFinetune, *_LARGE, BlockSwapOptions)
DENOISER_ONLY_GROUPS = (
    *(DenoiserOnlyOptions, AnyDataAliased, LargeModelFinetune, *_LARGE, OldBlockSwapOptions),
    *(CheckpointOffload, EfficientSaving),
)
