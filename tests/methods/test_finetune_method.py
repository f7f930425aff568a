"""The fine-tuning method on tiny Stable Diffusion models, with the real options of both scripts."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.errors import UserError
from library.families.sd.adapter import SdFamily
from library.families.sd3.adapter import Sd3Family
from library.families.sdxl.adapter import SdxlFamily
from library.methods.finetune import FinetuneMethod, unmoved
from library.methods.finetune_spec import check_options
from library.options.parsing import parse_options
from library.options.validation import problems, warnings
from library.registry import FAMILIES, groups_for
from tests.builders import tiny_sd, write_tiny_sd1
from tests.builders.sd3 import DEPTH, write_tiny_sd3
from tests.builders.sdxl import tiny_sdxl

METADATA = {
    "ss_steps": "12",
    "ss_epoch": "3",
    "modelspec.title": "mine",
    "modelspec.implementation": "diffusers",
}


def options(method, *flags):
    return parse_options(groups_for("sd", method), ["--learning_rate=1e-3", *flags])


def attached(method="dreambooth", *flags, models=None):
    opts = options(method, *flags)
    family = SdFamily(opts)
    models = models or (family.loader.load() if opts.model.pretrained_model_name_or_path else tiny_sd())
    made = FinetuneMethod(opts)
    made.attach(family, models)
    return made, models


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One model in every form, in float32, so that every rounding shows."""
    folder = tmp_path_factory.mktemp("models")
    found = {"safetensors": folder / "m.safetensors", "ckpt": folder / "m.ckpt", "diffusers_safetensors": folder / "m"}
    for path in found.values():
        write_tiny_sd1(path, dtype=torch.float32)
    family = SdFamily(options("dreambooth", f"--pretrained_model_name_or_path={found['ckpt']}"))
    found["diffusers"] = folder / "bins"
    family.writer.save(family.loader.load(), found["diffusers"], save_as="diffusers", dtype=None, metadata={})
    return found


def source(files, kind="safetensors"):
    return f"--pretrained_model_name_or_path={files[kind]}"


# ---- what is trained


@pytest.mark.rows("R5", "R8", "R11", "R14", "R226")
@pytest.mark.parametrize(
    ("method", "flags", "rates"),
    [
        ("finetune", (), {"unet": 1e-3}),
        ("finetune", ("--learning_rate_te=1e-4",), {"unet": 1e-3}),
        ("finetune", ("--train_text_encoder",), {"unet": 1e-3, "text_encoder": 1e-3}),
        ("finetune", ("--train_text_encoder", "--learning_rate_te=1e-4"), {"unet": 1e-3, "text_encoder": 1e-4}),
        ("dreambooth", (), {"unet": 1e-3, "text_encoder": 1e-3}),
        ("dreambooth", ("--learning_rate_te=1e-4",), {"unet": 1e-3, "text_encoder": 1e-4}),
        ("dreambooth", ("--learning_rate_te=0",), {"unet": 1e-3}),
        ("dreambooth", ("--learning_rate=0", "--learning_rate_te=1e-4"), {"text_encoder": 1e-4}),
        ("dreambooth", ("--stop_text_encoder_training=5",), {"unet": 1e-3, "text_encoder": 1e-3}),
        ("dreambooth", ("--stop_text_encoder_training=0",), {"unet": 1e-3}),
        ("dreambooth", ("--stop_text_encoder_training=-1",), {"unet": 1e-3}),
    ],
)
def test_every_weight_of_the_trained_parts_and_no_other(method, flags, rates):
    made, models = attached(method, *flags)
    groups = made.parameter_groups()
    assert {group["name"]: group["lr"] for group in groups} == rates
    assert bool(made.trained_text_encoders()) == ("text_encoder" in rates)
    by_name = {"unet": models.denoiser, "text_encoder": models.text_encoders["te"]}
    for group in groups:
        assert list(map(id, group["params"])) == list(map(id, by_name[group["name"]].parameters()))
    for name, part in {**by_name, "vae": models.vae}.items():
        assert {p.requires_grad for p in part.parameters()} == {name in rates}
    assert {id(p) for p in made.trainable().parameters()} == {id(p) for g in groups for p in g["params"]}


def test_a_run_that_would_train_nothing_is_refused():
    with pytest.raises(UserError, match="--learning_rate"):
        attached("finetune", "--learning_rate=0")


