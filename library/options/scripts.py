"""Which option groups a training script has. Nothing here imports torch."""

from __future__ import annotations

import importlib
from types import ModuleType

from library.families.base import FamilyTraits
from library.options.base import OptionGroup
from library.options.config_file import ConfigOptions
from library.options.data import DataOptions
from library.options.logging import LoggingOptions
from library.options.loss import LossOptions, NoiseOptions
from library.options.memory import DistributedOptions, MemoryOptions
from library.options.models import ModelOptions
from library.options.network import NetworkOptions
from library.options.optimizer import OptimizerOptions
from library.options.sampling import SamplingOptions, ValidationOptions
from library.options.saving import MetadataOptions, SavingOptions
from library.options.training import TrainingOptions

METHODS: dict[str, type[OptionGroup]] = {"network": NetworkOptions}


def groups_for(family: str, method: str) -> list[type[OptionGroup]]:
    """The groups of a family (a package in library.families whose `options` module has OPTIONS, TRAITS and SCRIPTS) and
    a method, in help order.
    """
    return [
        ConfigOptions,
        ModelOptions,
        _family_module(family).OPTIONS,
        DataOptions,
        METHODS[method],
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


def traits_for(family: str) -> FamilyTraits:
    return _family_module(family).TRAITS


def scripts_of(family: str) -> dict[str, str]:
    """Entry script -> method."""
    return _family_module(family).SCRIPTS


def _family_module(family: str) -> ModuleType:
    return importlib.import_module(f"library.families.{family}.options")
