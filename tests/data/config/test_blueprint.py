"""Flags and dataset configs to specs: fallback, types, and messages that say what to do."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from library.cli import ending_as_a_script
from library.data.config.blueprint import build_specs
from library.errors import UserError
from library.options import validation
from library.runtime.logs import setup_logging
from tests.builders.rights import without_rights


@pytest.fixture
def images(tmp_path, draw):
    return draw(tmp_path / "images" / "a.png").parent


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trainscripts"), "propagate", True)
    return caplog


def problems(opts, traits):
    with pytest.raises(UserError) as caught:
        build_specs(opts, traits)
    return caught.value.problems


@pytest.mark.rows("R205", "R206", "R210", "R211")
def test_dreambooth_folders(tmp_path, draw, make_opts, traits, warnings):
    for name in ("20_sls frog", "5_cpc_x frog", "no_repeats", "0_zero", ".hidden"):
        draw(tmp_path / "train" / name / "a.png")
    draw(tmp_path / "train" / "loose.png")
    draw(tmp_path / "reg" / "1_frog" / "r.png")
    opts = make_opts(train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"), resolution="512,640")
    (spec,) = build_specs(opts, traits)
    assert spec.resolution == (512, 640)
    assert [(s.image_dir.name, s.num_repeats, s.class_tokens, s.is_reg) for s in spec.subsets] == [
        ("20_sls frog", 20, "sls frog", False),
        ("5_cpc_x frog", 5, "cpc_x frog", False),
        ("1_frog", 1, "frog", True),
    ]
    assert "3 not used" in warnings.text
    assert all(name in warnings.text for name in ("no_repeats", "0_zero", "loose.png"))


@pytest.mark.rows("R39")
@pytest.mark.parametrize(("text", "size"), [("512", (512, 512)), ("448,640", (448, 640)), ("448, 640", (448, 640))])
def test_resolution_flag(tmp_path, draw, make_opts, traits, text, size):
    draw(tmp_path / "1_a" / "a.png")
    assert build_specs(make_opts(train_data_dir=str(tmp_path), resolution=text), traits)[0].resolution == size


CONFIG = """
[general]
flip_aug = true
color_aug = false
keep_tokens_separator= "|||"
shuffle_caption = false
caption_tag_dropout_rate = 0
caption_extension = ".txt"
keep_tokens = 1

[[datasets]]
batch_size = 2
enable_bucket = true
resolution = [1024, 768]
keep_tokens = 2

[[datasets.subsets]]
image_dir = "{dir}"
num_repeats = 1
keep_tokens = 3

[[datasets.subsets]]
image_dir = "{dir}"
flip_aug = false
class_tokens = "ünïcode 猫"
caption_extension = "cap"

[[datasets]]
resolution = 512
[[datasets.subsets]]
image_dir = "{dir}"
"""


@pytest.mark.rows("R223", "R224", "R240", "R241", "R242", "R243", "R244", "R245")
def test_every_level_of_the_fallback(images, write_config, make_opts, traits):
    file = write_config("\ufeff" + CONFIG.replace("{dir}", str(images)))
    opts = make_opts(
        dataset_config=file, train_batch_size=7, dataset_repeats=4, caption_prefix="p", shuffle_caption=True
    )
    first, second = build_specs(opts, traits)
    assert (first.batch_size, second.batch_size) == (2, 7)
    assert (first.resolution, second.resolution) == ((1024, 768), (512, 512))
    assert (first.enable_bucket, second.enable_bucket) == (True, False)
    one, two, three = (*first.subsets, *second.subsets)
    assert [s.captions.keep_tokens for s in (one, two, three)] == [3, 2, 1]
    assert [s.flip_aug for s in (one, two, three)] == [True, False, True]
    assert [s.num_repeats for s in (one, two, three)] == [1, 4, 4]
    assert [s.caption_extension for s in (one, two, three)] == [".txt", ".cap", ".txt"]
    assert all(s.captions.caption_prefix == "p" and not s.captions.shuffle_caption for s in (one, two, three))
    assert two.class_tokens == "ünïcode 猫"
    assert one.captions.caption_separator == ","


@pytest.mark.rows("R225")
def test_flags_say_the_same_as_a_config(tmp_path, draw, write_config, make_opts, traits):
    folder = draw(tmp_path / "train" / "3_sks dog" / "a.png").parent
    subset = {"image_dir": str(folder), "num_repeats": 3, "class_tokens": "sks dog"}
    file = write_config({"datasets": [{"resolution": [448, 640], "batch_size": 5, "subsets": [subset]}]})
    flags = make_opts(train_data_dir=str(tmp_path / "train"), resolution="448,640", train_batch_size=5)
    assert build_specs(flags, traits) == build_specs(make_opts(dataset_config=file), traits)
    assert build_specs(flags, traits)[0].batch_size == 5


def test_json_says_the_same(images, write_config, make_opts, traits):
    subset = {"image_dir": str(images), "face_crop_aug_range": [1, 2.5], "token_warmup_step": 0.5}
    file = write_config({"datasets": [{"resolution": 512, "subsets": [subset]}]})
    (spec,) = build_specs(make_opts(dataset_config=file), traits)
    assert spec.subsets[0].face_crop_aug_range == (1, 2.5)
    assert spec.subsets[0].captions.token_warmup_step == 0.5


def test_all_problems_at_once_each_with_its_place(images, write_config, make_opts, traits):
    file = write_config(
        f"""
