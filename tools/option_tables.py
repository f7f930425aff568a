"""`python tools/option_tables.py` writes docs/options/: every script's options and the dataset config's keys."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library import registry
from library.data.config.schema import DATASET, GENERAL, KEYS, NOT_IN_STYLE, SUBSET, Key
from library.options.base import Option, OptionGroup, options_of

DOCS = ROOT / "docs" / "options"
_KINDS = {
    "bool": "switch",
    "int": "whole number",
    "float": "number",
    "str": "text",
    "Path": "path",
    "int_or_float": "steps or share",
}
_HOMES = ("library.preparation", "library.model_tools", "library.generation")
_STARTS_PREPARATION = re.compile(r"^(from|import) library\.(preparation|model_tools|generation)\b", re.MULTILINE)


_OF_TRAINING = """Every option is a flag on the command line and, without the dashes, a key of the file given with
`--config_file`. A flag wins over the file, the file over the default. Options that are marked *not available
yet* are known, and refused where they are given."""
_OF_PREPARATION = """Options without dashes have to be given, in this order and without their names; the others may
stand anywhere between them."""


def render(script: str, groups: Sequence[type[OptionGroup]]) -> str:
    """The page about a script's options, in Markdown."""
    from_files = any(group.group == "config" for group in groups)
    lines = [
        f"# Options of {script}.py",
        "",
        "Made by `python tools/option_tables.py` from the declarations in `library/options`; do not edit.",
        "",
        _OF_TRAINING if from_files else _OF_PREPARATION,
    ]
    for group in groups:
        if not options_of(group):
            continue
        lines += ["", f"## {group.title}", "", "| option | values | default | meaning |", "|---|---|---|---|"]
        lines += [_row(option) for option in options_of(group)]
    return "\n".join(lines) + "\n"


def pages() -> Iterator[tuple[Path, str]]:
    """File and content of every page."""
    helps: dict[str, str] = {}
    for family, spec in registry.FAMILIES.items():
        for script, method in spec.scripts.items():
            groups = registry.groups_for(family, method)
            helps |= {option.flag: option.details.help for group in groups for option in options_of(group)}
            yield DOCS / f"{script}.md", render(script, groups)
    for script in preparation_scripts():
        yield DOCS / f"{script.stem}.md", render(script.stem, preparation_groups(script))
    yield DOCS / "dataset_config.md", render_keys(helps)


def preparation_scripts() -> list[Path]:
    """The scripts that work with `library.preparation`, `library.model_tools` or `library.generation`."""
    places = ("finetune", "tools", "networks", "")
    scripts = [file for folder in places for file in sorted((ROOT / folder).glob("*.py"))]
    return [script for script in scripts if _STARTS_PREPARATION.search(script.read_text(encoding="utf-8"))]


def preparation_groups(script: Path) -> Sequence[type[OptionGroup]]:
    """The option groups of such a script: its GROUPS, or those of the module that it starts."""
    spec = spec_from_file_location(f"{script.parent.name}.{script.stem}", script)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for place in (module, *(_home(value) for value in vars(module).values())):
        if hasattr(place, "GROUPS"):
            return place.GROUPS
    raise LookupError(f"{script}: there is no GROUPS, neither in it nor in what it imports from the library")


def _home(value: Any) -> ModuleType | None:
    """The module of one of `_HOMES` that `value` is or comes from."""
    module = value if isinstance(value, ModuleType) else sys.modules.get(getattr(value, "__module__", None) or "")
    return module if module is not None and module.__name__.startswith(_HOMES) else None


def render_keys(helps: Mapping[str, str]) -> str:
    """The page about the keys of a dataset config, in Markdown. `helps` are those of the flags."""
    lines = [
        "# Keys of a dataset config",
        "",
        "Made by `python tools/option_tables.py` from `library/data/config/schema.py`; do not edit. The guide with",
        "examples is [dataset_config.md](../dataset_config.md).",
        "",
        "A value is looked for in the subset, then in its dataset, in `[general]`, on the command line, and last in",
        "the built-in default. *Where* says which tables may hold the key: G `[general]`, D `[[datasets]]`, S",
        "`[[datasets.subsets]]`.",
        "",
        "| key | where | values | default | flag | meaning |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_key_row(name, key, helps) for name, key in KEYS.items()]
    lines += ["", "Keys without a meaning in some kinds of subset:", ""]
    lines += [f"- with `{style}`: {', '.join(f'`{key}`' for key in keys)}" for style, keys in NOT_IN_STYLE.items()]
    return "\n".join(lines) + "\n"


_LEVELS = {GENERAL: "G", DATASET: "D", SUBSET: "S"}
_KEY_KINDS = {
    "int": "whole number",
    "float": "number",
    "bool": "`true`, `false`",
    "str": "text",
    "size": "number, or `[width, height]`",
    "range": "`[low, high]`",
    "table": "table",
}


def _key_row(name: str, key: Key, helps: Mapping[str, str]) -> str:
    values = ", ".join(f"`{choice}`" for choice in key.choices) if key.choices else _KEY_KINDS[key.kind]
    limits = [f"{word} {limit}" for word, limit in (("at least", key.low), ("at most", key.high)) if limit is not None]
    default = "" if key.default in (None, "", False) else f"`{key.default}`"
    where = " ".join(_LEVELS[level] for level in key.levels)
    cells = (
        f"`{name}`",
        where,
        ", ".join([values, *limits]),
        default,
        f"`{key.flag}`" if key.flag else "",
        key.help or helps[key.flag],
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _row(option: Option) -> str:
    default = "" if option.default in (None, "", False) else f"`{option.default}`"
    meaning = option.details.help
    if option.details.deprecated:
        meaning += f"; deprecated; use `{option.details.deprecated}`"
    cells = (f"`{option.flag}`", _values(option), default, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(option: Option) -> str:
    if option.choices:
        text = ", ".join(f"`{choice}`" for choice in option.choices)
    else:
        text = _KINDS[option.kind]
    if option.range_text():
        text += f", {option.range_text()}"
    return f"any number of: {text}" if option.many else text


if __name__ == "__main__":
    for path, page in pages():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != page:
            path.write_text(page, encoding="utf-8")
            print(f"wrote {path}")
