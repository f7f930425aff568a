"""The scripts as users run them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tests.generation.test_networks_and_words as networks
from library.families.sd.adapter import SdFamily
from library.families.sd.variants import check_paths
from library.families.sdxl.saving import save_model as save_sdxl
from library.generation.script import ALL_FAMILIES, ONE_FAMILY, run
from library.runtime.logs import LOGGER
from tests.builders import for_inpainting, sd_options, write_tiny_inpainting, write_tiny_sd2
from tests.builders.flux import write_flux, write_part_files
from tests.builders.sd3 import write_tiny_sd3
from tests.builders.sdxl import tiny_sdxl, write_tiny_sdxl

files = networks.files


def test_a_prompt_file_becomes_images(run_script, small_model, files, tmp_path):
    """A line that is wrong costs its own image only, and the exit status says so."""
    (tmp_path / "p.txt").write_text("a {e$$red|blue} cat --n ugly\nbad --s few\na dog --w 96 --am 0.5 --f dog\n")
    words = [f"--ckpt={small_model}", f"--from_file={tmp_path / 'p.txt'}", f"--outdir={tmp_path / 'out'}"]
    words += ["--W=64", "--H=64", "--steps=2", "--scale=2", "--seed=1", "--batch_size=2", "--vae_batch_size=1"]
    result = run_script(
        "gen_img.py", *words, "--network_weights", *files, "--network_mul", "1", "0.5", "--vae_slices=2"
    )
    assert result.returncode == 1
    assert "3 done, 1 failed" in result.stderr
    assert "p.txt, line 2: --s needs a whole number, got 'few'" in result.stderr
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found[0] == "dog.png"
    assert [name.split("_", 2)[2] for name in found[1:]] == ["000_1.png", found[2].split("_", 2)[2]]
    with Image.open(tmp_path / "out" / "dog.png") as dog, Image.open(tmp_path / "out" / found[1]) as red:
        assert (dog.size, red.size) == ((96, 64), (64, 64))
        assert red.text["prompt"] == "a red cat"
        assert red.text["raw-prompt"] == "a {e$$red|blue} cat --n ugly"
        assert red.text["parameters"].startswith("a red cat <lora:1:1> <lora:2:0.5>\nNegative prompt: ugly\nSteps: 2, ")
        assert "a dog <lora:1:0.5> <lora:2:0.5>\n" in dog.text["parameters"]


def test_regions_of_the_bundled_model(run_script, tmp_path):
    """Each half of the image shows its own part, where without a mask both are everywhere."""
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[:, :16, 0], mask[:, 16:, 1] = 255, 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    lines = (
        "a photo of a red square AND a photo of a blue square --d 3 --f regions\na AND  AND b\nred AND blue --f plain"
    )
    (tmp_path / "p.txt").write_text(lines)
    words = ["--ckpt=examples/tiny_model/tiny-sd.safetensors", f"--from_file={tmp_path / 'p.txt'}", "--W=64", "--H=64"]
    result = run_script(
        "gen_img.py", *words, f"--mask_path={tmp_path / 'mask.png'}", "--steps=8", f"--outdir={tmp_path / 'out'}"
    )
    assert result.returncode == 1
    assert "p.txt, line 2: there is no text before or behind an AND" in result.stderr
    with Image.open(tmp_path / "out" / "regions.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
        assert image.text["prompt"] == "a photo of a red square AND a photo of a blue square"
    left, right = pixels[16:48, :32].mean((0, 1)), pixels[16:48, 32:].mean((0, 1))
    assert (left - right)[0] > 40
    assert (right - left)[2] > 40


@pytest.mark.parametrize("script", ["sdxl_gen_img.py", "gen_img_diffusers.py"])
def test_the_other_scripts_take_their_own_options(run_script, small_model, tmp_path, script):
    words = [f"--ckpt={small_model}", "--prompt=a cat", "--W=64", "--H=64", "--steps=1", "--seed=5"]
    words += [f"--outdir={tmp_path}", "--sequential_file_name", "--image_format=webp"]
    result = run_script(script, *words)
    if script == "sdxl_gen_img.py":
        assert result.returncode == 2
        assert "this is a Stable Diffusion 1.x model" in result.stderr
        assert "--ckpt: " in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["im_000001.webp"]


@pytest.fixture
def refused(small_model, tmp_path, capsys, monkeypatch):
    """The lines with which gen_img.py refuses a command line."""
    monkeypatch.setattr(LOGGER, "handlers", [])

    def refused(*words: str, groups=ALL_FAMILIES) -> str:
        usual = [] if any(word.startswith("--ckpt") for word in words) else [f"--ckpt={small_model}"]
        with pytest.raises(SystemExit) as end:
            run("Generates.", groups, argv=[*usual, f"--outdir={tmp_path / 'out'}", *words])
        assert end.value.code == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    return refused


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--prompt=a", "--sampler=eular"], "--sampler: must be one of ddim, pndm"),
        (["--prompt=a", "--sampler=eular"], "got 'eular'; did you mean 'euler'?"),
        (["--prompt=a", "--W=100"], "--W: must be a multiple of 8 with Stable Diffusion 1.x/2.x, got 100; 96 and 104"),
        (["--prompt=a", "--ckpt=gone.safetensors"], "gone.safetensors: no such file or folder"),
        (["--ckpt="], "--ckpt: missing; give a checkpoint file"),
        ([], "--prompt: missing; give a prompt, or prompts with --from_file"),
        (["--prompt=a", "--from_file=p.txt"], "--prompt and --from_file exclude each other"),
        (["--prompt=a", "--fp16", "--bf16"], "--fp16: cannot be used with --bf16"),
        (["--prompt=a", "--network_weights=gone.safetensors"], "--network_weights: gone.safetensors: "),
        (["--prompt=a", "--network_mul", "1", "2"], "--network_mul: has more values than --network_weights, 0"),
        (["--prompt=a", "--network_module=networks.nothing"], "--network_module: there is no module"),
        (["--prompt=a", "--v2"], "this is a Stable Diffusion 1.x model; remove --v2"),
        (["--prompt=a", "--sdxl", "--flux"], "--sdxl and --flux exclude each other"),
        (["--prompt=a", "--vae=gone.pt"], "--vae: gone.pt: no such file or folder"),
        (["--prompt=a", "--control_net_models=x"], "--control_net_models: x: no such file or folder"),
        (["--prompt=a", "--control_net_lllite_models=x"], "--control_net_lllite_models: x: no such file or folder"),
        (["--prompt=a", "--clip_vision_strength=1"], "--clip_vision_strength: needs --guide_image_path"),
        (["--prompt=a", "--XTI_embeddings=gone.safetensors"], "--XTI_embeddings: gone.safetensors: no such file"),
        (["--prompt=a", "--control_net_preps=cany"], "--control_net_preps: 'cany' is no preparation; use none, canny"),
        (["--prompt=a", "--highres_fix_upscaler=nothing.here"], "--highres_fix_upscaler: there is no module"),
        (["--from_module=nothing.here"], "--from_module: there is no module 'nothing.here'"),
        (["--interactive", "--prompt=a"], "--prompt and --interactive exclude each other"),
        (["--prompt=a AND b", "--mask_path=m.png"], "--mask_path: there is no file or folder 'm.png'"),
        (
            ["--prompt=a", "--network_regional_mask_max_color_codes=8"],
            "--network_regional_mask_max_color_codes: must be at least 1 and at most 7, got 8",
        ),
        (
            ["--prompt=a", "--pyramid_noise_discount_range", "2", "1"],
            "--pyramid_noise_discount_range: the lowest comes",
        ),
        (["--prompt=a", "--gradual_latent_timesteps=700"], "samplers euler_a and euler, not with ddim"),
        (["--prompt=a", "--gradual_latent_unsharp_params=3,a"], "--gradual_latent_unsharp_params: needs numbers with"),
        (
            [
                "--prompt=a",
                "--sampler=euler_a",
                "--gradual_latent_timesteps=9",
                "--gradual_latent_unsharp_params=2,1,1",
            ],
            "the size, which comes first, must be an odd number from 1 to 99, got 2,1,1",
        ),
        (["--prompt=a", "--ds_depth_1=12"], "ds_depth_1 must be from 0 to 11 with Stable Diffusion 1.x/2.x, got 12"),
        (["--prompt=a", "--ds_depth_1=-1"], "--ds_depth_1: must be at least 0, got -1"),
        (["--prompt=a", "--strength=2"], "--strength: must be at least 0 and at most 1, got 2"),
        (["--prompt=a", "--vae_batch_size=1.5"], "--vae_batch_size: must be a whole number or a share below 1"),
    ],
)
def test_mistakes_are_one_line(refused, words, line):
    said = refused(*words)
    assert line in said
    assert said.count("\n") <= 4


def test_a_network_of_another_model_is_refused(refused, tmp_path):
    place = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {f"{place}.lora_down.weight": torch.zeros(2, 64), f"{place}.lora_up.weight": torch.zeros(192, 2)},
        tmp_path / "other.safetensors",
    )
    said = refused("--prompt=a", "--W=64", "--H=64", f"--network_weights={tmp_path / 'other.safetensors'}")
    assert "other.safetensors: none of its 1 layers fits" in said


def test_the_only_line_of_a_file_being_wrong_makes_nothing(small_model, tmp_path, capsys):
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "a", "width": "wide"}]))
    with pytest.raises(SystemExit) as end:
        run(
            "",
            ALL_FAMILIES,
            argv=[f"--ckpt={small_model}", f"--from_file={tmp_path / 'p.json'}", f"--outdir={tmp_path / 'o'}"],
        )
    assert end.value.code == 1
    assert "prompt 1: width needs a whole number, got 'wide'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_help_names_the_samplers(capsys):
    for groups in (ALL_FAMILIES, ONE_FAMILY):
        with pytest.raises(SystemExit) as end:
            run("Generates.", groups, argv=["--help"])
        assert not end.value.code
        assert "k_dpm_2_a" in capsys.readouterr().out


def test_the_bundled_model_draws_a_flower(run_script, tmp_path):
    """Looked at as well: docs/gen_img.md shows it."""
    words = ["--ckpt=examples/tiny_model/tiny-sd.safetensors", "--prompt=a photo of red square", "--W=64", "--H=64"]
    result = run_script("gen_img.py", *words, "--steps=8", "--seed=3", f"--outdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    (path,) = Path(tmp_path).iterdir()
    with Image.open(path) as image:
        red, green, blue = image.convert("RGB").getpixel((32, 32))
    assert red > 150
    assert max(green, blue) < 80


@pytest.fixture
def draw_here(small_model, tmp_path, monkeypatch):
    """Runs gen_img.py in this process, and gives its exit status and the folder of its images."""
    monkeypatch.setattr(LOGGER, "handlers", [])

    def draw(*words: str) -> tuple[int, Path]:
        usual = [f"--ckpt={small_model}", f"--outdir={tmp_path / 'out'}", "--steps=1", "--scale=1", "--seed=1"]
        status: object = 0
        try:
            run("Generates.", ALL_FAMILIES, argv=[*usual, "--W=64", "--H=64", *words])
        except SystemExit as end:
            status = end.code
        assert isinstance(status, int)
        return status, tmp_path / "out"

    return draw


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_lines_that_are_typed(draw_here, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat --f one\n\nbad --w wide\ncn --f three --t 7\na dog --f two"))
    status, folder = draw_here("--interactive")
    said = capsys.readouterr()
    assert status == 0
    assert names(folder) == ["one.png", "two.png"]
    assert said.out.splitlines() == [str(folder / "one.png"), str(folder / "two.png")]
    assert "line 2: --w needs a whole number, got 'wide'" in said.err
    assert "line 3: the strength must be from 0 to 1, got 7" in said.err
    assert "2 done" in said.err


class Terminal(io.StringIO):
    """What a person types."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("more", [(), ("--no_preview",)])
