from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.errors import UserError
from library.generation.control import Guides
from library.generation.files import write
from library.generation.parameters import Made, texts_of
from library.generation.requests import Requests, base_prompt, entries_of
from library.generation.sources import Sources
from library.inference.deep_shrink import DeepShrink
from library.inference.gradual_latent import GradualLatent
from library.inference.prompts import SamplePrompt, SizeConditions
from library.registry import FAMILIES

SD, XL, FLOW = (FAMILIES[name].traits for name in ("sd", "sdxl", "flux"))


def requests_for(opts, traits=SD, failed=None):
    """Those of all iterations."""
    sources = Sources.of(opts.source)
    fail = failed.append if failed is not None else pytest.fail
    requests = Requests(opts, traits, base_prompt(opts, traits), lambda where, why: fail(f"{where}: {why}"), sources)
    prompts = entries_of(opts, sources)
    return [request for _ in range(opts.prompts.n_iter) for request in requests.of(prompts)]


def seeds(opts) -> list[int]:
    return [request.prompt.seed for request in requests_for(opts)]


# --- what the options say ---------------------------------------------------------------------------------------------


def test_defaults(options):
    (request,) = requests_for(options(prompt="a cat"))
    prompt = request.prompt
    assert (prompt.prompt, prompt.negative_prompt, prompt.width, prompt.height) == ("a cat", "", 512, 512)
    assert (prompt.steps, prompt.scale, prompt.sampler, prompt.negative_scale) == (50, 7.5, "ddim", None)
    assert base_prompt(options(), XL).width == 1024


def test_flow_models_have_their_own_defaults_but_what_is_given_counts(options):
    plain = base_prompt(options(), FLOW)
    assert (plain.steps, plain.scale, plain.sampler) == (FLOW.sample_steps, 1.0, "euler")
    given = base_prompt(options(steps=8, scale=3.0, sampler="k_euler", guidance_scale=2.0, flow_shift=1.5), FLOW)
    assert (given.steps, given.scale, given.sampler, given.guidance, given.flow_shift) == (8, 3.0, "euler", 2.0, 1.5)
    with pytest.raises(UserError, match=r"--sampler: ddim is none for FLUX.1; choose euler, heun, dpmsolver\+\+"):
        base_prompt(options(sampler="ddim"), FLOW)


def test_every_option_of_a_prompt_line(options):
    line = (
        "a cat --n ugly --W 128 --h 64 --s 9 --d 5 --l 2.5 --nl 1.5 --t 0.25 --am 0.5,1 --ow 10 --oh 20 "
        "--nw 30 --nh 40 --ct 1 --cl 2 --ss euler_a --f name"
    )
    (request,) = requests_for(options(prompt=line))
    prompt = request.prompt
    assert (prompt.prompt, prompt.negative_prompt, prompt.width, prompt.height) == ("a cat", "ugly", 128, 64)
    assert (prompt.steps, prompt.seed, prompt.scale, prompt.negative_scale) == (9, 5, 2.5, 1.5)
    assert (prompt.strength, prompt.multipliers, prompt.sampler) == (0.25, (0.5, 1.0), "euler_a")
    assert prompt.sizes == SizeConditions(10, 20, 30, 40, 1, 2)
    assert (request.file_name, request.raw) == ("name", line)


def test_deep_shrink_and_gradual_latent_of_lines(options):
    line = "a --dsd1 4 --dst1 700 --dsd2 5 --dst2 300 --dsr 0.25 --ss euler_a"
    line += " --glt 800 --glr 0.25 --gle 2 --gls 0.25 --glsn 0.5 --glus 3,0.5,0.5,1"
    (request,) = requests_for(options(prompt=line))
    assert request.prompt.shrink == DeepShrink(4, 700, 5, 300, 0.25)
    assert request.prompt.gradual == GradualLatent(800, 0.25, 0.25, 2, 0.5, (3, 0.5, 0.5, 1))
    (plain,) = requests_for(options(prompt="a"))
    assert (plain.prompt.shrink, plain.prompt.gradual) == (DeepShrink(), GradualLatent())