@pytest.mark.rows("R217")
def test_the_text_encoder_stops_at_its_step():
    """Weight decay and momentum would move it without any gradient, if the optimizer did not pass over it."""
    made, models = attached("dreambooth", "--stop_text_encoder_training=2")
    text, unet = models.text_encoders["te"], models.denoiser
    optimizer = torch.optim.AdamW(made.parameter_groups(), weight_decay=0.1)
    made.trainable().train()
    seen = []
    for step in range(4):
        made.start_step(step)
        states = text(torch.tensor([[0, 3, 4, 1]])).last_hidden_state
        unet(torch.ones(1, 4, 8, 8), torch.tensor([5]), states).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append([torch.cat([p.detach().flatten() for p in part.parameters()]) for part in (text, unet)])
    texts, unets = zip(*seen, strict=True)
    assert not torch.equal(texts[0], texts[1])
    assert torch.equal(texts[1], texts[2])
    assert torch.equal(texts[1], texts[3])
    assert not torch.equal(unets[2], unets[3])
    assert not made.trained_text_encoders()
    made.trainable().train()
    assert unet.training
    assert not any(module.training for module in text.modules())
    assert any(name.startswith("te.") for name in made.trainable().state_dict()), "its state stays part of the run's"


@pytest.mark.rows("R217")
def test_a_resumed_run_knows_that_it_has_stopped():
    for first, trained in ((1, True), (2, False), (7, False)):
        made, models = attached("dreambooth", "--stop_text_encoder_training=2")
        made.start_step(first)
        assert bool(made.trained_text_encoders()) == trained
        assert all(p.requires_grad == trained for p in models.text_encoders["te"].parameters())


# ---- what is saved


@pytest.mark.rows("R117", "R118", "R120")
@pytest.mark.parametrize(
    ("read", "flags", "written"),
    [
        ("safetensors", (), "safetensors"),
        ("ckpt", (), "ckpt"),
        ("diffusers", (), "diffusers"),
        ("diffusers_safetensors", (), "diffusers_safetensors"),
        ("ckpt", ("--use_safetensors",), "safetensors"),
        ("diffusers", ("--use_safetensors",), "diffusers_safetensors"),
        ("safetensors", ("--save_model_as=ckpt",), "ckpt"),
        ("ckpt", ("--save_model_as=diffusers",), "diffusers"),
        ("safetensors", ("--save_model_as=diffusers_safetensors", "--use_safetensors"), "diffusers_safetensors"),
        ("diffusers", ("--save_model_as=safetensors",), "safetensors"),
    ],
)
def test_the_format_is_that_which_was_read_unless_another_is_asked_for(files, tmp_path, read, flags, written):
    made, _ = attached("finetune", source(files, read), *flags)
    suffix = {"safetensors": ".safetensors", "ckpt": ".ckpt"}.get(written, "")
    assert made.file_suffix() == suffix
    path = tmp_path / f"out{suffix}"
    made.save(path, None, METADATA)
    if suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            assert "model.diffusion_model.input_blocks.0.0.weight" in file.keys()  # noqa: SIM118
    elif suffix == ".ckpt":
        file = torch.load(path, weights_only=True)
        assert (file["epoch"], file["global_step"]) == (3, 12)
    else:
        index = json.loads((path / "model_index.json").read_text())
        assert index["_class_name"] == "StableDiffusionPipeline"
        ending = "safetensors" if written == "diffusers_safetensors" else "bin"
        assert (path / "unet" / f"diffusion_pytorch_model.{ending}").is_file()


