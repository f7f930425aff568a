"""From command line text and TOML values to option values. Every ValueError reads "must be ..., got ..."."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.options.base import Option
from library.options.nearest import did_you_mean
from library.screen import hide

_WANTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text in quotes",
    "Path": "a path in quotes",
    "int_or_float": 'a whole number of steps, or a share such as 0.1 or "10%"',
}


def is_blank(option: Option, value: Any) -> bool:
    """Whether a value is the empty field of a form, which means "not given"; so does a list of nothing else."""
    if isinstance(value, list):
        return bool(value) and all(is_blank(option, item) for item in value)
    return isinstance(value, str) and not (value if option.details.verbatim else value.strip())


def from_text(option: Option, text: str) -> Any:
    """One value of the command line, which is not blank.

    Raises: ValueError: not of the option's type, or none of its choices.
    """
    try:
        value = _CONVERT[option.kind](text)
    except (ValueError, OverflowError):
        raise ValueError(f"must be {_WANTED[option.kind]}, got {text!r}") from None
    return _chosen(option, value)


def from_toml(option: Option, value: Any) -> Any:
    """A value of a configuration file, which is not blank; a single value will do where a list is taken.

    Raises: ValueError: not of the option's type, or none of its choices.
    """
    if option.details.secret and not isinstance(value, str):
        hide(value)
        raise ValueError("must be text in quotes; what was given is not repeated here")
    if option.many:
        items = value if isinstance(value, list) else [value]
        return [_item(option, item) for item in items if not is_blank(option, item)]
    if option.details.comma_list and isinstance(value, list):
        return ",".join(_number_text(option, item) for item in value)
    if option.details.comma_list and not isinstance(value, str):
        return _number_text(option, value)
    return _item(option, value)


def as_kind(kind: str, value: Any) -> Any:
    """A value of a TOML or JSON file as programs mean it: 0 and 1 for a switch are false and true, 64.0 is 64.

    What is neither stays as it is, for the check of types to judge.
    """
    if kind == "bool" and value in (0, 1) and isinstance(value, int | float):
        return bool(value)
    whole = kind in ("int", "size", "int_or_float") and isinstance(value, float) and value.is_integer()
    if whole and not (kind == "int_or_float" and value <= 1):  # there 1.0 is the whole run
        return int(value)
    if kind == "str" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


def _item(option: Option, value: Any) -> Any:
    value, kind = as_kind(option.kind, value), option.kind
    is_bool = isinstance(value, bool)
    wanted = ValueError(f"must be {_WANTED[kind]}, got {_show(value)}{_quotes_hint(option, value)}")
    match kind:
        case "bool":
            if not is_bool:
                raise wanted
        case "str" | "Path":
            if not isinstance(value, str):
                raise wanted
            value = value if kind == "str" else Path(value)
        case "int":
            if is_bool or not isinstance(value, int):
                raise wanted
        case "float":
            if is_bool or not isinstance(value, int | float):
                raise wanted
            try:
                value = float(value)
            except OverflowError:
                raise ValueError("must be a number that a computer can hold; this one has hundreds of digits") from None
        case "int_or_float":
            if isinstance(value, str) and value.endswith("%"):
                return from_text(option, value)
            if is_bool or not isinstance(value, int | float):
                raise wanted
    return _chosen(option, value)


def _chosen(option: Option, value: Any) -> Any:
    value = (option.details.synonyms or {}).get(value, value)
    if option.choices and value not in option.choices:
        instead = (option.details.instead or {}).get(value)
        near = did_you_mean(value, filter(_is_text, option.choices)) if _is_text(value) else ""
        way_out = f"; {instead}" if instead else near
        raise ValueError(f"must be one of {', '.join(map(str, option.choices))}; got {value!r}{way_out}")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _steps(text: str) -> int | float:
    if text.endswith("%"):
        return float(text[:-1]) / 100
    try:
        return int(text)
    except ValueError:
        return float(text)


def _number_text(option: Option, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, numbers in [brackets], or text in quotes, got {_show(value)}")
    return str(value)


def _quotes_hint(option: Option, value: Any) -> str:
    """A hint about quotes, for `"1e-4"` where 1e-4 was meant."""
    if not isinstance(value, str) or option.kind not in ("bool", "int", "float", "int_or_float"):
        return ""
    if option.kind == "bool":
        return "; remove the quotes" if value.lower() in ("true", "false") else ""
    try:
        _CONVERT[option.kind](value)
    except ValueError:
        return ""
    return "; remove the quotes"


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"the text {value!r}" if isinstance(value, str) else repr(value)


_CONVERT = {"int": int, "float": float, "str": str, "Path": Path, "int_or_float": _steps}
