"""The keys of a dataset config: type, default, where they may stand, and the command-line option behind each."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.options.data import MOST_REPEATS, ending_problem
from library.options.values import as_kind

GENERAL, DATASET, SUBSET = "general", "datasets", "datasets.subsets"
_DATASET_LEVELS = (GENERAL, DATASET)
_ALL_LEVELS = (GENERAL, DATASET, SUBSET)

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


@dataclass(frozen=True)
class Key:
    """One key. `flag` is the command-line option behind it, used where no table says anything."""

    kind: str
    default: Any = None
    levels: tuple[str, ...] = _ALL_LEVELS
    flag: str | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | None = None
    help: str = ""  # where there is no flag whose help says it


KEYS: dict[str, Key] = {
    "batch_size": Key("int", 1, _DATASET_LEVELS, "--train_batch_size", low=1),
    "resolution": Key("size", None, _DATASET_LEVELS, "--resolution", low=1),
    "enable_bucket": Key("bool", False, _DATASET_LEVELS, "--enable_bucket"),
    "min_bucket_reso": Key("int", 256, _DATASET_LEVELS, "--min_bucket_reso", low=1),
    "max_bucket_reso": Key("int", 1024, _DATASET_LEVELS, "--max_bucket_reso", low=1),
    "bucket_reso_steps": Key("int", 64, _DATASET_LEVELS, "--bucket_reso_steps", low=1),
    "bucket_no_upscale": Key("bool", False, _DATASET_LEVELS, "--bucket_no_upscale"),
    "skip_image_resolution": Key("size", None, _DATASET_LEVELS, "--skip_image_resolution", low=0),
    "network_multiplier": Key("float", 1.0, _DATASET_LEVELS, help="strength of the network while these images train"),
    "validation_seed": Key("int", None, _DATASET_LEVELS, "--validation_seed", low=0),
    "validation_split": Key("float", 0.0, _DATASET_LEVELS, "--validation_split"),
    "image_dir": Key("str", None, (SUBSET,), help="folder of the images; its sub-folders are not entered"),
    "is_reg": Key("bool", False, (SUBSET,), help="the images are for regularisation"),
    "class_tokens": Key("str", help="caption of images that have no caption file"),
    "num_repeats": Key("int", 1, flag="--dataset_repeats", low=0, high=MOST_REPEATS),
    "resize_interpolation": Key("str", None, flag="--resize_interpolation", choices=INTERPOLATIONS),
    "color_aug": Key("bool", False, flag="--color_aug"),
    "flip_aug": Key("bool", False, flag="--flip_aug"),
    "random_crop": Key("bool", False, flag="--random_crop"),
    "face_crop_aug_range": Key("range", None, flag="--face_crop_aug_range", low=0.01),
    "caption_extension": Key("str", ".caption", flag="--caption_extension"),
    "caption_separator": Key("str", ",", flag="--caption_separator"),
    "shuffle_caption": Key("bool", False, flag="--shuffle_caption"),
    "keep_tokens": Key("int", 0, flag="--keep_tokens", low=0),
    "keep_tokens_separator": Key("str", "", flag="--keep_tokens_separator"),
    "secondary_separator": Key("str", None, flag="--secondary_separator"),
    "enable_wildcard": Key("bool", False, flag="--enable_wildcard"),
    "caption_prefix": Key("str", None, flag="--caption_prefix"),
    "caption_suffix": Key("str", None, flag="--caption_suffix"),
    "caption_dropout_rate": Key("float", 0.0, flag="--caption_dropout_rate", low=0, high=1),
    "caption_dropout_every_n_epochs": Key("int", 0, flag="--caption_dropout_every_n_epochs", low=0),
    "caption_tag_dropout_rate": Key("float", 0.0, flag="--caption_tag_dropout_rate", low=0, high=1),
    "token_warmup_min": Key("int", 1, flag="--token_warmup_min", low=0),
    "token_warmup_step": Key("float", 0, flag="--token_warmup_step", low=0),
    "custom_attributes": Key("table", None, help="your own values; passed on with every batch, in `Batch.attributes`"),
    "cache_info": Key("bool", False, flag="--cache_info"),
    "alpha_mask": Key("bool", False, (SUBSET,), "--alpha_mask"),
    "metadata_file": Key("str", None, (SUBSET,), help="metadata file with captions and tags, as for `--in_json`"),
    "conditioning_data_dir": Key(
        "str",
        None,
        (SUBSET,),
        help="folder of images that belong to these by name: masks, for `--masked_loss`; a ControlNet's control images",
    ),
}

OF_BUCKETS = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
_PATHS = ("image_dir", "metadata_file", "conditioning_data_dir")

# What has no meaning in a subset of that style, named by the key that makes the style.
NOT_IN_STYLE = {
    "metadata_file": ("is_reg", "class_tokens", "caption_extension", "cache_info", "conditioning_data_dir"),
    "conditioning_data_dir": ("is_reg", "class_tokens"),
}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_pair(value: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(test, value))


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # what a value must be, in words and as a test
    "int": ("a whole number", _is_int),
    "float": ("a number", _is_number),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "str": ("text in quotes", lambda value: isinstance(value, str)),
    "size": ("a whole number, or two as [width, height]", lambda value: _is_int(value) or _is_pair(value, _is_int)),
    "range": ("two numbers as [low, high]", lambda value: _is_pair(value, _is_number)),
    "table": ("a table", lambda value: isinstance(value, Mapping)),
}


def as_meant(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table with its values as programs write and mean them, see `library.options.values.as_kind`.

    Empty text is left out where it can be no value; where text is wanted it is one, which hides that of a table above.
    """
    kinds = {name: KEYS[name].kind if name in KEYS else "" for name in table}
    given = {name: as_kind(kinds[name], value) for name, value in table.items()}
    return {
        name: value for name, value in given.items() if value != "" or (kinds[name] == "str" and name not in _PATHS)
    }