[general]
shufle_caption = true
batch_size = "2"
[genral]
[[datasets]]
resolution = 512
image_dir = "x"
[[datasets.subsets]]
image_dir = '{images}'
num_repeats = true
[[datasets.subsets]]
class_tokens = "x"
[[datasets]]
"""
    )
    found = problems(make_opts(dataset_config=file), traits)
    assert found == (
        f"{file}: unknown table 'genral'; known are general, datasets",
        f"{file}, [general]: unknown key 'shufle_caption'; did you mean 'shuffle_caption'?",
        f"{file}, [general]: batch_size must be a whole number, got '2'",
        f"{file}, [[datasets]] 1: 'image_dir' cannot stand here; it belongs in [[datasets.subsets]]",
        f"{file}, [[datasets]] 1, [[datasets.subsets]] 1: num_repeats must be a whole number, got True",
        f"{file}, [[datasets]] 1, [[datasets.subsets]] 2: image_dir is missing",
        f"{file}, [[datasets]] 2: no subsets; write at least one [[datasets.subsets]] with an image_dir",
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_repeats = -1", "num_repeats must be at least 0, got -1"),
        ("caption_dropout_rate = 1.5", "caption_dropout_rate must be at most 1, got 1.5"),
        ("keep_tokens = 1.5", "keep_tokens must be a whole number, got 1.5"),
        ("resize_interpolation = 'cubist'", "resize_interpolation must be one of lanczos"),
        ("face_crop_aug_range = [3, 1]", "face_crop_aug_range must be [low, high]"),
        ("face_crop_aug_range = [3]", "face_crop_aug_range must be two numbers"),
        ("caption_dropout_rate = nan", "caption_dropout_rate must be a finite number, got nan"),
        ("token_warmup_step = inf", "token_warmup_step must be a finite number, got inf"),
        ("caption_extension = '/'", "caption_extension must be an ending of file names, e.g. .txt, got '/'"),
        ("num_repeats = 1000000000000000000", "num_repeats must be at most 1000000"),
        ("alpha_mask = 2", "alpha_mask must be true or false"),
        ("metadata_file = 'x.json'", "metadata_file x.json is no file"),
        ("custom_attributes = 3", "custom_attributes must be a table"),
    ],
)
def test_values_of_a_subset(images, write_config, make_opts, traits, line, message):
    file = write_config(f"[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = '{images}'\n{line}\n")
    found = problems(make_opts(dataset_config=file), traits)
    assert len(found) == 1
    assert found[0].startswith(f"{file}, [[datasets]] 1, [[datasets.subsets]] 1: ")
    assert message in found[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("validation_split = 'a tenth'", "validation_split must be a number"),
        ("validation_seed = -1", "validation_seed must be at least 0"),
        ("batch_size = 0", "batch_size must be at least 1"),
        ("resolution = [512]", "resolution must be a whole number, or two"),
        ("resolution = 7", "resolution 7x7: sides must be at least 8 with Test family"),
        ("enable_bucket = true\nresolution = 512\nbucket_reso_steps = 32", "must be a multiple of 64, got 32"),
        ("enable_bucket = true\nresolution = 1536", "resolution 1536x1536 does not lie within min_bucket_reso 256"),
        ("enable_bucket = true\nresolution = 128", "resolution 128x128 does not lie within"),
        ("", "no resolution; give --resolution"),
    ],
)
def test_values_of_a_dataset(images, write_config, make_opts, traits, line, message):
    line = line if "resolution" in line or not line else line + "\nresolution = 512"
    file = write_config(f"[[datasets]]\n{line}\n[[datasets.subsets]]\nimage_dir = '{images}'\n")
    found = problems(make_opts(dataset_config=file), traits)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.rows("R255")
def test_every_key_arrives(images, write_config, make_opts, traits):
    file = write_config(
        "[general]\ncache_info = true\nvalidation_split = 0.25\nvalidation_seed = 3\n"
        "[[datasets]]\nresolution = 512\nnetwork_multiplier = 0.5\n"
        f"[[datasets.subsets]]\nimage_dir = '{images}'\nalpha_mask = true\ncustom_attributes = {{ a = 1 }}\n"
    )
    (spec,) = build_specs(make_opts(dataset_config=file, validation_split=0.9), traits)
    assert (spec.validation_split, spec.validation_seed, spec.network_multiplier) == (0.25, 3, 0.5)
    (subset,) = spec.subsets
    assert (subset.cache_info, subset.alpha_mask, subset.custom_attributes) == (True, True, {"a": 1})


def test_a_validation_split_that_is_no_share_is_ignored_with_a_warning(
    images, write_config, make_opts, traits, warnings
):
    file = write_config(
        f"[[datasets]]\nresolution = 512\nvalidation_split = 1.5\n[[datasets.subsets]]\nimage_dir = '{images}'\n"
    )
    (spec,) = build_specs(make_opts(dataset_config=file), traits)
    assert spec.validation_split == 0
    assert "validation_split must be from 0 to 1, got 1.5; ignored" in warnings.text


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("metadata_file = 'm.json'\nclass_tokens = 'x'", "class_tokens has no meaning with metadata_file"),
        ("metadata_file = 'm.json'\nis_reg = true", "is_reg has no meaning with metadata_file"),
        ("conditioning_data_dir = 'm'\nis_reg = true", "is_reg has no meaning with conditioning_data_dir"),
    ],
)
def test_keys_of_another_style(images, write_config, make_opts, traits, lines, key):
    file = write_config(f"[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = '{images}'\n{lines}\n")
    assert any(key in line for line in problems(make_opts(dataset_config=file), traits))


@pytest.mark.rows("R221")
def test_a_metadata_file_by_flag(tmp_path, draw, make_opts, traits):
    draw(tmp_path / "images" / "a.png")
    (tmp_path / "meta.json").write_text("{}")
    options = {"in_json": str(tmp_path / "meta.json"), "train_data_dir": str(tmp_path / "images"), "resolution": "64"}
    (spec,) = build_specs(make_opts(**options, dataset_repeats=3), traits)
    (subset,) = spec.subsets
    assert (subset.metadata_file, subset.image_dir) == (tmp_path / "meta.json", tmp_path / "images")
    assert subset.num_repeats == 3
    assert "--in_json: there is no file" in problems(make_opts(**{**options, "in_json": "none.json"}), traits)[0]


@pytest.mark.rows("R268")
def test_masks_by_flag(tmp_path, draw, make_opts, traits):
    draw(tmp_path / "flat" / "a.png")
    draw(tmp_path / "train" / "2_cat" / "a.png")
    draw(tmp_path / "train" / "3_dog" / "b.png")
    draw(tmp_path / "masks" / "2_cat" / "a.png")
    masked = {"conditioning_data_dir": str(tmp_path / "masks"), "masked_loss": True, "resolution": "64"}
    ((flat,),) = [s.subsets for s in build_specs(make_opts(train_data_dir=str(tmp_path / "flat"), **masked), traits)]
    assert (flat.conditioning_data_dir, flat.num_repeats) == (tmp_path / "masks", 1)
    (spec,) = build_specs(make_opts(train_data_dir=str(tmp_path / "train"), **masked), traits)
    found = [(s.image_dir.name, s.num_repeats, s.conditioning_data_dir.name) for s in spec.subsets]
    assert found == [("2_cat", 2, "2_cat"), ("3_dog", 3, "masks")]


def test_masks_and_masked_loss_need_each_other(tmp_path, draw, make_opts, traits):
    draw(tmp_path / "1_a" / "a.png")
    folder = {"train_data_dir": str(tmp_path), "resolution": "64"}
    (line,) = problems(make_opts(**folder, masked_loss=True), traits)
    assert line.startswith("--masked_loss: there are no masks")
    assert build_specs(make_opts(**folder, masked_loss=True, alpha_mask=True), traits)
    (line,) = problems(make_opts(**folder, conditioning_data_dir=str(tmp_path)), traits)
    assert "its images are masks for --masked_loss" in line


def test_control_images_are_no_masks(tmp_path, draw, make_opts, traits):
    draw(tmp_path / "p" / "a.png")
    folder = {"train_data_dir": str(tmp_path / "p"), "resolution": "64"}
    both = {**folder, "conditioning_data_dir": str(tmp_path)}
    ((subset,),) = [spec.subsets for spec in build_specs(make_opts(**both), traits, "control")]
    assert (subset.image_role, subset.conditioning_data_dir) == ("control", tmp_path)

    def line(options):
        with pytest.raises(UserError) as error:
            build_specs(make_opts(**options), traits, "control")
        return error.value.problems[0] if len(error.value.problems) == 1 else error.value.problems

    assert line({**both, "masked_loss": True}).startswith("--masked_loss: there are no masks, as the images of cond")
    assert build_specs(make_opts(**both, masked_loss=True, alpha_mask=True), traits, "control")


def test_every_subset_needs_control_images(tmp_path, draw, make_opts, traits, write_config):
    for name in ("p", "q"):
        draw(tmp_path / name / "a.png")
    with_partner = {"image_dir": str(tmp_path / "p"), "conditioning_data_dir": str(tmp_path)}
    subsets = [with_partner, {"image_dir": str(tmp_path / "q")}]
    file = write_config({"datasets": [{"resolution": 64, "subsets": subsets}]})
    with pytest.raises(UserError, match="q: it has no control images; name their folder") as error:
        build_specs(make_opts(dataset_config=file), traits, "control")
    assert len(error.value.problems) == 1


def test_mixed_styles(images, write_config, make_opts, traits):
    file = write_config({"datasets": [{"subsets": [{"image_dir": str(images)}, {"metadata_file": "m.json"}]}]})
    assert any("two datasets" in line for line in problems(make_opts(dataset_config=file, resolution="512"), traits))


def test_files_that_cannot_be_used(tmp_path, write_config, make_opts, traits):
    def one(path):
        (line,) = problems(make_opts(dataset_config=path), traits)
        return line

    assert "there is no file" in one(str(tmp_path / "none.toml"))
    assert "must be a .toml or a .json" in one(write_config("x", "data.yaml"))
    assert "line 1" in one(write_config("[general\n", "bad.toml"))
    assert "line 1" in one(write_config("{", "bad.json"))
    assert "no datasets" in one(write_config("[general]\n", "empty.toml"))
    latin = tmp_path / "latin.toml"
    latin.write_bytes('[general]\ncaption_prefix = "ü"'.encode("latin-1"))
    assert "not UTF-8" in one(str(latin))


def test_windows_paths_get_a_hint(write_config, make_opts, traits):
    file = write_config('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\Users\\me"\n')
    with pytest.raises(UserError) as caught:
        build_specs(make_opts(dataset_config=file), traits)
    assert f"{file} is not valid TOML: line 3, column 16: a backslash in double quotes" in caught.value.render()


def test_missing_and_empty_folders(tmp_path, make_opts, traits):
    (tmp_path / "train" / "3_cat").mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    found = problems(
        make_opts(train_data_dir=str(tmp_path / "none"), reg_data_dir=str(tmp_path / "bare"), resolution="64"), traits
    )
    assert f"--train_data_dir: {tmp_path / 'none'} is no folder" in found
    assert any(line.startswith("--reg_data_dir") and "<repeats>_<class tokens>" in line for line in found)
    (line,) = problems(make_opts(train_data_dir=str(tmp_path / "train"), resolution="64"), traits)
    assert line.endswith(f"no images in {tmp_path / 'train' / '3_cat'}")


def test_a_folder_of_repeats_in_place_of_the_one_above_gets_a_hint(tmp_path, draw, make_opts, traits):
    layout = "has no sub-folder named <repeats>_<class tokens>, e.g. 10_sks dog"
    inner = draw(tmp_path / "10_sks dog" / "a.png").parent
    (line,) = problems(make_opts(train_data_dir=str(inner), resolution="64"), traits)
    hint = f"it looks like one itself: give the folder above it, {tmp_path}"
    assert line == f"--train_data_dir: {inner} {layout}; {hint}"
    plain = draw(tmp_path / "other" / "sks dog" / "a.png").parent  # images, and a name without repeats
    (tmp_path / "other" / "1_empty").mkdir()
    for folder in (plain, tmp_path / "other" / "1_empty"):
        (line,) = problems(make_opts(train_data_dir=str(folder), resolution="64"), traits)
        assert line == f"--train_data_dir: {folder} {layout}"


@pytest.fixture
def screen(capsys):
    """The lines that a terminal gets of warnings and of the error, if there is one."""

    def look(action):
        setup_logging(simple=True)
        with contextlib.suppress(SystemExit), ending_as_a_script():
            action()
        return capsys.readouterr().err.splitlines()

    return look


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_dir", "none\x1b[2J\nx"),
        ("metadata_file", "none\x1b[2J\nx"),
        ("image_dir", "none\x9b2Jx\u2028y"),
        ("image_dir", "right\u202eto left"),
        ("caption_extension", ["\x1b[2J\n"]),
        ("k\x1b[2J\ny", 1),
    ],
)
def test_a_config_is_shown_without_control_characters(
    tmp_path, draw, write_config, make_opts, traits, screen, key, value
):
    good = draw(tmp_path / "good" / "a.png").parent
    config = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": str(good), key: value}]}]}
    (line,) = screen(lambda: build_specs(make_opts(dataset_config=write_config(config)), traits))
    assert line.startswith("error: ")
    assert line.isprintable()
    assert "\\" in line


def test_folders_and_images_are_shown_without_control_characters(tmp_path, draw, make_opts, traits, screen):
    draw(tmp_path / "1_good" / "a.png")
    (tmp_path / "1_empty\x1b[2J\nx").mkdir()
    draw(tmp_path / "loose\x1b[2J\u202e.png")
    lines = screen(lambda: build_specs(make_opts(train_data_dir=str(tmp_path), resolution="64"), traits))
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    assert "loose\\x1b[2J\\u202e.png" in lines[0]
    assert "1_empty\\x1b[2J\\nx" in lines[1]


@pytest.mark.parametrize("mode", [0, 0o111])
def test_folders_that_may_not_be_listed_are_reported_with_their_option(
    tmp_path, draw, make_opts, write_config, traits, mode
):
    inner = draw(tmp_path / "train" / "2_cat" / "a.png").parent
    config = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": str(inner)}]}]}
    flags = make_opts(train_data_dir=str(inner.parent), resolution="64")
    config = make_opts(dataset_config=write_config(config))
    inner.chmod(mode)
    (line,) = without_rights(lambda: problems(flags, traits))
    assert line == f"--train_data_dir: {inner} cannot be listed (Permission denied)"
    (line,) = without_rights(lambda: problems(config, traits))
    assert line.endswith(f"[[datasets.subsets]] 1: {inner} cannot be listed (Permission denied)")
    inner.parent.chmod(mode)
    masks = make_opts(train_data_dir=str(inner.parent), resolution="64", conditioning_data_dir=str(tmp_path))
    for opts in (flags, masks):
        found = without_rights(lambda opts=opts: problems(opts, traits))
        assert f"--train_data_dir: {inner.parent} cannot be listed (Permission denied)" in found
    if mode == 0:  # with 0o111 the sub-folder is found as before
        found = without_rights(lambda: problems(config, traits))
        assert any(line.endswith(f"image_dir {inner} cannot be examined (Permission denied)") for line in found)


def test_nothing_said_at_all(make_opts, traits):
    (line,) = problems(make_opts(), traits)
    assert line.startswith("--train_data_dir: missing")


@pytest.mark.parametrize(
    "given", [{"train_batch_size": 0}, {"in_json": "x.json"}, {"conditioning_data_dir": "none"}, {"dataset_class": "x"}]
)
def test_wrong_flags_are_reported_once_and_as_the_options_name_them(tmp_path, draw, make_opts, traits, given):
    draw(tmp_path / "1_a" / "a.png")
    opts = make_opts(train_data_dir=str(tmp_path), resolution="512", **given)
    found = problems(opts, traits)
    assert len(found) == 1
    assert found[0] in validation.problems(opts, traits)
    (flag,) = given
    assert found[0].startswith(f"--{flag}: ")


def test_wrong_flags_and_wrong_folders_together(tmp_path, make_opts, traits):
    found = problems(make_opts(train_data_dir=str(tmp_path / "none"), resolution="big", keep_tokens=-1), traits)
    assert [line.split(":")[0] for line in found] == ["--keep_tokens", "--resolution", "--train_data_dir"]


@pytest.mark.parametrize("flag", ["color_aug", "random_crop", "face_crop_aug_range"])
def test_cached_latents_need_fixed_images(tmp_path, draw, make_opts, traits, flag):
    draw(tmp_path / "1_a" / "a.png")
    value = "1.0,2.0" if flag == "face_crop_aug_range" else True
    (line,) = problems(
        make_opts(train_data_dir=str(tmp_path), resolution="512", cache_latents=True, **{flag: value}), traits
    )
    assert flag in line
    assert "--cache_latents" in line


def test_cached_latents_and_a_subset_that_varies(images, write_config, make_opts, traits):
    file = write_config(
        f"[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = '{images}'\n"
        f"[[datasets.subsets]]\nimage_dir = '{images}'\nrandom_crop = true\n"
    )
    (line,) = problems(make_opts(dataset_config=file, cache_latents=True), traits)
    assert line.startswith(f"{file}, [[datasets]] 1, [[datasets.subsets]] 2: random_crop changes the image")
    assert len(build_specs(make_opts(dataset_config=file), traits)) == 1


@pytest.mark.rows("R49")
def test_limits_are_rounded_with_a_warning(tmp_path, draw, make_opts, traits, warnings):
    draw(tmp_path / "1_a" / "a.png")
    opts = make_opts(
        train_data_dir=str(tmp_path), resolution="512", enable_bucket=True, min_bucket_reso=300, max_bucket_reso=1000
    )
    (spec,) = build_specs(opts, traits)
    assert (spec.min_bucket_reso, spec.max_bucket_reso) == (256, 1024)
    assert "min_bucket_reso 300" in warnings.text
    assert "max_bucket_reso 1000" in warnings.text


@pytest.mark.parametrize("value", ["512x512", "1,2,3", "big", ""])
def test_malformed_resolution(tmp_path, draw, make_opts, traits, value):
    draw(tmp_path / "1_a" / "a.png")
    (line,) = problems(make_opts(train_data_dir=str(tmp_path), resolution=value), traits)
    assert line.startswith("--resolution: must be one number or width,height")
    assert line.endswith(repr(value))


def test_torch_stays_out():
    root = Path(__file__).parents[3]
    heavy = "('torch', 'cv2', 'numpy', 'PIL')"
    code = f"import sys, library.data.config.blueprint; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


# ---- what is accepted and left out


def test_an_empty_part_is_left_out_and_named(tmp_path, draw, make_opts, traits, warnings):
    draw(tmp_path / "train" / "2_cat" / "a.png")
    (tmp_path / "train" / "1_later").mkdir()
    (tmp_path / "reg" / "1_animal").mkdir(parents=True)
    opts = make_opts(train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"), resolution="64")
    (spec,) = build_specs(opts, traits)
    assert [subset.place.name for subset in spec.subsets] == ["2_cat"]
    for folder in ("train/1_later", "reg/1_animal"):
        assert f"no images in {tmp_path / folder}; left out" in warnings.text


def test_subsets_and_datasets_that_are_switched_off(tmp_path, images, make_opts, traits, write_config, warnings):
    (tmp_path / "empty").mkdir()
    subset = {"image_dir": str(images)}
    config = {
        "datasets": [
            {
                "resolution": 64,
                "subsets": [subset, {**subset, "num_repeats": 0}, {"image_dir": str(tmp_path / "empty")}],
            },
            {"resolution": 128, "subsets": [{**subset, "num_repeats": 0}, {**subset, "is_reg": True}]},
        ]
    }
    (spec,) = build_specs(make_opts(dataset_config=write_config(config)), traits)
    assert len(spec.subsets) == 1
    assert spec.resolution == (64, 64)
    assert warnings.text.count("num_repeats = 0; left out") == 2
    config["datasets"] = config["datasets"][1:]
    assert problems(make_opts(dataset_config=write_config(config)), traits) == (
        f"{tmp_path / 'data.json'}, [[datasets]] 1, [[datasets.subsets]] 1: {images}: num_repeats = 0",
    )


def test_values_of_other_types_that_mean_the_same(images, make_opts, traits, write_config):
    lines = "resolution = 64.0\nbatch_size = 2.0\nenable_bucket = 1\nmin_bucket_reso = 64\nvalidation_seed = ''"
    config = f"[[datasets]]\n{lines}\n[[datasets.subsets]]\nimage_dir = '{images}'\nflip_aug = 1\nshuffle_caption = 0\n"
    (spec,) = build_specs(make_opts(dataset_config=write_config(config)), traits)
    assert (spec.resolution, spec.batch_size, spec.enable_bucket, spec.validation_seed) == ((64, 64), 2, True, None)
    assert (spec.subsets[0].flip_aug, spec.subsets[0].captions.shuffle_caption) == (True, False)


def test_an_empty_text_hides_that_of_the_table_above_but_is_no_path(images, make_opts, traits, write_config):
    config = "[general]\ncaption_prefix = 'sks, '\n[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{}\n"
    own = f"image_dir = '{images}'\ncaption_prefix = ''\nmetadata_file = ''\n"
    (spec,) = build_specs(make_opts(dataset_config=write_config(config.format(own))), traits)
    assert (spec.subsets[0].captions.caption_prefix, spec.subsets[0].metadata_file) == ("", None)
    (line,) = problems(make_opts(dataset_config=write_config(config.format("image_dir = ''"))), traits)
    assert line.endswith("[[datasets.subsets]] 1: image_dir is missing")


def test_bucket_limits_are_judged_with_buckets_only(tmp_path, images, make_opts, traits, write_config):
    odd = {"bucket_reso_steps": 0, "min_bucket_reso": 9000, "max_bucket_reso": -1}
    images = images.rename(tmp_path / "1_x")
    (spec,) = build_specs(make_opts(train_data_dir=str(tmp_path), resolution="64", **odd), traits)
    assert spec.bucket_reso_steps == 64
    dataset = {"resolution": 64, **odd, "subsets": [{"image_dir": str(images)}]}
    build_specs(make_opts(dataset_config=write_config({"datasets": [dataset]})), traits)
    found = problems(make_opts(dataset_config=write_config({"datasets": [{**dataset, "enable_bucket": True}]})), traits)
    assert any("bucket_reso_steps must be at least 1, got 0" in line for line in found)


def test_sides_are_rounded_to_what_latents_can_be(tmp_path, images, make_opts, traits, warnings):
    images.rename(tmp_path / "1_x")
    (spec,) = build_specs(make_opts(train_data_dir=str(tmp_path), resolution="512,650"), traits)
    assert spec.resolution == (512, 648)
    assert "512x648 is used" in warnings.text
    assert build_specs(make_opts(train_data_dir=str(tmp_path), resolution="512,648"), traits)[0].resolution[1] == 648


@pytest.mark.rows("R504")
def test_the_offset_of_timesteps(images, make_opts, traits, write_config):
    def config(offset):
        subset = {"image_dir": str(images), "custom_attributes": {"timestep_sampling": {"offset": offset}}}
        return make_opts(dataset_config=write_config({"datasets": [{"resolution": 64, "subsets": [subset]}]}))

    for offset, expected in ((-0.5, -0.5), (1, 1.0), (None, 0.0)):
        (spec,) = build_specs(config(offset), traits)
        assert spec.subsets[0].timestep_offset == expected
    for wrong in ("a", [0.5], True, float("inf")):
        (line,) = problems(config(wrong), traits)
        assert f"custom_attributes.timestep_sampling.offset must be a number, got {wrong!r}" in line
