"""Text, JSON and TOML that users write: one set of guards and one set of messages for every reader.

TOML is version 1.0. What the parser of earlier trainers took beyond that, and files in use hold, is read too: see
`_LENIENT`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.runtime.files import read_bytes, reason
from library.runtime.logs import LOGGER

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser under its own name
    import tomli as tomllib

_DECODER = json.JSONDecoder()

LARGEST_CONFIG = 64 << 20  # bytes of a file that options, data sets or prompts are read from
DEEPEST = 100  # tables and lists inside each other

_BACKSLASH = (
    "a backslash in double quotes begins an escape; write a path in 'single quotes', or with forward slashes, or with "
    "every backslash doubled"
)
_TOO_DEEP = f"tables or lists are nested too deeply; {DEEPEST} levels are read"
_GOES_ON = "there is more after the end of the value"
_TOO_MANY_DIGITS = "a number has too many digits"


class NotTextError(ValueError):
    """Bytes that are no UTF-8 text; the message says what they are."""


def decode(content: bytes) -> str:
    """UTF-8 as text, without a byte order mark.

    Raises: NotTextError: it is another encoding, or no text at all.
    """
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise NotTextError(f"not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        position = content.index(b"\0")
        raise NotTextError(f"not UTF-8 text: zero bytes, as UTF-16 text has them (byte {position})")
    return text


def read_text(path: str | Path, what: str, *, option: str | None = None, limit: int = LARGEST_CONFIG) -> str:
    """The text of a file, in UTF-8 and without a byte order mark.

    Args:
        what: how messages call the file, e.g. "the caption file".
        option: the option that names it, with its dashes; None where the path alone says enough.
        limit: bytes; a larger file is not read.
    Raises: UserError: missing, not readable, no regular file, too large, or not UTF-8 text.
    """
    place = f"{option}: {path}" if option else f"{path}"
    try:
        return decode(read_bytes(path, limit))
    except FileNotFoundError:
        raise UserError(f"{option}: there is no file {path}" if option else f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{place}: {what} cannot be read ({reason(error)})") from None
    except NotTextError as error:
        raise UserError(f"{place}: {error}; save {what} as UTF-8") from None


# ---- JSON


class JsonError(ValueError):
    """Text that is no JSON. `line` and `column` count from 1; both are None where the place is not known."""

    def __init__(self, problem: str, line: int | None = None, column: int | None = None):
        self.problem, self.line, self.column = problem, line, column
        self.goes_on = problem == _GOES_ON  # there is a whole value, and more behind it
        place = "" if line is None else f"line {line}, column {column}: "
        super().__init__(f"{place}{problem}")


def load_json(text: str | bytes, decoder: json.JSONDecoder = _DECODER) -> Any:
    """The value of a JSON text; bytes are UTF-8.

    Args:
        decoder: one of `json_decoder`.
    Raises: JsonError: malformed, not UTF-8, nested too deeply for the parser, or a number with thousands of digits.
    """
    try:
        return decoder.decode(text if isinstance(text, str) else text.decode("utf-8-sig", "surrogatepass"))
    except json.JSONDecodeError as error:
        raise JsonError(_in_our_words(error.msg, _JSON_WORDS), error.lineno, error.colno) from None
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise JsonError(_TOO_DEEP) from None
    except ValueError:
        raise JsonError(_TOO_MANY_DIGITS) from None


def parse_json(text: str, place: str | Path) -> Any:
    """The value of a JSON text that a user has written. Of a key that stands twice in one object, the last one counts.

    Args:
        place: names the text in messages: the path, perhaps after an option.
    Raises: UserError: no JSON, NaN or infinity in it, or it is nested too deeply.
    """
    repeated: list[str] = []
    try:
        value = load_json(text, json_decoder(repeated))
    except JsonError as error:
        raise UserError(f"{place} is not valid JSON: {error}") from None
    _require_shallow(value, place)
    for key in repeated:
        LOGGER.warning("%s: %r stands there more than once with different values; the last one is used", place, key)
    return value


def json_decoder(repeated: list[str]) -> json.JSONDecoder:
    """Puts keys into `repeated` that one object has twice, with different values. JSON itself takes the last one."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) < len(pairs):
            repeated.extend(dict.fromkeys(key for key, value in pairs if built[key] != value))
        return built

    return json.JSONDecoder(object_pairs_hook=build)


_JSON_WORDS = (
    ("Expecting value", "a value is missing, or is not written as JSON"),
    ("Expecting property name", "a key in double quotes is missing"),
    ("Expecting ',' delimiter", "a comma or a closing bracket is missing"),
    ("Expecting ':' delimiter", "the colon after a key is missing"),
    ("Extra data", _GOES_ON),
    ("Unterminated string", "a text in double quotes does not end"),
    ("Invalid control character", "a line break or other control character inside a text in quotes; write \\n or \\t"),
    ("Invalid \\", "a single backslash inside a text; write it twice, or use forward slashes in paths"),
    ("Illegal trailing comma", "a comma before the closing bracket"),
)


# ---- TOML


