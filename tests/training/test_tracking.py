"""Curves and images in TensorBoard and, offline, at Weights & Biases; trackers that fail or hang."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from library.options.logging import TENSORBOARD_KEYS
from library.options.parsing import parse_options
from library.registry import groups_for
from library.runtime.logs import LOGGER
from library.training.tracking import Sink, Tracker, loggable, make_tracker
from tests.builders.wandb_log import records

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"
OFFLINE_RUN = """
import sys
from pathlib import Path
from PIL import Image
from library.options.parsing import parse_options
from library.registry import groups_for
from library.training.tracking import make_tracker

with make_tracker(parse_options(groups_for("sd", "network"), sys.argv[1:]), "network_train") as tracker:
    tracker.scalars(10, {"loss/validation": 0.5})
    for step in (9, 10):
        tracker.scalars(step, {"loss/current": 1 / step, "lr/unet": 1e-4})
    tracker.image(10, "sample/00", Image.new("RGB", (8, 8), "red"), "a red square", Path("0.png"))
"""
TRACKER_CONFIG = """
[tensorboard]
filename_suffix = ".mine"

[wandb]
tags = ["flowers"]

[wandb.settings]
x_disable_stats = true
"""


def options(*flags: object):
    return parse_options(groups_for("sd", "network"), list(map(str, flags)))


@pytest.fixture
def messages(caplog):
    LOGGER.propagate = True
    return lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


# ---- what arrives


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_with_settings_of_its_own(tmp_path):
    config = tmp_path / "trackers.toml"
    config.write_text(TRACKER_CONFIG, encoding="utf-8")
    flags = (f"--logging_dir={tmp_path / 'logs'}", "--log_tracker_name=mine", f"--log_tracker_config={config}")
    with make_tracker(options(*flags), "network_train") as tracker:
        tracker.scalars(1, {"loss/current": 0.25})
        tracker.scalars(2, {"loss/current": 0.125})
        tracker.image(2, "sample/00", Image.new("RGB", (8, 8), "red"), "a red square", Path("0.png"))
    (run,) = (tmp_path / "logs").iterdir()
    (file,) = (run / "mine").iterdir()
    assert file.name.endswith(".mine")
    events = events_of(run / "mine")
    assert [(event.step, event.value) for event in events.Scalars("loss/current")] == [(1, 0.25), (2, 0.125)]
    assert events.Tags()["images"] == ["sample/00 a red square"]


def test_the_folder_of_a_run_carries_the_output_name(tmp_path):
    def name(*flags):
        opts = options(f"--logging_dir={tmp_path}", *flags)
        return opts.logging.folder_of_run("20261129131500", opts.saving.output_name).name

    assert name() == "20261129131500"
    assert name("--output_name=styles/flower", "--log_prefix=v1_") == "v1_20261129131500-flower"
    assert name("--output_name=" + "猫" * 80, "--log_prefix=" + "p" * 235) == f"{'p' * 235}20261129131500"
    long = name("--output_name=" + "猫" * 80, "--log_prefix=" + "p" * 100)
    assert long.startswith(f"{'p' * 100}20261129131500-猫")
    assert len(long.encode()) <= 255


def test_the_settings_we_name_are_those_of_the_writer():
    from torch.utils.tensorboard import SummaryWriter

    assert {*TENSORBOARD_KEYS} == {*inspect.signature(SummaryWriter.__init__).parameters} - {"self", "log_dir"}


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """A run at Weights & Biases that stays on this machine: its folder, and the messages in it."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("wandb")
    (folder / "trackers.toml").write_text(TRACKER_CONFIG, encoding="utf-8")
    flags = ["--log_with=wandb", "--logging_dir=logs", "--wandb_run_name=my run", "--log_tracker_name=my project"]
    flags += ["--log_config", "--log_tracker_config=trackers.toml", f"--wandb_api_key={KEY}", "--seed=3"]
    flags += ["--train_data_dir=my images", "--vae=/models/vae.safetensors"]
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE_RUN, *flags],
        cwd=folder,
        env={**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (run,) = (folder / "logs" / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    return folder, run, records(file)


def test_wandb_gets_numbers_in_any_order_and_images(offline_run):
    _, run, found = offline_run
    rows = []
    for record in found:
        if record.HasField("history"):
            items = {
                (item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item
            }
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    numbers = [{key: value for key, value in row.items() if "sample" not in key} for row in rows]
    assert numbers == [
        {"step": 10, "loss/validation": 0.5},
        {"step": 9, "loss/current": 1 / 9, "lr/unet": 1e-4},
        {"step": 10, "loss/current": 0.1, "lr/unet": 1e-4},
        {"step": 10},
    ]
    assert "a red square" in str(rows[3])
    (image,) = (run / "files" / "media").rglob("*.png")
    with Image.open(image) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    (metric,) = [record.metric for record in found if record.HasField("metric") and record.metric.glob_name]
    assert (metric.glob_name, metric.step_metric) == ("*", "step")


def test_wandb_names_and_settings(offline_run):
    _, _, found = offline_run
    (run,) = [record.run for record in found if record.HasField("run")]
    assert (run.project, run.display_name, list(run.tags)) == ("my project", "my run", ["flowers"])


@pytest.mark.rows("R235")
def test_wandb_gets_the_settings_without_keys_folders_and_absolute_paths(offline_run):
    _, _, found = offline_run
    (run,) = [record.run for record in found if record.HasField("run")]
    config = {item.key or item.nested_key[0]: item.value_json for item in run.config.update}
    assert config["seed"] == "3"
    assert config["max_train_steps"] == "1600"
    assert not config.keys() & {"wandb_api_key", "huggingface_token", "train_data_dir", "logging_dir", "vae"}


def test_the_key_is_in_no_file_of_wandb(offline_run):
    folder, run, _ = offline_run
    files = [path for path in folder.rglob("*") if path.is_file()]
    (log,) = run.glob("*.wandb")
    assert b"--wandb_api_key=***" in log.read_bytes(), "wandb stores the command line"
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_what_may_be_logged():
    opts = options(
        "--pretrained_model_name_or_path=models/a.safetensors",
        "--vae=C:\\models\\vae.pt",
        "--network_weights=/home/me/lora.safetensors",
        "--output_dir=out",
        "--huggingface_token=hf_abc",
        "--network_args",
        "conv_dim=2",
        "file=/home/me/x",
        "--optimizer_args",
        "betas=0.9,0.99",
    )
    found = loggable(opts)
    assert found["pretrained_model_name_or_path"] == "models/a.safetensors"
    assert found["optimizer_args"] == ["betas=0.9,0.99"]
    hidden = {"vae", "network_weights", "output_dir", "huggingface_token", "network_args", "caption_prefix"}
    assert not hidden & found.keys()


# ---- what goes wrong


class Memory(Sink):
    """A tracker that keeps what it gets, waits for `gate` before each value, and raises at the values in `bad`."""

    def __init__(self, bad=(), gate: threading.Event | None = None):
        self.values, self.closed, self.calls, self._bad, self._gate = [], None, 0, bad, gate

    def scalars(self, step, values):
        self.calls += 1
        if self._gate is not None:
            self._gate.wait(20)
        if step in self._bad:
            raise OSError("no space\nleft")
        self.values.append((step, values))

    def image(self, step, name, image, caption, path):
        self.values.append((step, name, caption))

    def close(self, failed):
        self.closed = failed


def test_one_that_fails_is_left_out_and_named_once(messages):
    bad, good = Memory(bad=(2, 3)), Memory()
    with Tracker({"Bad": bad, "Good": good}) as tracker:
        for step in range(1, 6):
            tracker.scalars(step, {"loss": float(step)})
            time.sleep(0.01)
        tracker.image(5, "sample/00", Image.new("RGB", (1, 1)), "text", Path("0.png"))
    assert good.values == [*((step, {"loss": float(step)}) for step in range(1, 6)), (5, "sample/00", "text")]
    assert (bad.values, bad.calls) == ([(1, {"loss": 1.0})], 2)
    assert messages() == ["Bad failed, nothing more is logged there: no space"]


def test_a_slow_one_neither_holds_up_the_run_nor_its_end(messages):
    gate = threading.Event()
    slow, good = Memory(gate=gate), Memory()
    start = time.monotonic()
    with Tracker({"Good": good, "Slow": slow}, patience=0.2, most_waiting=1000) as tracker:
        for step in range(2000):
            tracker.scalars(step, {"loss": 0.0})
            if step % 100 == 0:
                time.sleep(0.001)
    assert time.monotonic() - start < 10
    gate.set()
    assert len(good.values) > 1000
    assert "Slow is too slow; some values of this run are not logged there" in messages()
    assert "Slow did not end in time; what was logged last may be missing there" in messages()
    assert len([line for line in messages() if "Slow is too slow" in line]) == 1


def test_what_was_logged_before_a_run_failed_arrives():
    sink = Memory()

    def run():
        with Tracker({"Sink": sink}) as tracker:
            tracker.scalars(1, {"loss": 1.0})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run()
    assert (sink.values, sink.closed) == ([(1, {"loss": 1.0})], True)


def test_a_tracker_that_cannot_be_opened_does_not_end_the_run(tmp_path, messages):
    (tmp_path / "logs").write_text("a file")
    with make_tracker(options(f"--logging_dir={tmp_path / 'logs'}"), "network_train") as tracker:
        tracker.scalars(1, {"loss": 1.0})
    (line,) = messages()
    assert line.startswith("TensorBoard cannot be used, the run continues without it: ")


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_tensorboard_on_a_full_disk_is_one_warning(tmp_path, messages, monkeypatch):
    import resource

    tracebacks, limits = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with make_tracker(options(f"--logging_dir={tmp_path}"), "network_train") as tracker:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # files may not grow any more
        try:
            for step in range(100):
                tracker.scalars(step, {"loss": 1.0})
                time.sleep(0.002)
        finally:
            tracker.close()
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
    assert tracebacks == []
    (line,) = messages()
    assert line.startswith("TensorBoard failed, nothing more is logged there: ")


@pytest.mark.parametrize("enabled", [True, False])
def test_only_the_first_process_writes_and_only_if_asked(tmp_path, enabled):
    flags = [] if enabled else [f"--logging_dir={tmp_path / 'logs'}"]
    with make_tracker(options(*flags), "network_train", enabled=enabled) as tracker:
        tracker.scalars(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
