"""The data of a run, as all of its processes read it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from library.errors import UserError
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from library.data.sample.dataset import TrainingData
    from library.data.types import DatasetSpec
    from library.options.base import Options
    from library.runtime.processes import Processes
    from library.types import FamilyTraits


def read_data(specs: list[DatasetSpec], opts: Options, traits: FamilyTraits, processes: Processes) -> TrainingData:
    """The data of a run, whose seed is known by now; what was found goes to the log.

    Raises: UserError: it cannot be used.
    """
    main = processes.rank == 0
    if not main:
        processes.barrier()  # and find in the index what the first process has seen
    data = _data_builder(opts.data.dataset_class)(specs, opts, traits, opts.training.seed, main=main)
    if main:
        processes.barrier()
    for line in data.report():
        LOGGER.info("%s", line)
    return data


def _data_builder(name: str | None) -> Callable[..., TrainingData]:
    """`build_training_data`, or what --dataset_class names in its place.

    Raises: UserError: there is no such thing.
    """
    if name is None:
        from library.data.sample.dataset import build_training_data

        return build_training_data
    module, _, attribute = name.rpartition(".")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--dataset_class: {name} cannot be imported ({error})") from None
    finally:
        sys.path.remove(os.getcwd())
