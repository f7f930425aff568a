"""Which option groups a training script has. Nothing here imports torch."""

from __future__ import annotations

import importlib
from types import ModuleType

from library.options.base import OptionGroup
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
from library.types import FamilyTraits

# The method's own group, and what it has in place of shared groups.
METHODS: dict[str, tuple[type[OptionGroup], ...]] = {
    "network": (NetworkOptions,),
    "finetune": FINETUNE_GROUPS,
    "dreambooth": DREAMBOOTH_GROUPS,
}


def groups_for(family: str, method: str) -> list[type[OptionGroup]]:
    """The groups of a family and a method, in help order.

    A family is a package in library.families whose `options` module has OPTIONS, TRAITS and SCRIPTS. It may have
    GROUPS, by method: groups in place of those of the same name, and further ones.
    """
    module = _family_module(family)
    own = {group.group: group for group in METHODS[method]}
    own |= {group.group: group for group in getattr(module, "GROUPS", {}).get(method, ())}
    shared = [
        ConfigOptions,
        ModelOptions,
        module.OPTIONS,
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
    place = next(n for n, group in enumerate(groups, 1) if group.group == module.OPTIONS.group)
    return [*groups[:place], *own.values(), *groups[place:]]


def traits_for(family: str) -> FamilyTraits:
    return _family_module(family).TRAITS


def scripts_of(family: str) -> dict[str, str]:
    """Entry script -> method."""
    return _family_module(family).SCRIPTS


def _family_module(family: str) -> ModuleType:
    return importlib.import_module(f"library.families.{family}.options")
