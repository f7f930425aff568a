"""What the start of a training script imports: nothing that the run does not use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What transformers and diffusers import wherever it is installed, and what only some options use.
UNUSED = {"bitsandbytes", "peft", "scipy.stats", "tensorboard", "torch._inductor.compile_fx", "wandb", "xformers"}
TO_THE_MODEL = """
import logging, os, runpy, sys

def on_message(record):
    if str(record.msg).startswith("loaded "):
        print(*sys.modules, flush=True)
        os._exit(0)
    return True

logging.getLogger("trainscripts").addFilter(on_message)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
AFTERWARDS = """
import gc, json
from library.runtime.libraries import import_libraries
import_libraries({"scipy"})
from diffusers.utils import is_peft_available, is_xformers_available
from library.inference.samplers import make_scheduler
import bitsandbytes
print(json.dumps({
    "collects": gc.isenabled(),
    "diffusers sees": [is_peft_available(), is_xformers_available()],
    "sampler": type(make_scheduler("lms", steps=4, prediction_type="epsilon")).__name__,
    "optimizer": bitsandbytes.optim.AdamW8bit.__name__,
}))
"""


def python(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


def test_a_loaded_model_needed_no_optional_package(tmp_path):
    line = ["train_network.py", "--pretrained_model_name_or_path=examples/tiny_model/tiny-sd.safetensors"]
    line += ["--train_data_dir=examples/concept", f"--output_dir={tmp_path}", "--network_module=networks.lora"]
    modules = python(TO_THE_MODEL, *line, "--enable_bucket", "--min_bucket_reso=64", "--resolution=64").split()
    assert {"torch", "transformers", "diffusers"} <= set(modules)
    assert UNUSED & set(modules) == set()


def test_what_is_used_works_afterwards():
    assert json.loads(python(AFTERWARDS)) == {
        "collects": True,
        "diffusers sees": [False, False],
        "sampler": "LMSDiscreteScheduler",
        "optimizer": "AdamW8bit",
    }
