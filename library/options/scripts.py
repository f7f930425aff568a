"""Which option groups a training script has. Nothing here imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.options.config_file import ConfigOptions
from library.options.data import DataOptions
from library.options.finetune import DREAMBOOTH_GROUPS, FINETUNE_GROUPS
from library.options.logging import LoggingOptions
from library.options.loss import LossOptions, NoiseOptions
from library.options.memory import DistributedOptions, MemoryOptions
from library.options.models import ModelOptions
from library.options.network import NetworkOptions
from library.options.optimizer import OptimizerOptions
from library.options.sampling import SamplingOptions, ValidationOptions
from library.options.saving import MetadataOptions, SavingOptions
from library.options.training import TrainingOptions

if TYPE_CHECKING:
    from library.families.spec import FamilySpec
    from library.options.base import OptionGroup

# The method's own group, and what it has in place of shared groups.
METHODS: dict[str, tuple[type[OptionGroup], ...]] = {
    "network": (NetworkOptions,),
    "finetune": FINETUNE_GROUPS,
    "dreambooth": DREAMBOOTH_GROUPS,
}


def groups_for(family: FamilySpec, method: str) -> list[type[OptionGroup]]:
    """The groups of a family and a method, in help order; those of `FamilySpec.groups` count before the method's."""
    own = {group.group: group for group in METHODS[method]}
    own |= {group.group: group for group in family.groups.get(method, ())}
    shared = [
        ConfigOptions,
        ModelOptions,
        family.options,
        DataOptions,
        own["method"],
        TrainingOptions,
        OptimizerOptions,
        NoiseOptions,
        LossOptions,
        MemoryOptions,
        DistributedOptions,
        SavingOptions,
        MetadataOptions,
        SamplingOptions,
        ValidationOptions,
        LoggingOptions,
    ]
    groups = [own.pop(group.group, group) for group in shared]
    place = next(n for n, group in enumerate(groups, 1) if group.group == family.options.group)
    return [*groups[:place], *own.values(), *groups[place:]]