def test_what_a_line_says_of_them_switches_them_on(options):
    """With the options' values, and the usual ones where there are none."""
    (request,) = requests_for(options(prompt="a --dsr 0.75 --gle 5 --ss euler_a"))
    assert request.prompt.shrink == DeepShrink(3, ratio=0.75)
    assert request.prompt.gradual == GradualLatent(650, every_n_steps=5)
    given = {"ds_depth_1": 5, "ds_timesteps_1": 800, "gradual_latent_timesteps": 700, "sampler": "euler_a"}
    given |= {"gradual_latent_unsharp_params": "3,1,1,0", "gradual_latent_ratio": 0.75}
    (request,) = requests_for(options(prompt="a --dsr 0.75 --glsn 0.5", **given))
    assert request.prompt.shrink == DeepShrink(5, 800, ratio=0.75)
    assert request.prompt.gradual == GradualLatent(700, 0.75, s_noise=0.5, unsharp=(3, 1, 1, 0))
    (request,) = requests_for(options(prompt="a", **given))
    assert (request.prompt.shrink.depth_1, request.prompt.gradual.timesteps) == (5, 700)


def test_flow_models_have_neither(options):
    failed: list[str] = []
    for line in ("a --dsd1 3", "a --glt 700"):
        requests_for(options(prompt=line), FLOW, failed)
    assert failed == [
        "--prompt: Deep Shrink (ds_depth_1) needs a U-Net, and FLUX.1 has none; leave it out",
        "--prompt: Gradual Latent (gradual_latent_timesteps) is not for FLUX.1; leave it out",
    ]


def test_deep_shrink_by_timestep():
    shrink = DeepShrink(3, 650, 6, 350)
    assert [shrink.depth_at(time) for time in (999, 650, 649.9, 350, 349)] == [3, 3, 6, 6, None]
    assert DeepShrink(3).depth_at(649) is None
    assert DeepShrink().depth_at(999) is None
    assert list(DeepShrink(8).problems(XL)) == []
    assert list(DeepShrink(2, depth_2=9).problems(XL)) == [
        f"Deep Shrink's ds_depth_2 must be from 0 to 8 with {XL.label}, got 9"
    ]


def test_the_options_are_the_defaults_of_lines(options):
    opts = options(
        prompt="a", W=128, H=192, steps=7, scale=3.0, negative_scale=1.0, original_width=9, crop_left=4, sampler="lms"
    )
    prompt = base_prompt(opts, SD)
    assert (prompt.width, prompt.height, prompt.steps, prompt.scale) == (128, 192, 7, 3.0)
    assert (prompt.negative_scale, prompt.sizes, prompt.sampler) == (1.0, SizeConditions(9, crop_left=4), "lms")
    (request,) = requests_for(options(prompt="a --nl none", negative_scale=1.0))
    assert request.prompt.negative_scale is None


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_the_seed_is_that_of_the_first_image_and_others_follow_from_it(options):
    several = seeds(options(prompt="a", seed=3, images_per_prompt=2, n_iter=2))
    assert several[0] == 3
    assert len(set(several)) == 4
    assert several == seeds(options(prompt="a", seed=3, images_per_prompt=2, n_iter=2))
    assert seeds(options(prompt="a", seed=3)) == [3]
    assert several[1:] != seeds(options(prompt="a", seed=4, images_per_prompt=2, n_iter=2))[1:]


def test_without_a_seed_images_differ_each_time(options):
    assert len({*seeds(options(prompt="a", n_iter=3)), *seeds(options(prompt="a", n_iter=3))}) == 6


def test_seeds_of_a_line_are_taken_in_turn(options):
    assert seeds(options(prompt="a --d 7,8", images_per_prompt=3, seed=1))[:2] == [7, 8]
    assert len(set(seeds(options(prompt="a --d 7,8", images_per_prompt=3, seed=1)))) == 3


