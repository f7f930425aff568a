"""The guards that every reader of text, JSON and TOML shares."""

from __future__ import annotations

import logging
import math
import os
import signal

import pytest

from library.errors import UserError
from library.runtime.documents import DEEPEST, format_toml, parse_json, parse_toml, read_text, read_toml
from library.runtime.logs import LOGGER


@pytest.fixture(autouse=True)
def _no_waiting():
    """A reader that waits for a pipe's other end must not hold up the whole suite."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def refused(parse, text):
    with pytest.raises(UserError) as caught:
        parse(text, "f")
    (line,) = caught.value.problems
    assert line.startswith("f")
    assert "\n" not in line
    return line


class TestText:
    @pytest.mark.parametrize("content", [b"\xef\xbb\xbfa\r\nb", b"a\r\nb"])
    def test_utf_8_with_or_without_its_mark(self, tmp_path, content):
        (tmp_path / "a").write_bytes(content)
        assert read_text(tmp_path / "a", "the file") == "a\r\nb"

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp932", "latin-1"])
    def test_other_encodings_are_named(self, tmp_path, encoding):
        (tmp_path / "a").write_bytes("é a cat".encode(encoding, errors="replace").replace(b"?", "猫".encode("cp932")))
        with pytest.raises(UserError, match=r"a: not UTF-8 text .*; save the note as UTF-8"):
            read_text(tmp_path / "a", "the note")

    def test_a_pipe_is_named_with_its_option(self, tmp_path):
        os.mkfifo(tmp_path / "a")
        with pytest.raises(UserError, match=r"^--x: .*a: the note cannot be read \(a named pipe"):
            read_text(tmp_path / "a", "the note", option="--x")

    def test_too_much(self, tmp_path):
        (tmp_path / "a").write_bytes(b"abc")
        with pytest.raises(UserError, match=r"the note cannot be read \(it has 3 bytes, and at most 2 are read"):
            read_text(tmp_path / "a", "the note", limit=2)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(UserError, match=r"^--x: there is no file .*a$"):
            read_text(tmp_path / "a", "the note", option="--x")


class TestToml:
    @pytest.mark.parametrize(
        ("text", "column"), [('[x]\na = "C:\\users\\x"', 8), ('[x]\na = "C:\\data"', 8), ('[x]\na = "\\C"', 6)]
    )
    def test_a_windows_path_gets_the_three_ways_out(self, text, column):
        line = refused(parse_toml, text)
        assert line.startswith(f"f is not valid TOML: line 2, column {column}: a backslash in double quotes")
        assert "'single quotes'" in line
        assert "forward slashes" in line
        assert "doubled" in line

    def test_a_path_that_ends_in_a_backslash_gets_them_too(self):
        assert "backslash" in refused(parse_toml, 'a = "C:\\dir\\"\n')

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("a = hello", "line 1, column 5: no value; texts need quotes"),
            ("a = 1\na = 2", "a key that stands there already"),
            ("[a]\n[a]", "line 2, column 3: a table that stands there already"),
            ("a = [1 2]", "line 1, column 8: a comma between two values"),
            ('a = """x', "at its end: a text in quotes does not end"),
            ("a b = 1", "line 1, column 3: the equals sign"),
            ("a = " + "9" * 5000, "too many digits"),
            ("a = " + "[" * 100_000, f"nested too deeply; {DEEPEST} levels are read"),
            ("[" + "a." * 5000 + "a]", f"nested too deeply; {DEEPEST} levels are read"),
        ],
    )
    def test_what_is_wrong_is_one_line_of_our_own(self, text, problem):
        assert problem in refused(parse_toml, text)

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ('a = "x\x01y"', "x\x01y"),
            ('a = """x\x0b"""', "x\x0b"),
            ("a = 1 # \x07 bell", 1),
            ("a = 1\x0c\n", 1),
            ("a =\u00a05", 5),
            ("a = 5.e-4", 5e-4),
            ("a = [1., 2.]", [1.0, 2.0]),
            ("a = Inf", math.inf),
            ("größe = 3\na = 1", 1),
        ],
    )
    def test_what_only_the_older_parser_took_still_reads(self, text, value):
        assert parse_toml(text, "f")["a"] == value

    def test_the_second_try_changes_no_text(self):
        tables = parse_toml("a = 5.e-4 # Inf\nb = 'no\u00a0break 5.e-4 Inf'\nc = \"größe = 3 #\"\n", "f")
        assert tables == {"a": 5e-4, "b": "no\u00a0break 5.e-4 Inf", "c": "größe = 3 #"}

    def test_what_is_written_reads_back(self, tmp_path):
        tables = {"x": {"a": 1e-05, "b": [1, 2.5], "c": 'tab\tquote"\\u00e9 \x7f \x01 🐸', "d": True}, "y": {"e": 0}}
        (tmp_path / "a.toml").write_text(format_toml(tables), encoding="utf-8")
        assert read_toml(tmp_path / "a.toml", "the file") == tables


class TestJson:
    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "line 1, column 1: a value is missing"),
            ('{"a": 1,\n b}', "line 2, column 2: a key in double quotes is missing"),
            ('{"a": "C:\\data"}', "a single backslash inside a text"),
            ('{"a": 1} {}', "there is more after the end"),
            ("[" * 200_000, "nested"),
            ("[" * 500 + "]" * 500, f"nested too deeply; {DEEPEST} levels are read"),
            ("9" * 5000, "too many digits"),
        ],
    )
    def test_what_is_wrong_is_one_line_of_our_own(self, text, problem):
        assert problem in refused(parse_json, text)

    def test_of_a_key_that_stands_twice_the_last_counts(self, caplog, monkeypatch):
        monkeypatch.setattr(LOGGER, "propagate", True)
        with caplog.at_level(logging.WARNING):
            assert parse_json('{"a": 1, "b": 2, "b": 2, "a": 3}', "f") == {"a": 3, "b": 2}
        assert [record.getMessage() for record in caplog.records] == [
            "f: 'a' stands there more than once with different values; the last one is used"
        ]
