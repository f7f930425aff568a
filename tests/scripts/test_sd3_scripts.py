"""sd3_train_network.py and sd3_train.py from the outside, on tiny random models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests.builders.hashes import tensor_hash
from tests.builders.sd3 import DEPTH, write_encoder_file, write_tiny_sd3
from tests.builders.t5 import write_t5_tokenizer
from tests.scripts.weights import furthest

ENCODERS = {"clip_l": "te1", "clip_g": "te2", "t5xxl": "te3"}
MMDIT, LORA = "model.diffusion_model.", "lora_unet_joint_blocks_"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """Models without text encoders, these in files of their own, and a tokenizer for T5."""
    folder = tmp_path_factory.mktemp("files")
    found = {flag: write_encoder_file(folder / f"{flag}.safetensors", part) for flag, part in ENCODERS.items()}
    found["large"] = write_tiny_sd3(folder / "sd3.5_large.safetensors", "5-large", torch.float16)
    found["medium"] = write_tiny_sd3(folder / "sd3.5_medium.safetensors", "5-medium")
    write_t5_tokenizer(folder / "tokenizers" / "google_t5-v1_1-xxl")
    return SimpleNamespace(tokenizers=folder / "tokenizers", **found)


@pytest.fixture(scope="module")
def make_data(tmp_path_factory):
    """Writes four images and a dataset config with batches of two at each resolution; returns the config."""

    def make(*resolutions: int) -> Path:
        folder = tmp_path_factory.mktemp("data")
        for number, caption in enumerate(("a red house", "a blue house", "a cat", "tree of a cat")):
            Image.new("RGB", (64, 64), (number * 60, 90, 120)).save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
        config = folder / "dataset_64_bs2.toml"
        config.write_text(
            "[general]\ncaption_extension = '.txt'\nenable_bucket = true\nmin_bucket_reso = 64\n"
            + "".join(
                f"[[datasets]]\nresolution = {resolution}\nbatch_size = 2\n"
                f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n"
                for resolution in resolutions or (64,)
            ),
            encoding="utf-8",
        )
        return config

    return make


@pytest.fixture(scope="module")
def data(make_data) -> Path:
    return make_data()


@pytest.fixture(scope="module")
def ran(run_script, files):
    """Runs a command line; `encoders` are those that it is given. Returns what was logged."""

    def run(command: str, *more: str, encoders=tuple(ENCODERS), fails: str = "", processes: int = 1) -> str:
        given = [part for flag in encoders for part in (f"--{flag}", str(getattr(files, flag)))]
        given += ["--tokenizer_cache_dir", str(files.tokenizers)]
        done = run_script(*command.split(), *more, *given, processes=processes)
        assert done.returncode == (2 if fails else 0), done.stderr[-3000:]
        assert fails in done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    return run


def trained_layers(weights: dict[str, torch.Tensor], start: str = "lora_") -> set[str]:
    """The layers of a LoRA file that have learned something."""
    ups = {key: value for key, value in weights.items() if key.startswith(start) and "lora_up" in key}
    assert all(value.isfinite().all() for value in ups.values())
    return {key.split(".")[0] for key, value in ups.items() if value.any()}


def changed(before: Path, after: Path) -> set[str]:
    """The tensors that hold other numbers than before; both files have the same names, shapes and formats."""
    old, new = load_file(before), load_file(after)
    assert {key: (t.shape, t.dtype) for key, t in old.items()} == {key: (t.shape, t.dtype) for key, t in new.items()}
    assert all(value.isfinite().all() for value in new.values())
    return {key for key in new if not torch.equal(old[key], new[key])}


# ---- LoRA


@pytest.fixture(scope="module")
def printed(tmp_path_factory, ran, files, data) -> SimpleNamespace:
    """The printed command without its launcher, with paths of its own."""
    out = tmp_path_factory.mktemp("printed")
    told = ran(
        f"sd3_train_network.py --pretrained_model_name_or_path {files.large} --cache_latents_to_disk "
        "--save_model_as safetensors --sdpa --persistent_data_loader_workers --max_data_loader_n_workers 2 --seed 42 "
        "--gradient_checkpointing --mixed_precision bf16 --save_precision bf16 --network_module networks.lora_sd3 "
        "--network_dim 4 --network_train_unet_only --optimizer_type adamw8bit --learning_rate 1e-4 "
        "--cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk --fp8_base --highvram --max_train_epochs 2 "
        f"--save_every_n_epochs 1 --dataset_config {data} --output_dir {out} --output_name sd3-lora-name"
    )
    return SimpleNamespace(out=out, told=told, weights=load_file(out / "sd3-lora-name.safetensors"))


@pytest.mark.rows("C66", "R3", "R193", "R428", "R429", "R434")
def test_the_printed_command(printed, data):
    names = sorted(path.name for path in printed.out.iterdir())
    assert names == ["sd3-lora-name-000001.safetensors", "sd3-lora-name.html", "sd3-lora-name.safetensors"]
    beside = {path.name for path in data.parent.glob("*.npz")}
    assert beside == {f"{n}{end}" for n in range(4) for end in ("_0064x0064_sd3.npz", "_sd3_te.npz")}
    assert {value.dtype for value in printed.weights.values()} == {torch.bfloat16}
    assert all(key.startswith(LORA) for key in printed.weights)
    assert len(trained_layers(printed.weights)) == len({key.split(".")[0] for key in printed.weights})
    with safe_open(printed.out / "sd3-lora-name.safetensors", "pt") as file:
        metadata = file.metadata()
    expected = {
        "ss_base_model_version": "5-large",
        "ss_network_module": "networks.lora_sd3",
        "ss_weighting_scheme": "uniform",
        "modelspec.architecture": "stable-diffusion-3-5-large/lora",
    }
    assert {name: metadata.get(name) for name in expected} == expected


TYPE_RANKS = {
    "context_block_attn": 2,
    "context_block_mlp": 3,
    "context_block_adaLN": 4,
    "x_block_attn": 5,  # attn2 too
    "x_block_mlp": 6,
    "x_block_adaLN": 7,
}
EMBEDDERS = ("context_embedder", "t_embedder", "x_embedder", "y_embedder", "final_layer_adaLN", "final_layer_linear")


@pytest.mark.rows(
    "C67", "C68", "C69", "C70", "R428", "R436", "R437", "R438", "R441", "R443", "R444", "R450", "R451", "R452"
)
def test_every_text_encoder_with_ranks_by_layer_and_positions_of_its_own(ran, files, data, tmp_path):
    """All that draws by chance is on; a sample image is made at the end."""
    (tmp_path / "prompts.txt").write_text("a cat --n blue --w 64 --h 96 --s 2 --d 7\n", encoding="utf-8")
    told = ran(
        f"sd3_train_network.py --pretrained_model_name_or_path={files.medium} --dataset_config={data} "
        f"--output_dir={tmp_path} --output_name=lora --network_module=networks.lora_sd3 --network_dim=4 "
        "--max_train_steps=2 --learning_rate=1e-3 --seed=1 --max_data_loader_n_workers=0 "
        "--text_encoder_lr 1e-4 1e-5 5e-6 --enable_scaled_pos_embed --pos_emb_random_crop_rate=0.5 "
        "--clip_l_dropout_rate=0.1 --clip_g_dropout_rate=0.1 --t5_dropout_rate=0.1 --apply_lg_attn_mask "
        "--apply_t5_attn_mask --weighting_scheme=logit_normal --training_shift=1.5 --gradient_checkpointing "
        f"--sample_prompts={tmp_path}/prompts.txt --sample_every_n_steps=2 --network_args",
        *("context_attn_dim=2", "context_mlp_dim=3", "context_mod_dim=4", "x_attn_dim=5", "x_mlp_dim=6"),
        *("x_mod_dim=7", "verbose=True", "emb_dims=[2,3,4,5,6,7]", "train_block_indices=1,2", "train_t5xxl=True"),
    )
    assert "lora_unet_joint_blocks_1_x_block_attn2_qkv: rank 5" in told, "verbose"
    weights = load_file(tmp_path / "lora.safetensors")
    ranks = {key.split(".")[0]: len(value) for key, value in weights.items() if key.endswith("lora_down.weight")}
    in_blocks = {key: rank for key, rank in ranks.items() if key.startswith(LORA)}
    for key, rank in in_blocks.items():
        assert rank == next(r for kind, r in TYPE_RANKS.items() if kind in key), key
    assert {int(key.removeprefix(LORA).split("_")[0]) for key in in_blocks} == {1, 2}
    outside = {key: rank for key, rank in ranks.items() if key.startswith("lora_unet_") and key not in in_blocks}
    for rank, kind in enumerate(EMBEDDERS, 2):
        assert {r for key, r in outside.items() if key.startswith(f"lora_unet_{kind}")} == {rank}, kind
    # AdamW moves what has a gradient by the rate in its first steps.
    for part, rate in (("lora_unet", 1e-3), ("lora_te1", 1e-4), ("lora_te2", 1e-5), ("lora_te3", 5e-6)):
        moved = max(value.abs().max() for key, value in weights.items() if key.startswith(part) and "lora_up" in key)
        assert rate < moved < 2.1 * rate, (part, moved)
    (image,) = (tmp_path / "sample").glob("lora_000002_00_*_7.png")
    with Image.open(image) as image:
        assert image.size == (64, 96)


@pytest.fixture(scope="module")
def with_clips(tmp_path_factory, ran, files, make_data) -> SimpleNamespace:
    """CLIP and the denoiser adapted, T5's outputs on disk, two resolutions: a command, and what it gave by itself."""
    command = (
        f"sd3_train_network.py --pretrained_model_name_or_path={files.medium} --dataset_config={make_data(64, 96)} "
        "--output_name=lora --network_module=networks.lora_sd3 --max_train_steps=3 --learning_rate=1e-3 --seed=1 "
        "--max_data_loader_n_workers=0 --cache_latents --cache_text_encoder_outputs_to_disk --network_dropout=0.1 "
        "--clip_l_dropout_rate=0.2 --pos_emb_random_crop_rate=0.5 --save_every_n_steps=1 --save_state"
    ).split()
    out = tmp_path_factory.mktemp("with_clips")
    ran(" ".join(command), f"--output_dir={out}", "--gradient_accumulation_steps=2")
    return SimpleNamespace(command=" ".join(command), out=out, file=out / "lora.safetensors")


