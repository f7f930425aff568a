"""The parts of a model that encode images or captions, for scripts that do nothing else with a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.training.distributed import join_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.families.spec import FamilySpec
    from library.options.base import Options
    from library.types import Models


def load_vae(family: FamilySpec, opts: Options) -> Models:
    """A model of which only the VAE is there. Raises: UserError: missing, unreadable, or of another family."""
    from library.types import Models

    missing: Any = None
    return Models(missing, {}, {}, family.load_vae(opts))


def make_accelerator(opts: Options) -> Accelerator:
    """Joins the processes, and knows this one's device. Raises: UserError: fp16 without a GPU."""
    return join_processes(opts.memory.mixed_precision, opts.distributed.ddp_timeout)
