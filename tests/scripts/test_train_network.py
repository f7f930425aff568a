"""train_network.py from the outside, on the bundled model."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
CONCEPT = ROOT / "examples" / "concept" / "10_sks flower"
PROMPTS = """# a comment

a sks flower on a black background --w 64 --h 64 --s 3 --d 7
a red circle --n blue --w 64 --h 64 --s 2
a sks flower --w 64 --h 64 --s 1 --d 9 --am 0
a sks flower --w 64 --h 64 --s 1 --d 9 --am -2,1
"""


def sha(path: Path) -> str:
    """Of the weights alone; the metadata holds times."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_script, train_arguments):
    """One run that uses most of what a run can do."""
    out = tmp_path_factory.mktemp("trained")
    prompts = out / "prompts.txt"
    prompts.write_text(PROMPTS, encoding="utf-8")
    command = train_arguments(
        out,
        max_train_steps=6,
        save_every_n_steps=2,
        save_last_n_steps=2,
        sample_prompts=prompts,
        sample_at_first=True,
        sample_every_n_steps=6,
        logging_dir=out / "logs",
        log_prefix="style_",
        log_config=True,
        training_comment="a test",
        network_args=["conv_dim=2", "conv_alpha=1"],
        gradient_accumulation_steps=2,
        lr_scheduler="cosine",
        lr_warmup_steps=1,
    )
    result = run_script(*command)
    assert result.returncode == 0, result.stderr
    return out, result


