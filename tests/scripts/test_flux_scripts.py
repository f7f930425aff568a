"""flux_train_network.py and flux_train.py from the outside, on a tiny random model in separate files.

Only paths, sizes and lengths of the printed command lines are changed.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library import cli, registry
from library.options import parsing, validation
from library.training import loop, placement
from networks.lora_flux import MODULE as lora_flux
from tests.builders.flux import write_flux, write_parts
from tests.scripts.starting import as_words
from tests.scripts.weights import furthest, hash_of

CONCEPT = Path("examples/concept/10_sks flower")
SIDES = (128, 96, 64)
MULTI_RESOLUTION = """
[general]
flip_aug = true
color_aug = false
keep_tokens_separator= "|||"
shuffle_caption = false
caption_tag_dropout_rate = 0
caption_extension = ".txt"
bucket_reso_steps = 32
min_bucket_reso = 64

[[datasets]]
batch_size = 2
enable_bucket = true
resolution = [{0}, {0}]

  [[datasets.subsets]]
  image_dir = "{folder}"
  num_repeats = 1

[[datasets]]
batch_size = 3
enable_bucket = true
resolution = [{1}, {1}]

  [[datasets.subsets]]
  image_dir = "{folder}"
  num_repeats = 1

[[datasets]]
batch_size = 4
enable_bucket = true
resolution = [{2}, {2}]

  [[datasets.subsets]]
  image_dir = "{folder}"
  num_repeats = 1
"""
LORA = (
    "accelerate launch --mixed_precision bf16 --num_cpu_threads_per_process 1 flux_train_network.py "
    "--pretrained_model_name_or_path {model} --clip_l {clip_l} --t5xxl {t5xxl} --ae {ae} --cache_latents_to_disk "
    "--save_model_as safetensors --sdpa --persistent_data_loader_workers --max_data_loader_n_workers 2 --seed 42 "
    "--gradient_checkpointing --mixed_precision bf16 --save_precision bf16 --network_module networks.lora_flux "
    "--network_dim 4 --network_train_unet_only --optimizer_type adamw8bit --learning_rate 1e-4 "
    "--cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk --fp8_base --highvram --max_train_epochs 2 "
    "--save_every_n_epochs 1 --dataset_config {data} --output_dir {out} --output_name flux-lora-name "
    "--timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw --guidance_scale 1.0"
)
WHOLE_MODEL = (
    "accelerate launch --mixed_precision bf16 --num_cpu_threads_per_process 1 flux_train.py "
    "--pretrained_model_name_or_path {model} --clip_l {clip_l} --t5xxl {t5xxl} --ae {ae} --save_model_as safetensors "
    "--sdpa --persistent_data_loader_workers "
    "--max_data_loader_n_workers 2 --seed 42 --gradient_checkpointing --mixed_precision bf16 --save_precision bf16 "
    "--dataset_config {data} --output_dir {out} --output_name output-name --learning_rate 5e-5 --max_train_epochs 2 "
    "--sdpa --highvram --cache_text_encoder_outputs_to_disk --cache_latents_to_disk --save_every_n_epochs 1 "
    '--optimizer_type adafactor --optimizer_args "relative_step=False" "scale_parameter=False" "warmup_init=False" '
    "--lr_scheduler constant_with_warmup --max_grad_norm 0.0 --timestep_sampling shift --discrete_flow_shift 3.1582 "
    "--model_prediction_type raw --guidance_scale 1.0 --fused_backward_pass --blocks_to_swap 8 --full_bf16"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> SimpleNamespace:
    """The transformer in bfloat16, and the options that name the other parts."""
    folder = tmp_path_factory.mktemp("model")
    return SimpleNamespace(file=write_flux(folder, dtype=torch.bfloat16), parts=write_parts(folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SimpleNamespace:
    """Two captioned images, with latents and text outputs beside them once they were cached."""
    folder = tmp_path_factory.mktemp("data")
    images = folder / "1_a red house"
    images.mkdir()
    for name, caption in (("flower_00", "a red house"), ("flower_01", "a blue tree of a cat")):
        with Image.open(CONCEPT / f"{name}.png") as image:
            image.resize((128, 128)).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(caption, encoding="utf-8")
    config = folder / "data.toml"
    config.write_text(MULTI_RESOLUTION.format(*SIDES, folder=images.as_posix()), encoding="utf-8")
    return SimpleNamespace(folder=folder, images=images, config=config)


@pytest.fixture(scope="module")
def printed_lora(tmp_path_factory, run_script, model, data) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("lora")
    printed = ran(run_script, LORA, model, data, out)
    return SimpleNamespace(out=out, printed=printed)


def ran(run_script, printed: str, model, data, out) -> str:
    """Runs a printed command line without its launcher. T5's tokenizer, which the tiny model brings, is added."""
    line = printed.format(model=model.file, data=data.config, out=out, **model.parts)
    words = shlex.split(line.replace("\\", "/"))
    script = next(number for number, word in enumerate(words) if word.endswith(".py"))
    done = run_script(*words[script:], f"--tokenizer_cache_dir={model.parts['tokenizer_cache_dir']}")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def short(script: str, model, data, out: Path, **changes: object) -> list[str]:
    """A short command line in float32, with captions of 16 tokens for T5."""
    options: dict[str, object] = {
        "pretrained_model_name_or_path": model.file,
        **model.parts,
        "train_data_dir": data.folder,
        "caption_extension": ".txt",
        "output_dir": out,
        "output_name": "model",
        "resolution": 64,
        "bucket_reso_steps": 32,
        "enable_bucket": True,
        "min_bucket_reso": 64,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "t5xxl_max_token_length": 16,
        "model_prediction_type": "raw",
        "max_data_loader_n_workers": 0,
        "seed": 1,
        "save_precision": "float",
        **({"network_module": "networks.lora_flux"} if script == "flux_train_network.py" else {}),
        **changes,
    }
    return [script, *as_words(options)]


