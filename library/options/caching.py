"""Options of the tools that fill the caches of a training run: those of training, as far as they decide what is cached.

What a command line for training says beside it is understood and does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from library.options.base import OptionGroup, Options, opt
from library.options.config_file import ConfigOptions
from library.options.finetune import AnyData
from library.options.large_models import BlockSwapOptions, LargeModelOptions, TextCacheOptions
from library.options.logging import LoggingOptions
from library.options.loss import LossOptions, NoiseOptions
from library.options.memory import DistributedOptions, MemoryOptions
from library.options.method import MethodOptions
from library.options.sampling import SamplingOptions
from library.options.saving import MetadataOptions, SavingOptions
from library.options.training import TrainingOptions

if TYPE_CHECKING:
    from library.types import FamilyTraits


@dataclass(frozen=True, kw_only=True)
class CachingOptions(MethodOptions, title="Caching"):
    skip_existing: bool = opt(False, "has no effect: valid cache files are always kept, and others encoded again")

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.skip_existing:
            yield "--skip_existing: has no effect; valid files are always kept, and others are made again"


class CachedModel(LargeModelOptions):
    needs_name = False  # which parts have to be named depends on what is encoded, and on the family


class CachedData(AnyData):
    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.debug_dataset:
            yield "--debug_dataset: has no effect here; the training scripts do this"


class CachedTexts(TextCacheOptions):
    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        return ()


def _only(group: type[OptionGroup], *kept: str) -> list[str]:
    return [field.name for field in fields(group) if field.name not in kept]


class CachedLoss(
    LossOptions,
    without=_only(
        LossOptions, "loss_type", "huber_schedule", "huber_c", "huber_scale", "prior_loss_weight", "masked_loss"
    ),
):
    pass


class CachedTraining(
    TrainingOptions,
    without=_only(TrainingOptions, "max_train_steps", "max_train_epochs", "seed", "gradient_accumulation_steps"),
):
    pass


class CachedMemory(
    MemoryOptions, without=("cpu_offload_checkpointing", "selective_checkpointing", "stochastic_rounding")
):
    pass


class CachedDistribution(
    DistributedOptions,
    without=_only(DistributedOptions, "ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph"),
):
    trains = False


class NotSaving(SavingOptions, without=("save_model_as",)):
    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        return ()

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        return ()


class NoMetadata(MetadataOptions, without=("no_metadata",)):
    pass


# The options of all families stand between these.
BEFORE_FAMILIES = (ConfigOptions, CachedModel)
AFTER_FAMILIES = (
    *(CachingOptions, CachedData, CachedTraining, NoiseOptions, CachedLoss, CachedTexts, BlockSwapOptions),
    *(CachedMemory, CachedDistribution, NotSaving, NoMetadata, SamplingOptions, LoggingOptions),
)
