"""Images into buckets, latents beside them, and what is noted of both."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from library.caching import store
from library.errors import UserError
from library.families.shared.vae import vae_map
from library.options import parsing, validation
from library.preparation.common.script import run_script
from library.preparation.latents.buckets import GROUPS, prepare
from library.runtime import seeds
from tests.builders import flux, sd3, tiny_sd

FOUR = tiny_sd().vae


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files by kind: VAEs by themselves, and models of which no more is whole than the VAE and the names that tell."""
    folder = tmp_path_factory.mktemp("models")

    def write(name, vae, prefix="first_stage_model.", *signs):
        tensors = {key: tensor.contiguous() for key, tensor in vae_map(4, prefix).to_file(vae.state_dict()).items()}
        save_file(tensors | {sign: torch.zeros(1) for sign in signs}, folder / name)
        return folder / name

    return SimpleNamespace(
        sd1=write("sd1.safetensors", FOUR, "first_stage_model.", "cond_stage_model.transformer.x"),
        sd2=write("sd2.safetensors", FOUR, "first_stage_model.", "cond_stage_model.model.x"),
        sdxl=write("sdxl.safetensors", FOUR, "first_stage_model.", "conditioner.embedders.0.x"),
        sd3=write("sd3.safetensors", sd3.tiny_vae(), "first_stage_model.", "model.diffusion_model.joint_blocks.0.x"),
        vae=write("vae.safetensors", FOUR, ""),
        empty=write("empty.safetensors", nn.Module(), "", "cond_stage_model.transformer.x"),
        ae=write("ae.safetensors", flux.tiny_ae(), ""),
        bundle=write("bundle.safetensors", flux.tiny_ae(), "vae.", "double_blocks.0.x"),
    )


@pytest.fixture
def folder(tmp_path):
    """Three images, two of them with captions."""
    place = tmp_path / "train"
    place.mkdir()
    for number, (name, size) in enumerate((("wide.png", (150, 70)), ("square.png", (64, 64)), ("high.jpg", (70, 150)))):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(place / name)
    metadata = {"wide": {"caption": "a wide one", "tags": "ä, ö"}, "square": {"caption": "square", "more": 1}}
    (tmp_path / "in.json").write_text(json.dumps(metadata))
    return place


@pytest.fixture
def run(folder, tmp_path, models):
    """Prepares; returns the outcome and what was written."""

    def start(*arguments, model=models.sd1, place=folder, read="in.json", write="out.json"):
        sizes = ("--max_resolution=128,64", "--min_bucket_reso=64", *arguments)
        opts = parsing.parse_options(
            GROUPS, [str(place), str(tmp_path / read), str(tmp_path / write), str(model), *sizes]
        )
        problems = validation.problems(opts, None)
        if problems:
            raise UserError(*problems)
        return prepare(opts), json.loads((tmp_path / write).read_text(encoding="utf-8"))

    return start


def drawn(vae, image, look="plain", seed=0):
    """Latents by diffusers alone, of an image that needs no resizing."""
    pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)[None].float() / 127.5 - 1
    rng = seeds.generator("cpu", seed, "latents", image.name, *pixels.shape[:1:-1], look)
    with torch.no_grad():
        return vae.encode(pixels.flip(-1) if look == "flipped" else pixels).latent_dist.sample(rng)[0].numpy()


@pytest.mark.rows("C21", "R102", "R103", "R104", "R106")
def test_buckets_are_noted_and_latents_lie_beside_the_images(run, folder, caplog):
    with caplog.at_level("INFO", "trainscripts"):
        outcome, written = run()
    assert (outcome.done, outcome.skipped, outcome.failed) == (3, 0, {})
    assert written == {
        "wide": {
            "caption": "a wide one", "tags": "ä, ö", "train_resolution": [128, 64], "image_size": [150, 70],
        },
        "square": {"caption": "square", "more": 1, "train_resolution": [64, 64], "image_size": [64, 64]},
        "high": {"train_resolution": [64, 128], "image_size": [70, 150]},
    }  # fmt: skip
    assert sorted(path.name for path in folder.glob("*.npz")) == ["high.npz", "square.npz", "wide.npz"]
    arrays = store.read(folder / "wide.npz")
    assert arrays["latents"].shape == (4, 8, 16)
    assert arrays["original_size"].tolist() == [150, 70]
    np.testing.assert_allclose(arrays["crop_ltrb"], [0, 2, 128, 2 + 128 * 70 / 150])
    assert "bucket 128x64: 1 image\n" in caplog.text
    error = (abs(2 - 150 / 70) + abs(0.5 - 70 / 150)) / 3
    assert f"mean aspect error: {error:.4f}" in caplog.text


