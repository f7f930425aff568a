"""What models say about their own training is followed, warned about, and said again by what is saved."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from library import registry
from library.families.sdxl.loading import load_model
from library.families.sdxl.saving import save_model
from library.families.shared.markers import MARKERS
from library.options.parsing import parse_options
from library.registry import groups_for
from library.types import Models
from tests.builders.sdxl import tiny_sdxl, write_tiny_sdxl


def write(path, *markers):
    tensors = {"conditioner.embedders.0.transformer.x": torch.zeros(1)} | {name: torch.zeros(0) for name in markers}
    torch.save({"state_dict": tensors}, path) if path.suffix == ".ckpt" else save_file(tensors, path)
    return path


def followed(model, *arguments, family="sdxl"):
    opts = parse_options(groups_for(family, "network"), [f"--pretrained_model_name_or_path={model}", *arguments])
    opts = registry.FAMILIES[family].complete_options(opts)
    return opts.family.v_parameterization, opts.noise.zero_terminal_snr


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "0a1b2c"])
@pytest.mark.parametrize("markers", [(), ("v_pred",), ("v_pred", "ztsnr")])
def test_markers_switch_on_what_no_option_says(tmp_path, caplog, family, name, markers):
    with caplog.at_level("INFO"):
        found = followed(write(tmp_path / name, *markers), family=family)
    assert found == ("v_pred" in markers, "ztsnr" in markers)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (1 if markers else 0)
    if markers:
        flags = " ".join(f"--{MARKERS[marker]}" for marker in markers)
        assert lines[0].startswith(f"{flags}: switched on, as {tmp_path / name}: its markers say that it predicts v")


def test_options_that_say_the_same_need_no_line(tmp_path, caplog):
    path = write(tmp_path / "m.safetensors", "v_pred", "ztsnr")
    with caplog.at_level("INFO"):
        assert followed(path, "--v_parameterization", "--zero_terminal_snr") == (True, True)
    assert not caplog.records


@pytest.mark.parametrize("against", ["config", "loss"])
def test_an_option_against_a_marker_stands_and_is_warned_about(tmp_path, caplog, against):
    path = write(tmp_path / "m.safetensors", "v_pred", "ztsnr")
    (tmp_path / "c.toml").write_text("v_parameterization = false\n")
    argument = f"--config_file={tmp_path / 'c.toml'}" if against == "config" else "--v_pred_like_loss=0.5"
    assert followed(path, argument) == (False, False)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "its markers say that it predicts v, with noise that ends in pure noise, but" in line
    assert {"config": "v_parameterization is off in", "loss": "--v_pred_like_loss"}[against] in line


def test_the_scheduler_of_a_folder_is_followed(tmp_path, caplog):
    (tmp_path / "scheduler").mkdir()
    config = tmp_path / "scheduler" / "scheduler_config.json"
    for told, found in (
        ({"prediction_type": "epsilon"}, (False, False)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}, (True, False)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, (True, True)),
    ):
        config.write_text(json.dumps(told))
        assert followed(tmp_path) == found
    config.write_text("{")
    assert followed(tmp_path) == (False, False)  # loading says what is wrong


def test_edm_models_are_warned_about(tmp_path, caplog):
    assert followed(write(tmp_path / "m.safetensors", "edm_vpred.sigma_max", "edm_vpred.sigma_min")) == (False, False)
    assert "was trained with an EDM noise schedule, which is not available" in caplog.text


def test_flow_models_and_models_that_are_not_here_say_nothing(tmp_path, caplog):
    assert followed("owner/model") == followed(tmp_path / "gone.safetensors") == (False, False)
    assert followed(write(tmp_path / "m.safetensors", "v_pred"), family="sd3") == (False, False)
    assert not caplog.records


# --- what is saved ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, Models]:
    """Models as read from a file without markers, and from one with both."""
    folder = tmp_path_factory.mktemp("models")
    plain = write_tiny_sdxl(folder / "plain.safetensors")
    save_file({**load_file(plain), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, folder / "marked.safetensors")
    made = {}
    for name in ("plain", "marked"):
        parts = load_model(str(folder / f"{name}.safetensors"))
        tokenizers = tiny_sdxl().tokenizers
        made[name] = Models(parts.denoiser, parts.text_encoders, tokenizers, parts.vae, parts.source)
    return made


@pytest.mark.parametrize("source", ["plain", "marked"])
@pytest.mark.parametrize(("v", "zero"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_saved_models_say_what_they_were_trained_for(loaded, tmp_path, source, v, zero, kind):
    path = tmp_path / f"out.{kind}"
    save_model(loaded[source], path, save_as=kind, dtype=None, metadata={}, v_prediction=v, zero_terminal_snr=zero)
    tensors = load_file(path) if kind == "safetensors" else torch.load(path, weights_only=True)["state_dict"]
    assert {marker: tensors[marker].shape for marker in MARKERS if marker in tensors} == {
        marker: (0,) for marker, is_true in zip(MARKERS, (v, zero), strict=True) if is_true
    }
    assert followed(path) == (v, zero)
