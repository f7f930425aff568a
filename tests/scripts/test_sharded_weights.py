"""Whole models whose weights are sharded over two processes: FSDP by `accelerate launch`, and DeepSpeed's options.

What is trained, saved and resumed must be what one process that holds everything makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.builders.flux import write_flux, write_parts
from tests.builders.hashes import tensor_hash
from tests.builders.sd3 import write_encoder_file, write_tiny_sd3
from tests.builders.t5 import write_t5_tokenizer
from tests.scripts.weights import furthest

FSDP_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_version: 2
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
main_process_port: 0
"""
STEPS = 4


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "1_thing"
    folder.mkdir()
    for number, caption in enumerate(("a red house", "a blue house", "a cat", "tree of a cat")):
        Image.new("RGB", (64, 64), (number * 60, 90, 120)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    return folder.parent


@pytest.fixture(scope="module")
def train(run_script, images) -> Callable[..., str]:
    """A short run in float32; returns what was logged."""

    def run(script: str, out: Path, *more: object, **how: object) -> str:
        line = [
            *(script, f"--train_data_dir={images}", "--caption_extension=.txt", "--resolution=64"),
            *(f"--output_dir={out}", "--output_name=model", f"--max_train_steps={STEPS}", "--learning_rate=1e-3"),
            *("--max_data_loader_n_workers=0", "--seed=1", "--save_precision=float", "--gradient_checkpointing"),
            *("--cache_latents", "--save_every_n_steps=2", "--save_state", "--ema", "--ddp_timeout=5"),
            *map(str, more),
        ]
        done = run_script(*line, **how)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    return run


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("flux")
    parts = [f"--{name}={value}" for name, value in write_parts(folder).items()]
    return [f"--pretrained_model_name_or_path={write_flux(folder)}", *parts, "--t5xxl_max_token_length=16"]


@pytest.fixture(scope="module")
def flux_runs(tmp_path_factory, train, flux) -> SimpleNamespace:
    """One process that accumulates two batches; and two, started as `accelerate config` says, that share the model."""
    folder = tmp_path_factory.mktemp("runs")
    config, prompts = folder / "fsdp.yaml", folder / "prompts.txt"
    config.write_text(FSDP_CONFIG, encoding="utf-8")
    prompts.write_text("a red house --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    samples = ("--sample_every_n_steps=2", f"--sample_prompts={prompts}")
    launcher = ("-m", "accelerate.commands.launch", f"--config_file={config}")
    whole, sharded = folder / "whole", folder / "sharded"
    train("flux_train.py", whole, *flux, *samples, "--gradient_accumulation_steps=2")
    printed = train("flux_train.py", sharded, *flux, *samples, launcher=launcher)
    return SimpleNamespace(whole=whole, sharded=sharded, printed=printed)


def test_two_processes_that_share_a_model_make_what_one_makes(flux_runs):
    printed = re.search(r"FluxTransformer2DModel: FSDP over 2 processes, ([\d.]+) of ([\d.]+) MiB", flux_runs.printed)
    own, whole = printed.groups()
    assert 0.4 < float(own) / float(whole) < 0.6
    assert flux_runs.printed.count("saved the state") == 3
    for name in ("model-step00000002.safetensors", "model.safetensors", "model-state/model.safetensors"):
        assert furthest(load_file(flux_runs.whole / name), load_file(flux_runs.sharded / name)) < 1e-6
    trained = load_file(flux_runs.sharded / "model.safetensors")
    earlier = load_file(flux_runs.sharded / "model-step00000002.safetensors")
    assert any(not trained[key].equal(earlier[key]) for key in trained)


def test_their_sample_images_are_the_same(flux_runs):
    images = [sorted((folder / "sample").glob("*.png")) for folder in (flux_runs.whole, flux_runs.sharded)]
    assert [len(found) for found in images] == [2, 2]
    for one, two in zip(*images, strict=True):
        with Image.open(one) as left, Image.open(two) as right:
            off = [abs(a - b) for a, b in zip(left.tobytes(), right.tobytes(), strict=True)]
        assert max(off) <= 1


@pytest.mark.parametrize("processes", [2, 1])
def test_a_state_goes_on_with_as_many_processes_and_with_one(train, flux, flux_runs, tmp_path, monkeypatch, processes):
    """The state holds whole tensors, so it does not matter how many processes shared them."""
    resume = f"--resume={flux_runs.sharded / 'model-step00000002-state'}"
    if processes == 2:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as the launcher of the first run sets it
        monkeypatch.setenv("FSDP_VERSION", "2")
    more = [] if processes == 2 else ["--gradient_accumulation_steps=2"]
    printed = train("flux_train.py", tmp_path, *flux, resume, *more, processes=processes)
    assert "resumed from" in printed
    last = "model.safetensors"
    if processes == 2:
        assert tensor_hash(tmp_path / last) == tensor_hash(flux_runs.sharded / last)
    assert furthest(load_file(tmp_path / last), load_file(flux_runs.sharded / last)) < 1e-6


@pytest.fixture(scope="module")
def sd3(tmp_path_factory, train) -> SimpleNamespace:
    """Denoiser, CLIP-L, CLIP-G and T5, all trained; with SGD, which does not magnify the rounding of sums."""
    folder = tmp_path_factory.mktemp("sd3")
    model = write_tiny_sd3(folder / "sd3.safetensors", "5-medium")
    encoders = {"clip_l": "te1", "clip_g": "te2", "t5xxl": "te3"}
    parts = [f"--{n}={write_encoder_file(folder / f'{n}.safetensors', p)}" for n, p in encoders.items()]
    write_t5_tokenizer(folder / "tokenizers" / "google_t5-v1_1-xxl")
    options = (
        *(f"--pretrained_model_name_or_path={model}", *parts, f"--tokenizer_cache_dir={folder / 'tokenizers'}"),
        *("--train_text_encoder", "--train_t5xxl", "--t5xxl_max_token_length=16", "--save_t5xxl"),
        *("--optimizer_type=SGD", "--learning_rate=0.1"),
    )
    train("sd3_train.py", folder / "whole", *options, "--gradient_accumulation_steps=2")
    return SimpleNamespace(whole=folder / "whole", options=options)


@pytest.mark.rows("R192", "R471")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_options_shard_denoiser_and_text_encoders(train, sd3, tmp_path, stage):
    printed = train("sd3_train.py", tmp_path, *sd3.options, "--deepspeed", f"--zero_stage={stage}", processes=2)
    assert "weights are sharded by torch's own FSDP2" in printed
    assert printed.count("--deepspeed over 2 processes") == 4
    files = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (tmp_path, sd3.whole)]
    assert files[0] == files[1]
    assert len(files[0]) > 2
    for name in files[0]:
        assert furthest(load_file(tmp_path / name), load_file(sd3.whole / name)) < 1e-6
    first, last = (
        load_file(tmp_path / name) for name in ("model-step00000002_t5xxl.safetensors", "model_t5xxl.safetensors")
    )
    assert any(not first[key].equal(last[key]) for key in first)