def test_images_of_lines_are_shown_where_there_is_a_screen(draw_here, monkeypatch, more):
    opened: list[list[str]] = []
    monkeypatch.setattr("sys.stdin", Terminal("a cat --f one\n"))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("subprocess.Popen", lambda words, **_: opened.append(words))
    status, folder = draw_here("--interactive", *more)
    assert status == 0
    assert opened == ([] if more else [["xdg-open", str(folder / "one.png")]])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_deep_shrink_and_gradual_latent(draw_here, tmp_path, capsys):
    """Lines change what the options say; of each other line only its own image changes."""
    lines = ["--f plain", "--f shrunk --dsd1 1 --dst1 0", "--f never --dsd1 1 --dst1 1000 --dst2 1000"]
    lines += ["--f grown --glt 1000 --gle 1 --gls 0.5", "--f sharp --glt 1000 --gle 1 --gls 0.5 --glus 3,0.5,2,1"]
    (tmp_path / "p.txt").write_text("\n".join(f"a cat {line} --w 128 --h 128 --s 3 --ss euler_a" for line in lines))
    status, folder = draw_here(f"--from_file={tmp_path / 'p.txt'}", "--iter_same_seed")
    assert status == 0, capsys.readouterr().err
    found = {path.stem: pixels(path) for path in folder.iterdir()}
    assert sorted(found) == ["grown", "never", "plain", "sharp", "shrunk"]
    assert all(image.shape == (128, 128, 3) for image in found.values())
    assert np.array_equal(found["plain"], found["never"])
    for one, other in (("plain", "shrunk"), ("plain", "grown"), ("shrunk", "grown"), ("grown", "sharp")):
        assert not np.array_equal(found[one], found[other]), (one, other)