def test_no_vae_is_loaded_for_a_folder_that_cannot_be_written_to(run, folder, monkeypatch):
    run()
    closed = Mock(side_effect=lambda place: "Read-only file system" if place == folder else None)
    monkeypatch.setattr("library.preparation.common.images._closed", closed)
    outcome, _ = run("--skip_existing")
    assert outcome.skipped == 3
    monkeypatch.setattr("library.preparation.latents.encoders.load_vae", pytest.fail)
    with pytest.raises(UserError, match=r"latents cannot be written in this folder \(Read-only file system\)"):
        run()
    (folder / "wide.npz").unlink()
    with pytest.raises(UserError, match="latents cannot be written in this folder"):
        run("--skip_existing")


@pytest.mark.rows("R104", "R105", "R109")
@pytest.mark.parametrize(
    ("model", "more", "vae", "file", "suffix", "mapped"),
    [
        ("sd1", (), FOUR, "square.npz", "", lambda z: z),
        ("sd2", ("--v2",), FOUR, "square.npz", "", lambda z: z),
        ("sdxl", ("--bucket_reso_steps=32",), FOUR, "square.npz", "", lambda z: z),
        ("sd3", (), sd3.tiny_vae(), "square_0064x0064_sd3.npz", "_8x8", lambda z: z),
        ("ae", ("--family=sd3",), flux.tiny_ae(), "square_0064x0064_sd3.npz", "_8x8", lambda z: z),
        (
            "ae",
            ("--family=flux",),
            flux.tiny_ae(),
            "square_0064x0064_flux.npz",
            "_8x8",
            lambda z: (z - 0.1159) * 0.3611,
        ),
        ("bundle", (), flux.tiny_ae(), "square_0064x0064_flux.npz", "_8x8", lambda z: (z - 0.1159) * 0.3611),
    ],
)
def test_every_family_has_its_own_files(run, folder, models, model, more, vae, file, suffix, mapped):
    run("--flip_aug", "--seed=5", *more, model=getattr(models, model))
    arrays = store.read(folder / file)
    for name, look in (("latents", "plain"), ("latents_flipped", "flipped")):
        expected = mapped(drawn(vae, folder / "square.png", look, seed=5))
        np.testing.assert_allclose(arrays[name + suffix], expected, atol=2e-5)
    apart = folder / "square_flip.npz"
    assert apart.is_file() is (suffix == ""), "the oldest names have mirrored latents in a file of their own"
    if apart.is_file():
        np.testing.assert_array_equal(store.read(apart)["latents"], arrays["latents_flipped"])


def test_a_vae_by_itself_is_one_of_the_first_models(run, folder, models):
    run("--seed=5", model=models.vae)
    expected = drawn(FOUR, folder / "square.png", seed=5)
    np.testing.assert_allclose(store.read(folder / "square.npz")["latents"], expected, atol=2e-5)


def test_a_checkpoint_without_vae_names_what_to_give(run, models):
    with pytest.raises(UserError, match="holds no VAE; give one in place of the model, and --family sd"):
        run(model=models.empty)


def test_a_vae_with_16_channels_needs_its_family(run, models):
    with pytest.raises(UserError, match="this is a VAE, which may belong to several families; choose one with --fam"):
        run(model=models.ae)


