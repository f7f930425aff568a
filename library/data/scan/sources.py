"""How each style of data set says which images it has: a folder, a folder with masks, or a metadata file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from library.data.sample.captions import DEFAULT_EXTENSION, caption_name, extension_in_use, read_caption
from library.data.scan import info_cache, metadata_files
from library.data.scan.cached_names import Prepared
from library.data.scan.folders import is_image, is_other_image
from library.data.scan.index import FileIndex
from library.data.types import SubsetSpec
from library.errors import UserError
from library.types import ImageRole, Size

ROLE_NAMES: dict[ImageRole, str] = {"mask": "mask", "control": "control image"}  # for messages


class ImageEntry(NamedTuple):
    """An image as its folder or metadata file names it, before its file is opened."""

    path: Path  # where there are latents only: the image's place without extension
    caption: str | None  # None: nothing says; the class tokens stand in
    present: bool = True  # whether there is an image, and not only its latents
    size: Size | None = None  # known without looking
    bucket: Size | None = None  # what the latents were made for, as a metadata file says
    conditioning: Path | None = None  # the image of conditioning_data_dir, whatever its role
    tags: str | None = None  # see Record
    flip_file: bool = False  # a file of mirrored latents lies beside it


@dataclass
class ScanLog:
    """Warnings, problems and counts from finding the images of a subset."""

    warnings: list[str]
    dropped: list[tuple[Path, str]]  # files, or the metadata file that names them, and why
    problems: list[str]  # each of these ends the run
    uncaptioned: list[Path]  # images without a caption in folders where most have one


def find_images(subset: SubsetSpec, index: FileIndex, log: ScanLog) -> list[ImageEntry]:
    """The images of a subset in a stable order, by path.

    Raises: UserError: a metadata file that cannot be read.
    """
    if subset.metadata_file is not None:
        return _of_metadata(subset, subset.metadata_file, index, log)
    infos = info_cache.read(subset.image_dir) if subset.cache_info else None
    if infos is not None:
        found = [ImageEntry(path, info.caption, size=info.size) for path, info in sorted(infos.items())]
    else:
        found = _of_folder(subset, index, log)
    if subset.conditioning_data_dir is not None and subset.image_role is not None:
        found = list(_with_conditioning(found, subset, subset.conditioning_data_dir, index, log))
    return found


def _of_folder(subset: SubsetSpec, index: FileIndex, log: ScanLog) -> list[ImageEntry]:
    names = index.listing(subset.image_dir)
    images = sorted(filter(is_image, names))
    extension = extension_in_use(subset.caption_extension, images, names)
    if extension != subset.caption_extension:
        log.warnings.append(
            f"{subset.image_dir}: no {subset.caption_extension} files; its {extension} files are used as captions "
            f"(set --caption_extension {extension} to say so)"
        )
    others = sorted(filter(is_other_image, names))
    log.dropped += [(subset.image_dir / name, "images of this kind are not read; save it as PNG") for name in others]
    files = [caption_name(image, extension, names) for image in images]
    missing = [subset.image_dir / name for name, file in zip(images, files, strict=True) if file is None]
    if 2 * len(missing) <= len(images):
        log.uncaptioned += missing
    passed_over = sum(caption_name(path.name, ".txt", names) is not None for path in missing)
    if passed_over and extension == DEFAULT_EXTENSION:
        log.warnings.append(
            f"{subset.image_dir}: {passed_over} of the images without {extension} file have a .txt file, which is "
            "not read; in one folder all captions have one ending"
        )
    folder, multiline = subset.image_dir, subset.captions.enable_wildcard
    places = {file: os.path.join(folder, file) for file in files if file}
    kind, learn = "caption lines" if multiline else "caption", partial(_caption_or_problem, multiline=multiline)
    read = index.learn(kind, list(places.values()), learn)
    log.problems += [problem for _, problem in read if problem]
    captions = {file: caption for file, (caption, _) in zip(places, read, strict=True)}
    return [ImageEntry(folder / name, captions.get(file)) for name, file in zip(images, files, strict=True)]


def _caption_or_problem(file: Path, multiline: bool) -> tuple[str, str]:
    try:
        return read_caption(file, multiline=multiline), ""
    except UserError as error:
        return "", error.problems[0]


def _of_metadata(subset: SubsetSpec, file: Path, index: FileIndex, log: ScanLog) -> list[ImageEntry]:
    options = subset.captions
    entries, problems = metadata_files.resolve(
        metadata_files.read_metadata(file),
        subset.image_dir,
        index.listing,
        file=file,
        separator=options.caption_separator,
        wildcard=options.enable_wildcard,
    )
    log.dropped += [(file, problem.removeprefix(f"{file}: ")) for problem in problems]
    prepared = Prepared(index.listing)
    found = []
    for entry in entries:
        one = ImageEntry(
            path=entry.base if entry.image is None else entry.image,
            caption=entry.caption if entry.captioned else None,
            present=entry.image is not None,
            bucket=entry.train_resolution,
            tags=entry.tags,
            flip_file=prepared.has_flip_file(entry.base),
        )
        if entry.image is None:
            one = one._replace(size=entry.image_size or prepared.size(entry.base) or entry.train_resolution)
        found.append(one)
    return found


def _with_conditioning(
    found: Sequence[ImageEntry], subset: SubsetSpec, folder: Path, index: FileIndex, log: ScanLog
) -> Iterable[ImageEntry]:
    by_stem: dict[str, list[str]] = {}
    for name in sorted(index.listing(folder)):
        if is_image(name):
            by_stem.setdefault(Path(name).stem, []).append(name)
    missing = []
    for one in found:
        names = by_stem.get(one.path.stem)
        if not names:
            missing.append(one.path)
            continue
        yield one._replace(conditioning=folder / (one.path.name if one.path.name in names else names[0]))
    if missing:
        names = ", ".join(path.name for path in missing[:5]) + (", ..." if len(missing) > 5 else "")
        what = ROLE_NAMES[subset.image_role]
        log.problems.append(f"{folder}: no {what} for {len(missing)} images of {missing[0].parent}: {names}")
    surplus = by_stem.keys() - {one.path.stem for one in found}
    if surplus:
        log.warnings.append(f"{folder}: {len(surplus)} images belong to no image of the data set")
