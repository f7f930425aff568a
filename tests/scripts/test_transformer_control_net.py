"""flux_train_control_net.py and sd3_train_control_net.py from the outside, on tiny random models."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, SD3ControlNetModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.families.flux.controlnet import CONTROL_MAP
from tests.builders.flux import write_flux, write_parts
from tests.builders.sd3 import write_encoder_file, write_tiny_sd3
from tests.builders.t5 import write_t5_tokenizer
from tests.scripts.starting import as_words
from tests.scripts.weights import furthest

PRINTED = (
    "accelerate launch --mixed_precision bf16 --num_cpu_threads_per_process 1 flux_train_control_net.py "
    "--pretrained_model_name_or_path {model} --clip_l {clip_l} --t5xxl {t5xxl} --ae {ae} --save_model_as safetensors "
    "--sdpa --persistent_data_loader_workers --max_data_loader_n_workers 1 --seed 42 --gradient_checkpointing "
    "--mixed_precision bf16 --optimizer_type adamw8bit --learning_rate 2e-5 --highvram --max_train_epochs 1 "
    "--save_every_n_steps 1000 --dataset_config {data} --output_dir {out} --output_name flux-cn "
    "--timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw --guidance_scale 1.0 "
    "--deepspeed"
)
IN_24_GB = "--blocks_to_swap 16 --cache_latents_to_disk --cache_text_encoder_outputs_to_disk"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> SimpleNamespace:
    """By family, the options that name a tiny model and its parts."""
    folder = tmp_path_factory.mktemp("models")
    parts = write_parts(folder)
    flux = {"pretrained_model_name_or_path": write_flux(folder, dtype=torch.bfloat16), **parts}
    sd3 = {"pretrained_model_name_or_path": write_tiny_sd3(folder / "sd3.safetensors", "5-medium")}
    for flag, part in (("clip_l", "te1"), ("clip_g", "te2"), ("t5xxl", "te3")):
        sd3[flag] = write_encoder_file(folder / f"sd3_{flag}.safetensors", part)
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")
    return SimpleNamespace(flux=flux, sd3={**sd3, "tokenizer_cache_dir": folder})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> SimpleNamespace:
    """Four images and control images, a dataset config that names them, and a prompt with a control image."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(1)
    for number, caption in enumerate(("a red house", "a blue house", "a cat", "tree of a cat")):
        for name in ("images", "edges"):
            (root / name).mkdir(exist_ok=True)
            pixels = np.repeat(np.repeat(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8), 16, 0), 16, 1)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
        (root / "images" / f"{number}.txt").write_text(caption, encoding="utf-8")
    config = root / "dataset.toml"
    config.write_text(
        "[general]\ncaption_extension = '.txt'\nresolution = 64\nbatch_size = 1\n[[datasets]]\n[[datasets.subsets]]\n"
        f"image_dir = '{root.as_posix()}/images'\nconditioning_data_dir = '{root.as_posix()}/edges'\n"
    )
    size = "--w 64 --h 64 --s 2 --d 1"
    (root / "prompts.txt").write_text(f"a cat {size} --cn {root}/edges/0.png\na cat {size}\n")
    return SimpleNamespace(config=config, prompts=root / "prompts.txt", images=root / "images")