def check_table(table: Mapping[str, Any], level: str, place: str) -> Iterator[str]:
    """Problems of one table: unknown keys, keys of another level, values of the wrong type.

    Args:
        place: how messages call the table, e.g. ``data.toml, [[datasets]] 1``.
    """
    for name, value in table.items():
        key = KEYS.get(name)
        if key is None:
            known = [candidate for candidate, one in KEYS.items() if level in one.levels]
            near = difflib.get_close_matches(name.lower(), known, n=1)
            yield f"{place}: unknown key '{name}'" + (f"; did you mean '{near[0]}'?" if near else "")
        elif level not in key.levels:
            allowed = " or ".join(f"[{one}]" if one == GENERAL else f"[[{one}]]" for one in key.levels)
            yield f"{place}: '{name}' cannot stand here; it belongs in {allowed}"
        elif not _KINDS[key.kind][1](value):
            yield f"{place}: {name} must be {_KINDS[key.kind][0]}, got {value!r}"


def check_value(name: str, value: Any, source: str) -> Iterator[str]:
    """Problems of a value that has the right type. `source` says where it was found, e.g. ``--train_batch_size``."""
    key = KEYS[name]
    if value is None:
        return
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        yield f"{source}: {name} must be a finite number, got {value!r}"
        return
    if key.low is not None and min(numbers) < key.low:
        yield f"{source}: {name} must be at least {key.low}, got {value!r}"
    if key.high is not None and max(numbers) > key.high:
        yield f"{source}: {name} must be at most {key.high}, got {value!r}"
    if key.choices is not None and value not in key.choices:
        yield f"{source}: {name} must be one of {', '.join(key.choices)}; got {value!r}"
    if key.kind == "range" and value[0] > value[1]:
        yield f"{source}: {name} must be [low, high], got {value!r}"
    if name == "caption_separator" and not value:
        yield f"{source}: caption_separator must not be empty"
    fault = ending_problem(value) if name == "caption_extension" and value else None
    if fault:
        yield f"{source}: {name} {fault}"
    if name in _PATHS and not value.isprintable():
        yield (
            f"{source}: {name} has a control character in it, {value!r}; a backslash in double quotes begins an "
            "escape: write a path in 'single quotes', or with forward slashes"
        )
