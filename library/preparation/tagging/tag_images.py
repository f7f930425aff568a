"""Tags for the images of a folder: finetune/tag_images_by_wd14_tagger.py."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from library.data.sample.opencv import opencv
from library.errors import UserError
from library.options.base import Options
from library.options.preparation import WorkOptions
from library.options.tagging import TaggingOptions
from library.preparation.common.images import (
    all_gather,
    by_the_first,
    find_images,
    in_batches,
    is_first,
    my_share,
    read_ahead,
)
from library.preparation.common.summary import Outcome, show
from library.preparation.tagging.tag_outputs import TagPlace, tag_place
from library.preparation.tagging.tag_rules import (
    TagRules,
    Vocabulary,
    choose_tags,
    make_vocabulary,
    probabilities_in_words,
    rules_of,
)
from library.runtime.logs import LOGGER
from library.screen import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from library.preparation.tagging.taggers import Tagger

GROUPS = (TaggingOptions, WorkOptions)

_BEHIND = 32  # images whose tags may still wait to be written


@dataclass
class _Found:
    """The counts for the final report on this process's images."""

    images_by_tag: Counter[str] = field(default_factory=Counter)
    without_tags: int = 0


class _Put(NamedTuple):
    """Tags on their way to where they belong."""

    path: Path
    tags: list[str]
    row: NDArray[np.float32]
    done: Future[None]


def tag_images(opts: Options) -> Outcome:
    """Writes the tags of every image in this process's share.

    Raises: UserError: there are no images, the tagger cannot be had or run, or the file for all cannot be written.
    """
    from library.preparation.tagging.tagger_files import find_tagger
    from library.preparation.tagging.taggers import open_tagger

    opencv()
    options: TaggingOptions = opts.tagging
    rules = rules_of(options)
    images = find_images(Path(options.train_data_dir), recursive=options.recursive)
    place = tag_place(options, images)
    share = my_share(images)
    todo = [path for path in share if not (options.skip_existing and place.has(path))]
    outcome, found = Outcome(skipped=len(share) - len(todo)), _Found()
    if not any(all_gather(len(todo))):  # together, as the processes load together
        return outcome
    if not options.onnx:
        LOGGER.info("the tagger's ONNX file is run, as with --onnx")
    where = (options.repo_id, Path(options.model_dir))
    files = by_the_first(lambda: find_tagger(*where, force=options.force_download))
    tagger = open_tagger(files or find_tagger(*where))
    words = make_vocabulary(tagger.labels, rules, ranked=tagger.ranked)
    LOGGER.info("tagging with %s on the %s", tagger.files.path, "GPU" if tagger.on_gpu else "CPU")
    if tagger.batch is not None and tagger.batch != options.batch_size:
        LOGGER.info("this tagger takes %s at a time, whatever --batch_size says", counted(tagger.batch))
    for name in ("rating", "quality"):
        asked = getattr(options, f"use_{name}_tags") or getattr(options, f"use_{name}_tags_as_last_tag")
        if asked and not len(words.best_of[name]):
            LOGGER.warning("--use_%s_tags: this tagger knows no %s tags", name, name)
    try:
        _tag(todo, tagger, words, rules, options, place, outcome, found)
    except KeyboardInterrupt:
        place.interrupted()
        raise
    place.finish()
    everything = all_gather(found)
    if not is_first():
        return outcome
    if without := sum(one.without_tags for one in everything):
        LOGGER.warning("%s without a tag, as nothing reaches the thresholds", counted(without))
    if options.frequency_tags:
        counts: Counter[str] = sum((one.images_by_tag for one in everything), Counter())
        for tag, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            show(f"{tag}: {count}")
    return outcome


def _tag(
    images: Sequence[Path],
    tagger: Tagger,
    words: Vocabulary,
    rules: TagRules,
    options: TaggingOptions,
    place: TagPlace,
    outcome: Outcome,
    found: _Found,
) -> None:
    from library.preparation.tagging.taggers import probabilities, read_pixels

    def read(path: Path) -> tuple:
        return read_pixels(path, tagger)

    size = max(options.batch_size, tagger.batch or 1)
    reading = read_ahead(images, read, outcome, workers=options.max_data_loader_n_workers, desc="tags", batch=size)
    behind: deque[_Put] = deque()
    with ThreadPoolExecutor(1) as writer:  # the next images need not wait for the disk
        for batch in in_batches(reading, size):
            rows = probabilities([pixels for _, (pixels, _) in batch], tagger)
            for (path, (_, size_of_image)), row in zip(batch, rows, strict=True):
                if not np.isfinite(row).all():
                    outcome.fail(path, "the tagger's answer holds no numbers (NaN)")
                    continue
                tags = choose_tags(row, words, rules)
                behind.append(_Put(path, tags, row, writer.submit(place.put, path, tags, size_of_image)))
            while len(behind) > _BEHIND:
                _count_result(behind.popleft(), words, rules, options, outcome, found)
        while behind:
            _count_result(behind.popleft(), words, rules, options, outcome, found)


def _count_result(
    put: _Put, words: Vocabulary, rules: TagRules, options: TaggingOptions, outcome: Outcome, found: _Found
) -> None:
    """Counts an image once its tags have been written."""
    try:
        put.done.result()
    except UserError as error:
        outcome.fail(put.path, str(error))
        return
    outcome.done += 1
    found.images_by_tag.update(put.tags)
    found.without_tags += not put.tags
    if options.debug:
        show(f"{put.path}: {rules.separator.join(put.tags)}")
        for line in probabilities_in_words(put.row, words):
            show(f"  {line}")