def test_a_command_with_both(run_script, small_model, tmp_path):
    """As users type them; an option that has no effect is said."""
    words = [f"--ckpt={small_model}", "--prompt=a cat --f it", "--W=128", "--H=64", "--steps=4", "--scale=1"]
    words += [
        "--seed=1",
        f"--outdir={tmp_path / 'out'}",
        "--sampler=k_euler_a",
        "--ds_depth_1=3",
        "--ds_timesteps_1=500",
    ]
    words += ["--ds_depth_2=2", "--ds_ratio=0.75", "--gradual_latent_timesteps=900", "--gradual_latent_every_n_steps=1"]
    words += ["--gradual_latent_unsharp_params=3,0.5,0.5,1", "--gradual_latent_s_noise=0.9"]
    result = run_script("gen_img.py", *words, "--gradual_latent_ratio_step=0.25", "--gradual_latent_ratio=0.5")
    assert result.returncode == 0, result.stderr
    assert "--ds_depth_2: has no effect, as --ds_timesteps_2 is not below --ds_timesteps_1" in result.stderr
    assert pixels(tmp_path / "out" / "it.png").shape == (64, 128, 3)


def test_a_prompt_of_which_no_image_can_be_made(draw_here, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a --dsd1 40\nb --glt 700\nc --gle 0 --ss euler_a\nd --dsr 2\n")
    assert draw_here(f"--from_file={tmp_path / 'p.txt'}")[0] == 1
    said = capsys.readouterr().err
    for line in (
        "line 1: Deep Shrink's ds_depth_1 must be from 0 to 11 with Stable Diffusion 1.x/2.x, got 40",
        "line 2: Gradual Latent works with the samplers euler_a and euler, not with ddim",
        "line 3: Gradual Latent's every_n_steps must be at least 1, got 0",
        "line 4: Deep Shrink's ds_ratio must be above 0 and at most 1, got 2",
    ):
        assert line in said


@pytest.mark.parametrize("name", ["a.safetensors", "folder"])
def test_models_for_inpainting(draw_here, image, tmp_path, capsys, name):
    """With an image and a mask, and as any other model without; training refuses them as before."""
    model = write_tiny_inpainting(tmp_path / name, v2=name == "folder")
    Image.linear_gradient("L").save(tmp_path / "mask.png")
    given = [f"--ckpt={model}", f"--image_path={image}"]
    assert draw_here("--prompt=a cat --f in", *given, f"--mask_path={tmp_path / 'mask.png'}")[0] == 0
    assert draw_here("--prompt=a cat --f all", *given, "--strength=1")[0] == 0
    status, folder = draw_here("--prompt=a cat --f text", f"--ckpt={model}")
    assert status == 0, capsys.readouterr().err
    assert np.array_equal(pixels(folder / "all.png"), pixels(folder / "text.png"))
    assert not np.array_equal(pixels(folder / "in.png"), pixels(folder / "text.png"))
    (problem,) = check_paths(sd_options(model, v2=name == "folder"))
    assert problem.endswith(
        "this is an inpainting model: its U-Net takes 9 channels; --train_inpainting trains such models, where it is "
        "offered"
    )


def test_an_sdxl_for_inpainting(draw_here, image, tmp_path, capsys):
    models = for_inpainting(tiny_sdxl())
    save_sdxl(models, tmp_path / "xl.safetensors", save_as="safetensors", dtype=None, metadata={})
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    given = [f"--ckpt={tmp_path / 'xl.safetensors'}", f"--image_path={image}", f"--mask_path={tmp_path / 'mask.png'}"]
    status, folder = draw_here("--prompt=a cat --f it", *given)
    assert status == 0, capsys.readouterr().err
    assert names(folder) == ["it.png"]


def test_a_model_with_another_input_is_named(draw_here, small_model, tmp_path, capsys):
    tensors = load_file(small_model)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(64, 8, 3, 3)
    save_file(tensors, tmp_path / "a.safetensors")
    assert draw_here("--prompt=a cat", f"--ckpt={tmp_path / 'a.safetensors'}")[0] == 2
    assert (
        "this is an instruct-pix2pix model: its U-Net takes 8 channels; only those that take 4, or 9 for inpainting, "
        "can be used here"
    ) in capsys.readouterr().err


@pytest.mark.parametrize("called", [True, False])
def test_lines_of_a_module(draw_here, tmp_path, called):
    lines = 'lambda: (f"{args.prompter_module_args} --f {n}" for n in range(2))'
    (tmp_path / "mine.py").write_text(
        f"def get_prompter(args, pipe, networks):\n    return ({lines}){'' if called else '()'}\n"
    )
    status, folder = draw_here(f"--from_module={tmp_path / 'mine.py'}", "--prompter_module_args=a cat")
    assert status == 0
    assert names(folder) == ["0.png", "1.png"]
    with Image.open(folder / "1.png") as image:
        assert image.text["prompt"] == "a cat"


def test_a_module_that_fails_is_said(draw_here, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def get_prompter(args, pipe, networks):\n    return [3]\n")
    assert draw_here(f"--from_module={tmp_path / 'mine.py'}")[0] == 2
    assert "mine.py: prompt 1 is no text but int" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text("1 / 0\n")
    assert draw_here(f"--from_module={tmp_path / 'mine.py'}")[0] == 2
    assert "mine.py cannot be used: ZeroDivisionError" in capsys.readouterr().err


def test_images_in(draw_here, small_model, image, tmp_path, capsys):
    """An image with a mask, a ControlNet that reads its edges, and two drawings of each."""
    family = SdFamily(sd_options(small_model))
    models = family.loader.load()
    family.control.save(
        family.control.build(models), tmp_path / "net.safetensors", save_as="safetensors", dtype=None, metadata={}
    )
    Image.linear_gradient("L").save(tmp_path / "mask.png")
    words = [f"--image_path={image}", f"--mask_path={tmp_path / 'mask.png'}", f"--guide_image_path={image}"]
    words += ["--strength=1", f"--control_net_models={tmp_path / 'net.safetensors'}", "--control_net_preps=canny"]
    words += ["--highres_fix_scale=0.5", "--highres_fix_steps=1", "--highres_fix_save_1st", "--use_original_file_name"]
    status, folder = draw_here("--prompt=a cat --w 128", *words)
    assert status == 0, capsys.readouterr().err
    assert names(folder) == ["first_from.png", "from.png"]
    with Image.open(folder / "from.png") as second, Image.open(folder / "first_from.png") as first:
        assert (second.size, first.size) == ((128, 64), (64, 64))
        assert (second.text["seed"], first.text["seed"]) == ("1", "1")
        assert second.text["strength"] == "1.0"


def test_a_control_net_without_an_image_is_said(draw_here, small_model, tmp_path, capsys):
    save_file({"input_hint_block.0.weight": torch.zeros(1)}, tmp_path / "net.safetensors")
    status, folder = draw_here("--prompt=a", f"--control_net_models={tmp_path / 'net.safetensors'}")
    assert status == 1
    assert "--prompt: no control image: give --guide_image_path, or --cn in the prompt" in capsys.readouterr().err
    assert not folder.exists()


def model_of(family: str, folder: Path) -> list[str]:
    """A tiny model of the family, as options name it."""
    if family == "sd2":
        return [f"--ckpt={write_tiny_sd2(folder / 'a.safetensors')}"]
    if family == "sd2 folder":
        return [f"--ckpt={write_tiny_sd2(folder / 'a')}"]
    if family == "sdxl":
        return [f"--ckpt={write_tiny_sdxl(folder / 'a.safetensors')}"]
    if family == "sd3":
        return [f"--ckpt={write_tiny_sd3(folder / 'a.safetensors', encoders=('te1', 'te2'))}"]
    parts = write_part_files(folder, vocabulary=32128)  # that of the tokenizer that is bundled
    return [f"--ckpt={write_flux(folder)}", *(f"--{name}={path}" for name, path in parts.items())]


@pytest.mark.parametrize("family", ["sd2", "sd2 folder", "sdxl", "sd3", "flux"])
def test_the_family_is_recognised_by_the_file(draw_here, tmp_path, capsys, family):
    model = model_of(family, tmp_path)
    status, folder = draw_here("--prompt=a cat --f it", *model)
    assert status == 0, capsys.readouterr().err
    with Image.open(folder / "it.png") as image:
        assert image.size == (64, 64)
        assert image.text["sampler"] == ("euler" if family in ("sd3", "flux") else "ddim")


def test_parts_that_a_model_lacks_are_named(draw_here, tmp_path, capsys):
    status, _ = draw_here("--prompt=a cat", f"--ckpt={write_flux(tmp_path)}")
    said = capsys.readouterr().err
    assert status == 2
    assert all(f"--{name}: needed, as " in said for name in ("clip_l", "t5xxl", "ae"))
