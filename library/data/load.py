"""The data of a run, as all of its processes read it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.errors import UserError
from library.runtime.logs import LOGGER
from library.text.added_word import word_pattern

if TYPE_CHECKING:
    from library.data.sample.dataset import TrainingData
    from library.data.types import DatasetSpec, Record
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
    words = () if opts.data.debug_dataset else (*opts.method.caption_words, *opts.words.caption_words)
    for word in words:  # templates hold one word only
        _require_word(data, word, templates=len(words) == 1 and "use_object_template" in opts.flat())
    return data


def _require_word(data: TrainingData, word: str, *, templates: bool) -> None:
    """Looks for a word that is to be trained in the captions; where some do not hold it there is a warning.

    Args: templates: whether the script can make captions itself.
    Raises: UserError: no caption holds it.
    """

    def texts(record: Record) -> Sequence[str]:  # what the caption of an image is made from
        options = record.subset.captions
        own = (options.caption_prefix, record.caption, options.caption_suffix)
        return options.templates or (" ".join(part for part in own if part),)

    pattern = word_pattern(word)
    records = [record for record in data.records if not record.subset.is_reg]
    without = [record.path for record in records if not any(map(pattern.search, texts(record)))]
    hint = f"write {word!r} into the captions"
    hint += ", or add --use_object_template or --use_style_template" if templates else ""
    if records and len(without) == len(records):
        raise UserError(f"--token_string: no caption holds {word!r}, so nothing would be learned; {hint}")
    if without:
        LOGGER.warning(
            "the captions of %d of %d images do not hold %r and teach it nothing, such as that of %s; %s",
            *(len(without), len(records), word, without[0], hint),
        )
