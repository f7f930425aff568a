"""A run that is stopped and goes on ends in the same weights as one that never stopped."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.builders.hashes import tensor_hash
from tests.scripts.weights import hash_of

START = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
STEPS = 9
# All that draws by chance, in one run: flips, shuffling, dropout of captions and inside the layers, noise options.
OPTIONS = {
    "max_train_steps": STEPS,
    "gradient_accumulation_steps": 2,
    "flip_aug": True,
    "shuffle_caption": True,
    "caption_separator": " ",
    "caption_dropout_rate": 0.2,
    "network_dropout": 0.1,
    "noise_offset": 0.05,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "cache_latents": None,
    "save_every_n_steps": 2,
    "save_state": True,
    "train_batch_size": 2,
    "loss_type": "huber",
}


@pytest.fixture(scope="module")
def whole(run_script, train_arguments, tmp_path_factory):
    """The output folder of a run that never stopped."""
    out = tmp_path_factory.mktemp("whole")
    done = run_script(*train_arguments(out, **OPTIONS))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def weights_hash(folder):
    return hash_of(folder / "lora.safetensors")


@pytest.mark.rows("R141", "R143", "R146", "R147", "R149", "R152")
def test_states_hold_what_is_trained_and_go_on_exactly(whole, run_script, train_arguments, tmp_path):
    states = sorted(path.name for path in whole.iterdir() if path.is_dir())
    assert states == ["lora-state", *(f"lora-step{step:08d}-state" for step in (2, 4, 6, 8))]
    state = whole / "lora-step00000004-state"
    assert sorted(path.name for path in state.iterdir()) == [
        "model.safetensors",
        "optimizer.bin",
        "scheduler.bin",
        "train_state.json",
    ]
    told = json.loads((state / "train_state.json").read_text())
    assert (told["current_epoch"], told["current_step"]) == (1, 4)
    with safe_open(state / "model.safetensors", "pt") as file:
        assert all(name.startswith("lora_") for name in file.keys())  # noqa: SIM118  # not a dict
    # Another number of workers, and no --seed: the state knows it.
    changed = {"resume": state, "max_data_loader_n_workers": 2, "seed": None}
    done = run_script(*train_arguments(tmp_path, **OPTIONS | changed))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "5 steps in" in done.stderr
    assert weights_hash(tmp_path) == weights_hash(whole)


def killed(start_script, line, folder, times):
    """SIGKILL at moments nobody chose; each time the run goes on from the newest state.

    `line(state)` gives the arguments, without a state those of the first start.
    """
    moments = random.Random(os.getpid())
    for attempt in range(times + 1):
        states = sorted(folder.glob("*-step*-state"))
        script = start_script(*line(states[-1] if states else None))
        if attempt < times:
            enough = len(states) + moments.randint(0, 1)
            while script.is_running() and len(list(folder.glob("*-step*-state"))) < enough:
                time.sleep(0.02)
            time.sleep(moments.random())
            script.kill()
        done = script.result()
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(folder.glob(".*-state.*/train_state.json")), "a half-written state looks whole"


def test_three_kills_change_nothing(whole, start_script, train_arguments, tmp_path):
    def line(state):
        workers = 0 if state is None else 1
        return train_arguments(tmp_path, **OPTIONS | {"resume": state, "max_data_loader_n_workers": workers})

    killed(start_script, line, tmp_path, times=3)
    assert weights_hash(tmp_path) == weights_hash(whole)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_signal_ends_the_run_with_a_state_and_a_copy(whole, train_arguments, start_script, run_script, tmp_path):
    script = start_script(*train_arguments(tmp_path, **OPTIONS | {"save_state": None, "save_every_n_steps": None}))
    while "steps:" not in script.said() and script.is_running():
        time.sleep(0.02)
    os.kill(script.pid, signal.SIGTERM)
    done = script.result()
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-3000:]
    (state,) = tmp_path.glob("lora-step*-state")
    (copy,) = tmp_path.glob("lora-step*.safetensors")
    assert copy.stem == state.name.removesuffix("-state")
    assert f"{copy} can be used as it is; --resume={state} continues from there" in done.stderr
    assert not (tmp_path / "lora.safetensors").exists()
    with safe_open(copy, "pt") as file, safe_open(state / "model.safetensors", "pt") as of_state:
        assert int(file.metadata()["ss_steps"]) == int(copy.stem.removeprefix("lora-step"))
        assert sorted(file.keys()) == sorted(of_state.keys())
        assert all(torch.equal(file.get_tensor(key), of_state.get_tensor(key)) for key in file.keys())  # noqa: SIM118
    done = run_script(*train_arguments(tmp_path, **OPTIONS | {"resume": state}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights_hash(tmp_path) == weights_hash(whole)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of the run in /proc")
def test_ctrl_c_is_answered_once(start_script, train_arguments, tmp_path):
    """A terminal sends it to all processes of the run: those that read data leave it to the one that trains."""
    options = {
        **OPTIONS,
        "max_data_loader_n_workers": 2,
        "max_train_steps": 2000,
        "persistent_data_loader_workers": True,
    }
    line = train_arguments(tmp_path, **options | {"save_state": None, "save_every_n_steps": None})
    script = start_script("-c", f"import os, runpy, sys; os.setsid(); {START}", *line)
    workers = Path(f"/proc/{script.pid}/task/{script.pid}/children")
    while not ("steps:" in script.said() and len(workers.read_text().split()) >= 2) and script.is_running():
        time.sleep(0.02)
    time.sleep(0.5)
    os.killpg(script.pid, signal.SIGINT)
    done = script.result()
    assert done.returncode == 130, done.stderr[-3000:]
    assert done.stderr.count("SIGINT: finishing the step") == 1, done.stderr[-3000:]
    (state,) = tmp_path.glob("lora-step*-state")
    assert f"--resume={state} continues from there" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_resumed_is_reported_at_once(whole, run_script, train_arguments, tmp_path):
    def refused(**changes):
        done = run_script(*train_arguments(tmp_path, **OPTIONS | changes))
        assert done.returncode == 2, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "there is no folder" in refused(resume=tmp_path / "none")
    cut = tmp_path / "cut-state"
    shutil.copytree(whole / "lora-step00000004-state", cut)
    (cut / "optimizer.bin").unlink()
    assert "is no whole state, it has no optimizer.bin" in refused(resume=cut)
    assert "the state of another network or model" in refused(
        resume=whole / "lora-state", max_train_steps=12, network_dim=8
    )
    broken = tmp_path / "broken-state"
    shutil.copytree(whole / "lora-step00000004-state", broken)
    content = (broken / "optimizer.bin").read_bytes()
    (broken / "optimizer.bin").write_bytes(content[: len(content) // 2])
    said = refused(resume=broken)
    assert f"{broken / 'optimizer.bin'} has {len(content) // 2:,} bytes and was saved with" in said
    assert "loaded" not in said
    shutil.copytree(whole / "lora-step00000004-state", tmp_path / "turned-state")
    turned = bytearray(content)
    turned[len(content) // 2] ^= 1
    (tmp_path / "turned-state" / "optimizer.bin").write_bytes(turned)
    said = refused(resume=tmp_path / "turned-state")
    assert "optimizer.bin is damaged" in said
    assert "loaded" not in said
    said = refused(resume=whole / "lora-step00000004-state", optimizer_type="Lion")
    assert "was saved with the optimizer torch.optim.adamw.AdamW, and --optimizer_type now says lion_pytorch" in said
    assert "loaded" not in said


SIGNAL_IN_THE_LAST_STEP = f"""
import os, runpy, signal, sys
from library.training import loop
done, real = [], loop.training_step
def step(*args, **kwargs):
    done.append(1)
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*args, **kwargs)
loop.training_step = step
{START}
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_signal_in_the_last_step_changes_nothing(run_script, train_arguments, tmp_path):
    line = train_arguments(tmp_path, max_train_steps=2, train_batch_size=4)
    done = run_script("-c", SIGNAL_IN_THE_LAST_STEP, *line)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "SIGTERM: finishing the step" in done.stderr
    assert "interrupted" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.html", "lora.safetensors"]