def test_a_model_of_another_family_is_refused(run, models):
    with pytest.raises(UserError, match="this is an SDXL model; a VAE, or a Stable Diffusion 3 model, is needed here"):
        run("--family=sd3", model=models.sdxl)


def test_a_model_without_its_vae(run, tmp_path):
    save_file({"double_blocks.0.x": torch.zeros(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match="holds no autoencoder; give its file in place of the model, and --family flux"):
        run(model=tmp_path / "flux.safetensors")


def test_only_what_does_not_fit_is_made_again_with_skip_existing(run, folder):
    first, written = run()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    image = folder / "square.png"
    image.write_bytes((folder / "wide.png").read_bytes())
    again, changed = run("--skip_existing", read="out.json")
    assert (first.done, again.done, again.skipped) == (3, 1, 2)
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    assert [path.name for path in before if before[path] != after[path]] == ["square.npz"]
    assert changed == {
        **written,
        "square": {**written["square"], "train_resolution": [128, 64], "image_size": [150, 70]},
    }
    whole, _ = run("--skip_existing", read="out.json", write="third.json")
    assert (whole.done, whole.skipped) == (0, 3)
    everything, _ = run(write="fourth.json")
    assert (everything.done, everything.skipped) == (3, 0)


def test_bad_images_are_left_out_of_everything_but_the_summary(run, folder, tmp_path, caplog):
    damaged = (folder / "wide.png").read_bytes()
    (folder / "wide.png").write_bytes(damaged[: len(damaged) // 2])
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (2, 1000)).save(folder / "thin.png")
    metadata = json.loads((tmp_path / "in.json").read_text())
    metadata["wide"]["train_resolution"] = [128, 64]
    (tmp_path / "in.json").write_text(json.dumps(metadata))
    outcome, written = run("--bucket_no_upscale", "--max_resolution=128,128", "--batch_size=3")
    assert sorted(path.name for path in outcome.failed) == ["empty.png", "thin.png", "wide.png"]
    assert outcome.done == 2
    assert written["wide"] == {"caption": "a wide one", "tags": "ä, ö"}
    assert sorted(written) == ["high", "square", "wide"]
    assert all(str(path) in caplog.text for path in outcome.failed)
    assert not (folder / "wide.npz").exists()


def test_images_that_the_vae_fails_on_do_not_take_their_batch_along(run, folder, models, monkeypatch):
    from library.families.shared.roles import VaeLatents

    encode = VaeLatents.encode
    bright = Image.new("RGB", (64, 64), "white")
    bright.save(folder / "white.png")

    def broken(self, models, pixels, generator=None):
        latents = encode(self, models, pixels, generator)
        latents[pixels.mean((1, 2, 3)) > 0.9] = float("nan")
        return latents

    monkeypatch.setattr(VaeLatents, "encode", broken)
    outcome, _ = run("--batch_size=4")
    assert {path.name: reason for path, reason in outcome.failed.items()} == {
        "white.png": "the VAE gives NaN or infinite latents"
    }
    assert outcome.done == 3
    np.testing.assert_allclose(
        store.read(folder / "square.npz")["latents"], drawn(FOUR, folder / "square.png"), atol=1e-5
    )


@pytest.mark.rows("C22", "C23", "R58", "R112")
def test_several_folders_one_after_the_other_in_one_file(run, folder, tmp_path, monkeypatch):
    second = tmp_path / "train2" / "below"
    second.mkdir(parents=True)
    shutil.copy(folder / "wide.png", second / "wide.png")
    _, first = run("--full_path")
    assert sorted(first) == sorted(["wide", "square", str(folder / "high.jpg")]), "known images keep their keys"
    monkeypatch.chdir(tmp_path)
    _, both = run("--full_path", "--recursive", place="train2", read="out.json")
    assert both == {**first, str(second / "wide.png"): {"train_resolution": [128, 64], "image_size": [150, 70]}}


def test_sub_folders_need_whole_paths(run):
    with pytest.raises(UserError, match="--recursive: needs --full_path"):
        run("--recursive")


def test_equal_stems_are_distinguished_by_their_extensions(run, folder):
    shutil.copy(folder / "square.png", folder / "square.webp")
    shutil.copy(folder / "square.png", folder / "new.png")
    shutil.copy(folder / "square.png", folder / "new.bmp")
    outcome, written = run()
    assert sorted(path.name for path in outcome.failed) == ["square.png", "square.webp"]
    assert {"new.png", "new.bmp"} < written.keys()
    assert written["square"] == {"caption": "square", "more": 1}
    assert sorted(path.name for path in folder.glob("new*.npz")) == [
        "new.bmp_0064x0064_sd.npz", "new.png_0064x0064_sd.npz",
    ]  # fmt: skip


def test_an_image_that_is_called_like_mirrored_latents(run, folder):
    shutil.copy(folder / "wide.png", folder / "square_flip.png")
    run("--flip_aug")
    names = sorted(path.name for path in folder.glob("square*.npz"))
    assert names == ["square_0064x0064_sd.npz", "square_flip_0150x0070_sd.npz"]


def test_such_an_image_where_stems_are_equal_too(run, folder):
    shutil.copy(folder / "square.png", folder / "new.png")
    shutil.copy(folder / "square.png", folder / "new.bmp")
    shutil.copy(folder / "wide.png", folder / "new_flip.png")
    run("--flip_aug")
    assert sorted(path.name for path in folder.glob("new*.npz")) == [
        "new.bmp_0064x0064_sd.npz", "new.png_0064x0064_sd.npz", "new_flip_0150x0070_sd.npz",
    ]  # fmt: skip


def test_mirrored_latents_of_an_earlier_run_go(run, folder):
    run("--flip_aug")
    assert (folder / "square_flip.npz").is_file()
    run("--skip_existing")
    assert (folder / "square_flip.npz").is_file()
    run()
    assert not (folder / "square_flip.npz").exists()


@pytest.mark.parametrize(("said", "kept"), [("1", True), ("yes", True), ("False", False)])
def test_transparency_is_kept_on_request(run, folder, said, kept):
    Image.new("RGBA", (64, 64), (9, 9, 9, 51)).save(folder / "square.png")
    run(f"--alpha_mask={said}")
    arrays = store.read(folder / "square.npz")
    assert ("alpha_mask" in arrays) is kept
    if kept:
        np.testing.assert_allclose(arrays["alpha_mask"], np.full((64, 64), 0.2), atol=1e-6)


@pytest.mark.rows("R107")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--max_resolution=64,32",), "--max_resolution: 64,32 is below --min_bucket_reso 64"),
        (("--max_resolution=x",), "--max_resolution: must be one number or width,height in pixels, got 'x'"),
        (
            ("--bucket_reso_steps=10",),
            "bucket_reso_steps: must be a multiple of 64 for Stable Diffusion 1.x/2.x, got 10",
        ),
        (("--min_bucket_reso=2048",), "--min_bucket_reso: 2048 is above --max_bucket_reso 1024"),
    ],
)
def test_sizes_that_do_not_go_together(run, arguments, said):
    with pytest.raises(UserError) as error:
        run(*arguments)
    assert any(said in problem for problem in error.value.problems), error.value.problems


def test_a_file_that_cannot_be_written(run, tmp_path):
    (tmp_path / "out.json").mkdir()
    with pytest.raises(UserError, match=r"out\.json cannot be written"):
        run()


@pytest.mark.rows("R103")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere", "in.json", "out.json", "model"), "train_data_dir: there is no folder 'nowhere'"),
        (("examples", "in.json", "out.json", "model"), "in_json: there is no file 'in.json'"),
        (("examples", "pyproject.toml", "out.json"), "required: model_name_or_path"),
        (("examples", "pyproject.toml", "out", "model"), "out_json: must be a .json file, got 'out'"),
        (("examples", "pyproject.toml", "out.json", "m", "--family=x"), "--family: must be one of"),
    ],
)
def test_mistakes_are_one_clear_line(capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        run_script(prepare, GROUPS, arguments, description="")
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
