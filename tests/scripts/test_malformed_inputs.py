"""Every preparation script on what folders of users hold: odd and damaged files, foreign texts, no room, no rights."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.builders import face_models
from tests.builders.captioners import tiny_blip, write_blip_folder, write_git_folder
from tests.builders.odd_images import (
    FACELESS,
    LONG,
    NOT_UNICODE,
    REFUSED,
    USED,
    drawing,
    write_odd_images,
)
from tests.builders.onnx_file import write_tagger
from tests.builders.sdxl import write_tiny_sdxl
from tests.scripts.starting import ROOT

MODEL = "examples/tiny_model/tiny-sd.safetensors"
MOST_MEMORY = 400  # MB of a script without torch; the huge image alone would take three times as much
TAGS = "t0, t1, t2"
BUCKETS = ("--max_resolution=64,64", "--min_bucket_reso=64", "--max_bucket_reso=128")

MEASURED = """
import atexit
def tell():
    status = open("/proc/self/status").read() if sys.platform == "linux" else "VmHWM: 0"
    print("peak memory:", int(status.split("VmHWM:")[1].split()[0]) // 1024, file=sys.stderr)
atexit.register(tell)
"""
FULL_DISK = """
import resource, signal
sys.dont_write_bytecode = True
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""
# What may be read and written does not bind root as long as it has its capabilities.
RESTRAINED = """
import ctypes, os
if sys.platform == "linux" and os.geteuid() == 0:
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0
"""
START = "import sys\n{first}\nimport runpy\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"


def run_alone(first: str, *words: object) -> subprocess.CompletedProcess:
    """A script in a new process after the code `first`, with its messages in a pipe: a full disk has room for them."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:backslashreplace", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", START.format(first=first), *map(os.fspath, words)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def shown(name: str) -> str:
    """A file name as messages have it."""
    return name.encode("utf-8", "backslashreplace").decode()


# ---- the scripts, each on the folder of odd images


@dataclass(frozen=True)
class Script:
    """How a script is run on a folder of images, and where its results are."""

    path: str
    words: Callable[[Path, Path, Path], list[object]]  # of the images, for the results, of the models
    results: str  # their names, with {} for the image's without its ending; "" where they are in one file
    beside: bool = True  # results lie beside the images, and not in the folder for results
    torch: bool = False
    refused: dict[str, str] = field(default_factory=dict)  # images that only this script refuses, and why
    nothing_to_do: tuple[str, ...] = ()
    goes_on: str = "--skip_existing"


def _tagging(data: Path, out: Path, models: Path) -> list[object]:
    return [data, f"--repo_id={models / 'tagger'}", "--batch_size=3", "--onnx"]


NARROW = {"strip": "60000x1 is too narrow to be captioned"}
NO_BUCKET = {"strip": "60000x1 is too small or too narrow for a bucket"}
NO_KEY = {} if NOT_UNICODE == "café" else {NOT_UNICODE: "the name is not Unicode text"}
NO_ROOM = {LONG: "name"}  # for longer names; ends of messages differ
SCRIPTS = {
    "tags": Script("finetune/tag_images_by_wd14_tagger.py", _tagging, "{}.txt"),
    "tags in one file": Script(
        "finetune/tag_images_by_wd14_tagger.py",
        lambda data, out, models: [*_tagging(data, out, models), f"--output_path={out / 'tags.json'}"],
        "",
        refused=NO_KEY,
    ),
    "edges": Script(
        "tools/canny.py",
        lambda data, out, models: [f"--input={data}", f"--output={out}"],
        "{}.png",
        beside=False,
        goes_on="",
    ),
    "sizes": Script(
        "tools/resize_images_to_resolution.py",
        lambda data, out, models: [data, out, "--max_resolution=64x64"],
        "{}+*.jpg",
        beside=False,
    ),
    "faces": Script(
        "tools/detect_face_rotate.py",
        lambda data, out, models: [
            *(f"--src_dir={data}", f"--dst_dir={out}", f"--model={models / 'face.onnx'}", "--score_threshold=0.3"),
        ],
        "{}_*_*_*_*.*",
        beside=False,
        refused=NO_ROOM,
        nothing_to_do=FACELESS,
    ),
    "captions": Script(
        "finetune/make_captions.py",
        lambda data, out, models: [
            *(data, f"--caption_weights={models / 'blip'}", "--batch_size=4", "--max_length=9", "--min_length=2"),
        ],
        "{}.caption",
        torch=True,
        refused=NARROW,
    ),
    "captions by git": Script(
        "finetune/make_captions_by_git.py",
        lambda data, out, models: [data, f"--model_id={models / 'git'}", "--batch_size=4", "--max_length=6"],
        "{}.caption",
        torch=True,
        refused=NARROW,
        goes_on="",
    ),
    "buckets": Script(
        "finetune/prepare_buckets_latents.py",
        lambda data, out, models: [
            *(data, models / "empty.json", out / "meta.json", MODEL, *BUCKETS, "--batch_size=4"),
        ],
        "{}.npz",
        torch=True,
        refused=NO_KEY | NO_BUCKET,
    ),
    "latents": Script(
        "tools/cache_latents.py",
        lambda data, out, models: [
            *(f"--dataset_config={_data_set(data, out)}", f"--pretrained_model_name_or_path={MODEL}"),
        ],
        "{}_*_sd.npz",
        torch=True,
        refused=NO_BUCKET,
    ),
    "texts": Script(
        "tools/cache_text_encoder_outputs.py",
        lambda data, out, models: [
            *("--sdxl", f"--dataset_config={_data_set(data, out)}"),
            f"--pretrained_model_name_or_path={models / 'sdxl.safetensors'}",
        ],
        "{}_te_outputs.npz",
        torch=True,
        refused=NO_BUCKET,
        goes_on="",
    ),
}


def _data_set(data: Path, out: Path) -> Path:
    file = out / "data.toml"
    file.write_text(
        "[general]\nenable_bucket = true\nmin_bucket_reso = 64\nresolution = 64\n"
        f"[[datasets]]\n[[datasets.subsets]]\nclass_tokens = 'a thing'\nimage_dir = '{data.as_posix()}'\n",
        encoding="utf-8",
    )
    return file


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    weight = np.random.default_rng(0).normal(scale=0.002, size=(8 * 8 * 3, 4)).astype(np.float32)
    write_tagger(place / "tagger" / "model.onnx", weight * 0, np.float32([1, 1, 1, -9]), ("N", 8, 8, 3))
    rows = "".join(f"{number},t{number},0,1\n" for number in range(4))
    (place / "tagger" / "selected_tags.csv").write_text(f"tag_id,name,category,count\n{rows}")
    face_models.write_yolo8(place / "face.onnx")
    write_blip_folder(tiny_blip(), place / "blip")
    write_git_folder(place / "git")
    write_tiny_sdxl(place / "sdxl.safetensors")
    (place / "empty.json").write_text('{"another": {"caption": "kept"}}')
    return place


@pytest.fixture(scope="module")
def odd_images(tmp_path_factory):
    return write_odd_images(tmp_path_factory.mktemp("odd") / "images")


@pytest.fixture
def data(odd_images, tmp_path):
    return shutil.copytree(odd_images, tmp_path / "data")


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def fits(folder: Path, name: str) -> bool:
    """Whether the file system takes a file of this name."""
    try:
        (folder / name).touch()
    except OSError:
        return False
    (folder / name).unlink()
    return True


def state(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_odd_images(run_script, odd_images, models, data, out, name):
    """What can be used is used; what cannot is named with the reason, and counted. A second run finds it all done."""
    script = SCRIPTS[name]
    refused = {stem + USED[stem]: why for stem, why in script.refused.items()} | REFUSED
    if fits(out, LONG + "_0000_0000_0000_0000.png"):
        refused.pop(LONG + USED[LONG], None)
    used = [stem for stem, ending in USED.items() if stem + ending not in refused and stem not in script.nothing_to_do]
    words = [script.path, *script.words(data, out, models)]
    done = run_script(*words) if script.torch else run_alone(MEASURED, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    for image, why in refused.items():
        told = [line for line in done.stderr.splitlines() if f"{shown(image)}: " in line and "failed: " not in line]
        assert len(told) == 1, (image, done.stderr[-3000:])
        assert why in told[0]
        assert f"failed: {shown(str(data / image))}: " in done.stderr
    skipped = f", {len(script.nothing_to_do)} skipped" if script.nothing_to_do else ""
    assert f"{len(used)} done{skipped}, {len(refused)} failed" in done.stderr
    assert re.search(r"100%.*\[\d\d:\d\d<\d\d:\d\d, .*/s", done.stderr), "rate and remaining time"

    folder = data if script.beside else out
    new = {path for path in folder.iterdir() if not (odd_images / path.name).exists() or not script.beside}
    if script.results:
        expected = {stem: list(folder.glob(script.results.format(stem))) for stem in used}
        if LONG in used and not expected[LONG]:  # the name of a cache file is shortened
            expected[LONG] = list(folder.glob(script.results.format(f"{LONG[:40]}*~????????")))
        assert all(len(found) == 1 for found in expected.values()), expected
        assert {path for found in expected.values() for path in found} == {p for p in new if p.suffix != ".toml"}
    else:
        entries = json.loads((out / "tags.json").read_text(encoding="utf-8"))
        assert {Path(key).stem for key in entries} == set(used)
        assert not new
    if not script.torch:
        peak = int(done.stderr.rpartition("peak memory:")[2])
        assert peak < MOST_MEMORY, f"{peak} MB"

    if script.goes_on:
        before = state(folder)
        again = run_script(*words, script.goes_on, "--strict")
        assert again.returncode == 1, again.stderr[-3000:]
        assert "Traceback" not in again.stderr
        assert f"0 done, {len(used) + len(script.nothing_to_do)} skipped, {len(refused)} failed" in again.stderr
        assert state(folder) == before


@pytest.mark.parametrize("name", ["tags", "edges", "sizes", "buckets"])
def test_nothing_can_be_used(run_script, models, tmp_path, out, name):
    folder, script = tmp_path / "data", SCRIPTS[name]
    folder.mkdir()
    (folder / "zero.png").write_bytes(b"")
    (folder / "words.webp").write_text("no image")
    words = [script.path, *script.words(folder, out, models)]
    done = run_script(*words)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "0 done, 2 failed" in done.stderr
    assert not [path for path in out.iterdir() if path.suffix not in (".json", ".toml")]
    shutil.rmtree(folder)
    folder.mkdir()
    empty = run_script(*words)
    assert empty.returncode == 2
    assert f"there are no images in {folder}" in empty.stderr


# ---- texts

JAPANESE = "青い空、ポニーテールの女の子"
TEXTS = {
    "plain": (b"one, two\n", "one, two"),
    "marked": (b"\xef\xbb\xbfone, two\r\n", "one, two"),
    "utf16": ("one, 青".encode("utf-16"), "one, 青"),
    "utf16be": (b"\xfe\xff" + "one, 青".encode("utf-16-be"), "one, 青"),
    "unmarked16": ("one, two".encode("utf-16-le"), "one, two"),
    "sjis": (JAPANESE.encode("cp932"), JAPANESE),
    "emoji": ("😀, 猫".encode(), "😀, 猫"),
    "empty": (b"", ""),
    "blank": (b" \r\n\t\n", ""),
    "latin": ("café".encode("latin-1"), None),
    "kanji": ("青髪".encode("cp932"), None),
    "cut16": (b"\xff\xfea\x00b", None),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", None),
    "absent": (None, ""),
}


@pytest.fixture
def texts(tmp_path):
    """Images with a text each, of which the last has none; and a folder that is called like a text."""
    folder = tmp_path / "texts"
    folder.mkdir()
    image = write_image(folder / "as_folder.png").read_bytes()
    (folder / "as_folder.txt").mkdir()
    for stem, (content, _) in TEXTS.items():
        (folder / f"{stem}.png").write_bytes(image)
        if content is not None:
            (folder / f"{stem}.txt").write_bytes(content)
    return folder


def write_image(path: Path) -> Path:
    Image.fromarray(drawing()).save(path)
    return path


UNREADABLE = [stem for stem, (_, text) in TEXTS.items() if text is None]


@pytest.mark.parametrize("script", ["merge_captions_to_metadata.py", "merge_dd_tags_to_metadata.py"])
def test_texts_into_metadata(run_script, texts, tmp_path, script):
    """Decoded where that is certain; else the file is named, and what the metadata said of its image stays."""
    there, field_name = tmp_path / "meta.json", "tags" if "tags" in script else "caption"
    there.write_text(json.dumps({"latin": {field_name: "as before"}}))
    done = run_script(f"finetune/{script}", texts, there, "--caption_extension=.txt", "--in_json", there)
    assert done.returncode == 0, done.stderr
    expected = {stem: text for stem, (content, text) in TEXTS.items() if text is not None and content is not None}
    entries = json.loads(there.read_text(encoding="utf-8"))
    assert {stem: entry[field_name] for stem, entry in entries.items()} == {**expected, "latin": "as before"}
    for stem in [*UNREADABLE, "as_folder"]:
        assert f"failed: {texts / stem}.png: {texts / stem}.txt: " in done.stderr
    assert f"{len(expected)} done, 1 skipped, {len(UNREADABLE) + 1} failed" in done.stderr
    before = there.read_bytes()
    again = run_script(f"finetune/{script}", texts, there, "--caption_extension=.txt", "--strict")
    assert again.returncode == 1
    assert there.read_bytes() == before
    for stem in ("absent", *expected):
        (texts / f"{stem}.png").unlink()
    none = run_script(f"finetune/{script}", texts, there, "--caption_extension=.txt")
    assert none.returncode == 1
    assert there.read_bytes() == before


def test_tags_appended_to_texts(run_script, texts, models):
    """What was written before stays, in UTF-8 from now on. Files that cannot be read are left as they are."""
    arguments = (SCRIPTS["tags"].path, *_tagging(texts, texts, models), "--append_tags")
    done = run_script(*arguments)
    assert done.returncode == 0, done.stderr
    for stem, (content, text) in TEXTS.items():
        file = texts / f"{stem}.txt"
        if text is None:
            assert file.read_bytes() == content
            assert f"failed: {texts / stem}.png: {file}: " in done.stderr
        else:
            assert file.read_text(encoding="utf-8") == f"{text}, {TAGS}\n".removeprefix(", ")
    before = state(texts)
    again = run_script(*arguments, "--strict")
    assert again.returncode == 1
    assert state(texts) == before


@pytest.mark.parametrize("name", ["tags", "captions"])
def test_texts_never_replace_images(run_script, texts, models, out, name):
    script, before = SCRIPTS[name], state(texts)
    done = run_script(script.path, *script.words(texts, out, models), "--caption_extension=.PNG")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --caption_extension: files ending in .PNG are images")
    assert state(texts) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "there are no images in it"),
        (b'{"a": {"caption": "b"}', "line 1, column"),
        (b"[]", "must hold one object"),
        ('{"a": {"caption": "é"}}'.encode("utf-16"), "not UTF-8 text"),
        (b'{"a": {"caption": "half \\ud83d"}}', "an incomplete character"),
        (b'{"a": {"tags": 5}}', "'a'"),
    ],
)
def test_metadata_that_cannot_be_cleaned(run_script, tmp_path, content, said):
    (tmp_path / "in.json").write_bytes(content)
    done = run_script("finetune/clean_captions_and_tags.py", tmp_path / "in.json", tmp_path / "out.json")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'in.json'}")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_metadata_of_other_programs_is_kept_as_it_is(run_script, tmp_path):
    """A half of a character in a value that is not ours, and a mark at the beginning."""
    (tmp_path / "in.json").write_bytes(b'\xef\xbb\xbf{"a": {"caption": "x ", "theirs": "\\ud83d"}}')
    done = run_script("finetune/clean_captions_and_tags.py", tmp_path / "in.json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text()) == {"a": {"caption": "x", "theirs": "\ud83d"}}


@pytest.mark.parametrize(
    "content", [b"", b"\x10", b"\xff" * 8, (8).to_bytes(8, "little") + b'{"a": 1}', b"\x89PNG" * 9]
)
def test_models_without_metadata_that_could_be_shown(run_script, tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    done = run_script("tools/show_metadata.py", "--model", tmp_path / "a.safetensors")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'a.safetensors'}: ")
    assert len(done.stderr.splitlines()) == 1


# ---- no rights, no room


@pytest.fixture
def places(models, tmp_path) -> Iterator[tuple[Path, Path]]:
    """A folder of two images with texts, and one with earlier results; nothing new can be made in either."""
    data, out = tmp_path / "data", tmp_path / "out"
    for folder in (data, out):
        folder.mkdir()
    for stem in "ab":
        write_image(data / f"{stem}.png")
        (data / f"{stem}.caption").write_text("text")
    (out / "meta.json").write_text('{"a": {"caption": "long  ago"}}')
    for folder in (data, out):
        folder.chmod(0o555)
    yield data, out
    for folder in (data, out):
        folder.chmod(0o755)


def writers(data: Path, out: Path, models: Path) -> dict[str, list[object]]:
    """What writes a file here, by name: command lines."""
    meta = out / "meta.json"
    return {
        "tags": [SCRIPTS["tags"].path, *_tagging(data, out, models)],
        "tags in one file": [SCRIPTS["tags"].path, *_tagging(data, out, models), f"--output_path={out / 'tags.json'}"],
        "edges": [SCRIPTS["edges"].path, *SCRIPTS["edges"].words(data, out, models)],
        "sizes": [SCRIPTS["sizes"].path, *SCRIPTS["sizes"].words(data, out, models)],
        "faces": [SCRIPTS["faces"].path, *SCRIPTS["faces"].words(data, out, models)],
        "merging": ["finetune/merge_captions_to_metadata.py", data, meta],
        "cleaning": ["finetune/clean_captions_and_tags.py", meta, meta],
        "buckets": [SCRIPTS["buckets"].path, data, meta, meta, MODEL, *BUCKETS],
    }


def contents(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(os.name == "nt", reason="rights of POSIX")
@pytest.mark.parametrize("name", ["tags", "tags in one file", "sizes", "faces", "merging", "cleaning", "buckets"])
def test_a_folder_that_is_read_only(run_script, places, models, name):
    before = contents(*places)
    done = run_script("-c", START.format(first=RESTRAINED), *writers(*places, models)[name])
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "cannot be written" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert str(places[0] if name == "tags" else places[1]) in done.stderr.splitlines()[-1]
    assert "caching latents" not in done.stderr, "before anything is encoded"
    assert contents(*places) == before


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize("name", ["tags", "edges", "sizes", "faces", "merging", "cleaning"])
def test_a_full_disk(places, models, name):
    """No file may grow. What was there stays, and nothing half-written is left."""
    for folder in places:
        folder.chmod(0o755)
    before = contents(*places)
    done = run_alone(FULL_DISK, *writers(*places, models)[name])
    assert done.returncode == (1 if name == "tags" else 2), done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "cannot be written (File too large)" in done.stderr
    assert contents(*places) == before


# ---- killed


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Forty times the same image, large enough to be caught in the middle of them."""
    folder = tmp_path_factory.mktemp("many")
    pixels = np.random.default_rng(0).integers(0, 256, (450, 600, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "00.png", compress_level=1)
    for number in range(1, 40):
        shutil.copy(folder / "00.png", folder / f"{number:02}.png")
    return folder


@pytest.mark.parametrize("name", ["tags", "sizes", "captions", "buckets"])
def test_killed_and_run_again(start_script, run_script, models, many, tmp_path, out, name):
    """No result is half-written; the second run makes the rest and nothing twice."""
    script = SCRIPTS[name]
    data = shutil.copytree(many, tmp_path / "data", copy_function=os.link)
    words = [script.path, *script.words(data, out, models)]
    words += ["--beam_search"] if name == "captions" else []
    pattern, folder = script.results.format("*"), data if script.beside else out
    first = start_script(*words)
    deadline = time.monotonic() + 120
    while len(list(folder.glob(pattern))) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first.kill()
    first.result()
    made = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob(pattern)}
    assert 5 <= len(made) < 40
    again = run_script(*words, "--skip_existing")
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"{40 - len(made)} done, {len(made)} skipped" in again.stderr
    results = list(folder.glob(pattern))
    assert len(results) == 40
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in made} == made
    if name == "buckets":
        for path in results:
            with np.load(path, allow_pickle=False) as arrays:
                assert all(np.isfinite(arrays[key]).all() for key in arrays if arrays[key].dtype.kind == "f")
    else:
        assert len({path.read_bytes() for path in results}) == 1, "of equal images"
