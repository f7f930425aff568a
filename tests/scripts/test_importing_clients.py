"""Programs that import the scripts, by the calls that they make themselves.

Their windows are left out, and their own folders are made here; what they import and call is ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.builders.hub_server import TOKEN, running_hub

ROOT = Path(__file__).resolve().parents[2]

# kohya-colab's wrapper: a file beside the scripts, started by accelerate with --config_file.
WRAPPER = """
from train_network import setup_parser, NetworkTrainer
from library.train_util import read_config_from_file

parser = setup_parser()
args = parser.parse_args()
args = read_config_from_file(args, parser)
trainer = NetworkTrainer()
trainer.train(args)
"""
CONFIG = """
[additional_network_arguments]
network_module = "networks.lora"
network_dim = 2
network_alpha = 2
[optimizer_arguments]
learning_rate = 0.001
optimizer_args = ["weight_decay=0.1"]
[training_arguments]
pretrained_model_name_or_path = "examples/tiny_model/tiny-sd.safetensors"
train_data_dir = "examples/concept"
resolution = "64,64"
enable_bucket = true
min_bucket_reso = 64
max_train_steps = 9
max_data_loader_n_workers = 0
output_dir = {out}
output_name = "flower"
"""


def test_a_wrapper_trains_from_a_configuration_file(run_script, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(out=json.dumps(str(tmp_path / "out"))))
    # 1 is the default of the alpha, yet given: it wins over the file's 2.
    done = run_script("-c", WRAPPER, f"--config_file={config}", "--max_train_steps=2", "--network_alpha=1")
    assert done.returncode == 0, done.stderr[-3000:]
    with safe_open(tmp_path / "out" / "flower.safetensors", "pt") as file:
        told = file.metadata()
    assert (told["ss_steps"], told["ss_network_dim"], float(told["ss_network_alpha"])) == ("2", "2", 1.0)
    assert told["ss_optimizer"].endswith("(weight_decay=0.1)")


# fluxgym's start: the scripts are the last place that Python looks in, and every option becomes a field of a form.
FORM = f"""
import sys
sys.path.append({str(ROOT)!r})
from argparse import Namespace
from library import flux_train_utils, huggingface_util
import train_network

parser = train_network.setup_parser()
flux_train_utils.add_flux_train_arguments(parser)
form = {{}}
for action in parser._actions:
    if action.dest != "help":
        is_checkbox = str(action.type) == "None"
        assert is_checkbox == (action.nargs == 0), action.dest
        form[action.dest] = action.option_strings[0], action.help + "", action.default, action.required
for dest in ("clip_l", "t5xxl", "ae", "guidance_scale", "timestep_sampling", "network_dim", "max_train_epochs"):
    assert form[dest][0] == f"--{{dest}}"
flux_train_utils.add_flux_train_arguments(parser)  # nothing is left to add
parser.parse_args(["--guidance_scale", "1.0"])

huggingface_util.upload(args=Namespace(
    huggingface_repo_id="me/style", huggingface_repo_type="model", huggingface_repo_visibility="public",
    huggingface_path_in_repo="", huggingface_token={TOKEN!r},
), src="outputs/style")
"""


def test_a_form_of_all_options_and_an_upload(tmp_path):
    folder = tmp_path / "outputs" / "style" / "sample"
    folder.mkdir(parents=True)
    (folder.parent / "style.safetensors").write_bytes(b"weights")
    (folder / "style_000010_00_1.png").write_bytes(b"image")
    with running_hub() as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        env |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-c", FORM]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.files["me/style"].keys() >= {"style.safetensors", "sample/style_000010_00_1.png"}  # at the top
    assert [(made["name"], made["visibility"]) for made in hub.made] == [("style", "public")]


# The backend of LoRA_Easy_Training_Scripts counts steps, and has a tool that reads these names.
COUNTING = """
from library.train_util import BucketManager
from library import train_util, model_util

manager = BucketManager(False, (512, 512), 256, 1024, 64)
manager.make_buckets()
reso, resized, error = manager.select_bucket(640, 480)
manager.add_image(reso, "a.png")
assert len(manager.buckets) == 1 and reso[0] * reso[1] <= 512 * 512, reso
assert model_util.is_safetensors("a.safetensors") and not model_util.is_safetensors("a.ckpt")

import torch
model_hash, legacy_hash = train_util.precalculate_safetensors_hashes({"a": torch.zeros(2)}, {"ss_a": "1"})
assert (len(model_hash), len(legacy_hash)) == (64, 8)
"""


def test_a_backend_counts_steps(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COUNTING]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("train_network", "NetworkTrainer"),
        ("sdxl_train_network", "SdxlNetworkTrainer"),
        ("flux_train_network", "FluxNetworkTrainer"),
        ("sd3_train_network", "Sd3NetworkTrainer"),
        *((script, "train") for script in ("train_db", "fine_tune", "sdxl_train", "sd3_train", "flux_train")),
    ],
)
def test_every_script_can_be_called(script, name, capsys):
    module = __import__(script)
    args = module.setup_parser().parse_args(["--pretrained_model_name_or_path", "no/such/file.safetensors"])
    args.of_the_program = object()  # programs put things of their own beside the options
    train = getattr(module, name) if name == "train" else getattr(module, name)().train
    with pytest.raises(SystemExit) as ended:
        train(args)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err
