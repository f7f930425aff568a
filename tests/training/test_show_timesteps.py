"""--show_timesteps: text of 80 columns or a PNG file, of what the objective itself draws."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from library import registry
from library.checking import check_objective
from library.objectives.histogram import Bin
from library.training.show_timesteps import COLUMNS, as_text, panels, settings, show_timesteps
from tests.builders.options import options_for


def shown(capsys, family="flux", **given):
    opts = options_for(family, "network", **{"show_timesteps": "console", **given})
    spec = registry.FAMILIES[family]
    show_timesteps(opts, spec.traits, spec.adapter(opts).denoiser.objective())
    return capsys.readouterr().out.splitlines()


@pytest.mark.rows("R503")
def test_text_of_even_weights(capsys):
    given = {"timestep_sampling": "shift", "model_prediction_type": "raw", "show_timesteps_offset": 0.5}
    lines = shown(capsys, **given, show_timesteps_resolution="512,768")
    assert lines[0] == "FLUX.1, images of 768x512, 1,000,000 draws"
    assert "--timestep_sampling shift  --sigmoid_scale 1.0  --discrete_flow_shift 3.0" in lines
    assert any("--show_timesteps_offset 0.5" in line for line in lines)
    assert max(map(len, lines)) == COLUMNS  # the longest bar
    rows = [re.match(r" *(\d+)- *(\d+) +([\d.]+) %(?:  (#+))?$", line) for line in lines]
    rows = [row for row in rows if row]
    assert [(int(row[1]), int(row[2])) for row in rows] == [(50 * n, 50 * n + 50) for n in range(20)]
    assert sum(float(row[3]) for row in rows) == pytest.approx(100, abs=1)
    densest = max(rows, key=lambda row: len(row[4] or ""))
    assert densest[1] == "900"  # logit N(0.5 + ln 3, 1) has its mode at 0.918
    assert lines[-1] == "Every timestep weighs the same in the loss: 1."


@pytest.mark.rows("R503")
@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("sd3", {"weighting_scheme": "sigma_sqrt", "training_shift": 3.0}),
        ("sd", {"min_snr_gamma": 5.0, "min_timestep": 100}),
        ("sdxl", {"debiased_estimation_loss": True, "v_parameterization": True}),
    ],
)
def test_text_with_weights(capsys, family, given):
    lines = shown(capsys, family, **given)
    assert max(map(len, lines)) <= COLUMNS
    assert all(f"--{name}" in " ".join(lines) for name in given)
    assert sum(" %  " in line or line.endswith(" %") for line in lines) == 20
    shares = [float(share) for line in lines for share in re.findall(r"([\d.]+) %", line)]
    assert sum(shares) == pytest.approx(200, abs=2)  # what is drawn, and what it weighs


def test_only_what_has_an_effect_is_listed():
    found = settings(options_for("flux", "network", timestep_sampling="sigmoid"))
    assert found[:2] == ["--timestep_sampling sigmoid", "--sigmoid_scale 1.0"]
    assert not [line for line in found if "discrete_flow_shift" in line or "offset" in line]
    assert settings(options_for("sdxl", "network")) == []


@pytest.mark.rows("R503")
def test_the_image(tmp_path):
    opts = options_for("sdxl", "network", show_timesteps="image", output_dir=str(tmp_path), output_name="run")
    spec = registry.FAMILIES["sdxl"]
    show_timesteps(opts, spec.traits, spec.adapter(opts).denoiser.objective())
    with Image.open(tmp_path / "run_timesteps.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 300


def test_charts_hold_what_was_counted():
    bins = [Bin(0, 500, 0.25, 3.0, 0.6), Bin(500, 1000, 0.75, None, 0.4)]
    drawn, weight = panels(bins, "title", flow=True)
    assert [curve.name for curve in drawn.curves] == ["drawn"]  # one weight is no difference
    assert drawn.curves[0].points == [(0, 0.5), (500, 0.5), (500, 1.5), (1000, 1.5)]
    assert weight.curves[0].points == [(0, 3.0), (500, 3.0)]
    assert weight.top >= 3.0
    assert weight.ticks[-1] == weight.top
    assert as_text(bins, "title", [])[0] == "title"


@pytest.mark.rows("R502", "R503")
def test_the_command_needs_no_model_and_no_images(run_script):
    done = run_script("flux_train_network.py", "--show_timesteps=console", "--timestep_sampling=sigmoid")
    assert done.returncode == 0
    assert "images of 1024x1024" in done.stdout
    wrong = run_script("sdxl_train.py", "--show_timesteps=console", "--show_timesteps_resolution=a")
    assert wrong.returncode == 2
    assert "--show_timesteps_resolution: must be one number or height,width in pixels, got 'a'" in wrong.stderr
    assert "--train_data_dir" not in wrong.stderr


@pytest.mark.parametrize(
    ("family", "given", "why"),
    [
        ("flux", {"timestep_sampling": "uniform"}, "with --timestep_sampling uniform"),
        ("sd3", {}, "on Stable Diffusion 3"),
        ("flux", {"timestep_sampling": "sigmoid"}, None),
    ],
)
def test_an_offset_that_has_no_effect_is_named(caplog, family, given, why):
    opts = options_for(family, "network", show_timesteps="console", show_timesteps_offset=0.5, **given)
    check_objective(opts, registry.FAMILIES[family].traits)
    said = [line for line in caplog.messages if line.startswith("--show_timesteps_offset")]
    assert [line.startswith(f"--show_timesteps_offset: has no effect {why}") for line in said] == [True] * bool(why)
