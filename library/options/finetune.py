"""Training of whole models: the options of each script, and how the shared groups differ from those of a network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from library.options.base import OptionGroup, Options, opt
from library.options.data import DataOptions
from library.options.loss import LossOptions
from library.options.memory import MemoryOptions
from library.options.sampling import ValidationOptions
from library.options.saving import MetadataOptions, SavingOptions
from library.options.training import TrainingOptions

if TYPE_CHECKING:
    from library.families.base import FamilyTraits

_TEXT_RATE = "learning rate of the text encoders; --learning_rate if not given"


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(OptionGroup, group="method", title="Fine-tuning"):
    """Pictures by metadata file; text encoders on request."""

    learning_rate_te: float | None = opt(None, _TEXT_RATE)
    train_text_encoder: bool = opt(False, "train the text encoders too; takes a little more memory")
    diffusers_xformers: bool = opt(False, "the same as --xformers", alias_of="xformers", deprecated="--xformers")

    @property
    def text_encoder_stop(self) -> int | None:
        """Number of optimizer steps after which text encoders stay as they are; None: they are trained to the end."""
        return None if self.train_text_encoder else 0

    def advise(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.learning_rate_te is not None and not self.train_text_encoder:
            yield "--learning_rate_te: no effect without --train_text_encoder"


@dataclass(frozen=True, kw_only=True)
class DreamBoothOptions(OptionGroup, group="method", title="DreamBooth"):
    """Pictures by folders; text encoders unless they are stopped."""

    learning_rate_te: float | None = opt(None, _TEXT_RATE)
    stop_text_encoder_training: int | None = opt(
        None, "train only the denoiser from this optimizer step on; -1: the text encoders are never trained"
    )
    no_token_padding: bool = opt(False, "leave captions as short as they are instead of padding them to 75 tokens")

    @property
    def text_encoder_stop(self) -> int | None:
        """Number of optimizer steps after which text encoders stay as they are; None: they are trained to the end."""
        stop = self.stop_text_encoder_training
        return None if stop is None else max(stop, 0)

    def advise(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.learning_rate_te is not None and self.text_encoder_stop == 0:
            yield "--learning_rate_te: no effect with --stop_text_encoder_training from the start"
        if self.no_token_padding and getattr(opts.family, "weighted_captions", False):
            yield "--no_token_padding: no effect with --weighted_captions"


class FinetuneData(DataOptions, without=("reg_data_dir", "conditioning_data_dir")):
    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        for line in super().check(opts, traits):
            # Latents that were prepared have their sizes already.
            if not (self.in_json and line.startswith("--resolution: missing")):
                yield line
        if not (self.in_json or self.dataset_config or self.dataset_class):
            yield (
                "--in_json: missing; name a metadata file with it, or a data set with metadata_file with "
                "--dataset_config (train_db.py takes folders of pictures)"
            )

    def advise(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().advise(opts, traits)
        if self.in_json and self.resolution is None and not self.dataset_config:
            side = traits.default_resolution
            yield f"--resolution: not given; pictures without prepared latents are trained at {side}x{side}"


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
        None, "number format of single files; that of the base model's file if not given"
    )
    use_safetensors: bool = opt(
        False, "save as safetensors what would otherwise be .ckpt or .bin; --save_model_as decides where it is given"
    )

    def advise(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().advise(opts, traits)
        if self.use_safetensors and self.save_model_as:
            yield "--use_safetensors: no effect, --save_model_as decides"


class WholeModelTraining(TrainingOptions, without=("skip_until_initial_step", "initial_epoch", "initial_step")):
    pass


class WholeModelMemory(MemoryOptions, without=("fp8_base_unet", "cpu_offload_checkpointing")):
    pass


class WholeModelMetadata(MetadataOptions, without=("no_metadata",)):
    pass


class NoValidation(ValidationOptions, without=[field.name for field in fields(ValidationOptions)]):
    pass


_WHOLE_MODEL = (WholeModelSaving, WholeModelTraining, WholeModelMemory, WholeModelMetadata, NoValidation)
FINETUNE_GROUPS = (FinetuneOptions, FinetuneData, FinetuneLoss, *_WHOLE_MODEL)
DREAMBOOTH_GROUPS = (DreamBoothOptions, DreamBoothData, *_WHOLE_MODEL)