@pytest.mark.parametrize("seed", [None, 5])
def test_the_same_seed_for_all_prompts_of_an_iteration(options, tmp_path, seed):
    (tmp_path / "p.txt").write_text("a\nb\nc --d 9\n")
    found = seeds(
        options(from_file=str(tmp_path / "p.txt"), iter_same_seed=True, images_per_prompt=2, n_iter=2, seed=seed)
    )
    first, second = found[:6], found[6:]
    assert first[:2] == first[2:4]
    assert first[4] == 9
    assert first[5] == first[1]
    assert second[:2] == second[2:4]
    assert len({*first[:2], *second[:2]}) == 4
    assert seed is None or first[0] == seed


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_files_of_every_kind(options, tmp_path):
    (tmp_path / "p.txt").write_text("# no prompt\n\na --d 1\n")
    (tmp_path / "p.toml").write_text(
        '[prompt]\nsteps = 1\nsample_steps = 4\n[[prompt.subset]]\nprompt = "a"\nseed = 1\nnetwork_mul = [0.5, 1]\n'
    )
    (tmp_path / "p.json").write_text('[{"prompt": "a", "seed": [1, 2], "negative_scale": "none"}]')
    found = {}
    for name in ("p.txt", "p.toml", "p.json"):
        (request,) = requests_for(options(from_file=str(tmp_path / name)))
        assert (request.prompt.prompt, request.prompt.seed) == ("a", 1)
        found[name] = request.prompt
    assert (found["p.toml"].steps, found["p.toml"].multipliers) == (4, (0.5, 1.0))


def test_dynamic_prompts_are_drawn_for_each_image(options):
    drawn = {r.prompt.prompt for r in requests_for(options(prompt="{a|b} --n {x|y}", images_per_prompt=40, seed=1))}
    assert drawn == {"a", "b"}
    each = requests_for(options(prompt="{e$$a|b} {e$$1|2}", images_per_prompt=2, iter_same_seed=True))
    assert [r.prompt.prompt for r in each] == ["a 1", "a 1", "a 2", "a 2", "b 1", "b 1", "b 2", "b 2"]
    assert [r.prompt.seed for r in each] == [each[0].prompt.seed, each[1].prompt.seed] * 4


def test_a_broken_line_is_named_and_the_others_are_made(options, tmp_path):
    (tmp_path / "p.txt").write_text(
        "good\nbad --w wide\n# fine\nworse --ss eular\nslashes --f a/b\nalso good\na AND  AND b\n"
    )
    failed: list[str] = []
    found = requests_for(options(from_file=str(tmp_path / "p.txt")), failed=failed)
    assert [request.prompt.prompt for request in found] == ["good", "also good"]
    file = tmp_path / "p.txt"
    assert failed[0] == f"{file}, line 2: --w needs a whole number, got 'wide'"
    assert failed[1].startswith(f"{file}, line 4: unknown sampler 'eular'; did you mean 'euler'?")
    assert failed[2] == f"{file}, line 5: --f must be the name of a file, without folders, got 'a/b'"
    assert failed[3] == f"{file}, line 7: there is no text before or behind an AND"
    assert len(failed) == 4


def test_shuffled_prompts_are_all_there(options, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(map(str, range(30))))
    opts = options(from_file=str(tmp_path / "p.txt"), shuffle_prompts=True, seed=1, n_iter=2)
    texts = [request.prompt.prompt for request in requests_for(opts)]
    first, second = texts[:30], texts[30:]
    assert sorted(first) == sorted(second) == sorted(map(str, range(30)))
    assert len({tuple(first), tuple(second), tuple(map(str, range(30)))}) == 3


# --- images to begin with ---------------------------------------------------------------------------------------------


def test_an_image_to_begin_with_gives_the_size(options, image):
    (request,) = requests_for(options(prompt="a", image_path=str(image), strength=0.3))
    assert (request.prompt.width, request.prompt.height, request.prompt.strength) == (96, 64, 0.3)
    assert request.prompt.source.path == image
    (request,) = requests_for(options(prompt="a --w 128", image_path=str(image), H=None))
    assert (request.prompt.width, request.prompt.height) == (128, 512)


def test_images_of_a_folder_are_taken_in_turn(options, image):
    Image.new("RGB", (64, 64)).save(image.parent / "other.png")
    (image.parent / "masks").mkdir()
    Image.new("L", (64, 64)).save(image.parent / "masks" / "m.png")
    opts = options(prompt="a", image_path=str(image.parent), mask_path=str(image.parent / "masks"), images_per_prompt=3)
    sources = [request.prompt.source for request in requests_for(opts)]
    assert [source.path.name for source in sources] == ["from.png", "other.png", "from.png"]
    assert {source.mask.name for source in sources} == {"m.png"}