def parse_toml(text: str, place: str | Path) -> dict[str, Any]:
    """The tables of a TOML text that a user has written.

    Args:
        place: names the text in messages: the path, perhaps after an option.
    Raises: UserError: no TOML, or it is nested too deeply.
    """
    try:
        tables = _load_toml(text)
    except tomllib.TOMLDecodeError as error:
        found = _PLACE.search(str(error))
        words, where = (str(error)[: found.start()] if found else str(error)), "at its end"
        problem = _in_our_words(words, _TOML_WORDS)
        if found and found[1]:
            line, column = int(found[1]), int(found[2])
            before = text.split("\n")[line - 1][: column - 1]
            if words.startswith(("Unescaped '\\'", "Invalid hex value", "Escaped character")):
                problem, column = _BACKSLASH, before.rfind("\\") + 1 or column
            elif before.endswith(('\\"', "\\")):  # "C:\dir\" does not end at its last quote
                problem += f"; {_BACKSLASH}"
            where = f"line {line}, column {column}"
        raise UserError(f"{place} is not valid TOML: {where}: {problem}") from None
    except RecursionError:
        raise UserError(f"{place}: {_TOO_DEEP}") from None
    except ValueError:
        raise UserError(f"{place}: {_TOO_MANY_DIGITS}") from None
    _require_shallow(tables, place)
    return tables


def read_toml(path: str | Path, what: str, *, option: str | None = None) -> dict[str, Any]:
    """`parse_toml` of a file; see `read_text` for the arguments. Raises: UserError."""
    return parse_toml(read_text(path, what, option=option), f"{option}: {path}" if option else path)


def _load_toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        lenient = _LENIENT.sub(_as_toml_1_0, text)
        if lenient == text:
            raise
        try:
            return _restored(tomllib.loads(lenient))
        except tomllib.TOMLDecodeError:
            pass
        raise


# What the parser of earlier trainers read and TOML 1.0 does not allow: control characters in texts and comments, other
# blanks than space and tab between tokens, letters of any script in bare keys, a point without digits behind it
# (5.e-4), and Inf. Each text, comment and rest of a file is one match, so that rules apply where they are meant.
_LENIENT = re.compile(
    r'(?P<text>"""(?:\\.|[^\\])*?"""|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\')|(?P<comment>#[^\n]*)'
    r"|(?P<rest>[^\"'#]+)",
    re.DOTALL,
)
_CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")
_PRIVATE = 0xF0000  # where a control character of a text waits until the text is parsed: a plane for private use
_FOREIGN_BLANK = re.compile(r"[\x0b\x0c\x1c-\x1f\x85\xa0\u2000-\u200a\u3000]")
_BARE_KEY = re.compile(r"(?m)^([ \t]*)((?=[\w-]*[^\W\x00-\x7f])[\w-]+)(?=[ \t]*=)")
_POINT = re.compile(r"(?<=\d)\.(?=[eE]|[ \t]*(?:$|[,\]\n]))")
_INFINITY = re.compile(r"(?<=[=\[,+\- \t])Inf\b")


def _as_toml_1_0(match: re.Match[str]) -> str:
    if match["text"]:
        return _CONTROL.sub(lambda one: chr(_PRIVATE + ord(one[0])), match["text"])
    if match["comment"]:
        return _CONTROL.sub(" ", match["comment"])
    rest = _FOREIGN_BLANK.sub(" ", match["rest"])
    rest = _BARE_KEY.sub(r'\1"\2"', rest)
    return _INFINITY.sub("inf", _POINT.sub(".0", rest))


def _restored(value: Any) -> Any:
    """A parsed value with its control characters back in place."""
    if isinstance(value, dict):
        return {_restored(key): _restored(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_restored(one) for one in value]
    if isinstance(value, str):
        return re.sub("[\U000f0001-\U000f007f]", lambda one: chr(ord(one[0]) - _PRIVATE), value)
    return value


_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
_TOML_WORDS = (
    ("Illegal character", "a text in quotes does not end on its line, or has a control character in it"),
    ("Found invalid character", "a control character in a comment"),
    ("Expected newline or end of document", "there is more on the line than one value; write one key on each line"),
    ("Invalid statement", 'no key; a line is `key = value`, a table `[name]` or a comment "#"'),
    ("Invalid value", "no value; texts need quotes, booleans are true and false, and a list stands in [brackets]"),
    ("Invalid initial character", "a key has a letter that needs quotes around the key"),
    ("Expected '=' after a key", "the equals sign after a key is missing"),
    ("Expected ']'", "a closing bracket is missing"),
    ("Unclosed array", "a comma between two values, or a closing bracket, is missing"),
    ("Unclosed inline table", "a closing brace is missing, or a comma between two of its keys"),
    ("Unterminated string", "a text in quotes does not end"),
    ('Expected "\'"', "a text in quotes does not end"),
    ("Expected '\"'", "a text in quotes does not end"),
    ("Cannot overwrite a value", "a key that stands there already; remove one of them"),
    ("Duplicate inline table key", "a key that stands there already; remove one of them"),
    ("Cannot declare", "a table that stands there already; put its keys together"),
    ("Cannot redefine namespace", "a table that stands there already; put its keys together"),
    ("Cannot mutate immutable", "a table that is complete already; put its keys together"),
    ("Invalid date or datetime", "no date; texts need quotes"),
)


# ---- both


def _in_our_words(message: str, words: tuple[tuple[str, str], ...]) -> str:
    return next((ours for theirs, ours in words if message.startswith(theirs)), message)


def _require_shallow(value: Any, place: str | Path) -> None:
    """Raises: UserError: nested so deeply that whoever shows or compares it would fail."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        children: list[Any] = []
        for one in level:
            children.extend(one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        if not children:
            return
        level = children
    raise UserError(f"{place}: {_TOO_DEEP}")


def format_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of values as the text of a TOML file. TOML has no None; paths are written as text."""
    import tomli_w

    return tomli_w.dumps(
        {
            name: {key: str(value) if isinstance(value, Path) else value for key, value in table.items()}
            for name, table in tables.items()
        }
    )
