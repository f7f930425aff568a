"""A configuration file of a GUI, but for paths, size and length as it comes: every family trains from it in silence.

`tests/options/test_acceptance.py` has what else such files may hold.
"""

from __future__ import annotations

import pytest
from PIL import Image

from tests.builders import write_tiny_sd1
from tests.builders.flux import write_flux, write_parts
from tests.builders.gui_files import TABS, write_gui_file, written_by_gui
from tests.builders.sd3 import write_encoder_file, write_tiny_sd3
from tests.builders.sdxl import write_tiny_sdxl


def model_files(family, folder):
    """The options that name a tiny model's files."""
    if family == "sd3":
        parts = {
            name: write_encoder_file(folder / f"{name}.safetensors", part)
            for name, part in (("clip_l", "te1"), ("clip_g", "te2"))
        }
        return {"pretrained_model_name_or_path": write_tiny_sd3(folder / "model.safetensors"), **parts}
    if family == "flux":
        return {"pretrained_model_name_or_path": write_flux(folder), **write_parts(folder)}
    write = {"sd": write_tiny_sd1, "sdxl": write_tiny_sdxl}[family]
    return {"pretrained_model_name_or_path": write(folder / "model.safetensors")}


SCRIPTS = {"network": "{}train_network.py", "finetune": "{}train.py", "dreambooth": "train_db.py"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gui") / "train"
    (folder / "1_sks flower").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 120, 60)).save(folder / "1_sks flower" / f"{number}.png")
        (folder / "1_sks flower" / f"{number}.txt").write_text("a flower")
    return folder


@pytest.mark.parametrize(("family", "method"), TABS)
def test_a_file_of_a_gui_trains(run_script, images, tmp_path, family, method):
    paths = {**model_files(family, tmp_path), "train_data_dir": images, "output_dir": tmp_path / "out"}
    keys = {**written_by_gui(family, method), **{name: str(path) for name, path in paths.items()}}
    keys |= {"resolution": "64,64", "min_bucket_reso": 64, "max_train_epochs": 1}
    file = write_gui_file(tmp_path / "gui.toml", keys)
    script = SCRIPTS[method].format("" if family == "sd" else f"{family}_")
    done = run_script(script, "--config_file", file, "--mixed_precision=bf16", "--console_log_simple")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "x.safetensors").is_file()
    assert "total: 2 optimizer steps" in done.stderr
    words = ("gui.toml", "deprecated", "ignored", "no effect")
    assert [line for line in done.stderr.splitlines() if any(word in line for word in words)] == []
