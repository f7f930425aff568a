"""From flags or a dataset config to typed specs. Nothing heavy is imported, so mistakes are reported at once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.data.config.file import read_config
from library.data.config.schema import DATASET, KEYS, OF_BUCKETS, SUBSET, Key, check_value
from library.data.sample.buckets import round_limits
from library.data.sample.captions import CaptionOptions, changing
from library.data.scan.folders import has_images, repeat_folders
from library.data.types import DatasetSpec, SubsetSpec
from library.errors import UserError
from library.options import base, validation
from library.options.data import MOST_REPEATS
from library.runtime.files import path_problem, reason
from library.runtime.logs import LOGGER
from library.types import Size

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import FamilyTraits, ImageRole


def build_specs(opts: Options, traits: FamilyTraits, image_role: ImageRole | None = "mask") -> list[DatasetSpec]:
    """The datasets of a run, from --dataset_config or from the data flags.

    A value is looked for in the subset, the dataset, the general table, the command line, and the built-in default.

    Args: image_role: what the images of conditioning_data_dir are to the method; None: they do not matter.

    Raises: UserError: with every problem found: of the data flags (in the very lines of `library.options.validation`),
        unknown keys, wrong values, missing or empty folders, combinations that cannot work.
    """
    reader = _Reader(opts, traits, image_role)
    if opts.data.dataset_config:
        file = Path(opts.data.dataset_config)
        config, general_place = read_config(file), f"{file}, [general]"
        folders = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")
        _warn_about_ignored(opts, folders, "--dataset_config says where the images are")
    else:
        file, general_place = None, ""
        config = {"general": {}, "datasets": [{"subsets": _subsets_of_flags(opts, image_role, reader.problems)}]}
    specs, flag = [], "--in_json" if opts.data.in_json else "--train_data_dir"
    for number, table in enumerate(config["datasets"], 1):
        place = f"{file}, [[datasets]] {number}" if file else flag
        spec = reader.dataset(table, place, [(general_place, config["general"])])
        if spec.subsets:
            specs.append(spec)
    if image_role is not None:
        reader.problems += _check_partners([subset for spec in specs for subset in spec.subsets], opts, image_role)
    if not specs and not reader.problems:
        reader.problems += reader.left_out or ["no images: the data set names no folder"]
    if reader.problems:
        raise UserError(*dict.fromkeys(reader.problems))
    for why in reader.left_out:
        LOGGER.warning(f"{why}; left out")
    return specs


class _Reader:
    """Looks values up level by level, and collects every problem on the way."""

    def __init__(self, opts: Options, traits: FamilyTraits, image_role: ImageRole | None):
        self.opts, self.traits, self.image_role, self.flags = opts, traits, image_role, opts.flat()
        self.problems = validation.problems(base.Options([opts.data], opts.given), traits)
        # What the flags alone say is checked there already; a file may combine them with something else.
        self.combine = bool(opts.data.dataset_config) or not self.problems
        self.left_out: list[str] = []  # what is empty, a line for each

    def value(self, name: str, tables: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
        """The value in force. `tables` are (place, table), the most specific first."""
        key = KEYS[name]
        for place, table in tables:
            if name in table:
                found = list(check_value(name, table[name], place))
                self.problems += found
                return key.default if found else table[name]
        return key.default if key.flag is None else self._from_flag(name, key)

    def _from_flag(self, name: str, key: Key) -> Any:
        """The flag's value; the default stands in for a wrong one, which is among the problems already."""
        value = self.flags.get(key.flag[2:])
        if value is not None and key.kind in ("size", "range"):  # "512" or "512,768"; "2.0,4.0"
            try:
                numbers = tuple(int(part) if key.kind == "size" else float(part) for part in value.split(","))
            except ValueError:
                return key.default
            if len(numbers) not in ((1, 2) if key.kind == "size" else (2,)):
                return key.default
            value = numbers[0] if len(numbers) == 1 else numbers
        return key.default if value is None or any(check_value(name, value, key.flag)) else value

    def dataset(self, table: Mapping[str, Any], place: str, outer: list) -> DatasetSpec:
        tables = [(place, table), *outer]
        unused = () if self.value("enable_bucket", tables) else OF_BUCKETS  # a value that has no effect is not checked
        names = (name for name, key in KEYS.items() if DATASET in key.levels)
        found = {name: KEYS[name].default if name in unused else self.value(name, tables) for name in names}
        if found["resolution"] is None:
            said = self.opts.data.resolution is not None or any("resolution" in table for _, table in tables)
            if self.opts.data.dataset_config and not said:
                self.problems.append(f"{place}: no resolution; give --resolution, or resolution in the dataset config")
            found["resolution"] = self.traits.default_resolution
        for name in ("resolution", "skip_image_resolution"):
            found[name] = _size(found[name])
        _round_sizes(found, place, self.traits)
        if not 0 <= found["validation_split"] <= 1:
            LOGGER.warning(f"{place}: validation_split must be from 0 to 1, got {found['validation_split']}; ignored")
            found["validation_split"] = 0.0
        if self.combine:
            self.problems += _check_frame(found, place, self.traits)
        subsets = self._subsets(table["subsets"], place, tables, found["enable_bucket"])
        own = {field.name: found[field.name] for field in fields(DatasetSpec) if field.name in KEYS}
        cached = self.opts.data.cache_latents or self.opts.data.cache_latents_to_disk
        return DatasetSpec(subsets=tuple(subsets), fits_any_size=cached, **own)

    def _subsets(
        self, listed: Sequence[Mapping[str, Any]], place: str, tables: list, buckets: bool
    ) -> list[SubsetSpec]:
        """The subsets that have something in them; the others are noted. Without training images there are none."""
        subsets, only_regularisation = [], bool(listed)
        for number, table in enumerate(listed, 1):
            where = f"{place}, [[datasets.subsets]] {number}" if self.opts.data.dataset_config else place
            subset = self.subset(table, where, tables)
            only_regularisation = only_regularisation and subset.is_reg
            self.problems += self._check_subset(subset, where, buckets)
            folder = None if subset.metadata_file is not None else subset.image_dir
            try:
                if subset.num_repeats < 1:
                    self.left_out.append(f"{where}: {subset.place}: num_repeats = 0")
                elif folder is not None and os.path.isdir(folder) and not has_images(folder):
                    self.left_out.append(f"{where}: no images in {folder}")
                else:
                    subsets.append(subset)
            except OSError as error:
                self.problems.append(f"{where}: {subset.place} cannot be listed ({reason(error)})")
        if only_regularisation:
            self.problems.append(f"{place}: every subset has is_reg = true; regularisation needs images to train on")
        return subsets if any(not subset.is_reg for subset in subsets) else []

    def _check_subset(self, subset: SubsetSpec, place: str, buckets: bool) -> Iterator[str]:
        data, folder = self.opts.data, subset.image_dir
        places = (("metadata_file", os.path.isfile, "file"), ("conditioning_data_dir", os.path.isdir, "folder"))
        for name, is_there, kind in places if data.dataset_config else ():  # flags have checks of their own
            path = getattr(subset, name)
            if path is not None and not is_there(path):
                yield f"{place}: {name} {path} is no {kind}"
        if folder is not None and not os.path.isdir(folder):
            yield f"{place}: image_dir {folder} {_no_folder(folder)}"
        if self.combine:
            if data.cache_latents or data.cache_latents_to_disk:
                flag = "--cache_latents" if data.cache_latents else "--cache_latents_to_disk"
                for name in ("color_aug", "random_crop", "face_crop_aug_range"):
                    if getattr(subset, name):
                        why = f"{name} changes the image every time, so its latents cannot be cached"
                        yield f"{place}: {why}; remove {flag} or {name}"
            if self.opts.text_cache.in_use:
                yield from changing(subset.captions, place)
            if buckets and subset.face_crop_aug_range:
                LOGGER.warning(f"{place}: face_crop_aug_range has no effect on images in buckets (enable_bucket)")
        offset = subset.timestep_offset
        if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
            yield f"{place}: custom_attributes.timestep_sampling.offset must be a number, got {offset!r}"

    def subset(self, table: Mapping[str, Any], place: str, outer: list) -> SubsetSpec:
        tables = [(place, table), *outer]
        found = {name: self.value(name, tables) for name, key in KEYS.items() if SUBSET in key.levels}
        own = {field.name: found[field.name] for field in fields(SubsetSpec) if field.name in KEYS}
        templates = () if own["is_reg"] else self.opts.method.caption_templates
        named = {field.name: found[field.name] for field in fields(CaptionOptions) if field.name in KEYS}
        captions = CaptionOptions(**named, templates=templates)
        for name in ("image_dir", "metadata_file", "conditioning_data_dir"):
            own[name] = Path(own[name]).expanduser() if own[name] else None
        own["class_tokens"] = own["class_tokens"] or None
        own["face_crop_aug_range"] = tuple(own["face_crop_aug_range"]) if own["face_crop_aug_range"] else None
        extension = own["caption_extension"]
        own["caption_extension"] = extension if extension.startswith(".") else "." + extension
        inpainting = self.opts.data.train_inpainting and self.traits.inpaints
        own |= {"inpainting": inpainting, "masks_weigh": self.opts.loss.masked_loss or not inpainting}
        return SubsetSpec(captions=captions, image_role=self.image_role, **own)