@pytest.fixture(scope="module")
def train(run_script, models, pairs):
    """A short run in float32 of a family's script. Gives messages, file and, where there is one, its weights."""

    def run(family: str, out: Path, processes: int = 1, **changes: object) -> SimpleNamespace:
        options: dict[str, object] = {
            **getattr(models, family),
            "dataset_config": pairs.config,
            "output_dir": out,
            "output_name": "net",
            "max_train_steps": 4,
            "learning_rate": 1e-3,
            "t5xxl_max_token_length": 16,
            "max_data_loader_n_workers": 0,
            "seed": 1,
            **changes,
        }
        done = run_script(f"{family}_train_control_net.py", *as_words(options), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        file = out / "net.safetensors"
        return SimpleNamespace(said=done.stderr, file=file, weights=load_file(file) if file.is_file() else None)

    return run


@pytest.fixture(scope="module", params=["flux", "sd3"])
def whole(request, train, pairs, tmp_path_factory) -> SimpleNamespace:
    """A run with everything cached, sample images, states, an average and validation."""
    more = {"cache_latents": True, "cache_text_encoder_outputs": True, "ema": True, "validation_split": 0.25}
    more |= {"validate_every_n_steps": 2, "save_state": True, "save_every_n_steps": 2}
    samples = {"sample_prompts": pairs.prompts, "sample_at_first": True, "sample_every_n_steps": 4}
    out = tmp_path_factory.mktemp(request.param)
    run = train(request.param, out, **more, **samples)
    return SimpleNamespace(family=request.param, options=more, **vars(run))


@pytest.mark.rows("C57", "C58", "R336")
def test_the_printed_command_with_what_fits_24_gb(run_script, models, pairs, tmp_path):
    line = PRINTED.replace(" --deepspeed", f" {IN_24_GB}").format(
        model=models.flux["pretrained_model_name_or_path"], data=pairs.config, out=tmp_path,
        **{name: models.flux[name] for name in ("clip_l", "t5xxl", "ae")},
    )  # fmt: skip
    words = shlex.split(line.replace("\\", "/"))
    words.append(f"--tokenizer_cache_dir={models.flux['tokenizer_cache_dir']}")
    start = words.index("flux_train_control_net.py")
    done = run_script(*words[start:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(pairs.images.glob("*_flux.npz"))) == len(list(pairs.images.glob("*_flux_te.npz"))) == 4
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == ["flux-cn.html", "flux-cn.safetensors"]
    weights = load_file(tmp_path / "flux-cn.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert weights["controlnet_blocks.0.weight"].any()
    with safe_open(tmp_path / "flux-cn.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.architecture"] == "flux-1-dev/controlnet"
    assert not any(key.startswith("ss_") for key in metadata)
    for path in pairs.images.glob("*.npz"):
        path.unlink()


def test_sample_images_show_the_controlnet(whole):
    """A new ControlNet adds nothing; a trained one acts where there is an image for it, and nowhere else."""
    images = {path.name[4:13]: Image.open(path).tobytes() for path in (whole.file.parent / "sample").glob("net_*.png")}
    assert images.keys() == {f"{step:06d}_{prompt:02d}" for step in (0, 4) for prompt in (0, 1)}
    assert images["000000_00"] == images["000000_01"] == images["000004_01"]
    assert images["000004_00"] != images["000000_00"]
    assert whole.said.count("validation loss") == 2


def test_all_of_the_controlnet_learns_that_reaches_the_model(whole):
    """Of the last block, what it makes of the text goes nowhere."""
    before = load_file(whole.file.parent / "net-step00000002.safetensors")
    still = {key for key, value in whole.weights.items() if torch.equal(value, before[key])}
    last = r"(double_blocks\.1\.txt_(attn\.proj|mlp)|transformer_blocks\.0\.(attn\.to_add_out|ff_context))\."
    assert {key for key in still if not re.match(last, key)} <= {"pos_embed.pos_embed"}  # a table, and no weight


def test_what_is_saved_goes_on_and_opens_in_diffusers(whole, train, tmp_path):
    """With a rate that changes nothing much, and a base in 8 bits."""
    kept = {"learning_rate": 1e-12, "max_train_steps": 1, "controlnet_model_name_or_path": whole.file}
    again = train(whole.family, tmp_path, **kept, save_model_as="diffusers", fp8_base=True)
    model_class = FluxControlNetModel if whole.family == "flux" else SD3ControlNetModel
    theirs = model_class.from_pretrained(tmp_path / "net").state_dict()
    ours = CONTROL_MAP.to_model(whole.weights) if whole.family == "flux" else whole.weights
    assert furthest(ours, theirs) < 1e-9
    assert "ControlNet read from" in again.said
    assert "Transformer2DModel: the weights of" in again.said


def test_a_resumed_run_writes_the_same_bytes(whole, train, tmp_path):
    state = whole.file.parent / "net-step00000002-state"
    again = train(whole.family, tmp_path, resume=state, **whole.options)
    assert furthest(again.weights, whole.weights) == 0


@pytest.mark.rows("R338", "R339")
def test_two_processes_train_as_one_that_accumulates(train, tmp_path):
    """Whether the ControlNet is sharded over them or not. Weights without a gradient do not decay in either."""
    common = {"max_train_steps": 2, "optimizer_type": "SGD", "learning_rate": 0.1, "cache_latents": True}
    common["optimizer_args"] = ["weight_decay=0.1"]
    one = train("flux", tmp_path / "one", gradient_accumulation_steps=2, **common)
    two = train("flux", tmp_path / "two", processes=2, **common)
    sharded = train("flux", tmp_path / "sharded", processes=2, deepspeed=True, zero_stage=3, **common)
    assert one.weights["controlnet_blocks.0.weight"].abs().max() > 1e-5
    assert furthest(one.weights, two.weights) < 1e-6
    assert furthest(one.weights, sharded.weights) < 1e-6
    assert "FluxControlNetModel: --deepspeed over 2 processes" in sharded.said


@pytest.mark.rows("R340")
def test_steps_inside_the_backward_pass_are_plain_ones(train, tmp_path):
    """Block by block, with the base's blocks swapped as far as this machine does."""
    plain = train("flux", tmp_path / "plain", max_train_steps=2, max_grad_norm=0)
    more = {"blockwise_fused_optimizers": True, "double_blocks_to_swap": 1, "gradient_checkpointing": True}
    fused = train("flux", tmp_path / "fused", max_train_steps=2, **more)
    assert furthest(fused.weights, plain.weights) < 1e-6
