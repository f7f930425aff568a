"""`--plan` as a user gives it."""

from __future__ import annotations

import json

import pytest

from tests.scripts.conftest import small_model, train_arguments  # noqa: F401  # fixtures

PLANNED = {"plan": True, "mixed_precision": "bf16", "network_train_unet_only": True}


def test_a_plan_that_fits_trains_nothing_and_says_what_is_needed(run_script, train_arguments, tmp_path):  # noqa: F811
    file = tmp_path / "plan.json"
    options = {**PLANNED, "plan_device": "rtx 4090", "plan_json": file, "save_every_n_epochs": 1}
    script = run_script(*train_arguments(tmp_path / "out", **options))
    assert script.returncode == 0, script.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))
    for words in (
        "plan for RTX 4090 (24.00 GiB)",
        "second step",
        "weights of the denoiser",
        "optimizer state",
        ": fits",
        "length: 4 steps, 1 epoch, of 2 images a step",
    ):
        assert words in script.stdout, script.stdout
    plan = json.loads(file.read_text())
    assert plan["fits"]
    assert plan["steps"] == 4
    assert plan["changes"] == []
    peaks = {phase["name"]: phase["peaks"] for phase in plan["phases"]}
    step = peaks["second step"]["gpu"]
    assert sum(step["by_kind"].values()) == step["bytes"]
    # AdamW keeps two float32 numbers for each that is trained; so does the gradient one, rounded up to whole pieces.
    assert 8 * plan["trained"] <= step["by_kind"]["optimizer state"] < 8 * plan["trained"] + 2 * 512 * 500
    assert (
        plan["device_bytes"] == max(p["gpu"]["bytes"] for p in peaks.values() if "gpu" in p) + plan["device_overhead"]
    )


def test_a_plan_that_does_not_fit_ends_with_3_and_names_what_would(run_script, train_arguments, tmp_path):  # noqa: F811
    file = tmp_path / "plan.json"
    options = {**PLANNED, "plan_vram": "536MB", "plan_json": file, "train_batch_size": 8}
    script = run_script(*train_arguments(tmp_path / "out", **options))
    assert script.returncode == 3, script.stderr
    assert "does not fit" in script.stdout
    plan = json.loads(file.read_text())
    assert plan["changes"], script.stdout
    limit = plan["device"]["memory"]
    assert all(change["device_bytes"] <= limit < plan["device_bytes"] for change in plan["changes"])
    speeds = [change["images_per_second"] for change in plan["changes"]]
    assert speeds == sorted(speeds, reverse=True)
    assert plan["changes"][0]["flags"] in script.stdout


def test_plan_apply_trains_what_fits(run_script, train_arguments, tmp_path):  # noqa: F811
    options = {"plan_apply": True, "plan_vram": "12", "max_train_steps": 1}
    script = run_script(*train_arguments(tmp_path, **options))
    assert script.returncode == 0, script.stderr
    assert ": fits" in script.stdout
    assert (tmp_path / "lora.safetensors").is_file()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"plan_device": "RTX 4091"}, "--plan_device: RTX 4091 is not known; did you mean 'RTX 4090'?"),
        ({"plan_vram": "much"}, "--plan_vram: 'much' is no size; give one such as 12GB"),
    ],
)
def test_a_wrong_device_is_said_before_anything_is_read(run_script, train_arguments, tmp_path, option, message):  # noqa: F811
    script = run_script(*train_arguments(tmp_path, plan=True, **option))
    assert script.returncode == 2
    assert message in script.stderr