@pytest.mark.rows("R15", "R125", "R140", "R289")
def test_files(trained):
    out, _ = trained
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert names == ["lora-step00000004.safetensors", "lora-step00000006.safetensors", "lora.safetensors"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")], "nothing half-written is left behind"


@pytest.mark.rows("R277", "R278", "R279", "R282")
def test_sample_images(trained):
    out, _ = trained
    names = sorted(path.name for path in (out / "sample").iterdir())
    shapes = [re.sub(r"\d{14}", "T", name) for name in names]
    assert [s.rsplit("_T", 1)[0] for s in shapes] == [
        f"lora_{step}_{number:02d}" for step in ("000000", "000006") for number in range(4)
    ]
    with Image.open(out / "sample" / names[0]) as image:
        assert image.size == (64, 64)
        assert image.info["prompt"] == "a sks flower on a black background"


@pytest.mark.rows("R507")
def test_am_is_the_strength_of_the_network_in_a_sample_image(trained):
    out, _ = trained
    images = [path.read_bytes() for _, path in sorted((p.name[:14], p) for p in (out / "sample").iterdir())]
    pixels = [np.asarray(Image.open(io.BytesIO(image))) for image in images]
    before, after = pixels[:4], pixels[4:]
    assert (after[2] == before[2]).all()  # without the network, as before training
    assert (before[3] == before[2]).all()  # which began with nothing
    assert (after[3] != after[2]).any()


@pytest.mark.rows("R232", "R233", "R235", "C26")
def test_tensorboard(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = trained
    (run,) = (out / "logs").iterdir()
    assert re.fullmatch(r"style_\d{14}-lora", run.name)
    events = EventAccumulator(str(run / "network_train"))
    events.Reload()
    tags = events.Tags()
    assert {"loss/current", "loss/average", "norm/gradient"} <= set(tags["scalars"])
    assert {"time/step", "memory/peak GB", "progress/epoch"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("loss/current")] == [1, 2, 3, 4, 5, 6]
    rates = [event.value for event in events.Scalars("lr/unet")]
    assert rates[0] == 0, "a warm-up begins at 0"
    assert rates[1] == pytest.approx(1e-3)
    assert len(tags["images"]) == 4
    (text,) = events.Tensors("config/text_summary")
    assert "learning_rate" in str(text.tensor_proto.string_val)


@pytest.mark.rows("R295")
def test_metadata(trained):
    out, _ = trained
    with safe_open(out / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    expected = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "1",
        "ss_steps": "6",
        "ss_max_train_steps": "6",
        "ss_gradient_accumulation_steps": "2",
        "ss_num_train_images": "160",
        "ss_base_model_version": "sd_v1",
        "ss_output_name": "lora",
        "ss_training_comment": "a test",
        "ss_sd_model_name": "tiny-sd.safetensors",
        "ss_seed": "1",
        "ss_resolution": "(64, 64)",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "lora",
    }
    assert {name: metadata.get(name) for name in expected} == expected
    assert json.loads(metadata["ss_dataset_dirs"]) == {"10_sks flower": {"n_repeats": 10, "img_count": 16}}
    assert json.loads(metadata["ss_network_args"])["conv_dim"] == "2"
    data = (out / "lora.safetensors").read_bytes()
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(tensors).hexdigest()


def test_the_arithmetic_is_printed(trained):
    _, result = trained
    assert "160" in result.stderr
    assert "total: 6 optimizer steps, 1 epoch\n" in result.stderr
    assert "40 steps per epoch (80 batches / 1 process / 2 accumulated)" in result.stderr


def test_nothing_that_a_user_cannot_act_on_is_printed(trained):
    _, result = trained
    noise = [
        line
        for line in (result.stdout + result.stderr).splitlines()
        if re.search(r"xformers|torchvision|bitsandbytes|triton|kernels|FutureWarning|UserWarning|Deprecat", line, re.I)
    ]
    assert noise == []


@pytest.mark.rows("R287", "R288", "R300")
def test_conv_dim_reaches_the_3x3_convolutions(trained):
    out, _ = trained
    weights = load_file(out / "lora.safetensors")
    conv = weights["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"]
    assert conv.shape[0] == 2
    assert conv.shape[2:] == (3, 3)
    assert weights["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"].shape[0] == 4
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_up" in name)


# Linux forks workers up to Python 3.13. Elsewhere, and from 3.14 on, they get what they need pickled.
STARTED_BY = """
import multiprocessing, runpy, sys
multiprocessing.set_start_method(sys.argv.pop(1))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_workers_change_nothing(tmp_path, run_script, train_arguments):
    """Images, crops, flips, captions and noise are addressed, not consumed."""
    hashes = set()
    for workers, started_by in ((0, []), (2, []), (1, ["-c", STARTED_BY, "spawn"])):
        out = tmp_path / str(workers)
        command = train_arguments(
            out,
            cache_latents=None,
            flip_aug=True,
            shuffle_caption=True,
            caption_separator=" ",
            caption_dropout_rate=0.2,
            max_data_loader_n_workers=workers,
        )
        result = run_script(*started_by, *command)
        assert result.returncode == 0, result.stderr
        hashes.add(sha(out / "lora.safetensors"))
    assert len(hashes) == 1


@pytest.mark.rows("R176", "R177", "R156")
def test_launched_by_accelerate_in_bf16_with_checkpointing(tmp_path, run_script, train_arguments):
    (tmp_path / "data" / "2_flower").mkdir(parents=True)
    for number in range(3):  # bf16 is slow on CPUs
        shutil.copy(CONCEPT / f"flower_{number:02}.png", tmp_path / "data" / "2_flower")
    command = train_arguments(
        tmp_path,
        train_data_dir=tmp_path / "data",
        mixed_precision="bf16",
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        optimizer_type="AdamW8bit",
        save_precision="fp16",
        network_train_unet_only=True,
        max_train_steps=None,
        max_train_epochs=1,
        train_batch_size=2,
        xformers=True,
    )
    launcher = ("-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1", "--cpu")
    result = run_script(*command, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert "sdpa is used instead" in result.stderr
    weights = load_file(tmp_path / "lora.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert not [name for name in weights if name.startswith("lora_te")]


def test_two_processes_share_the_work_and_one_writes(tmp_path, run_script, train_arguments):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    result = run_script(*train_arguments(tmp_path, seed=None, max_train_steps=2), launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert "40 steps per epoch (80 batches / 2 processes / 1 accumulated)" in result.stderr
    assert result.stderr.count("saved ") == 1


@pytest.mark.parametrize(
    ("module", "args"), [("networks.lora_fa", None), ("networks.dylora", ["unit=2"])], ids=["lora_fa", "dylora"]
)
def test_other_networks_of_the_package(tmp_path, run_script, train_arguments, module, args):
    """LoRA-FA leaves the down matrices as they were drawn, DyLoRA does not."""
    options = {"network_module": module, "network_args": args, "max_train_steps": 2, "save_every_n_steps": 1}
    result = run_script(*train_arguments(tmp_path, **options, network_train_unet_only=True))
    assert result.returncode == 0, result.stderr
    weights = [load_file(tmp_path / f"lora{end}.safetensors") for end in ("-step00000001", "")]
    assert weights[0].keys() == weights[1].keys()
    moved = {name.rsplit(".", 2)[1] for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert "lora_up" in moved
    assert ("lora_down" in moved) == (module == "networks.dylora")
    assert len(weights[0]) == 3 * sum(name.endswith(".alpha") for name in weights[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pretrained_model_name_or_path": "no_such.safetensors"}, "no_such.safetensors"),
        ({"train_data_dir": "no_such_folder"}, "no_such_folder"),
        ({"network_dim": 0}, "--network_dim"),
        ({"learning_rat": 1}, None),  # an abbreviation that argparse has always taken
        ({"learnign_rate": 1}, "learning_rate"),
        ({"resume": "state"}, "--resume: there is no folder state"),
        ({"network_module": "networks.lorra"}, "networks.lorra"),
        ({"mixed_precision": "fp61"}, "fp61"),
        ({"network_weights": "README.md"}, "README.md"),
        ({"sample_prompts": "no_such.txt", "sample_at_first": True}, "no_such.txt"),
        ({"lr_warmup_steps": 10}, "warm"),
        ({"optimizer_args": ["no_such=1"]}, "AdamW has no argument 'no_such'"),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": ["no_such=1"]}, "no_such"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, run_script, train_arguments, changes, said):
    result = run_script(*train_arguments(tmp_path, **changes, max_train_steps=1))
    if said is None:
        assert result.returncode == 0, result.stderr
        return
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert "loaded" not in result.stderr or said == "--network_dim"
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.rows("R4")
def test_help_is_instant_and_light(run_script):
    probe = (
        "import sys, time; start = time.time(); sys.argv = ['train_network.py', '--help']\n"
        "import runpy\n"
        "try: runpy.run_path('train_network.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'accelerate', 'PIL', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = run_script(launcher=("-c", probe))
    assert result.returncode == 0, result.stderr
    assert "--network_module" in result.stdout
