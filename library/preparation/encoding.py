"""The parts of a model that encode pictures or captions, for scripts that do nothing else with a model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from library import cli
from library.options import scripts

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.families.base import Family, FamilyTraits
    from library.options.base import OptionGroup, Options
    from library.types import Models


def family_options(family: str) -> type[OptionGroup]:
    """A family's own group of options."""
    return _module(family, "options").OPTIONS


def family_traits(family: str) -> FamilyTraits:
    return scripts.traits_for(family)


def path_problems(family: str, opts: Options) -> list[str]:
    """What is wrong with the paths of a whole model, as far as names tell it."""
    return _module(family, "variants").check_paths(opts)


def missing_encoders(family: str, opts: Options) -> list[str]:
    """A line for each text encoder that is not given, with families that can do without."""
    variants = _module(family, "variants")
    return variants.missing_encoders(opts) if hasattr(variants, "missing_encoders") else []


def make_family(family: str, opts: Options) -> Family:
    """The family's adapter; nothing is loaded."""
    return getattr(_module(family, "adapter"), cli.FAMILIES[family][1])(opts)


def load_vae(family: str, opts: Options) -> Models:
    """A model of which only the VAE is there. Raises: UserError: missing, unreadable, or of another family."""
    from library.types import Models

    missing: Any = None
    return Models(missing, {}, {}, _module(family, "loading").own_vae(opts))


def make_accelerator(opts: Options) -> Accelerator:
    """Joins the processes, and knows this one's device. Raises: UserError: fp16 without a GPU."""
    return cli.join_processes(opts.memory.mixed_precision, opts.distributed.ddp_timeout)


def _module(family: str, name: str) -> Any:
    return importlib.import_module(f"{cli.FAMILIES[family][0]}.{name}")
