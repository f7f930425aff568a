"""The families and the methods by their names. Torch is not needed before a model or a method is made."""

from __future__ import annotations

from library.families.registry import FAMILIES
from library.methods.registry import METHODS
from library.options.base import Option, OptionGroup, options_of
from library.options.config_file import ConfigOptions
from library.options.data import DataOptions
from library.options.logging import LoggingOptions
from library.options.loss import LossOptions, NoiseOptions
from library.options.memory import DistributedOptions, MemoryOptions
from library.options.models import ModelOptions
from library.options.optimizer import OptimizerOptions
from library.options.planning import PlanningOptions
from library.options.sampling import SamplingOptions, ValidationOptions
from library.options.saving import MetadataOptions, SavingOptions
from library.options.training import TrainingOptions


def groups_for(family: str, method: str) -> list[type[OptionGroup]]:
    """The option groups of the script that trains a family by a method, in help order.

    Groups of the family count before the method's, and both before shared groups of the same name.
    """
    spec = FAMILIES[family]
    own = {group.group: group for group in METHODS[method].groups}
    own |= {group.group: group for group in spec.groups.get(method, ())}
    shared = [
        ConfigOptions,
        ModelOptions,
        spec.options,
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
        PlanningOptions,
    ]
    groups = [own.pop(group.group, group) for group in shared]
    place = next(n for n, group in enumerate(groups, 1) if group.group == spec.options.group)
    return [*groups[:place], *own.values(), *groups[place:]]


def scripts_of(family: str, method: str) -> dict[str, dict[str, bool]]:
    """The scripts that train a family by a method, as `parse_options` wants them."""
    return {script: {} for script, of in FAMILIES[family].scripts.items() if of == method}


def options_elsewhere() -> dict[str, dict[str, Option]]:
    """The options of all training scripts, name -> script -> option."""
    found: dict[str, dict[str, Option]] = {}
    for family, spec in FAMILIES.items():
        for script, method in spec.scripts.items():
            for option in (option for group in groups_for(family, method) for option in options_of(group)):
                found.setdefault(option.dest, {})[f"{script}.py"] = option
    return found