@pytest.mark.rows("R449")
def test_images_of_several_resolutions(with_clips):
    with safe_open(with_clips.file, "pt") as file:
        datasets = json.loads(file.metadata()["ss_datasets"])
    assert [(dataset["resolution"], dataset["num_train_images"]) for dataset in datasets] == [
        ([64, 64], 4),
        ([96, 96], 4),
    ]


@pytest.mark.rows("R442")
def test_clips_train_while_t5_comes_from_its_cache_and_a_resumed_run_needs_no_t5(with_clips, ran, tmp_path):
    weights = load_file(with_clips.file)
    assert trained_layers(weights, "lora_te1_")
    assert trained_layers(weights, "lora_te2_")
    assert not [key for key in weights if key.startswith("lora_te3_")]
    state = with_clips.out / "lora-step00000001-state"
    more = (f"--output_dir={tmp_path}", "--gradient_accumulation_steps=2", f"--resume={state}")
    told = ran(with_clips.command, *more, encoders=("clip_l", "clip_g"))
    assert "encoded again:" not in told
    assert tensor_hash(tmp_path / "lora.safetensors") == tensor_hash(with_clips.file)


def test_two_processes_train_as_one_that_accumulates(with_clips, ran, tmp_path):
    ran(with_clips.command, f"--output_dir={tmp_path}", processes=2)
    one, two = load_file(with_clips.file), load_file(tmp_path / "lora.safetensors")
    assert furthest(one, two) < 1e-6


