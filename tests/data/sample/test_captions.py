"""The caption pipeline against the worked examples of the format sheet, and caption files as people have them."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from library.data.sample.captions import (
    LARGEST_CAPTION,
    CaptionOptions,
    caption_name,
    changing,
    extension_in_use,
    make_caption,
    read_caption,
)
from library.errors import UserError


def caption(raw, *, seed=0, epoch=1, step=0, **options):
    return make_caption(raw, CaptionOptions(**options), Random(seed), epoch, step)


def outcomes(raw, **options):
    """Every result over many seeds."""
    return {caption(raw, seed=seed, **options) for seed in range(300)}


def test_prefix_and_suffix():
    assert caption("1girl,solo ,hat", caption_prefix="masterpiece,", caption_suffix="best") == (
        "masterpiece, 1girl,solo ,hat best"
    )


def test_without_wildcard_only_the_first_line_counts():
    assert caption("line one\nline two", caption_prefix="P", caption_suffix="S") == "P line one"


@pytest.mark.rows("R248")
def test_wildcards_and_lines():
    assert outcomes("a {red|blue|green} {{x}} car", enable_wildcard=True) == {
        f"a {colour} {{x}} car" for colour in ("red", "blue", "green")
    }
    assert outcomes("a {|x} b", enable_wildcard=True) == {"a  b", "a x b"}
    assert outcomes("one\ntwo", enable_wildcard=True, caption_prefix="P", caption_suffix="S") == {"P one", "two S"}


@pytest.mark.rows("R248")
@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{{a|b}|c}", {"a", "b", "c"}),
        ("{{a|b}|{c|d}}", {"a", "b", "c", "d"}),
        ("{{a|{b|c}}|d}", {"a", "b", "c", "d"}),
        ("{a|{b|{c|{d|e}}}}", {"a", "b", "c", "d", "e"}),
        ("{{{{a|b}|c}|d}|e}", {"a", "b", "c", "d", "e"}),
        ("{{long|short} hair|{|red }hat}, {x}", {"long hair, x", "short hair, x", "hat, x", "red hat, x"}),
    ],
)
def test_wildcards_may_nest(raw, expected):
    assert outcomes(raw, enable_wildcard=True) == expected


@pytest.mark.rows("R248")
@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("{{a|b}}", {"{a|b}"}),
        ("{{}} {{{{x}}}}", {"{} {{x}}"}),
        ("{a|{{b}}}", {"a", "{b}"}),
        ("{{{a}}|b}", {"{a}", "b"}),
        ("{{{a|b}}}", {"{a}", "{b}"}),
        ("{{an {a|b}}}", {"{an a}", "{an b}"}),
        ("{:{{|:}}}", {":{", ":}"}),
    ],
)
def test_doubled_braces_are_plain_also_beside_wildcards(raw, expected):
    assert outcomes(raw, enable_wildcard=True) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a } b { c", {"a } b { c"}),
        ("{a|b", {"{a|b"}),
        ("a|b}", {"a|b}"}),
        ("{x|{a|b}", {"{x|a", "{x|b"}),
        ("{a|b} :}", {"a :}", "b :}"}),
        (":{{ {a|b}", {":{ a", ":{ b"}),
        ("{:}}|:{{}", {":}", ":{"}),
        ("a | b", {"a | b"}),
    ],
)
def test_braces_without_a_partner(raw, expected):
    assert outcomes(raw, enable_wildcard=True) == expected


@pytest.mark.rows("R248")
@pytest.mark.parametrize(
    ("raw", "shares"),
    [("{a|a|b}", {"a": 2 / 3, "b": 1 / 3}), ("{a|{b|b|b|c}}", {"a": 1 / 2, "b": 3 / 8, "c": 1 / 8})],
)
def test_wildcard_shares(raw, shares):
    counts = Counter(caption(raw, seed=seed, enable_wildcard=True) for seed in range(4000))
    assert counts.keys() == shares.keys()
    # 4 standard deviations of a share are 0.032 at most
    assert all(counts[one] / 4000 == pytest.approx(share, abs=0.032) for one, share in shares.items())


@pytest.mark.rows("R195", "R196", "R197")
def test_shuffle_and_keep_tokens():
    results = outcomes("a,b,c,d,e", shuffle_caption=True, keep_tokens=2)
    assert len(results) == 6
    assert all(result.startswith("a, b, ") and sorted(result) == sorted("a, b, c, d, e") for result in results)


@pytest.mark.rows("R249")
def test_separator_fixes_both_ends():
    results = outcomes("a, b ||| c, d, e ||| f, g", shuffle_caption=True, keep_tokens_separator="|||")
    assert len(results) == 6
    assert all(result.startswith("a, b, ") and result.endswith(", f, g") for result in results)


@pytest.mark.rows("C96")
def test_the_published_caption_with_two_marks():
    raw = "1girl, hatsune miku, vocaloid ||| stage, mic ||| best quality, rating: general"
    start, end = "1girl, hatsune miku, vocaloid, ", "best quality, rating: general"
    marks = {"keep_tokens_separator": "|||"}
    assert caption(raw, **marks) == f"{start}stage, mic, {end}"
    assert outcomes(raw, shuffle_caption=True, **marks) == {
        f"{start}{middle}, {end}" for middle in ("stage, mic", "mic, stage")
    }
    dropped = outcomes(raw, caption_tag_dropout_rate=0.5, **marks)
    assert dropped == {f"{start}{middle}{end}" for middle in ("stage, mic, ", "stage, ", "mic, ", "")}


def test_separator_overrides_keep_tokens_and_drops_empties():
    options = {"shuffle_caption": True, "keep_tokens_separator": "|||"}
    assert outcomes("a,,b, ||| c", keep_tokens=1, **options) == {"a, b, c"}
    assert len(outcomes("a,b,c", keep_tokens=2, **options)) == 1  # no separator in the caption: keep_tokens counts


@pytest.mark.parametrize(
    ("raw", "expected"),
    [("a, b ||| c, d, e", "a, b, c, d, e"), ("a, b, ||| c ||| d", "a, b, c, d"), ("a,b|||c", "a,b, c"), ("a|||", "a")],
)
def test_separator_never_reaches_the_tokenizer(raw, expected):
    assert caption(raw, keep_tokens_separator="|||") == expected


@pytest.mark.rows("R246", "R247")
def test_secondary_separator_moves_its_tags_as_one():
    options = {"secondary_separator": ";;", "keep_tokens_separator": "|||"}
    results = outcomes("a, b ||| c;;x, d, e", shuffle_caption=True, **options)
    assert len(results) == 6
    assert all("c,x" in result for result in results)
    dropped = outcomes("c;;x, d", caption_tag_dropout_rate=0.5, **options)
    assert dropped == {"c,x, d", "c,x", "d", ""}
    assert caption("c;;x", **options) == "c,x"


def test_token_warmup():
    grow = {"token_warmup_step": 10, "token_warmup_min": 1}
    assert caption("a,b,c,d,e,f", step=0, **grow) == "a"
    assert caption("a,b,c,d,e,f", step=5, **grow) == "a, b, c"
    assert caption("a,b,c,d,e,f", step=10, **grow) == "a, b, c, d, e, f"
    assert caption("a,b", step=9, token_warmup_step=10, token_warmup_min=5) == "a, b"
    assert caption("a,b,c", step=0, keep_tokens=2, **grow) == "a, b, c"
    assert caption("a,b,c", step=0, token_warmup_step=1) == "a"


def test_fractional_warmup_is_of_the_whole_run():
    options = CaptionOptions(token_warmup_step=0.25)
    assert options.with_run_length(103).token_warmup_step == 25
    assert CaptionOptions(token_warmup_step=7).with_run_length(103).token_warmup_step == 7


def test_tag_dropout_spares_kept_tokens():
    results = outcomes("a,b,c,d,e,f", caption_tag_dropout_rate=0.5, keep_tokens=1)
    assert "a, b, c, f" in results
    assert len(results) == 2**5
    assert all(result.split(", ")[0] == "a" for result in results)


def test_tag_dropout_rate():
    kept = sum(
        len(caption("a,b,c,d", seed=seed, caption_tag_dropout_rate=0.3).replace(", ", "")) for seed in range(2000)
    )
    assert kept / 8000 == pytest.approx(0.7, abs=0.02)  # 4 standard deviations of the mean


def test_whole_caption_dropout():
    options = {"caption_dropout_every_n_epochs": 2, "caption_prefix": "P"}
    assert caption("a,b", epoch=2, **options) == ""
    assert caption("a,b", epoch=1, **options) == "P a,b"
    assert caption("a,b", epoch=1, caption_dropout_every_n_epochs=1) == ""
    dropped = sum(caption("a", seed=seed, caption_dropout_rate=0.25) == "" for seed in range(4000))
    assert dropped / 4000 == pytest.approx(0.25, abs=0.03)


def test_empty_tokens_survive_a_shuffle():
    assert all(
        sorted(result.split(", ")) == ["", "", "a", "b", "c"] for result in outcomes("a,,b, ,c", shuffle_caption=True)
    )


@pytest.mark.rows("R251")
def test_another_caption_separator_joins_with_comma():
    results = outcomes("a b;c;d", shuffle_caption=True, caption_separator=";", keep_tokens=1)
    assert results == {"a b, c, d", "a b, d, c"}


@pytest.mark.rows("R250")
def test_order_of_steps():
    raw = "{one|one} ||| x;;y, z ||| end"
    result = outcomes(
        raw,
        caption_prefix="pre,",
        caption_suffix=", suf",
        enable_wildcard=True,
        keep_tokens_separator="|||",
        shuffle_caption=True,
        secondary_separator=";;",
    )
    assert result == {"pre, one, x,y, z, end, suf", "pre, one, z, x,y, end, suf"}


def test_caption_file_of_an_image():
    image = "a_b.c_1_2_3_4.png"
    assert caption_name(image, ".txt", ["a_b.c_1_2_3_4.txt", "a_b.c.txt"]) == "a_b.c_1_2_3_4.txt"
    assert caption_name(image, ".txt", ["a_b.c.txt"]) == "a_b.c.txt"
    assert caption_name(image, ".caption", ["a_b.c.txt"]) is None
    assert caption_name("b_1_2_3.png", ".txt", ["b.txt", ".txt", "b_1_2_3.png.txt"]) is None


def test_the_default_extension_does_not_hide_txt_files():
    images = ["a.png", "b.png"]
    assert extension_in_use(".caption", images, frozenset(["a.txt"])) == ".txt"
    assert extension_in_use(".caption", images, frozenset(["a.txt", "b.caption"])) == ".caption"
    assert extension_in_use(".caption", images, frozenset(["notes.txt"])) == ".caption"
    assert extension_in_use(".cap", images, frozenset(["a.txt"])) == ".cap"


@pytest.mark.parametrize(
    ("content", "first", "lines"),
    [
        (b"\xef\xbb\xbfa cat\r\n\r\n b \r\n", "a cat", "a cat\nb"),
        (b"a cat\r\nb\r\n", "a cat", "a cat\nb"),
        (b"a cat\rb\r", "a cat", "a cat\nb"),
        (b"", "", ""),
        (b"\xef\xbb\xbf", "", ""),
        (b"  \n", "", ""),
        (b" \t \r\n\r\n ", "", ""),
        (b"\n a cat\n", "", "a cat"),
        ("a\u2028b\fc\vd\x1ce\x85f\nsecond".encode(), "a\u2028b\fc\vd\x1ce\x85f", "a\u2028b\fc\vd\x1ce\x85f\nsecond"),
        ("\u3000a cat\u2028\f\n\u2028\nb".encode(), "a cat", "a cat\nb"),
        ("Ünïcode 猫".encode(), "Ünïcode 猫", "Ünïcode 猫"),
    ],
)
def test_read_caption(tmp_path, content, first, lines):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert read_caption(path, multiline=False) == first
    assert read_caption(path, multiline=True) == lines


@pytest.mark.parametrize("encoding", ["utf-16", "shift_jis"])
def test_other_encodings_name_the_file(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes("猫".encode(encoding))
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8"):
        read_caption(path, multiline=False)


@pytest.mark.parametrize(("content", "byte"), [(b"caf\xe9", 3), (b"\xef\xbb\xbfcaf\xe9", 6), (b"\xff\xfea\0", 0)])
def test_the_byte_that_is_not_utf8_is_named(tmp_path, content, byte):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt: not UTF-8 text \(byte {byte}\)"):
        read_caption(path, multiline=True)


def test_a_line_separator_inside_a_caption_reaches_the_caption(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("a cat\u2028on a mat, hat\nsecond".encode())
    assert caption(read_caption(path, multiline=False)) == "a cat\u2028on a mat, hat"
    whole = read_caption(path, multiline=True)
    assert outcomes(whole, enable_wildcard=True) == {"a cat\u2028on a mat, hat", "second"}


def test_a_template_replaces_the_caption_whatever_else_is_asked():
    templates = ("a photo of zwx", "a zwx, large")
    rest = {"caption_prefix": "p", "shuffle_caption": True, "caption_dropout_rate": 1, "enable_wildcard": True}
    assert outcomes("a cat", templates=templates, **rest) == set(templates)


# ---- captions that change


def test_fixed_captions_give_no_problem():
    fixed = CaptionOptions(
        keep_tokens=1, caption_prefix="a", caption_suffix="b", secondary_separator=";", token_warmup_min=3
    )
    assert list(changing(fixed, "here")) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shuffle_caption", True),
        ("caption_tag_dropout_rate", 0.1),
        ("token_warmup_step", 0.5),
        ("enable_wildcard", True),
        ("caption_dropout_rate", 0.1),
        ("caption_dropout_every_n_epochs", 3),
    ],
)
def test_captions_that_change_are_refused(name, value):
    (line,) = changing(CaptionOptions(**{name: value}), "data.toml, [[datasets]] 1")
    assert line.startswith(f"data.toml, [[datasets]] 1: {name} changes the caption")
    assert f"remove {name}" in line


def test_templates_are_refused_by_their_options():
    (line,) = changing(CaptionOptions(templates=("a zwx",)), "here")
    assert "--use_object_template" in line


def test_every_reason_has_its_line():
    captions = CaptionOptions(shuffle_caption=True, enable_wildcard=True, caption_dropout_rate=1)
    assert [line.split()[1] for line in changing(captions, "here:")] == [
        "shuffle_caption",
        "enable_wildcard",
        "caption_dropout_rate",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a" * (LARGEST_CAPTION + 1), "it has 1,048,577 bytes, and at most 1,048,576 are read"),
        ("a cat".encode("utf-16-le"), "not UTF-8 text: zero bytes, as UTF-16 text has them (byte 1)"),
    ],
    ids=["too long", "UTF-16 without a mark"],
)
def test_what_is_no_caption_is_named(tmp_path, content, problem):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_caption(tmp_path / "a.txt", multiline=False)
    assert str(caught.value).startswith(f"{tmp_path / 'a.txt'}: ")
    assert problem in str(caught.value)


def test_the_longest_caption_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * LARGEST_CAPTION)
    assert len(read_caption(tmp_path / "a.txt", multiline=False)) == LARGEST_CAPTION
