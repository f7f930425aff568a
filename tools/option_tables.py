"""`python tools/option_tables.py` writes the option tables in docs/options/ from the groups."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import library.families
from library.options import scripts
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


def render(script: str, groups: Iterable[type[OptionGroup]]) -> str:
    """The page about a script's options, in Markdown."""
    lines = [
        f"# Options of {script}.py",
        "",
        "Made by `python tools/option_tables.py` from the declarations in `library/options`; do not edit.",
        "",
        "Every option is a flag on the command line and, without the dashes, a key of the file given with",
        "`--config_file`. A flag wins over the file, the file over the default. Options that are marked *not available",
        "yet* are known, and refused where they are given.",
    ]
    for group in groups:
        lines += ["", f"## {group.title}", "", "| option | values | default | meaning |", "|---|---|---|---|"]
        lines += [_row(option) for option in options_of(group)]
    return "\n".join(lines) + "\n"


def pages() -> Iterator[tuple[Path, str]]:
    """File and content of every page."""
    for _, family, is_package in pkgutil.iter_modules(library.families.__path__):
        if is_package and (Path(library.families.__path__[0]) / family / "options.py").is_file():
            for script, method in scripts.scripts_of(family).items():
                yield DOCS / f"{script}.md", render(script, scripts.groups_for(family, method))


def _row(option: Option) -> str:
    default = "" if option.default in (None, "", False) else f"`{option.default}`"
    meaning = option.details.help
    if option.details.deprecated:
        meaning += f"; an older way to say `{option.details.deprecated}`"
    if option.details.later:
        meaning += f" (*not available yet: {option.details.later}*)"
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
        path.write_text(page, encoding="utf-8")
        print(f"wrote {path}")