# ---- text encoders that are not there


@pytest.mark.rows("R446", "R447", "R459")
def test_without_t5(ran, files, data, tmp_path):
    """With the transformer in 8 bits, split projections and Adafactor; a file of its own, then trained further."""
    ran(
        f"sd3_train_network.py --pretrained_model_name_or_path={files.large} --dataset_config={data} "
        f"--output_dir={tmp_path} --output_name=lora --network_module=networks.lora_sd3 --network_dim=2 "
        "--max_train_steps=1 --learning_rate=1e-3 --seed=1 --max_data_loader_n_workers=0 --fp8_base_unet "
        "--mixed_precision=bf16 --optimizer_type=adafactor --optimizer_args relative_step=False "
        "scale_parameter=False warmup_init=False --lr_scheduler=constant --network_args split_qkv=True",
        encoders=("clip_l", "clip_g"),
    )
    weights = load_file(tmp_path / "lora.safetensors")
    assert {part for part in ("te1", "te2", "te3", "unet") if trained_layers(weights, f"lora_{part}_")} == {
        *("te1", "te2", "unet")
    }
    assert len(weights[f"{LORA}0_x_block_attn_qkv.lora_down.weight"]) == 3 * 2


ONLY_CACHES = (
    "--network_module=networks.lora_sd3 --network_train_unet_only --max_train_steps=1 --learning_rate=1e-3 --seed=1 "
    "--max_data_loader_n_workers=0 --cache_text_encoder_outputs_to_disk --output_name=lora"
)