@pytest.mark.parametrize("ours", [True, False])
def test_without_a_prompt_the_images_own_counts(options, tmp_path, ours):
    text = PngInfo()
    if ours:
        for key, value in {"prompt": "a dog", "negative-prompt": "ugly", "scale": "3.5", "seed": "4"}.items():
            text.add_text(key, value)
    else:
        text.add_text("parameters", "a dog\nNegative prompt: ugly\nSteps: 20, Sampler: Euler a")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", pnginfo=text)
    (request,) = requests_for(options(image_path=str(tmp_path / "a.png")))
    assert (request.prompt.prompt, request.prompt.negative_prompt) == ("a dog", "ugly")
    if ours:
        assert (request.prompt.scale, request.prompt.seed) == (3.5, 4)


@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
def test_images_of_this_program_say_what_they_were_made_with(options, tmp_path, ending):
    """Options of the command line count more."""
    made = SamplePrompt("a dog", "ugly", 64, 64, 4, 12, 3.5, "euler_a")
    write(Image.new("RGB", (64, 64)), tmp_path / f"a.{ending}", texts_of(made, Made("a dog", "model")))
    given = {"image_path": str(tmp_path / f"a.{ending}"), "W": 64, "H": 64}
    (request,) = requests_for(options(**given))
    assert replace(request.prompt, source=None) == made
    (request,) = requests_for(options(**given, steps=9, scale=2.0))
    assert (request.prompt.steps, request.prompt.scale, request.prompt.seed) == (9, 2.0, 4)


def test_what_is_wrong_with_images_is_said(options, tmp_path, image):
    with pytest.raises(UserError, match=r"--image_path: there is no file or folder 'gone\.png'"):
        Sources.of(options(image_path="gone.png").source)
    with pytest.raises(UserError, match=r"from\.png: the image does not say which prompt"):
        requests_for(options(image_path=str(image)))
    (tmp_path / "broken.png").write_text("no image")
    failed: list[str] = []
    assert requests_for(options(prompt="a", image_path=str(tmp_path / "broken.png")), failed=failed) == []
    assert "broken.png: the image cannot be read" in failed[0]


def test_a_broken_image_costs_its_own_turn(options, tmp_path):
    """With a size on the command line too; masks and control images alike."""
    for folder in ("images", "masks", "guides"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            Image.new("RGB", (64, 64)).save(tmp_path / folder / f"{number}.png")
    for number, folder in enumerate(("images", "masks", "guides")):
        (tmp_path / folder / f"{number}.png").write_text("no image")
    opts = options(
        prompt="a", n_iter=4, W=64, H=64, image_path=str(tmp_path / "images"), mask_path=str(tmp_path / "masks"),
        guide_image_path=[str(tmp_path / "guides")], control_net_models=["x"],
    )  # fmt: skip
    failed: dict[int, str] = {}
    requests = Requests(
        opts, SD, base_prompt(opts, SD), lambda _, why: failed.__setitem__(len(failed), why), Sources.of(opts.source),
        Guides.of(opts),
    )  # fmt: skip
    found = [request for _ in range(4) for request in requests.of([("--prompt", "a")])]
    assert not found
    assert [Path(why.split(":")[0]).parent.name for why in failed.values()][:3] == ["images", "masks", "guides"]


def test_the_steps_that_are_made(options, image):
    (request,) = requests_for(options(prompt="a --s 10 --t 0.35", image_path=str(image)))
    assert request.prompt.steps_made == 3
    assert replace(request.prompt, source=None).steps_made == 10
    assert Path(image).is_file()


def test_deep_shrink_and_lllites_exclude_each_other(options):
    opts, failed = options(prompt="a --dsd1 1", control_net_lllite_models=["x"]), []
    assert requests_for(opts, XL, failed) == []
    assert failed == ["--prompt: Deep Shrink cannot be used with --control_net_lllite_models"]
