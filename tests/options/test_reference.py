"""The option tables in docs/ are those of the code."""

from __future__ import annotations

from library.data.config_schema import KEYS
from library.options.base import options_of
from tools.option_tables import pages


def test_the_tables_are_current():
    """If this fails: python tools/option_tables.py"""
    found = list(pages())
    assert [path.name for path, _ in found] == ["train_network.md", "dataset_config.md"]
    for path, page in found:
        assert path.read_text(encoding="utf-8") == page


def test_every_option_has_a_row_of_four_cells(groups):
    (_, page), _ = pages()
    rows = [line for line in page.splitlines() if line.startswith("| `--")]
    assert [row.split("`")[1] for row in rows] == [option.flag for group in groups for option in options_of(group)]
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)


def test_every_key_has_a_row_of_six_cells():
    _, (_, page) = pages()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(KEYS)
    for row in rows:
        cells = row.replace("\\|", "").split("|")[1:-1]
        assert len(cells) == 6
        assert len(cells[5].split()) > 2  # every key is explained
