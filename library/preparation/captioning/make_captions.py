"""Writes a caption beside each image of a folder: finetune/make_captions.py and make_captions_by_git.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from os.path import isfile  # unlike Path.is_file, it also knows that names too long for files are none
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.data.sample.images import read_reduced
from library.errors import UserError
from library.options.base import Options
from library.options.captioning import CaptionFileOptions, CaptionOptions, GitCaptionOptions
from library.options.preparation import WorkOptions
from library.preparation.captioning.text_mentions import without_text_mentions
from library.preparation.common.images import (
    all_gather,
    find_images,
    in_batches,
    my_share,
    read_ahead,
    require_room_beside,
    warn_of_shared_names,
)
from library.preparation.common.summary import Outcome, show
from library.preparation.common.texts import require_text_ending, write_text
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from library.preparation.captioning.captioners import Captioner

GROUPS = (CaptionOptions, WorkOptions)
GIT_GROUPS = (GitCaptionOptions, WorkOptions)

_NARROWEST = 400  # the longer side of an image in shorter ones


def make_captions(opts: Options) -> Outcome:
    """Captions a folder with BLIP, or with the model that --model names."""
    given: CaptionOptions = opts.caption

    def load() -> Captioner:
        from library.preparation.captioning import captioners

        draws = not given.beam_search and (given.model is None or "top_p" in opts.explicit)
        search = captioners.Search(
            max_length=given.max_length,
            min_length=given.min_length,
            num_beams=given.num_beams if given.beam_search else 1,
            top_p=given.top_p if draws else None,
            seed=given.seed,
        )
        if given.model is not None:
            return captioners.load_image_text_model(given.model, search, given.prompt)
        return captioners.load_blip(given.caption_weights, search, given.prompt)

    return caption_folder(given, load)


def make_captions_by_git(opts: Options) -> Outcome:
    """Captions a folder with GIT."""
    given: GitCaptionOptions = opts.caption

    def load() -> Captioner:
        from library.preparation.captioning import captioners

        return captioners.load_git(given.model_id, captioners.Search(max_length=given.max_length))

    return caption_folder(given, load, without_text_mentions if given.remove_words else lambda caption: caption)


def caption_folder(
    given: CaptionFileOptions, load: Callable[[], Captioner], change: Callable[[str], str] = lambda caption: caption
) -> Outcome:
    """Captions this process's share of the images of a folder.

    Args:
        load: makes the model; called only if there is something to do.
        change: changes a caption before it is written.
    Raises: UserError: no images, the model cannot be had, or a batch does not fit into the GPU's memory.
    """
    require_text_ending(given.caption_extension)
    folder = Path(given.train_data_dir)
    outcome = Outcome()
    images = find_images(folder, recursive=given.recursive)
    warn_of_shared_names(images, "caption file")
    share = my_share(images)
    done = {path for path in images if given.skip_existing and isfile(caption_path(path, given))}
    require_room_beside((path for path in images if path not in done), "caption files")
    todo = [path for path in share if path not in done]
    outcome.skipped = len(share) - len(todo)
    if not any(all_gather(len(todo))):  # together, as the processes load together
        return outcome
    captioner = load()

    def read(path: Path) -> Any:
        pixels, size = read_reduced(path, captioner.enough)
        if max(size) > _NARROWEST * min(size):  # what models shrink the shorter side of would need all memory
            raise ValueError(f"{size.width}x{size.height} is too narrow to be captioned")
        return captioner.prepare(pixels)

    size = given.batch_size
    reading = read_ahead(todo, read, outcome, workers=given.max_data_loader_n_workers, desc="captions", batch=size)
    for batch in in_batches(reading, size):
        for path, found in _captioned(captioner, batch, folder, outcome):
            caption = change(found)
            try:
                write_text(caption_path(path, given), f"{caption}\n")
            except UserError as error:
                outcome.fail(path, str(error))
                continue
            outcome.done += 1
            if given.debug:
                show(f"{path}: {caption}")
    return outcome


def caption_path(image: Path, given: CaptionFileOptions) -> Path:
    """The caption file of an image: its name with another extension."""
    return image.with_name(image.stem + given.caption_extension)


def _captioned(
    captioner: Captioner, batch: Sequence[tuple[Path, Any]], folder: Path, outcome: Outcome
) -> Iterator[tuple[Path, str]]:
    """Images of a batch with their captions. If the model refuses the batch, they go one by one."""
    import torch

    names = [path.relative_to(folder).as_posix() for path, _ in batch]
    try:
        captions = captioner.caption([prepared for _, prepared in batch], names)
    except torch.OutOfMemoryError:
        raise UserError(
            f"--batch_size {len(batch)}: the GPU's memory is too small"
            + ("; give a smaller number" if len(batch) > 1 else " for this model")
        ) from None
    except Exception as error:  # what processors and models raise over an image is of every kind
        if len(batch) == 1:
            LOGGER.debug("%s", batch[0][0], exc_info=error)
            lines = str(error).splitlines() or [type(error).__name__]
            outcome.fail(batch[0][0], f"the model cannot caption it ({lines[0]})")
            return
        for one in batch:
            yield from _captioned(captioner, [one], folder, outcome)
        return
    yield from zip((path for path, _ in batch), captions, strict=True)