def trained(run_script, line: list[str], processes: int = 1) -> str:
    done = run_script(*line, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


# ---- the printed command lines


@pytest.mark.rows("C42", "C64", "R3", "R193", "R344", "R346", "R349", "R350", "R351", "R352", "R360")
def test_a_lora_with_cached_latents_and_texts_on_a_base_in_8_bits(printed_lora):
    files = sorted(path.name for path in printed_lora.out.iterdir())
    assert files == ["flux-lora-name-000001.safetensors", "flux-lora-name.html", "flux-lora-name.safetensors"]
    weights = load_file(printed_lora.out / "flux-lora-name.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert all(value.isfinite().all() for value in weights.values())
    layers = {key.partition(".")[0] for key in weights}
    assert layers == {
        *(
            f"lora_unet_double_blocks_{number}_{stream}_{layer}"
            for number in range(2)
            for stream in ("img", "txt")
            for layer in ("mod_lin", "attn_qkv", "attn_proj", "mlp_0", "mlp_2")
        ),
        *(
            f"lora_unet_single_blocks_{number}_{layer}"
            for number in range(2)
            for layer in ("linear1", "linear2", "modulation_lin")
        ),
    }
    assert weights.keys() == {
        f"{layer}.{part}" for layer in layers for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert all(weights[f"{layer}.lora_up.weight"].any() for layer in layers if "double_blocks_0" in layer)
    with safe_open(printed_lora.out / "flux-lora-name.safetensors", "pt") as file:
        metadata = file.metadata()
    told = {
        "ss_base_model_version": "flux1",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": "4",
        "ss_timestep_sampling": "shift",
        "ss_discrete_flow_shift": "3.1582",
        "ss_model_prediction_type": "raw",
        "ss_guidance_scale": "1.0",
        "modelspec.architecture": "flux-1-dev/lora",
    }
    assert {name: metadata.get(name) for name in told} == told


@pytest.mark.rows("R379")
def test_one_file_holds_the_latents_of_all_resolutions(printed_lora, data):
    (path, _) = sorted(data.images.glob("*_flux.npz"))
    assert path.name == "flower_00_0128x0128_flux.npz"
    with np.load(path) as file:
        shapes = {key: file[key].shape for key in file if re.match(r"latents(_flipped)?_\d", key)}
    assert shapes == {
        f"latents{turned}_{side // 8}x{side // 8}": (16, side // 8, side // 8)
        for side in SIDES
        for turned in ("", "_flipped")
    }
    with np.load(data.images / "flower_00_flux_te.npz") as file:
        texts = {name: file[name].shape for name in ("l_pooled", "t5_out", "txt_ids", "t5_attn_mask")}
        assert not file["apply_t5_attn_mask"]
    assert texts == {"l_pooled": (64,), "t5_out": (512, 48), "txt_ids": (512, 3), "t5_attn_mask": (512,)}


@pytest.mark.rows("C61", "R391", "R393", "R394", "R397")
def test_a_whole_model_in_bf16_from_cached_texts(run_script, tmp_path, model, data, printed_lora):
    printed = ran(run_script, WHOLE_MODEL, model, data, tmp_path)
    assert "--blocks_to_swap: has no effect on a CPU" in printed
    assert "latents on disk: 6 used as they are" in printed, "those of the LoRA's run"
    assert "caching text encoder outputs" not in printed
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["output-name-000001.safetensors", "output-name.html", "output-name.safetensors"]
    before, after = load_file(model.file), load_file(tmp_path / "output-name.safetensors")
    assert after.keys() == before.keys(), "the transformer, and nothing else"
    forms = {name: (value.dtype, value.shape) for name, value in before.items()}
    assert {name: (value.dtype, value.shape) for name, value in after.items()} == forms
    assert all(value.isfinite().all() for value in after.values())
    blocks = [name for name in after if re.match(r"(double|single)_blocks\.\d+\..*\.weight", name)]
    assert len(blocks) == 2 * 10 + 2 * 3
    assert not [name for name in blocks if torch.equal(after[name], before[name])]
    with safe_open(tmp_path / "output-name.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "flux-1-dev"
    assert not [name for name in metadata if name.startswith("ss_")]


FRAGMENTS = {
    "C43": "--blocks_to_swap 10",
    "C44": '--optimizer_type adafactor --optimizer_args "relative_step=False" "scale_parameter=False" '
    '"warmup_init=False" --lr_scheduler constant_with_warmup --max_grad_norm 0.0',
    "C45": "--blocks_to_swap 16",
    "C46": "--blocks_to_swap 18",
    "C47": "--timestep_sampling sigma --model_prediction_type raw --discrete_flow_shift 1.0 --loss_type l2",
    "C48": "--timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw --guidance_scale 1.0",
    "C49": "--timestep_sampling sigmoid --model_prediction_type raw --guidance_scale 1.0",
    "C50": '--network_args "train_t5xxl=True"',
    "C51": "--text_encoder_lr 1e-4 1e-5",
    "C52": '--network_args "split_qkv=True"',
    "C53": '--network_args "img_attn_dim=4" "img_mlp_dim=8" "txt_attn_dim=2" "txt_mlp_dim=2" "img_mod_dim=2" '
    '"txt_mod_dim=2" "single_dim=4" "single_mod_dim=2" "verbose=True"',
    "C54": '--network_args "in_dims=[4,2,2,2,4]"',
    "C55": '--network_args "train_double_block_indices=0,1,8-12,18" "train_single_block_indices=3,10,20-25,37"',
    "C56": '--network_args "train_double_block_indices=none" "train_single_block_indices=10-15"',
}


def checked(script: str, line: str):
    """The options of a command line, and the lines of problems and warnings."""
    groups = registry.groups_for("flux", registry.FAMILIES["flux"].scripts[script])
    needed = "--pretrained_model_name_or_path=flux1-dev.safetensors --train_data_dir=. --resolution=512 --output_dir=x"
    if script == "flux_train_network":
        needed += " --network_module=networks.lora_flux"
    opts = parsing.parse_options(groups, shlex.split(f"{needed} {line}"))
    traits = registry.FAMILIES["flux"].traits
    return opts, validation.problems(opts, traits), validation.warnings(opts, traits)


@pytest.mark.rows("R353", "R363", "R398")
@pytest.mark.rows("C43", "C44", "C45", "C46", "C47", "C48", "C49", "C50", "C51", "C52", "C53", "C54", "C55", "C56")
def test_printed_fragments_are_accepted():
    for name, fragment in FRAGMENTS.items():
        more = "" if "prediction_type" in fragment else " --model_prediction_type raw"
        opts, problems, warnings = checked("flux_train_network", fragment + more)
        assert (name, problems, warnings) == (name, [], [])
        arguments = dict(entry.split("=", 1) for entry in opts.method.network_args or [])
        assert lora_flux.check(arguments, dim=4, ranks_from_file=False) == []


@pytest.mark.rows("R369", "R392", "R398")
@pytest.mark.parametrize(
    ("script", "line", "count"),
    [
        ("flux_train_network", "--split_mode", 18),
        ("flux_train_network", "--split_mode --blocks_to_swap 4", 4),
        ("flux_train", "--double_blocks_to_swap 6 --single_blocks_to_swap 5 --fused_backward_pass", 8),
        ("flux_train", "--single_blocks_to_swap 8 --fused_backward_pass", 4),
        ("flux_train", "--double_blocks_to_swap 6 --blocks_to_swap 3 --fused_backward_pass", 3),
        ("flux_train", "", 0),
    ],
)
def test_older_words_for_block_swap(script, line, count):
    opts, problems, warnings = checked(script, line)
    assert (opts.swap.count, problems) == (count, [])
    for flag in re.findall(r"--(?:double_|single_)blocks_to_swap|--split_mode", line):
        assert any(said.startswith(f"{flag}: deprecated; use --blocks_to_swap") for said in warnings)


@pytest.mark.rows("R365", "R373", "R395", "R397", "R399")
@pytest.mark.parametrize(
    ("script", "line", "said"),
    [
        (
            "flux_train_network",
            "--cache_text_encoder_outputs --network_args train_t5xxl=True",
            "--cache_text_encoder_outputs: T5 cannot be trained when its outputs are cached",
        ),
        ("flux_train_network", "--cache_text_encoder_outputs --network_train_unet_only", None),
        ("flux_train_network", "--cache_text_encoder_outputs", None),
        ("flux_train_network", "--network_args train_t5xxl=True", None),
        (
            "flux_train",
            "--blocks_to_swap 8 --fused_backward_pass --cpu_offload_checkpointing --gradient_checkpointing",
            "--blocks_to_swap: cannot be used with --cpu_offload_checkpointing",
        ),
        (
            "flux_train",
            "--full_bf16 --mixed_precision bf16 --fused_backward_pass --max_grad_norm 0 --optimizer_type adafactor "
            "--cpu_offload_checkpointing --gradient_checkpointing",
            None,
        ),
        ("flux_train", "--full_bf16 --mixed_precision bf16 --fused_backward_pass --blocks_to_swap 8", None),
        ("flux_train", "--blockwise_fused_optimizers --full_bf16 --mixed_precision bf16", None),
        (
            "flux_train",
            "--blockwise_fused_optimizers --fused_backward_pass",
            "--blockwise_fused_optimizers: cannot be used with --fused_backward_pass",
        ),
        (
            "flux_train",
            "--blockwise_fused_optimizers --full_bf16 --mixed_precision bf16 --stochastic_rounding",
            "--blockwise_fused_optimizers: cannot be used with --stochastic_rounding",
        ),
    ],
)
def test_what_goes_together(script, line, said):
    _, problems, _ = checked(script, line)
    assert [problem.startswith(said) for problem in problems] == [True] if said else problems == []


def refused(capsys, line: list[str]) -> list[str]:
    """Runs a command line in this process, which must be refused; returns what it printed."""
    with pytest.raises(SystemExit) as stopped:
        cli.run("flux", "network", line[1:])
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()


def test_t5_trained_from_a_cache_is_refused_in_one_line_at_the_start(model, data, tmp_path, capsys):
    arguments = {"cache_text_encoder_outputs": True, "network_args": ["train_t5xxl=True"]}
    (line,) = refused(capsys, short("flux_train_network.py", model, data, tmp_path, **arguments))
    assert "T5 cannot be trained when its outputs are cached" in line


def test_nothing_is_encoded_before_too_many_blocks_are_refused(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(placement, "swaps", lambda opts, device: True)  # as on a GPU
    shutil.copytree(data.images, tmp_path / "data" / "1_x", ignore=shutil.ignore_patterns("*.npz"))
    arguments = {"blocks_to_swap": 99, "cache_text_encoder_outputs_to_disk": True, "cache_latents_to_disk": True}
    arguments |= {"train_data_dir": tmp_path / "data"}
    *_, said = refused(capsys, short("flux_train_network.py", model, data, tmp_path, **arguments))
    assert said == "error: --blocks_to_swap: 99 are more than this model can swap; at most 1"
    assert not list(tmp_path.rglob("*.npz"))


def test_broken_weights_do_not_replace_the_last_good_ones(model, data, tmp_path, capsys, monkeypatch):
    """Their loss would tell a step later, when the copy that is to be deleted is gone."""

    def update(run, parameters):
        norm = whole(run, parameters)
        if any(tmp_path.glob("*-state")):  # the first step is done
            parameters[0].data.fill_(torch.nan)
        return norm

    whole = loop._update
    monkeypatch.setattr(loop, "_update", update)
    arguments = {"save_every_n_steps": 1, "save_last_n_steps": 1, "save_state": True, "max_train_steps": 3}
    said = refused(capsys, short("flux_train_network.py", model, data, tmp_path, **arguments))
    assert said[-2].startswith("error: the weights are no longer finite after step 2; they are not saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-step00000001-state",
        "model-step00000001.safetensors",
        "model.html",
    ]


def test_outputs_of_text_encoders_that_a_file_brings_to_training_cannot_be_cached(
    everything, model, data, tmp_path, capsys
):
    arguments = {"network_weights": everything.out / "model.safetensors", "dim_from_weights": True}
    arguments["cache_text_encoder_outputs"] = True
    *_, said = refused(capsys, short("flux_train_network.py", model, data, tmp_path, **arguments))
    assert said.startswith("error: --cache_text_encoder_outputs: every text encoder is trained")


@pytest.mark.rows("R408")
def test_blocks_of_a_trained_model_are_not_swapped_in_several_processes(run_script, model, data, tmp_path):
    """There the weights would have to be stepped where they are, before the processes have met."""
    swap = {"double_blocks_to_swap": 1, "single_blocks_to_swap": 2, "fused_backward_pass": True, "max_grad_norm": 0}
    done = run_script(*short("flux_train.py", model, data, tmp_path, **swap), processes=2)
    assert done.returncode == 2
    assert "steps inside the backward pass cannot be used with several processes; leave them out" in done.stderr
    assert "Traceback" not in done.stderr
    _, problems, _ = checked("flux_train", "--double_blocks_to_swap 1 --single_blocks_to_swap 2")
    assert [problem.startswith("--blocks_to_swap: needs --fused_backward_pass") for problem in problems] == [True]


# ---- a LoRA with everything, its samples and its states

NETWORK_ARGS = [
    "split_qkv=True", "train_t5xxl=True", "img_attn_dim=2", "img_mlp_dim=8", "txt_attn_dim=3", "txt_mlp_dim=2",
    "img_mod_dim=0", "txt_mod_dim=2", "single_dim=5", "single_mod_dim=2", "in_dims=[4,2,2,2,0]",
    "train_double_block_indices=1", "train_single_block_indices=0-1", "verbose=True",
]  # fmt: skip
EVERYTHING = {
    "network_args": [*NETWORK_ARGS, "ggpo_sigma=0.03", "ggpo_beta=0.01"],
    "network_dim": 4,
    "text_encoder_lr": ["1e-4", "1e-5"],
    "timestep_sampling": "flux_shift",
    "apply_t5_attn_mask": True,
    "save_state": True,
    "save_every_n_steps": 1,
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory, run_script, model, data) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("everything")
    prompts = out / "prompts.txt"
    line = "a red house --n a cat --w 64 --h 96 --s 2 --d 7 --g {}\n"
    prompts.write_text("".join(line.format(scale) for scale in (1, 9, 1)) + "a blue cat --w 64 --h 64 --s 1 --l 3\n")
    samples = {"sample_prompts": prompts, "sample_every_n_steps": 2}
    printed = trained(run_script, short("flux_train_network.py", model, data, out, **EVERYTHING, **samples))
    weights = load_file(out / "model.safetensors")
    return SimpleNamespace(out=out, printed=printed, weights=weights)


@pytest.mark.rows("R376", "R377", "R380", "R381", "R382", "R383")
def test_ranks_by_type_of_layer_and_by_block(everything):
    ranks = {
        key.removesuffix(".lora_down.weight").removeprefix("lora_unet_"): len(value)
        for key, value in everything.weights.items()
        if key.endswith("lora_down.weight") and key.startswith("lora_unet_")
    }
    single = {"linear1": 4 * 5, "linear2": 5, "modulation_lin": 2}  # query, key, value, MLP side by side
    assert ranks == {
        "double_blocks_1_img_attn_qkv": 3 * 2,
        "double_blocks_1_img_attn_proj": 2,
        "double_blocks_1_img_mlp_0": 8,
        "double_blocks_1_img_mlp_2": 8,
        "double_blocks_1_txt_attn_qkv": 3 * 3,
        "double_blocks_1_txt_attn_proj": 3,
        "double_blocks_1_txt_mlp_0": 2,
        "double_blocks_1_txt_mlp_2": 2,
        "double_blocks_1_txt_mod_lin": 2,
        **{f"single_blocks_{number}_{layer}": rank for number in range(2) for layer, rank in single.items()},
        "img_in": 4,
        **{f"{name}_in_{layer}_layer": 2 for name in ("time", "vector", "guidance") for layer in ("in", "out")},
    }
    assert "lora_unet_double_blocks_1_img_mlp_0: rank 8" in everything.printed


@pytest.mark.rows("R370", "R372")
def test_clip_l_and_t5_learn_at_their_own_rates(everything):
    """AdamW's first two steps are about as large as the rate, whatever the gradient."""
    for part, layer, rate in (("te1", "text_model_encoder_layers", 1e-4), ("te3", "encoder_block", 1e-5)):
        ups = {key: value for key, value in everything.weights.items() if key.startswith(f"lora_{part}_{layer}_")}
        ups = {key: value for key, value in ups.items() if key.endswith("lora_up.weight")}
        assert len(ups) >= 12
        assert max(value.abs().max().item() for value in ups.values()) == pytest.approx(2 * rate, rel=0.1)
    with safe_open(everything.out / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["ss_text_encoder_lr"]) == [1e-4, 1e-5]
    assert metadata["ss_apply_t5_attn_mask"] == "True"
    assert metadata["ss_timestep_sampling"] == "flux_shift"


@pytest.mark.rows("R283")
def test_images_are_sampled_with_the_guidance_that_the_prompt_asks_for(everything):
    images = [np.asarray(Image.open(path)) for path in sorted((everything.out / "sample").glob("*.png"))]
    assert [image.shape for image in images] == [(96, 64, 3)] * 3 + [(64, 64, 3)]
    low, high, again, _ = images
    assert np.array_equal(low, again)
    assert not np.array_equal(low, high)


def test_a_resumed_run_ends_in_the_same_weights(everything, run_script, tmp_path, model, data):
    changes = {**EVERYTHING, "resume": everything.out / "model-step00000001-state", "save_state": None}
    trained(run_script, short("flux_train_network.py", model, data, tmp_path, **changes))
    assert hash_of(tmp_path / "model.safetensors") == hash_of(everything.out / "model.safetensors")


# ---- caches and processes


@pytest.mark.rows("R371", "R373")
def test_two_processes_that_encode_equal_one_that_accumulates_and_has_t5_cached(run_script, tmp_path, model, data):
    """CLIP-L is trained all the while, so that its part of the cache must not be used."""
    common = {"learning_rate": 1e-2, "optimizer_type": "SGD", "network_alpha": 4, "cache_latents": True}
    cached = {"gradient_accumulation_steps": 2, "cache_text_encoder_outputs": True}
    for name, more, processes in (("one", cached, 1), ("two", {}, 2)):
        line = short("flux_train_network.py", model, data, tmp_path / name, **common, **more)
        printed = trained(run_script, line, processes)
        assert ("caching text encoder outputs" in printed) == (name == "one")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert furthest(one, two) < 1e-6
    for part in ("te1", "unet"):
        ups = [value for key, value in one.items() if key.startswith(f"lora_{part}_") and key.endswith("up.weight")]
        assert max(value.abs().max().item() for value in ups) > 1e-5, part
    assert not [key for key in one if key.startswith("lora_te3_")]


# ---- whole models


@pytest.mark.rows("R391", "R395", "R396")
def test_blocks_stepped_inside_the_backward_pass_and_a_resumed_run_are_the_plain_run(run_script, tmp_path, model, data):
    """The first run steps each block by itself; the second goes on from its first step and steps all at once."""
    common = {"cache_latents": True, "cache_text_encoder_outputs": True, "max_grad_norm": 0}
    blockwise = {"blockwise_fused_optimizers": True, "mem_eff_save": True, "save_state": True, "save_every_n_steps": 1}
    trained(run_script, short("flux_train.py", model, data, tmp_path / "blocks", **common, **blockwise))
    state = tmp_path / "blocks" / "model-step00000001-state"
    trained(run_script, short("flux_train.py", model, data, tmp_path / "plain", **common, resume=state))
    before = load_file(model.file)
    blocks, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("blocks", "plain"))
    first = load_file(tmp_path / "blocks" / "model-step00000001.safetensors")
    assert blocks.keys() == plain.keys() == before.keys()
    assert all(torch.equal(blocks[name], plain[name]) for name in blocks)
    assert not [name for name in blocks if name.endswith("weight") and torch.equal(blocks[name], first[name])]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """A dataset config: three batches of an epoch, and one that is kept for validation."""
    config = tmp_path_factory.mktemp("held_out") / "data.json"
    subset = {"image_dir": CONCEPT.as_posix(), "caption_extension": ".txt"}
    config.write_text(json.dumps({"datasets": [{"batch_size": 4, "validation_split": 0.25, "subsets": [subset]}]}))
    return config


@pytest.fixture(scope="module")
def standing(run_script, model, data, held_out):
    """Runs a whole model's script with steps that change nothing, so that every validation gives the same loss."""

    def run(out: Path, processes: int = 1, **changes: object) -> list[str]:
        options: dict[str, object] = {
            "train_data_dir": None,
            "caption_extension": None,
            "dataset_config": held_out,
            "cache_latents": True,
            "cache_text_encoder_outputs": True,
            "learning_rate": 1e-30,
            "max_train_steps": 20,
            "early_stop_patience": 1,
            "save_every_n_epochs": 1,
            "save_best_validation": True,
            **changes,
        }
        said = trained(run_script, short("flux_train.py", model, data, out, **options), processes)
        assert "epochs" in said
        return re.findall(r"validation loss .*|stopping at .*", said)

    return run


def copies(out: Path) -> list[str]:
    return sorted(path.stem.removeprefix("model") for path in out.glob("*.safetensors"))


def test_a_whole_model_that_no_longer_improves_is_not_trained_on(standing, tmp_path):
    """Where the end of an epoch is such a step as well, its loss counts once."""
    said = standing(tmp_path, validate_every_n_steps=3, validate_every_n_epochs=1, early_stop_patience=2)
    assert [re.sub(r"^.* at |: [+-].*", "", line) for line in said] == [
        "step 3",
        "step 6",
        "step 6: 2 validations without improvement",
    ]
    assert copies(tmp_path) == ["", "-000001", "-000002", "-best"]


def test_an_epoch_that_is_not_over_has_no_copy_and_processes_find_the_same_loss(standing, tmp_path):
    one = standing(tmp_path / "one", validate_every_n_steps=2, early_stop_patience=2)
    assert [re.sub(r"^.* at |: [+-].*", "", line) for line in one[:2]] == ["step 2", "step 4"]
    assert copies(tmp_path / "one") == ["", "-000001", "-best"]
    two = standing(tmp_path / "two", processes=2, validate_every_n_steps=2, early_stop_patience=2)
    assert two == one