def test_what_is_not_trained_is_saved_as_it_was_read(files, tmp_path):
    """A frozen VAE computes in half precision on a GPU, and a frozen text encoder wherever precision is mixed."""
    made, models = attached("finetune", source(files))
    for part in (models.vae, models.text_encoders["te"]):
        part.to(torch.bfloat16)
    for parameter in models.denoiser.parameters():
        parameter.data += 1
    made.save(tmp_path / "out.safetensors", None, METADATA)
    before, after = load_file(files["safetensors"]), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        expected = value + 1 if name.startswith("model.diffusion_model.") else value
        assert torch.equal(after[name], expected), name
    made.opts = options("finetune", source(files), "--save_model_as=diffusers_safetensors")
    made.save(tmp_path / "folder", None, METADATA)
    vae = load_file(tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors")
    original = load_file(files["diffusers_safetensors"] / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(vae[name], original[name]) for name in original)


@pytest.mark.rows("R121")
def test_precision_and_metadata_of_a_whole_model(files, tmp_path):
    made, _ = attached("dreambooth", source(files))
    made.save(tmp_path / "half.safetensors", torch.float16, METADATA)
    assert {value.dtype for value in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}
    with safe_open(tmp_path / "half.safetensors", "pt") as file:
        assert file.metadata() == {
            "modelspec.title": "mine",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        }


@pytest.mark.rows("R231")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_models_trained_in_bf16_are_files_of_the_usual_kind(files, tmp_path, dtype):
    """Under the names of the model that was read, in one number format, with nothing to unpickle."""
    made, models = attached("dreambooth", source(files), "--mixed_precision=bf16", "--full_bf16")
    for part in (models.denoiser, *models.text_encoders.values()):
        part.to(torch.bfloat16)
    made.save(tmp_path / "out.safetensors", dtype, METADATA)
    before, after = load_file(files["safetensors"]), load_file(tmp_path / "out.safetensors")
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    assert {value.dtype for value in after.values()} == {dtype}
    trained = [name for name in before if name.startswith("model.diffusion_model.")]
    assert all(torch.equal(after[name], before[name].bfloat16().to(dtype)) for name in trained)


def test_unmoved_shares_memory_until_the_module_moves():
    module = torch.nn.BatchNorm1d(3)
    other = unmoved(module)
    assert other.weight.data_ptr() == module.weight.data_ptr()
    module.to(torch.float64)
    assert module.weight.dtype == module.running_mean.dtype == torch.float64
    assert other.weight.dtype == other.running_mean.dtype == torch.float32


# ---- options


def complete(method, *flags):
    return options(method, "--pretrained_model_name_or_path=m.ckpt", "--output_dir=o", *flags)


@pytest.mark.rows("R222")
def test_fine_tuning_takes_metadata_files_only(tmp_path):
    traits = FAMILIES["sd"].traits
    (line,) = problems(complete("finetune", "--train_data_dir=p", "--resolution=64"), traits)
    assert line.startswith("--in_json: missing; name a metadata file")
    (tmp_path / "m.json").write_text("{}")
    flags = ("--train_data_dir=p", f"--in_json={tmp_path}/m.json")
    for resolution in ((), ("--resolution=64",)):
        opts = complete("finetune", *flags, *resolution)
        assert problems(opts, traits) == []
        assert list(warnings(opts, traits)) == [], "prepared latents have their sizes"


@pytest.mark.rows("R222")
def test_each_script_takes_its_kind_of_subsets(tmp_path):
    config = tmp_path / "data.toml"
    config.write_text(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'a'\nmetadata_file = 'm.json'\n"
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'b'\n"
    )
    (line,) = check_options(complete("finetune", f"--dataset_config={config}"))
    assert line.startswith(f"{config}, [[datasets]] 2, [[datasets.subsets]] 1: has no metadata_file")
    (line,) = check_options(complete("dreambooth", f"--dataset_config={config}"))
    assert line.startswith(f"{config}, [[datasets]] 1, [[datasets.subsets]] 1: has a metadata_file")
    assert check_options(complete("dreambooth", "--train_data_dir=p")) == []
    config.write_text("[[datasets]")
    assert check_options(complete("finetune", f"--dataset_config={config}")) == [], "others say what is wrong with it"


@pytest.mark.rows("R188")
def test_diffusers_xformers_is_xformers():
    opts = complete("finetune", "--diffusers_xformers", "--dataset_config=d.toml")
    assert opts.memory.xformers is True
    assert warnings(opts, FAMILIES["sd"].traits) == ["--diffusers_xformers: deprecated; use --xformers"]
    opts = complete("finetune", "--diffusers_xformers", "--sdpa", "--dataset_config=d.toml")
    assert problems(opts, FAMILIES["sd"].traits) == []
    assert "--sdpa: has no effect with --xformers, which is used" in warnings(opts, FAMILIES["sd"].traits)


@pytest.mark.parametrize(
    ("method", "flags", "beginning"),
    [
        ("finetune", ("--learning_rate_te=1e-5",), "--learning_rate_te: has no effect without --train_text_encoder"),
        (
            "dreambooth",
            ("--learning_rate_te=1e-5", "--stop_text_encoder_training=-1"),
            "--learning_rate_te: has no effect",
        ),
        ("dreambooth", ("--no_token_padding", "--weighted_captions"), "--no_token_padding: has no effect"),
        ("dreambooth", ("--use_safetensors", "--save_model_as=ckpt"), "--use_safetensors: has no effect"),
    ],
)
def test_what_has_no_effect_is_said(method, flags, beginning):
    (line,) = warnings(complete(method, "--dataset_config=d.toml", *flags), FAMILIES["sd"].traits)
    assert line.startswith(beginning)


@pytest.mark.rows("R218")
def test_captions_may_stay_short():
    made, models = attached("dreambooth", "--no_token_padding")
    family = SdFamily(made.opts)
    assert family.text.encode(models, ["a b", "c"]).tensors["context"].shape[1] == 4
    assert SdFamily(options("dreambooth")).text.encode(models, ["a b", "c"]).tensors["context"].shape[1] == 77


# ---- the guide

GUIDE = Path(__file__).parents[2] / "docs" / "fine_tuning.md"
SCRIPTS = {"train_db.py": "dreambooth", "fine_tune.py": "finetune"}


def test_the_guide_prints_commands_that_are_taken_and_options_that_exist(monkeypatch):
    text = GUIDE.read_text(encoding="utf-8")
    monkeypatch.chdir(GUIDE.parents[1])
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    commands = [shlex.split(block.replace("\\\n", " ")) for language, block in blocks if not language]
    assert len(commands) == 2
    for words in commands:
        start = next(index for index, word in enumerate(words) if word in SCRIPTS)
        opts = options(SCRIPTS[words[start]], *words[start + 1 :])
        missing = [line for line in problems(opts, FAMILIES["sd"].traits) if "demo_meta.json" not in line]
        assert missing == []  # the guide makes that file
        assert warnings(opts, FAMILIES["sd"].traits) == []
    known = {option for method in SCRIPTS.values() for option in options(method).flat()}
    assert set(re.findall(r"--(\w+)", text)) - known == {"num_cpu_threads_per_process"}


# ---- blocks that stay as they are


@pytest.mark.parametrize("rate", [0, 1e-3])
def test_blocks_with_the_rate_0_are_frozen_and_those_with_a_rate_need_no_other(rate):
    """Optimizers that find the rate themselves would move them."""
    rates = ["0"] * 11 + ["2e-4"] + ["0"] * 11
    family = SdxlFamily(parse_options(groups_for("sdxl", "finetune"), [f"--learning_rate={rate}"]))
    made = FinetuneMethod(parse_options(groups_for("sdxl", "finetune"), [f"--block_lr={','.join(rates)}"]))
    models = tiny_sdxl()
    made.attach(family, models)
    (group,) = made.parameter_groups()
    assert (group["name"], group["lr"]) == ("unet block 11", 2e-4)
    trained = {name for name, weight in models.denoiser.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in models.denoiser.named_parameters() if name.startswith("mid_block.att")}


@pytest.fixture(scope="module")
def sd3_file(tmp_path_factory):
    return write_tiny_sd3(tmp_path_factory.mktemp("sd3") / "m.safetensors", dtype=torch.float16)


def sd3_attached(path, *flags):
    opts = parse_options(groups_for("sd3", "finetune"), [f"--pretrained_model_name_or_path={path}", *flags])
    family, made = Sd3Family(opts), FinetuneMethod(opts)
    models = family.loader.load()
    made.attach(family, models)
    return made, models


def test_what_is_not_trained_in_the_denoiser_is_saved_as_it_was_read(sd3_file, tmp_path):
    """Blocks that are left alone, and the table of positions, although the run computes in another format."""
    made, models = sd3_attached(sd3_file, "--num_last_block_to_freeze=1")
    models.denoiser.to(torch.bfloat16)
    with torch.no_grad():
        for group in made.parameter_groups():
            for weight in group["params"]:
                weight += 1
    made.save(tmp_path / "tuned.safetensors", None, {})
    before, after = load_file(sd3_file), load_file(tmp_path / "tuned.safetensors")
    left = {key for key in before if torch.equal(before[key], after[key])}
    last = f"model.diffusion_model.joint_blocks.{DEPTH - 1}."
    assert left == {key for key in before if key.startswith((last, "first_stage_model.")) or "pos_embed" in key}
    assert {weight.dtype for weight in models.denoiser.state_dict().values()} == {torch.bfloat16}


def test_more_blocks_than_there_are_cannot_be_frozen(sd3_file):
    with pytest.raises(UserError, match=f"--num_last_block_to_freeze: {DEPTH + 1} are more than this model has"):
        sd3_attached(sd3_file, f"--num_last_block_to_freeze={DEPTH + 1}")
