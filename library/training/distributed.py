"""How the processes of a run meet, and the seed that they agree on. Nothing imports torch before it is called."""

from __future__ import annotations

import os
import random
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.options.sharding import USE_DEEPSPEED, USE_FSDP
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.options.base import Options
    from library.options.sharding import Sharding


def join_processes(precision: str, minutes: int | None) -> Accelerator:
    """Joins the processes that were launched together, and knows this one's device.

    Args:
        precision: as --mixed_precision.
        minutes: as --ddp_timeout.
    Raises: UserError: fp16 without a GPU.
    """
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a GPU, and torch finds none; use bf16 or no")
    for engine in (USE_FSDP, USE_DEEPSPEED):  # we read them ourselves; accelerate's own sharding is not wanted
        os.environ.pop(engine, None)
    patience = [InitProcessGroupKwargs(timeout=timedelta(minutes=minutes))] if minutes else []
    # With `cpu`, accelerate also joins several processes on CPUs; without it each would take itself for the only one.
    return Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available(), kwargs_handlers=patience)


def join_for_training(opts: Options, sharding: Sharding | None) -> Accelerator:
    """`join_processes` as the options of a training script ask for it.

    Args: sharding: how weights are sharded over the processes; None: not at all.
    Raises: UserError: the processes cannot do what the options ask for.
    """
    import torch

    chosen = opts.memory.mixed_precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", chosen)
    if launched not in (chosen, "no"):
        LOGGER.warning(
            "accelerate was launched with mixed precision %s; --mixed_precision %s is used", launched, chosen
        )
    minutes = opts.distributed.ddp_timeout
    if sharding is not None and sharding.offload and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(minutes=minutes or 10))
    made = join_processes(chosen, minutes)
    fused = opts.optimizer.fused_backward_pass or opts.fused.in_use
    if fused and made.num_processes > 1:
        raise UserError("steps inside the backward pass cannot be used with several processes; leave them out")
    if opts.memory.full_fp16:
        from library.training.precision import HalfGradScaler

        made.scaler = HalfGradScaler()
    return made


def agreed_seed(opts: Options, accelerator: Accelerator) -> int:
    """--seed, or one that the first process draws for all of them."""
    saved = seed_of_state(opts)
    if opts.training.seed is not None:
        if saved not in (None, opts.training.seed):
            LOGGER.warning(
                "--seed %d is not that of the resumed run, %d: the order of the data differs",
                opts.training.seed,
                saved,
            )
        return opts.training.seed
    if saved is not None:
        return saved
    from accelerate.utils import broadcast_object_list

    (seed,) = broadcast_object_list([random.SystemRandom().randrange(2**32)])
    LOGGER.info("--seed was not given; this run uses %d", seed)
    return seed


def seed_of_state(opts: Options) -> int | None:
    """The seed of the run that is resumed; None: there is none, or it is not fetched yet.

    Raises: UserError: an unreadable state.
    """
    from library.training.state_notes import read_progress, read_seed

    if not opts.saving.resume or opts.saving.resume_from_huggingface:
        return None
    folder = Path(opts.saving.resume)
    return None if read_progress(folder) is None else read_seed(folder)