def test_without_any_text_encoder_where_all_outputs_are_on_disk(printed, ran, files, data, tmp_path):
    told = ran(
        f"sd3_train_network.py --pretrained_model_name_or_path={files.large} --dataset_config={data} {ONLY_CACHES} "
        f"--output_dir={tmp_path}",
        encoders=(),
    )
    assert "encoded again:" not in told
    assert trained_layers(load_file(tmp_path / "lora.safetensors"))


def test_without_clip_nothing_is_loaded_in_order_to_encode(ran, files, make_data, tmp_path):
    told = ran(
        f"sd3_train_network.py --pretrained_model_name_or_path={files.large} --dataset_config={make_data()} "
        f"{ONLY_CACHES} --output_dir={tmp_path}",
        encoders=("clip_l", "t5xxl"),
        fails="error: --clip_g: missing, and the model brings no CLIP-G; texts cannot be encoded without it",
    )
    assert "0_sd3_te.npz would have to be made (it is not there) and 3 more files" in told
    assert "loaded" not in told


def test_images_beyond_the_table_of_positions_are_refused(ran, files, make_data, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 208\n", encoding="utf-8")
    told = ran(
        f"sd3_train_network.py --pretrained_model_name_or_path={files.large} --dataset_config={make_data(256)} "
        f"--network_module=networks.lora_sd3 --output_dir={tmp_path} --cache_latents --sample_every_n_steps=1 "
        f"--sample_prompts={tmp_path}/prompts.txt",
        fails="a bucket of 256x256 is too large: this model takes 192 pixels on a side",
    )
    assert "--sample_prompts: an image of 64x208 is too large" in told
    assert "caching" not in told


# ---- whole models


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, ran, files, data) -> SimpleNamespace:
    """All three text encoders and all blocks but the last; of the saves on the way the last two are kept."""
    out = tmp_path_factory.mktemp("tuned")
    ran(
        f"sd3_train.py --pretrained_model_name_or_path={files.medium} --dataset_config={data} --output_dir={out} "
        "--output_name=model --max_train_steps=3 --learning_rate=1e-4 --train_text_encoder --train_t5xxl "
        "--text_encoder_lr1=2e-5 --learning_rate_te2=1e-5 --learning_rate_te3=5e-6 --num_last_block_to_freeze=1 "
        "--save_every_n_steps=1 --save_last_n_steps=1 --enable_scaled_pos_embed --gradient_checkpointing "
        "--cache_latents --seed=1 --max_data_loader_n_workers=0"
    )
    return SimpleNamespace(out=out, model=out / "model.safetensors")