def _size(sides: int | Sequence[int] | None) -> Size | None:
    """A size from a value of that kind: one side of a square, or width and height."""
    if sides is None:
        return None
    return Size(*sides) if isinstance(sides, (list, tuple)) else Size(sides, sides)


def _round_sizes(found: dict[str, Any], place: str, traits: FamilyTraits) -> None:
    """Makes bucket limits multiples of the step, or without buckets the sides what latents can be, and says so."""
    if found["enable_bucket"] and not found["bucket_no_upscale"]:
        step = found["bucket_reso_steps"]
        low, high = round_limits(found["min_bucket_reso"], found["max_bucket_reso"], step)
        for name, rounded in (("min_bucket_reso", max(low, step)), ("max_bucket_reso", high)):
            if rounded != found[name]:
                LOGGER.warning(f"{place}: {name} {found[name]} is no multiple of {step}; {rounded} is used")
                found[name] = rounded
    elif not found["enable_bucket"]:
        unit, wanted = traits.pixel_multiple, found["resolution"]
        rounded = Size(*(side // unit * unit for side in wanted))
        if rounded != wanted and min(rounded) > 0:
            LOGGER.warning(
                f"{place}: resolution {wanted.width}x{wanted.height}: sides are multiples of {unit} with "
                f"{traits.label}; {rounded.width}x{rounded.height} is used"
            )
            found["resolution"] = rounded


def _check_frame(found: Mapping[str, Any], place: str, traits: FamilyTraits) -> Iterable[str]:
    """Problems of resolution, bucket step and bucket limits together."""
    resolution, step = found["resolution"], found["bucket_reso_steps"]
    size = f"resolution {resolution.width}x{resolution.height}"
    low, high = found["min_bucket_reso"], found["max_bucket_reso"]
    if not found["enable_bucket"]:
        if min(resolution) < traits.pixel_multiple:
            yield f"{place}: {size}: sides must be at least {traits.pixel_multiple} with {traits.label}"
    elif step % traits.bucket_step:
        yield f"{place}: bucket_reso_steps must be a multiple of {traits.bucket_step}, got {step}"
    elif found["bucket_no_upscale"]:  # buckets are made for the images, limits do not apply
        if resolution.width * resolution.height < step * step:
            yield f"{place}: {size} is smaller than one bucket step, {step}x{step}"
    elif not low <= min(resolution) <= max(resolution) <= high:
        yield (
            f"{place}: {size} does not lie within min_bucket_reso {low} and max_bucket_reso {high}; widen the limits"
        )


def _check_partners(subsets: Sequence[SubsetSpec], opts: Options, image_role: ImageRole) -> Iterable[str]:
    """Whether the images of conditioning_data_dir are there where they are needed, and of use where they are there."""
    folders = [subset.conditioning_data_dir for subset in subsets if subset.conditioning_data_dir]
    any_alpha = any(subset.alpha_mask for subset in subsets)
    if image_role == "mask":
        if folders and not (opts.loss.masked_loss or opts.data.train_inpainting) and os.path.isdir(folders[0]):
            why = "its images are masks for --masked_loss or --train_inpainting; add one of these, or remove them"
            yield f"conditioning_data_dir {folders[0]}: {why}"
        if opts.loss.masked_loss and not folders and not any_alpha:
            yield "--masked_loss: there are no masks; name their folder in conditioning_data_dir, or set alpha_mask"
        return
    for subset in subsets:
        if not subset.conditioning_data_dir:
            yield f"{subset.place}: it has no control images; name their folder in conditioning_data_dir"
    if opts.loss.masked_loss and not any_alpha:
        yield (
            "--masked_loss: there are no masks, as the images of conditioning_data_dir are control images here; "
            "set alpha_mask, or leave --masked_loss out"
        )


def _subsets_of_flags(opts: Options, image_role: ImageRole | None, problems: list[str]) -> list[dict[str, Any]]:
    """The data flags as subset tables: a metadata file, images with masks or control images, or repeated folders."""
    options = opts.data
    if image_role == "control":
        _warn_about_ignored(opts, ("in_json",), "control images belong to folders of images")
    elif options.in_json:
        _warn_about_ignored(opts, ("reg_data_dir", "conditioning_data_dir"), "--in_json says which images are used")
        return [{"metadata_file": options.in_json, "image_dir": options.train_data_dir}]
    if options.train_data_dir and options.conditioning_data_dir:
        _warn_about_ignored(opts, ("reg_data_dir",), "masks have none for regularisation images")
        images, partners = Path(options.train_data_dir).expanduser(), options.conditioning_data_dir
        try:
            is_plain = os.path.isdir(images) and has_images(images)
        except OSError:
            is_plain = False  # what is wrong with it is reported by `_repeating`
        if is_plain:
            return [{"image_dir": options.train_data_dir, "conditioning_data_dir": partners}]
        tables = _repeating(options.train_data_dir, "train_data_dir", problems)
        for table in tables:  # they lie in one folder, or in its sub-folders that are named as those of the images
            own = Path(partners).expanduser() / Path(table["image_dir"]).name
            table["conditioning_data_dir"] = str(own) if os.path.isdir(own) else partners
        return tables
    tables = []
    for flag, is_reg in (("train_data_dir", False), ("reg_data_dir", True)):
        if getattr(options, flag):
            tables += [{**one, "is_reg": is_reg} for one in _repeating(getattr(options, flag), flag, problems)]
    if options.dataset_repeats != 1:
        LOGGER.warning("--dataset_repeats has no effect here: the names of the folders say how often they repeat")
    return tables


def _repeating(parent: str, flag: str, problems: list[str]) -> list[dict[str, Any]]:
    """The sub-folders named <repeats>_<class tokens> as subset tables."""
    folder = Path(parent).expanduser()
    if not os.path.isdir(folder):
        problems.append(f"--{flag}: {folder} {_no_folder(folder)}")
        return []
    try:
        found, ignored = repeat_folders(folder)
    except OSError as error:
        problems.append(f"--{flag}: {folder} cannot be listed ({reason(error)})")
        return []
    if ignored:
        names = ", ".join(path.name for path in ignored[:5]) + (", ..." if len(ignored) > 5 else "")
        LOGGER.warning(f"--{flag}: {len(ignored)} not used, as they are no <repeats>_<class tokens> folder: {names}")
    if not found:
        is_one_itself = re.match(r"\d+_", folder.resolve().name) is not None and has_images(folder)
        way_out = f"; it looks like one itself: give the folder above it, {folder.parent}" if is_one_itself else ""
        problems.append(
            f"--{flag}: {folder} has no sub-folder named <repeats>_<class tokens>, e.g. 10_sks dog{way_out}"
        )
    tables = []
    for path, repeats, class_tokens in found:
        if repeats > MOST_REPEATS:
            problems.append(f"--{flag}: {path}: a folder may be repeated {MOST_REPEATS:,} times at most; rename it")
        repeats = min(repeats, MOST_REPEATS)
        tables.append({"image_dir": str(path), "num_repeats": repeats, "class_tokens": class_tokens})
    return tables


def _no_folder(path: Path) -> str:
    why = path_problem(path, "folder") or ""
    return why.removeprefix("it ") if why.startswith("it cannot") else "is no folder"


def _warn_about_ignored(opts: Options, flags: Iterable[str], why: str) -> None:
    for flag in flags:
        if getattr(opts.data, flag):
            LOGGER.warning(f"--{flag} has no effect: {why}")
