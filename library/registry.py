"""The families and the methods by their names. Their modules are imported when they are asked for."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from library.options import scripts
from library.options.base import Option, options_of

if TYPE_CHECKING:
    from library.families.base import Family
    from library.methods.base import Method
    from library.options.base import Options
    from library.types import FamilyTraits

# name, which is that of a package in library.families -> its adapter class in `adapter`; `options` holds TRAITS and
# `variants` `check_paths(opts)`, `check_text_paths(opts)` where texts need less, and `missing_encoders(opts)` where
# models may lack some; all but `adapter` without torch
FAMILIES = {"sd": "SdFamily", "sdxl": "SdxlFamily", "sd3": "Sd3Family", "flux": "FluxFamily"}
# name -> (module, its class); `<module>_args` holds `check_options(opts, traits)`, without torch
METHODS = {
    "network": ("library.methods.network", "NetworkMethod"),
    "finetune": ("library.methods.finetune", "FinetuneMethod"),
    "dreambooth": ("library.methods.finetune", "FinetuneMethod"),
}


def options_elsewhere() -> dict[str, dict[str, Option]]:
    """The options of all training scripts, name -> script -> option; torch is not needed."""
    found: dict[str, dict[str, Option]] = {}
    for family in FAMILIES:
        for script, method in scripts.scripts_of(family).items():
            for option in (option for group in scripts.groups_for(family, method) for option in options_of(group)):
                found.setdefault(option.dest, {})[f"{script}.py"] = option
    return found


def family_module(family: str, name: str) -> ModuleType:
    """A module of the family's package."""
    return importlib.import_module(f"library.families.{family}.{name}")


def make_family(family: str, opts: Options) -> Family:
    """The family's adapter; nothing is loaded."""
    return getattr(family_module(family, "adapter"), FAMILIES[family])(opts)


def make_method(method: str, opts: Options) -> Method:
    module, name = METHODS[method]
    return getattr(importlib.import_module(module), name)(opts)


def method_problems(method: str, opts: Options, traits: FamilyTraits) -> list[str]:
    """What is wrong with a method's options and the files that they name; torch is not needed."""
    return importlib.import_module(f"{METHODS[method][0]}_args").check_options(opts, traits)


def path_problems(family: str, opts: Options) -> list[str]:
    """What is wrong with the paths of a model, as far as names and headers tell it; torch is not needed."""
    return family_module(family, "variants").check_paths(opts)


def follow_model(family: str, opts: Options) -> Options:
    """The options, completed by what the model says about itself; torch is not needed."""
    from library.families.shared.markers import follow

    return follow(opts) if family_module(family, "options").TRAITS.objective == "ddpm" else opts


def text_path_problems(family: str, opts: Options) -> list[str]:
    """The same of text encoders alone, and of the model that has them."""
    variants = family_module(family, "variants")
    return getattr(variants, "check_text_paths", variants.check_paths)(opts)


def missing_encoders(family: str, opts: Options) -> list[str]:
    """A line for each text encoder that is not given, with families that can do without."""
    variants = family_module(family, "variants")
    return variants.missing_encoders(opts) if hasattr(variants, "missing_encoders") else []
