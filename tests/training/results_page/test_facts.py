"""What a results page says of settings, commands and data."""

from __future__ import annotations

import base64
import io
import shlex
from pathlib import Path

import pytest
from PIL import Image

from library.data.config.blueprint import build_specs
from library.data.sample.dataset import build_training_data
from library.families.registry import FAMILIES
from library.generation.script import ALL_FAMILIES
from library.methods.registry import METHODS
from library.options.base import options_of
from library.options.parsing import parse_options
from library.registry import groups_for
from library.training.results_page.facts import (
    OF_THE_MODEL,
    Example,
    data_report,
    repeat_command,
    settings,
    use_commands,
    without_secrets_in,
)

KEY = "0123456789abcdef0123456789abcdef01234567"
EXAMPLE = Example("it's a <cat>", 64, 96)
FLAGS = [
    *("--pretrained_model_name_or_path=my models/a.safetensors", "--train_data_dir=it's here", "--output_dir=out"),
    *("--network_module=networks.lora", "--network_args", "conv_dim=4", "conv_alpha=-1", "--learning_rate=1e-3"),
    *("--lr_warmup_steps=10%", "--optimizer_args", "betas=(0.9, 0.99)", "--cache_latents", f"--wandb_api_key={KEY}"),
    *("--min_snr_gamma=5", "--resolution=64,96", "--text_encoder_lr", "1e-4", '--metadata_title=$HOME `x` "y"'),
]


def options(*flags: str, family: str = "sd", method: str = "network"):
    return parse_options(groups_for(family, method), list(flags))


def words_of(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "))


def test_given_settings_and_defaults_are_apart_and_secrets_in_neither():
    found = settings(options(*FLAGS, "--seed=3"))
    given = {name: (value, by) for name, value, by in found["given"]}
    assert given["--seed"] == (3, "command line")
    assert given["--wandb_api_key"] == ("(hidden)", "command line")
    assert given["--network_args"] == (["conv_dim=4", "conv_alpha=-1"], "command line")
    defaults = dict(found["defaults"])
    assert defaults["--max_train_steps"] == 1600
    assert not given.keys() & defaults.keys()
    assert KEY not in str(found)


def test_the_command_asks_for_the_same(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        '[a]\nnetwork_dim = 8\nloss_type = "huber"\nhuber_c = 0.5\nxformers = false\n[b]\nnotify = "json://me:pass@x/"\n'
    )
    opts = options(*FLAGS, f"--config_file={config}").replaced(seed=77)
    command = repeat_command(opts, "train_network.py", processes=1)
    assert KEY not in command
    assert "json://" not in command
    python, script, *words = words_of(command)
    assert (python, script) == ("python", "train_network.py")
    again = options(*words)
    before, after = opts.flat(), again.flat()
    differ = {name for name in before if before[name] != after[name]}
    assert differ == {"wandb_api_key", "notify", "config_file"}
    assert after["seed"] == 77
    assert words_of(repeat_command(opts, "x.py", processes=3))[:4] == [
        "accelerate",
        "launch",
        "--num_processes=3",
        "x.py",
    ]


@pytest.mark.parametrize("name", METHODS)
def test_gen_img_has_the_options_that_a_method_names(name):
    known = {option.flag for group in ALL_FAMILIES for option in options_of(group)}
    for word in (METHODS[name].usage or "").split():
        if word.startswith("--"):
            assert word.partition("=")[0] in known
    assert {f"--{option}" for option in OF_THE_MODEL} <= known


def test_every_method_but_two_has_files_that_gen_img_reads():
    assert {name for name, spec in METHODS.items() if spec.usage is None} == {"lllite", "xti"}


def test_how_to_use_a_network():
    opts = options(*FLAGS, "--v2", "--vae=v.safetensors")
    (_, draw), (_, compare) = use_commands(
        opts, METHODS["network"].usage, Path("out/my lora.safetensors"), "out/my*.safetensors", EXAMPLE
    )
    words = words_of(draw)
    assert words[:3] == ["python", "gen_img.py", "--ckpt=my models/a.safetensors"]
    assert {"--v2", "--vae=v.safetensors", "--network_weights=out/my lora.safetensors", "--prompt=it's a <cat>"} <= {
        *words
    }
    parsed = parse_options(ALL_FAMILIES, words[2:])
    assert (parsed.image.W, parsed.image.H, parsed.networks.network_weights) == (64, 96, ["out/my lora.safetensors"])
    axes = parse_options(ALL_FAMILIES, words_of(compare)[2:]).grid.grid
    assert axes == ["network_weights=out/my*.safetensors", "network_mul=0.6,0.8,1.0"]


def test_a_trained_model_is_the_model():
    opts = options("--pretrained_model_name_or_path=a.safetensors", method="finetune")
    ((_, draw),) = use_commands(opts, METHODS["finetune"].usage, Path("out/b.safetensors"), None, EXAMPLE)
    assert [word for word in words_of(draw) if word.startswith("--ckpt")] == ["--ckpt=out/b.safetensors"]
    assert use_commands(opts, None, Path("x"), None, EXAMPLE) == []


def test_what_was_left_out_is_shown_with_its_reason(tmp_path):
    folder = tmp_path / "data" / "1_cat"
    folder.mkdir(parents=True)
    for number in range(8):
        image = Image.new("RGB", (96, 64))
        image.putdata([(x * number % 256, x % 251, 31 * number) for x in range(96 * 64)])
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"cat {number}")
    (folder / "0b.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "bad.png").write_bytes((folder / "1.png").read_bytes()[:200])
    Image.new("RGB", (640, 64), "red").save(folder / "long.png")
    opts = options(
        f"--train_data_dir={tmp_path / 'data'}",
        "--resolution=64",
        "--enable_bucket",
        "--min_bucket_reso=64",
        "--seed=1",
        "--validation_split=0.2",
        "--caption_extension=.txt",
    )
    traits = FAMILIES["sd"].traits
    data = build_training_data(build_specs(opts, traits, "mask"), opts, traits, seed=1)
    found = data_report(data)
    groups = {group["title"].partition(" (")[0]: group["images"] for group in found["groups"]}
    (bad,) = groups["Left out"]
    assert (bad["name"], bad["src"]) == ("bad.png", None)
    assert bad["why"] == "the file is truncated"
    assert {one["name"] for one in groups["More than half is cut off"]} == {"long.png"}
    assert {one["why"] for one in groups["The same image twice"]} <= {"equal to 0.png", "equal to 0b.png"}
    assert len(groups["Kept for validation"]) == len(data.held_out.records)
    source = groups["More than half is cut off"][0]["src"]
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        assert image.size == (160, 16)
    assert any("bad.png" in line for line in found["lines"])


def test_secrets_are_hidden_wherever_they_stand():
    options(*FLAGS)  # which makes the key known
    data = {"a": [f"x{KEY}x", ("b", 1, None)], "src": f"data:image/webp;base64,{KEY}"}
    assert without_secrets_in(data) == {"a": ["x(hidden)x", ["b", 1, None]], "src": f"data:image/webp;base64,{KEY}"}