@pytest.mark.rows("R439", "R455", "R456", "R457", "R458")
def test_whole_models_with_all_text_encoders(tuned, files):
    names = sorted(path.name for path in tuned.out.iterdir())
    ends = [".safetensors", *(f"_{flag}.safetensors" for flag in ENCODERS)]
    saves = ("model", "model-step00000002", "model-step00000003")
    assert names == sorted([*(save + end for save in saves for end in ends), "model.html"])
    moved = changed(files.medium, tuned.model)
    blocks = {int(found[1]) for key in moved if (found := re.match(rf"{re.escape(MMDIT)}joint_blocks\.(\d+)\.", key))}
    assert blocks == set(range(DEPTH - 1)), "the last one stays"
    assert all(key.startswith(MMDIT) for key in moved), "the VAE stays"
    assert f"{MMDIT}pos_embed" in load_file(tuned.model)
    for flag, rate in (("clip_l", 2e-5), ("clip_g", 1e-5), ("t5xxl", 5e-6)):
        before, after = load_file(getattr(files, flag)), load_file(tuned.out / f"model_{flag}.safetensors")
        assert before.keys() == after.keys()
        assert 0.5 * rate < max((after[key] - before[key]).abs().max() for key in before) < 3.5 * rate, flag


@pytest.mark.rows("R456")
def test_only_t5_is_read_from_the_cache(tuned, printed, ran, files, data, tmp_path):
    """In bfloat16 with steps inside the backward pass; the outputs on disk are of another CLIP-L."""
    told = ran(
        f"sd3_train.py --pretrained_model_name_or_path={files.large} --dataset_config={data} --output_dir={tmp_path} "
        "--output_name=model --max_train_steps=2 --learning_rate=1e-3 --train_text_encoder --learning_rate_te2=0 "
        "--cache_text_encoder_outputs_to_disk --use_t5xxl_cache_only --save_clip --save_t5xxl --seed=1 "
        "--mixed_precision=bf16 --full_bf16 --fused_backward_pass --max_grad_norm=0 --optimizer_type=adafactor "
        "--optimizer_args relative_step=False scale_parameter=False warmup_init=False --lr_scheduler=constant "
        f"--cache_latents_to_disk --max_data_loader_n_workers=0 --clip_l={tuned.out}/model_clip_l.safetensors",
        encoders=("clip_g", "t5xxl"),
    )
    assert "encoded again:" not in told
    moved = changed(files.large, tmp_path / "model.safetensors")
    assert f"{MMDIT}joint_blocks.{DEPTH - 1}.x_block.mlp.fc2.weight" in moved
    assert all(key.startswith(MMDIT) for key in moved)
    assert changed(tuned.out / "model_clip_l.safetensors", tmp_path / "model_clip_l.safetensors")
    for flag in ("clip_g", "t5xxl"):
        assert not changed(getattr(files, flag), tmp_path / f"model_{flag}.safetensors")


@pytest.mark.rows("R456")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--train_t5xxl", "--train_t5xxl: needs --train_text_encoder"),
        (
            "--train_text_encoder --train_t5xxl --cache_text_encoder_outputs",
            "--cache_text_encoder_outputs: a text encoder whose outputs are cached cannot be trained",
        ),
    ],
)
def test_contradictions_are_one_line(ran, files, data, tmp_path, options, said):
    ran(
        f"sd3_train.py --pretrained_model_name_or_path={files.medium} --dataset_config={data} --output_dir={tmp_path}",
        *options.split(),
        fails=said,
    )


@pytest.mark.parametrize("options", ["--train_text_encoder --train_t5xxl", "--save_t5xxl"])
def test_t5_cannot_be_trained_or_saved_where_there_is_none(ran, files, data, tmp_path, options):
    ran(
        f"sd3_train.py --pretrained_model_name_or_path={files.medium} --dataset_config={data} --output_dir={tmp_path}",
        *options.split(),
        encoders=("clip_l", "clip_g"),
        fails=f"{options.split()[-1]}: the model brings no T5; give its file with --t5xxl",
    )