def test_a_state_at_the_planned_end_writes_the_final_files(whole, run_script, train_arguments, tmp_path):
    """As a run needs that was killed between its last state and its final file."""
    for state, steps in (("lora-state", STEPS), ("lora-step00000008-state", 6)):
        done = run_script(*train_arguments(tmp_path, **OPTIONS | {"resume": whole / state, "max_train_steps": steps}))
        assert done.returncode == 0, done.stderr[-3000:]
        assert f" of {steps}; nothing is trained" in done.stderr
        assert "0 steps in" in done.stderr
        assert (tmp_path / "lora-state").is_dir()
        same = whole / ("lora.safetensors" if steps == STEPS else "lora-step00000008.safetensors")
        assert weights_hash(tmp_path) == hash_of(same)


def test_a_changed_rate_counts_and_is_reported(whole, run_script, train_arguments, tmp_path):
    state = whole / "lora-step00000008-state"
    done = run_script(*train_arguments(tmp_path, **OPTIONS | {"resume": state, "learning_rate": 1e-5}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the learning rate of textencoder, unet: 0.001 -> 1e-05 (the former is the state's)" in done.stderr
    assert weights_hash(tmp_path) != weights_hash(whole)


def test_names_are_tried_and_leftovers_cleared_away_before_anything_is_loaded(run_script, train_arguments, tmp_path):
    left = tmp_path / f".{'猫' * 80}.abcd1234.tmp"  # the end of so long a name is cut off
    left.write_text("half")
    done = run_script(*train_arguments(tmp_path, output_name="猫" * 84))
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "cannot be made (File name too long); choose another name" in done.stderr
    assert f"removed {left}" in done.stderr
    assert "loaded" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.rows("R148", "R150", "R151")
def test_counting_from_another_step(run_script, train_arguments, whole, tmp_path):
    """--initial_step counts only; with --skip_until_initial_step the data continues from there too."""
    weights = whole / "lora-step00000008.safetensors"
    options = OPTIONS | {"network_weights": weights, "initial_step": 7, "save_every_n_steps": None, "save_state": None}
    hashes = []
    for skip in (None, True):
        done = run_script(*train_arguments(tmp_path, **options, skip_until_initial_step=skip))
        assert done.returncode == 0, done.stderr[-3000:]
        assert "2 steps in" in done.stderr
        assert "Warning" not in done.stderr
        hashes.append(weights_hash(tmp_path))
    assert hashes[0] != hashes[1]


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_disk_that_fills_up_leaves_what_was_there(whole, run_script, train_arguments, tmp_path):
    """Files may be at most 40 kB, which no state and no network fits into; the run says so and breaks nothing."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    options = OPTIONS | {"resume": out / "lora-step00000006-state", "save_every_n_steps": 2}
    limited = (
        "import resource, runpy, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40960, 40960)); "
        f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); {START}"
    )
    done = run_script("-c", limited, *train_arguments(out, **options))
    assert done.returncode == 2, done.stderr[-3000:]
    assert "cannot be saved (File too large); what was saved before is whole" in done.stderr
    assert "Traceback" not in done.stderr
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    page = out / "lora.html"  # small enough to be written again; it is whole, whichever one it is
    assert after.pop(page).rstrip().endswith(b"</html>")
    del before[page]
    assert after == before


WHOLE_MODELS = {
    "train_db.py": ["--train_data_dir=examples/concept", "--stop_text_encoder_training=3", "--no_token_padding"],
    "fine_tune.py": ["--train_data_dir=examples/concept/10_sks flower", "--train_text_encoder", "--shuffle_caption"],
}


@pytest.mark.parametrize(("script", "kills"), [("train_db.py", 2), ("fine_tune.py", 1)])
def test_whole_models_go_on_exactly_after_kills(start_script, run_script, small_model, tmp_path, script, kills):
    own = list(WHOLE_MODELS[script])
    if script == "fine_tune.py":
        stems = sorted(path.stem for path in Path("examples/concept/10_sks flower").glob("*.png"))
        entries = {stem: {"caption": "a flower", "tags": f"sks, {stem}, pink"} for stem in stems}
        (tmp_path / "meta.json").write_text(json.dumps(entries))
        own.append(f"--in_json={tmp_path / 'meta.json'}")

    def line(folder, *more):
        return [
            script,
            f"--pretrained_model_name_or_path={small_model}",
            *own,
            f"--output_dir={tmp_path / folder}",
            "--output_name=model",
            "--save_model_as=safetensors",
            *("--resolution=64", "--enable_bucket", "--min_bucket_reso=64", "--train_batch_size=2", "--flip_aug"),
            *("--max_train_steps=4", "--gradient_accumulation_steps=2", "--learning_rate=1e-5", "--noise_offset=0.1"),
            *("--max_data_loader_n_workers=0", "--seed=1", "--save_state", "--save_every_n_steps=1"),
            *more,
        ]

    assert run_script(*line("whole")).returncode == 0
    again = ("--max_data_loader_n_workers=1",)
    killed(
        start_script,
        lambda state: line("killed", *(() if state is None else (f"--resume={state}", *again))),
        tmp_path / "killed",
        kills,
    )
    hashes = [tensor_hash(tmp_path / folder / "model.safetensors") for folder in ("whole", "killed")]
    assert hashes[0] == hashes[1]


def test_an_epoch_that_was_stopped_at_its_end_is_saved_after_all(run_script, train_arguments, tmp_path):
    """The state of an epoch's last step is written before the epoch's own copy; a kill may come between."""
    config, images = tmp_path / "data.json", tmp_path / "images"
    images.mkdir()
    for number in range(5):  # four for two steps of an epoch, and one for validation
        shutil.copy(f"examples/concept/10_sks flower/flower_{number:02}.png", images)
    dataset = {"batch_size": 2, "validation_split": 0.2, "subsets": [{"image_dir": str(images)}]}
    config.write_text(json.dumps({"datasets": [dataset]}))
    options = {"train_data_dir": None, "dataset_config": config, "max_train_steps": 6, "save_state": True}
    options |= {"save_every_n_steps": 2, "save_every_n_epochs": 1}
    whole = run_script(*train_arguments(tmp_path / "whole", **options))
    assert whole.returncode == 0, whole.stderr[-3000:]
    state = tmp_path / "whole" / "lora-step00000002-state"
    done = run_script(*train_arguments(tmp_path / "again", **options, resume=state))
    assert done.returncode == 0, done.stderr[-3000:]
    validated = re.findall(r"validation .*", done.stderr)
    assert len(validated) == 3, "the state has the losses before the first step, which are not measured again"
    assert validated == re.findall(r"validation .*", whole.stderr)[1:]
    files = [sorted(path.name for path in (tmp_path / name).glob("lora-00*")) for name in ("whole", "again")]
    assert files[0] == files[1] == [f"lora-00000{n}{end}" for n in (1, 2) for end in ("-state", ".safetensors")]
    assert weights_hash(tmp_path / "again") == weights_hash(tmp_path / "whole")
