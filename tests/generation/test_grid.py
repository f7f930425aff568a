from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

import tests.generation.test_networks_and_words as networks
import tests.generation.test_script as scripts
from library.errors import UserError
from library.generation.grid import axes_of, cells_of, sheet_axes
from library.generation.grid_sheets import Shown, draw_sheet, render_page, sheets_of
from library.pages.page import read_data

files, draw_here = networks.files, scripts.draw_here


def test_axes_and_their_product(tmp_path):
    for step in (1000, 900, 20):
        (tmp_path / f"lora-{step}.safetensors").write_bytes(b"")
    (tmp_path / "p.txt").write_text("# prompts\na cat\n\na dog --d 3\n")
    axes = axes_of([f"network_weights={tmp_path}/*.safetensors", "network_mul=0.6, 1", f"prompt={tmp_path / 'p.txt'}"])
    assert [[value.label for value in axis.values] for axis in axes] == [
        ["lora-20", "lora-900", "lora-1000"],
        ["0.6", "1"],
        ["a cat", "a dog --d 3"],
    ]
    cells = cells_of(axes)
    assert len(cells) == 12
    assert [value.label for value in cells[1].values] == ["lora-20", "0.6", "a dog --d 3"]
    assert [axis.name for axis in sheet_axes(axes)] == ["network_weights", "network_mul"]
    assert [axis and axis.name for axis in sheet_axes(axes_of(["scale=1,2", "steps=3"]))] == [None, "scale"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("sedd=1", "'sedd=1' is no axis; did you mean 'seed'?"),
        ("seed", "'seed' is no axis"),
        ("seed=1,two", "seed: 'two' is no whole number"),
        ("scale=", "scale: has no value"),
        ("sampler=eular", "unknown sampler 'eular'; did you mean 'euler'?"),
        ("network_weights=gone-*.safetensors", "there is no file 'gone-"),
    ],
)
def test_what_is_no_axis_is_said(entry, message):
    with pytest.raises(UserError) as error:
        axes_of(["steps=1", entry])
    assert message in str(error.value)


@pytest.fixture
def shown(tmp_path):
    axes = axes_of(["seed=1,2", "scale=3,4,5", "steps=6,7"])
    found = []
    for number, cell in enumerate(cells_of(axes)):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (64, 32), (20 * number, 0, 0)).save(path)
        found.append(Shown(cell, path, f'<{number}> & "steps"'))
    return axes, found


def test_a_sheet_has_each_image_in_its_place(shown):
    axes, found = shown
    sheets = sheets_of(axes, found)
    assert [sheet.title for sheet in sheets] == ["steps: 6", "steps: 7"]
    drawn = draw_sheet(sheets[1], axes)
    reds = {drawn.getpixel((x, y)) for x in range(drawn.width) for y in range(drawn.height)}
    expected = {(20 * number, 0, 0) for number in (1, 3, 5, 7, 9, 11)}
    assert expected <= reds
    assert not {(20 * number, 0, 0) for number in (2, 4, 6, 8, 10)} & reds
    # rows are seeds, columns scales: what stands right of an image has the next scale
    x, y = next((x, y) for y in range(drawn.height) for x in range(drawn.width) if drawn.getpixel((x, y)) == (20, 0, 0))
    assert drawn.getpixel((x + 64 + 6, y)) == (60, 0, 0)
    assert drawn.getpixel((x, y + 32 + 6)) == (140, 0, 0)


def test_the_page_holds_everything(shown, tmp_path):
    axes, found = shown
    page = tmp_path / "index.html"
    page.write_text(render_page(sheets_of(axes, found), axes), encoding="utf-8")
    assert not re.search(r"https?://|(src|href)=\"(?!data:)", page.read_text(encoding="utf-8"))
    assert '<0> & "steps"' not in page.read_text(encoding="utf-8")
    tables = read_data(page)["tables"]
    assert [table["title"] for table in tables] == ["steps: 6", "steps: 7"]
    assert [(table["rows"], table["columns"]) for table in tables] == [(["1", "2"], ["3", "4", "5"])] * 2
    cells = [cell for table in tables for row in table["cells"] for cell in row]
    assert len({cell["src"] for cell in cells}) == 12
    for cell in cells:  # a colour of its own for each
        number = int(cell["name"].removesuffix(".png"))
        with Image.open(io.BytesIO(base64.b64decode(cell["src"].removeprefix("data:image/webp;base64,")))) as image:
            assert image.size == (64, 32)
            assert image.convert("RGB").getpixel((30, 15)) == (20 * number, 0, 0)
    (said,) = [cell["facts"] for cell in cells if cell["name"] == "0.png"]
    assert said == ["seed: 1", "scale: 3", "steps: 6", '<0> & "steps"', "0.png"]


def test_a_grid_of_networks_and_strengths(draw_here, files, capsys):
    """Every image is the one that the same settings give without a grid."""
    folder = Path(files[0]).parent
    status, out = draw_here("--prompt=a cat", "--grid", f"network_weights={folder}/*.safetensors", "network_mul=0.5,1")
    assert status == 0, capsys.readouterr().err
    (made,) = out.iterdir()
    assert sorted(path.name for path in made.iterdir()) == ["images", "index.html", "sheet_1.png"]
    images = {}
    for path in (made / "images").iterdir():
        with Image.open(path) as image:
            name, strength = re.search(r"<lora:(\d):([\d.]+)>", image.text["parameters"]).groups()
            images[name, strength] = image.tobytes()
            assert image.text["seed"] == "1"
    assert sorted(images) == [("1", "0.5"), ("1", "1"), ("2", "0.5"), ("2", "1")]
    assert len(set(images.values())) == 4
    status, _ = draw_here("--prompt=a cat --f alone", f"--network_weights={files[1]}", "--network_mul=0.5")
    with Image.open(out / "alone.png") as alone:
        assert alone.tobytes() == images["2", "0.5"]


def test_a_grid_of_prompts_and_steps(draw_here, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog --d 5\n")
    words = ["--grid", f"prompt={tmp_path / 'p.txt'}", "steps=1,2", "scale=1,2", "--W=64"]
    status, out = draw_here(*words)
    assert status == 0
    (made,) = out.iterdir()
    assert sorted(path.name for path in made.iterdir()) == ["images", "index.html", "sheet_1.png", "sheet_2.png"]
    seeds = set()
    for path in (made / "images").iterdir():
        with Image.open(path) as image:
            seeds.add((image.text["prompt"], image.text["seed"]))
    assert seeds == {("a cat", "1"), ("a dog", "5")}


def test_what_a_grid_cannot_be_used_with(draw_here, capsys):
    assert draw_here("--prompt=a", "--grid", "seed=1", "--images_per_prompt=2")[0] == 2
    assert "--grid: cannot be used with --images_per_prompt" in capsys.readouterr().err
    assert draw_here("--prompt=a", "--grid", "seed=-5")[0] == 2
    assert "--grid: the seed must be from 0 to" in capsys.readouterr().err
    assert draw_here("--prompt=a --s few", "--grid", "seed=1")[0] == 2
    assert "--s needs a whole number, got 'few'" in capsys.readouterr().err
    assert draw_here("--prompt={e$$a|b}", "--grid", "seed=1")[0] == 2
    assert "stands for several" in capsys.readouterr().err
