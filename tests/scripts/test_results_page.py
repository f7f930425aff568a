"""`<output_name>.html` of real runs: what it holds, that a kill leaves it whole, that a resumed run continues it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
from types import SimpleNamespace

import pytest

from library.pages.page import read_data
from tests.scripts.weights import hash_of

START = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
TOKEN = "0123456789abcdef0123456789abcdef01234567"
# Writes half of the page at its third time and is gone, as by a power cut.
KILLED_WHILE_WRITING = f"""
import os, pathlib, runpy, signal, sys
real, pages = pathlib.Path.write_text, []
def write_text(self, text, *args, **kwargs):
    if text.startswith("<!doctype"):
        pages.append(1)
        if len(pages) == 3:
            real(self, text[:len(text) // 2], *args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
    return real(self, text, *args, **kwargs)
pathlib.Path.write_text = write_text
{START}
"""
OPTIONS = {
    "max_train_steps": 6,
    "sample_every_n_steps": 2,
    "sample_at_first": True,
    "save_every_n_steps": 2,
    "save_state": True,
    "validation_split": 0.2,
    "validate_every_n_steps": 3,
    "metadata_title": f"it's </script> & {TOKEN}",
}


@pytest.fixture(scope="module")
def line(train_arguments, tmp_path_factory):
    """The command line of a run with samples, states and validation; keywords change options."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a <b>cat</b> --w 64 --h 64 --s 1 --d 5\na dog --w 64 --h 64 --s 1\n", encoding="utf-8")
    return lambda out, **changes: train_arguments(out, **{**OPTIONS, "sample_prompts": prompts, **changes})


@pytest.fixture(scope="module")
def whole(run_script, line, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    done = run_script(*line(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{out / 'lora.html'} shows this run in a browser" in done.stderr
    return SimpleNamespace(out=out, page=read_data(out / "lora.html"), said=done.stderr)


def test_the_page_holds_the_run(whole):
    page = whole.page
    progress = page["progress"]
    assert (progress["state"], progress["step"], progress["total"], page["name"]) == ("done", 6, 6, "lora")
    samples = {(one["step"], one["number"]): one for one in page["samples"]}
    assert sorted(samples) == [(step, number) for step in (0, 2, 4, 6) for number in (0, 1)]
    assert samples[2, 0]["prompt"] == "a <b>cat</b>"
    for one in samples.values():
        assert one["src"].startswith("data:image/webp;base64,")
        assert (whole.out / one["href"]).is_file(), "it leads to the file"
    assert [step for step, _ in page["series"]["loss/current"]["points"]] == [1, 2, 3, 4, 5, 6]
    curves = {name: dict(curve["points"]) for name, curve in page["series"].items()}
    assert list(curves["loss/validation"]) == [0, 3, 6]
    base, now, change = (curves[f"loss/validation{name}"] for name in ("/base", "", "/difference"))
    assert change[0] == 0
    assert change[6] == pytest.approx(now[6] - base[6], abs=1e-5)
    assert 0 < curves["loss/validation/standard error"][6] < abs(base[6])
    assert {"lr/unet", "lr/textencoder", "time/step", "norm/gradient"} <= page["series"].keys()
    files = [file["name"] for file in page["files"]]
    assert files == [
        *(
            name
            for step in (2, 4, 6)
            for name in (f"lora-step0000000{step}.safetensors", f"lora-step0000000{step}-state")
        ),
        *("lora.safetensors", "lora-state"),
    ]
    assert [file["step"] for file in page["files"]] == [2, 2, 4, 4, 6, 6, 6, 6]
    for file in page["files"]:
        path = whole.out / file["href"]
        assert file["size"] == sum(one.stat().st_size for one in ([path] if path.is_file() else path.iterdir()))
    assert progress["memory"] > 0.05
    about = dict(page["about"])
    assert (about["seed"], about["batch"]) == ("1", "2")
    assert about["trained"].endswith(" parameters")
    (held,) = [group for group in page["data"]["groups"] if group["title"].startswith("Kept for validation")]
    assert all(one["src"] for one in held["images"])
    text = (whole.out / "lora.html").read_text(encoding="utf-8")
    assert TOKEN not in text
    assert text.count("</script>") == 2
    assert not list(whole.out.glob(".*"))


def test_the_run_says_what_it_is_about_and_how_far_it_is(whole):
    said = whole.said
    assert re.search(r"loading .*/tiny-sd\.safetensors \(\d+\.\d MB\)\n", said)
    block = (
        r"total: 6 optimizer steps.*\n.*seed: 1\n.*trained: [\d,]+ parameters\n"
        r".*rates: textencoder 0\.001, unet 0\.001; constant\n.*optimizer: torch\.optim\.adamw\.AdamW\n"
        r".*length: 6 steps, 1 epoch of \d+\n.*batch: 2\n"
    )
    assert re.search(block, said)
    last = [line for line in re.split(r"[\r\n]", said) if line.startswith("epoch 1/1, steps: 100%|")][-1]
    assert re.search(r"\| 6/6 \[\d+:\d\d<00:00, \d+\.\d\ds/step, avr_loss=\d\.\d{4}, lr=0\.001, \d\.\dGB\]", last)


def test_its_commands_do_what_they_say(whole, run_script, tmp_path):
    page = whole.page
    words = shlex.split(page["command"].replace("\\\n", " "))
    assert words[0] == "python"
    words = [word.replace(str(whole.out), str(tmp_path)) for word in words[1:]]
    done = run_script(*words, "--no_results_page")
    assert done.returncode == 0, done.stderr[-3000:]
    assert hash_of(tmp_path / "lora.safetensors") == hash_of(whole.out / "lora.safetensors")
    assert not list(tmp_path.glob("*.html")), "--no_results_page"
    (_, draw), _ = page["use"]
    words = shlex.split(draw.replace("\\\n", " "))[1:]
    words[words.index("--outdir=outputs")] = f"--outdir={tmp_path / 'drawn'}"
    done = run_script(*words, "--steps=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 1


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_kill_while_it_is_written_leaves_a_whole_page_that_a_resumed_run_continues(whole, run_script, line, tmp_path):
    done = run_script("-c", KILLED_WHILE_WRITING, *line(tmp_path))
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    before = read_data(tmp_path / "lora.html")
    assert before["progress"]["state"] == "running"
    assert list(tmp_path.glob(".lora.html.*.tmp")), "half of the next one"
    states = sorted(tmp_path.glob("lora-step*-state"))
    if not states:  # it was killed before the first
        shutil.copytree(whole.out / "lora-step00000002-state", tmp_path / "lora-step00000002-state")
        states = sorted(tmp_path.glob("lora-step*-state"))
    done = run_script(*line(tmp_path, resume=states[0]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.glob(".lora.html.*.tmp"))
    after = read_data(tmp_path / "lora.html")
    assert after["progress"]["state"] == "done"
    assert after["resumed"] == [2]
    kept = [one["step"] for one in before["samples"] if one["step"] <= 2]
    assert sorted({one["step"] for one in after["samples"]}) == sorted({*kept, 4, 6})
    assert after["series"]["loss/current"]["points"][-4:] == whole.page["series"]["loss/current"]["points"][-4:]
    assert hash_of(tmp_path / "lora.safetensors") == hash_of(whole.out / "lora.safetensors")


def test_another_page_of_this_name_stays(run_script, train_arguments, tmp_path):
    (tmp_path / "lora.html").write_text("<p>mine</p>", encoding="utf-8")
    done = run_script(*train_arguments(tmp_path, max_train_steps=1))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lora.html is there and is no results page; it stays as it is" in done.stderr
    assert (tmp_path / "lora.html").read_text(encoding="utf-8") == "<p>mine</p>"


def test_a_run_that_fails_says_so_on_its_page(run_script, line, tmp_path):
    done = run_script(*line(tmp_path, learning_rate=1e30, sample_every_n_steps=None, save_state=None))
    assert done.returncode == 2, done.stderr[-3000:]
    progress = read_data(tmp_path / "lora.html")["progress"]
    assert progress["state"] == "failed"
    assert "the loss became" in progress["text"] or "no longer finite" in progress["text"]
