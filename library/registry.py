"""The families and the methods by their names. Torch is not needed before a model or a method is made."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from library.families.registry import FAMILIES
from library.options import scripts
from library.options.base import Option, OptionGroup, options_of

if TYPE_CHECKING:
    from library.families.base import FamilyTraits
    from library.methods.base import Method
    from library.options.base import Options

# name -> (module, its class); `<module>_args` holds `check_options(opts, traits)`, without torch
METHODS = {
    "network": ("library.methods.network", "NetworkMethod"),
    "finetune": ("library.methods.finetune", "FinetuneMethod"),
    "dreambooth": ("library.methods.finetune", "FinetuneMethod"),
}


def groups_for(family: str, method: str) -> list[type[OptionGroup]]:
    """The option groups of the script that trains a family by a method, in help order."""
    return scripts.groups_for(FAMILIES[family], method)


def options_elsewhere() -> dict[str, dict[str, Option]]:
    """The options of all training scripts, name -> script -> option."""
    found: dict[str, dict[str, Option]] = {}
    for family, spec in FAMILIES.items():
        for script, method in spec.scripts.items():
            for option in (option for group in groups_for(family, method) for option in options_of(group)):
                found.setdefault(option.dest, {})[f"{script}.py"] = option
    return found


def make_method(method: str, opts: Options) -> Method:
    module, name = METHODS[method]
    return getattr(importlib.import_module(module), name)(opts)


def method_problems(method: str, opts: Options, traits: FamilyTraits) -> list[str]:
    """What is wrong with a method's options and the files that they name; torch is not needed."""
    return importlib.import_module(f"{METHODS[method][0]}_args").check_options(opts, traits)
