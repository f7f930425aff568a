"""The parts of a model that encode images or captions, for scripts that do nothing else with a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library import registry
from library.training.distributed import join_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.options.base import OptionGroup, Options
    from library.types import Models


def family_options(family: str) -> type[OptionGroup]:
    """A family's own group of options."""
    return registry.family_module(family, "options").OPTIONS


def load_vae(family: str, opts: Options) -> Models:
    """A model of which only the VAE is there. Raises: UserError: missing, unreadable, or of another family."""
    from library.types import Models

    missing: Any = None
    return Models(missing, {}, {}, registry.family_module(family, "loading").own_vae(opts))


def make_accelerator(opts: Options) -> Accelerator:
    """Joins the processes, and knows this one's device. Raises: UserError: fp16 without a GPU."""
    return join_processes(opts.memory.mixed_precision, opts.distributed.ddp_timeout)
