"""The data of a run, as all of its processes read it."""

from __future__ import annotations

import importlib
import os
import sys
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
    if opts.data.dataset_class is None:
        from library.data.sample.dataset import build_training_data as build
    else:
        module, _, attribute = opts.data.dataset_class.rpartition(".")
        sys.path.insert(0, os.getcwd())
        try:
            build = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"--dataset_class: {opts.data.dataset_class} cannot be imported ({error})") from None
        finally:
            sys.path.remove(os.getcwd())
    data = build(specs, opts, traits, opts.training.seed, main=main)
    if main:
        processes.barrier()
    for line in data.report():
        LOGGER.info("%s", line)
    return data
