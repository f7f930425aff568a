"""The option tables in docs/ are those of the code."""

from __future__ import annotations

from library.data.config.schema import KEYS
from library.options.base import options_of
from library.registry import FAMILIES, groups_for
from tools.option_tables import pages, preparation_scripts


def test_the_tables_are_current():
    """If this fails: python tools/option_tables.py"""
    found = list(pages())
    scripts = {script for family in FAMILIES for script in FAMILIES[family].scripts}
    scripts |= {script.stem for script in preparation_scripts()}
    assert {path.stem for path, _ in found} == scripts | {"dataset_config"}
    for path, page in found:
        assert path.read_text(encoding="utf-8") == page


def test_every_option_has_a_row_of_four_cells():
    content = {path.stem: page for path, page in pages()}
    for family, script, method in ((name, *pair) for name in FAMILIES for pair in FAMILIES[name].scripts.items()):
        lines = content[script].splitlines()
        rows = [line for line in lines if line.startswith("| `--")]
        options = [option for group in groups_for(family, method) for option in options_of(group)]
        assert [row.split("`")[1] for row in rows] == [option.flag for option in options]
        assert all(row.replace("\\|", "").count("|") == 5 for row in rows)
        tables = [index for index, line in enumerate(lines) if line == "|---|---|---|---|"]
        assert all(lines[index + 1].startswith("| `--") for index in tables), "no table is empty"


def test_every_key_has_a_row_of_six_cells():
    *_, (_, page) = pages()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(KEYS)
    for row in rows:
        cells = row.replace("\\|", "").split("|")[1:-1]
        assert len(cells) == 6
        assert len(cells[5].split()) > 2  # every key is explained
