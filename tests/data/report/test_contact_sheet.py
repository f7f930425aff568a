"""--debug_dataset: what the sheets show is what training gets, and nothing on the way to them ends the run."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.config.blueprint import build_specs
from library.data.report import contact_sheet, text_drawing
from library.data.report.contact_sheet import cells_of, show, write_sheets
from library.data.sample import images
from library.data.sample.dataset import build_training_data
from library.errors import UserError
from library.runtime import logs

BUCKETS = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256, "resolution": "128"}


@pytest.fixture
def load(make_opts, traits):
    """TrainingData of a folder of <repeats>_<class> folders or of a dataset config, 64x64 unless said otherwise."""

    def build(train=None, **options):
        if train is not None:
            options = {"train_data_dir": str(train), "resolution": "64", **options}
        opts = make_opts(**options)
        return build_training_data(build_specs(opts, traits), opts, traits, 1)

    return build


@pytest.fixture
def texts(monkeypatch):
    """The texts that are drawn, in order."""
    drawn = []
    write = contact_sheet.write

    def record(pen, left, top, text, size, colour):
        drawn.append(text)
        write(pen, left, top, text, size, colour)

    monkeypatch.setattr(contact_sheet, "write", record)
    return drawn


@pytest.fixture
def faces(monkeypatch):
    """Chooses the faces that are looked for."""

    def forget():
        for function in (text_drawing._face_of, text_drawing._typeface):
            function.cache_clear()

    def choose(*names):
        monkeypatch.setattr(text_drawing, "_FACES", names)
        forget()

    yield choose
    monkeypatch.undo()
    forget()


def all_cells(data, epochs=3):
    return list(cells_of(data, range(len(data.records)), epochs))


def as_pixels(cell):
    return images.to_pixels(cell.image)


def pixels_of(sheet):
    return np.asarray(Image.open(sheet).convert("RGB"))


def places_of(image, sheet):
    """(top, left) of every place where the sheet has exactly these pixels."""
    height, width = image.shape[:2]
    corners = np.argwhere((sheet[: -height + 1, : -width + 1] == image[0, 0]).all(axis=-1))
    return [(y, x) for y, x in corners.tolist() if np.array_equal(sheet[y : y + height, x : x + width], image)]


# ---- what the model sees


@pytest.mark.rows("R220")
def test_cells_are_what_training_gets(tmp_path, draw, load):
    for number in range(9):
        draw(tmp_path / "1_x" / f"{number}.png", (150 + 20 * number, 130), caption="a, b, c, d, e, f")
    chance = {"flip_aug": True, "color_aug": True, "random_crop": True, "shuffle_caption": True}
    data = load(tmp_path, train_batch_size=2, caption_dropout_rate=0.2, **chance, **BUCKETS)
    cells = {str(cell.record.path): cell for cell in all_cells(data)}
    assert len(cells) == 9
    for epoch in (1, 2, 3):
        for batch in data.loader(epoch):
            for key, caption, pixels in zip(batch.keys, batch.captions, batch.pixels, strict=True):
                assert cells[key].captions[epoch - 1] == caption
                assert (epoch > 1) or torch.equal(as_pixels(cells[key]), pixels)
    assert len({caption for cell in cells.values() for caption in cell.captions}) > 9


@pytest.mark.rows("R220")
def test_captions_grow_while_token_warmup_lasts(tmp_path, draw, load):
    for number in range(4):
        draw(tmp_path / "1_x" / f"{number}.png", caption="a,b,c,d,e")
    data = load(tmp_path, gradient_accumulation_steps=2, token_warmup_step=0.5)
    data.set_total_steps(8)
    cells = {str(cell.record.path): cell for cell in all_cells(data)}
    seen = [(epoch, batch.keys[0], batch.captions[0]) for epoch in (1, 2, 3) for batch in data.loader(epoch)]
    assert [cells[key].captions[epoch - 1] for epoch, key, _ in seen] == [caption for _, _, caption in seen]
    assert [caption.count(",") for _, _, caption in seen] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]


def test_mirrored_is_said_where_it_was_drawn(tmp_path, draw, load, texts):
    for number in range(12):
        draw(tmp_path / "1_x" / f"{number}.png")
    data = load(tmp_path, flip_aug=True)
    cells = all_cells(data)
    for cell in cells:
        whole = images.read_image(cell.record.path)
        assert np.array_equal(cell.image, whole[:, ::-1] if cell.mirrored else whole)
    assert {cell.mirrored for cell in cells} == {True, False}
    write_sheets(data, tmp_path / "out")
    assert texts.count("mirrored") == sum(cell.mirrored for cell in cells)
    assert not any(cell.mirrored for cell in all_cells(load(tmp_path)))


def test_of_repeats_the_first_is_shown(tmp_path, draw, load, texts):
    draw(tmp_path / "5_x" / "a.png")
    draw(tmp_path / "5_x" / "b.png")
    data = load(tmp_path, flip_aug=True, color_aug=True)
    assert len(write_sheets(data, tmp_path / "out")) == 1
    assert texts.count("a.png") == texts.count("b.png") == 1
    assert texts.count("64x64, 5 repeats") == 2
    assert "2 images, 10 with repeats; batch size 1" in texts
    batches = [batch for batch in data.loader(1) if batch.keys[0].endswith("a.png")]
    assert any(torch.equal(as_pixels(all_cells(data)[0]), batch.pixels[0]) for batch in batches)


# ---- what the sheets show


@pytest.mark.rows("R220")
def test_every_image_is_on_one_sheet_of_its_bucket(tmp_path, draw, load):
    for number in range(31):
        draw(tmp_path / "1_x" / f"{number:02}.png", (128, 128))
    draw(tmp_path / "1_x" / "wide.png", (256, 64))
    draw(tmp_path / "1_x" / "tall.png", (64, 256))
    data = load(tmp_path, **BUCKETS)
    sheets = write_sheets(data, tmp_path / "out")
    assert [sheet.name for sheet in sheets] == [
        "dataset1_bucket0064x0256_page1.png",
        "dataset1_bucket0128x0128_page1.png",
        "dataset1_bucket0128x0128_page2.png",
        "dataset1_bucket0256x0064_page1.png",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [sheet.name for sheet in sheets]
    pages = {sheet.name: pixels_of(sheet) for sheet in sheets}
    on = Counter()
    for record in data.records:
        whole = images.read_image(record.path)
        found = [name for name, page in pages.items() if places_of(whole, page)]
        assert len(found) == 1, record.path
        assert f"bucket{record.bucket.width:04}x{record.bucket.height:04}" in found[0]
        on[found[0]] += 1
    assert on == dict(zip(pages, (1, 28, 3, 1), strict=True))


def test_images_stand_in_rows_and_columns(tmp_path, draw, load):
    paths = [draw(tmp_path / "1_x" / f"{number}.png") for number in range(9)]
    (sheet,) = write_sheets(load(tmp_path), tmp_path / "out")
    page = pixels_of(sheet)
    places = [places_of(images.read_image(path), page) for path in paths]
    assert all(len(found) == 1 for found in places)
    tops, lefts = zip(*(found[0] for found in places), strict=True)
    assert len(set(tops[:7])) == len(set(tops[7:])) == 1
    assert tops[0] < tops[7]
    steps = np.diff(lefts[:7])
    assert set(steps) == {steps[0]}
    assert lefts[7:] == lefts[:2]


def test_larger_images_are_reduced(tmp_path, load):
    place = tmp_path / "1_x" / "a.png"
    place.parent.mkdir()
    Image.new("RGB", (512, 768), (10, 200, 30)).save(place)
    (sheet,) = write_sheets(load(tmp_path, resolution="512,768"), tmp_path / "out")
    green = np.argwhere((pixels_of(sheet) == (10, 200, 30)).all(axis=-1))
    height, width = green.max(axis=0) - green.min(axis=0) + 1
    assert (height, width) == (256, 171)
    assert len(green) == height * width


@pytest.mark.rows("R220")
@pytest.mark.parametrize("side", [64, 192])
def test_masks_are_seen(tmp_path, draw, load, write_config, side):
    """White is left as it is, black turns red; beside the image, which stays whole."""
    draw(tmp_path / "p" / "a.png", (side, side))
    mask = np.zeros((side, side), np.uint8)
    mask[:, side // 2 :] = 255
    (tmp_path / "m").mkdir()
    Image.fromarray(mask).save(tmp_path / "m" / "a.png")
    subset = {"image_dir": str(tmp_path / "p"), "conditioning_data_dir": str(tmp_path / "m")}
    file = write_config({"datasets": [{"resolution": side, "subsets": [subset]}]})
    data = load(dataset_config=file, masked_loss=True)
    (cell,) = all_cells(data)
    assert np.array_equal(cell.mask, mask / 255)
    (sheet,) = write_sheets(data, tmp_path / "out")
    page = pixels_of(sheet)
    ((top, left),) = places_of(cell.image, page)
    counts = places_of(np.ascontiguousarray(cell.image[:, side // 2 :]), page)
    assert len(counts) == 2
    assert (top, left + side // 2) in counts
    (second,) = set(counts) - {(top, left + side // 2)}
    assert second[0] == top
    assert second[1] >= left + side + side // 2
    out = page[top : top + side, second[1] - side // 2 : second[1]].astype(int)
    assert (out[..., 0] > out[..., 1:].max(axis=-1) + 30).all()
    assert np.corrcoef(out[..., 1].ravel(), cell.image[:, : side // 2, 1].ravel())[0, 1] > 0.99


@pytest.mark.parametrize("side", [64, 192])
def test_control_images_are_seen(tmp_path, draw, make_opts, traits, texts, side):
    for folder in ("p", "c"):
        draw(tmp_path / folder / "a.png", (side, side))
    Image.open(tmp_path / "p" / "a.png").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "c" / "a.png")
    opts = make_opts(
        train_data_dir=str(tmp_path / "p"), conditioning_data_dir=str(tmp_path / "c"), resolution=str(side)
    )
    data = build_training_data(build_specs(opts, traits, "control"), opts, traits, 1)
    (cell,) = all_cells(data)
    assert np.array_equal(cell.control, np.rot90(cell.image))
    (sheet,) = write_sheets(data, tmp_path / "out")
    page = pixels_of(sheet)
    ((top, left),) = places_of(cell.image, page)
    ((top_of_control, left_of_control),) = places_of(np.ascontiguousarray(cell.control), page)
    assert top_of_control == top
    assert left_of_control >= left + side
    assert any("The control image stands last." in text for text in texts)


def test_transparency_is_a_mask_where_it_is_used(tmp_path, load, texts):
    rgba = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    (tmp_path / "1_x").mkdir()
    Image.fromarray(rgba).save(tmp_path / "1_x" / "a.png")
    (plain,) = all_cells(load(tmp_path))
    assert plain.mask is None
    data = load(tmp_path, alpha_mask=True, masked_loss=True)
    (cell,) = all_cells(data)
    assert np.allclose(cell.mask, rgba[..., 3] / 255)
    write_sheets(data, tmp_path / "out")
    assert any("red does not count" in text for text in texts)


@pytest.mark.rows("R220")
def test_words_under_an_image(tmp_path, draw, load, texts):
    draw(tmp_path / "train" / "2_x" / "a.png", (256, 256), caption="one caption")
    draw(tmp_path / "reg" / "1_thing" / "r.png", (128, 128))
    write_sheets(load(tmp_path / "train", reg_data_dir=str(tmp_path / "reg"), **BUCKETS), tmp_path / "out")
    assert texts[0] == "Dataset 1, bucket 128x128"
    assert texts[1] == "1 image, 2 with repeats; 1 regularisation image, 2 with repeats; batch size 1"
    assert texts[3:] == [
        *("a.png", "in 2_x", "256x256 to 128x128, 2 repeats", "one caption"),
        *("r.png", "in 1_thing", "128x128, 2 repeats", "regularisation", "thing"),
    ]


def test_captions_that_change_stand_with_their_epochs(tmp_path, draw, load, texts):
    draw(tmp_path / "1_x" / "a.png", caption="some words")
    write_sheets(load(tmp_path, caption_dropout_every_n_epochs=2), tmp_path / "out", epochs=4)
    assert texts[-4:] == ["epochs 1, 3", "some words", "epochs 2, 4", "(empty caption)"]


def test_two_datasets(tmp_path, draw, load, write_config):
    draw(tmp_path / "p" / "a.png", (128, 128))
    subset = {"image_dir": str(tmp_path / "p"), "class_tokens": "x"}
    datasets = [{"resolution": side, "enable_bucket": True, "subsets": [subset]} for side in (64, 128)]
    config = write_config({"general": {"min_bucket_reso": 64}, "datasets": datasets})
    names = [sheet.name for sheet in write_sheets(load(dataset_config=config), tmp_path / "out")]
    assert names == ["dataset1_bucket0064x0064_page1.png", "dataset2_bucket0128x0128_page1.png"]


def test_images_held_out_have_sheets_of_their_own(tmp_path, draw, load, write_config, texts):
    for number in range(6):
        draw(tmp_path / "p" / f"{number}.png", caption="a, b, c, d")
    subset = {"image_dir": str(tmp_path / "p"), "shuffle_caption": True, "flip_aug": True}
    file = write_config({"datasets": [{"resolution": 64, "validation_split": 0.5, "subsets": [subset]}]})
    data = load(dataset_config=file)
    assert data.held_out is not None
    sheets = write_sheets(data, tmp_path / "out")
    train, validation = map(pixels_of, sheets)
    assert [sheet.name[:11] for sheet in sheets] == ["dataset1_bu", "validation_"]
    assert "Validation, dataset 1, bucket 64x64" in texts
    for batch in data.held_out.loader(1):
        (pixels,) = ((batch.pixels + 1) * 127.5).round().byte().numpy().transpose(0, 2, 3, 1)
        assert len(places_of(pixels, validation)) == 1
        assert places_of(pixels, train) == []
    assert texts[texts.index("Validation, dataset 1, bucket 64x64") :].count("a, b, c, d") == 3


# ---- many, broken, missing


def test_a_part_is_chosen_evenly(tmp_path, draw, load, texts):
    for number in range(20):
        draw(tmp_path / "1_many" / f"m{number:02}.png")
    for number in range(4):
        draw(tmp_path / "1_some" / f"s{number}.png")
    draw(tmp_path / "1_one" / "one.png")
    data = load(tmp_path)
    write_sheets(data, tmp_path / "out", most=9)
    names = [text for text in texts if text.endswith(".png")]
    assert names == ["m00.png", "m05.png", "m10.png", "m15.png", "one.png", "s0.png", "s1.png", "s2.png", "s3.png"]
    assert "A part only: 9 of the 25 images of this bucket." in texts
    texts.clear()
    write_sheets(data, tmp_path / "out", most=25)
    assert len([text for text in texts if text.endswith(".png")]) == 25
    assert not any("part only" in text for text in texts)


def test_an_image_that_cannot_be_read_says_why(tmp_path, draw, load, texts):
    broken, whole = draw(tmp_path / "1_x" / "a.png", caption="words"), draw(tmp_path / "1_x" / "b.png")
    data = load(tmp_path)
    broken.write_bytes(broken.read_bytes()[:500])
    first, second = all_cells(data)
    assert (first.image, first.problem) == (
        None,
        "the image cannot be read (the file is truncated); replace or remove it",
    )
    assert first.captions == ("words",) * 3
    assert second.problem == ""
    (sheet,) = write_sheets(data, tmp_path / "out")
    assert "the file is truncated" in " ".join(texts)
    assert len(places_of(images.read_image(whole), pixels_of(sheet))) == 1


def test_a_record_with_latents_only_has_a_place(tmp_path, draw, load, texts):
    draw(tmp_path / "1_x" / "a.png", caption="words")
    data = load(tmp_path)
    data.records[0] = replace(data.records[0], path=tmp_path / "1_x" / "elsewhere", present=False)
    assert len(write_sheets(data, tmp_path / "out")) == 1
    assert texts[-4:] == ["elsewhere", "64x64", "no image here, only its latents", "words"]


def test_sheets_of_an_earlier_call_go_and_nothing_else(tmp_path, draw, load):
    draw(tmp_path / "1_x" / "a.png")
    out = tmp_path / "out"
    out.mkdir()
    old = ("dataset1_bucket0512x0768_page1.png", "validation_dataset12_bucket0064x0064_page03.png")
    kept = ("dataset1.png", "my_dataset1_bucket0064x0064_page1.png", "dataset1_bucket0064x0064_page1.png.txt")
    for name in (*old, *kept):
        (out / name).write_text("x")
    (sheet,) = write_sheets(load(tmp_path), out)
    assert {path.name for path in out.iterdir()} == {sheet.name, *kept}


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path, draw, load):
    draw(tmp_path / "1_x" / "a.png")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="out: the contact sheets cannot be written"):
        write_sheets(load(tmp_path), tmp_path / "out")


# ---- texts


@pytest.mark.parametrize(
    "text",
    ["a short one", "1girl, solo, looking at viewer, " * 20, "no_space_" * 40, "猫が好きです。" * 20, "é ж λ ع " * 30],
)
def test_lines_fit_and_keep_the_words(text):
    lines = text_drawing.wrap(text, 216, 6)
    assert len(lines) <= 6
    assert all(text_drawing.length(line, text_drawing.TEXT) <= 216 for line in lines)
    told = "".join("".join(lines).split())
    whole = "".join(text.split())
    assert told == whole or (told.endswith("…") and whole.startswith(told[:-1]) and len(told) > 60)
    assert text_drawing.wrap(text, 10**6, 6) == [" ".join(text.split())]


def test_long_file_names_keep_both_ends(tmp_path, draw, load, texts):
    draw(tmp_path / "1_x" / f"DSC_{'0' * 60}_(2).png")
    write_sheets(load(tmp_path), tmp_path / "out")
    (name,) = [text for text in texts if text.endswith(".png")]
    assert name.startswith("DSC_000")
    assert "…" in name
    assert name.endswith("_(2).png")


def test_characters_that_no_font_has_are_reported(tmp_path, draw, load, faces, caplog, monkeypatch, texts):
    monkeypatch.setattr(logs.LOGGER, "propagate", True)
    faces("no such face.ttf")
    draw(tmp_path / "1_x" / "a.png", caption="plain words")
    data = load(tmp_path)
    with caplog.at_level(logging.WARNING):
        write_sheets(data, tmp_path / "out")
        assert not caplog.messages
        data.records[0] = replace(data.records[0], caption="the 猫 caption")
        write_sheets(data, tmp_path / "out")
    (message,) = caplog.messages
    assert "no font on this machine has 猫;" in message
    assert texts[-1] == "the 猫 caption"


def test_characters_come_from_the_first_face_that_has_them(faces):
    system = [face for face in text_drawing._FACES if text_drawing._typeface(face, 12) is not None]
    able = [face for face in system if text_drawing._face_of("ж") == face]
    if not able:
        pytest.skip("no font with Cyrillic letters is installed")
    faces("", able[0])  # Pillow's own, which has none, before it
    assert text_drawing._runs("a жж b") == [("", "a "), (able[0], "жж "), ("", "b")]


# ---- showing


class Terminal:
    def __init__(self, is_terminal):
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


@pytest.mark.rows("R220")
@pytest.mark.parametrize(
    ("platform", "screen", "terminal", "opens"),
    [
        ("linux", {"DISPLAY": ":0"}, True, True),
        ("linux", {"WAYLAND_DISPLAY": "wayland-0"}, True, True),
        ("linux", {}, True, False),
        ("linux", {"DISPLAY": ":0"}, False, False),
        ("win32", {}, True, True),
        ("darwin", {}, True, True),
        ("darwin", {}, False, False),
    ],
)
def test_sheets_open_only_where_someone_sits(tmp_path, monkeypatch, platform, screen, terminal, opens):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in screen.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sys, "stdin", Terminal(terminal))
    opened = []
    sheets = [tmp_path / f"{number}.png" for number in range(9)]
    show(sheets, opened.append)
    assert opened == (sheets[:4] if opens else [])


def test_showing_never_fails_and_never_waits(tmp_path, monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "stdin", None)
    show([tmp_path / "a.png"])
    monkeypatch.setattr(sys, "stdin", Terminal(True))
    monkeypatch.setenv("PATH", str(tmp_path))  # no xdg-open here
    show([tmp_path / "a.png"])

    def broken(path):
        raise RuntimeError("no viewer")

    show([tmp_path / "a.png"], broken)
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.append((command, options)))
    show([tmp_path / "a.png"])
    ((command, options),) = started
    assert command == ["xdg-open", str(tmp_path / "a.png")]
    assert options["stdin"] == subprocess.DEVNULL  # so that a viewer in the terminal cannot wait for keys
