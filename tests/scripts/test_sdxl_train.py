"""sdxl_train.py from the outside: a tiny SDXL model is trained as a whole."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library import cli, registry
from library.families.sdxl.options import TRAITS
from library.options import parsing, validation
from tests.builders.sdxl import write_tiny_sdxl
from tests.scripts.starting import as_words
from tests.scripts.weights import furthest

BLOCK_RATES = [(number + 1) * 1e-5 for number in range(23)]
TEXT_RATES = {"conditioner.embedders.0.": 1e-4, "conditioner.embedders.1.": 3e-4}
BEGINNINGS = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}
UNET = "model.diffusion_model."
ADAFACTOR = ["relative_step=False", "scale_parameter=False", "warmup_init=False"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny-xl.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images in a training folder, a mask for each, and a metadata file of the same images."""
    root = tmp_path_factory.mktemp("data")
    folder, masks = root / "train" / "1_sks flower", root / "masks"
    folder.mkdir(parents=True)
    masks.mkdir()
    entries = {}
    for path in sorted(Path("examples/concept/10_sks flower").glob("*.png"))[:4]:
        with Image.open(path) as image:
            image.resize((64, 64)).save(folder / path.name)
        Image.linear_gradient("L").resize((64, 64)).save(masks / path.name)
        entries[path.stem] = {"caption": f"a sks flower, {path.stem}"}
    (root / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def train(run_script, model, data):
    """Runs the script with options, see `as_words`. Gives messages, and weights and metadata of a single file."""

    def run(out: Path, *, by_json: bool, **changes: object) -> SimpleNamespace:
        images = data / "train" / "1_sks flower"
        options: dict[str, object] = {
            "pretrained_model_name_or_path": model,
            "train_data_dir": images if by_json else images.parent,
            "output_dir": out,
            "output_name": "tuned",
            "resolution": 64,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "max_grad_norm": 0,
            "max_data_loader_n_workers": 0,
            "seed": 1,
            **({"in_json": data / "meta.json"} if by_json else {}),
            **changes,
        }
        result = run_script("sdxl_train.py", *as_words(options))
        assert result.returncode == 0, result.stderr[-3000:]
        file = out / "tuned.safetensors"
        if not file.is_file():
            return SimpleNamespace(said=result.stderr)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        return SimpleNamespace(said=result.stderr, file=file, weights=load_file(file), metadata=metadata)

    return run


# ---- folders of images, text encoders, rates by block


@pytest.fixture(scope="module")
def one_step(train, data, tmp_path_factory):
    """One step of an optimizer whose first step is as long as the rate, so that files show rates."""

    def run(**changes: object) -> SimpleNamespace:
        return train(
            tmp_path_factory.mktemp("one_step"),
            by_json=False,
            train_text_encoder=True,
            learning_rate_te1=TEXT_RATES["conditioner.embedders.0."],
            learning_rate_te2=TEXT_RATES["conditioner.embedders.1."],
            block_lr=",".join(map(str, BLOCK_RATES)),
            optimizer_type="AdamW",
            optimizer_args=["weight_decay=0"],
            max_train_steps=1,
            masked_loss=True,
            conditioning_data_dir=data / "masks",
            disable_mmap_load_safetensors=True,
            **changes,
        )

    return run


@pytest.fixture(scope="module")
def by_folders(one_step) -> SimpleNamespace:
    return one_step(cache_latents=True)


def block_of(key: str) -> int:
    """Embeddings are the first block, the output layer is the last."""
    found = re.match(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.", key.removeprefix(UNET))
    if found:
        return BEGINNINGS[found[1]] + int(found[2])
    return 22 if key.startswith(UNET + "out.") else 0


@pytest.mark.rows("R332")
def test_every_block_and_text_encoder_has_its_rate(by_folders, model):
    before, moved = load_file(model), {}
    for key, value in by_folders.weights.items():
        part = block_of(key) if key.startswith(UNET) else key[:24]
        moved[part] = max(moved.get(part, 0.0), (value - before[key]).abs().max().item())
    assert moved.pop("first_stage_model.encode") == moved.pop("first_stage_model.decode") == 0
    assert moved.pop("first_stage_model.quant_") == moved.pop("first_stage_model.post_q") == 0
    expected = {**dict(enumerate(BLOCK_RATES)), **TEXT_RATES}
    assert moved == {part: pytest.approx(rate, rel=0.01) for part, rate in expected.items()}


@pytest.mark.rows("C88", "R329")
def test_steps_in_groups_give_the_same_weights(by_folders, one_step):
    fused = one_step(cache_latents=True, fused_optimizer_groups=4)
    assert furthest(fused.weights, by_folders.weights) == 0


def test_the_file_has_the_layout_of_the_one_that_was_read(by_folders, model):
    before = load_file(model)
    forms = {key: (value.shape, value.dtype) for key, value in by_folders.weights.items()}
    assert forms == {key: (value.shape, value.dtype) for key, value in before.items()}
    assert by_folders.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert by_folders.metadata["modelspec.title"] == "tuned"
    assert not [name for name in by_folders.metadata if name.startswith("ss_")]
    cli.load_family("sdxl", [f"--pretrained_model_name_or_path={by_folders.file}"])


# ---- a metadata file, half precision, steps in the backward pass, text encoders in files


HALF = {
    "mixed_precision": "bf16",
    "full_bf16": True,
    "optimizer_type": "Adafactor",
    "optimizer_args": ADAFACTOR,
    "learning_rate": 1e-2,  # what is smaller by far is lost in bf16
    "max_train_steps": 2,
    "cache_latents_to_disk": True,
    "cache_text_encoder_outputs_to_disk": True,
}


@pytest.fixture(scope="module")
def by_json(train, tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("by_json")
    (out / "prompts.txt").write_text("a sks flower --w 64 --h 64 --s 1 --d 7\n", encoding="utf-8")
    return train(
        out,
        by_json=True,
        fused_backward_pass=True,
        sample_prompts=out / "prompts.txt",
        sample_every_n_steps=2,
        **HALF,
    )


def test_what_is_not_trained_stays_bit_for_bit(by_json, model):
    before = load_file(model)
    assert by_json.weights.keys() == before.keys()
    for key, value in by_json.weights.items():
        if not key.startswith(UNET):
            assert value.dtype == before[key].dtype
            assert torch.equal(value, before[key]), key
    trained = [key for key in before if key.startswith(UNET)]
    moved = [key for key in trained if not torch.equal(by_json.weights[key], before[key].bfloat16().float())]
    assert len(moved) > 0.9 * len(trained)
    assert all(torch.equal(value, value.bfloat16().float()) for value in map(by_json.weights.get, trained))


def test_an_image_is_made_though_the_text_encoders_are_gone(by_json):
    (image,) = (by_json.file.parent / "sample").iterdir()
    with Image.open(image) as image:
        assert image.size == (64, 64)
        assert len(image.getcolors(4096)) > 1


@pytest.mark.rows("R324")
def test_steps_in_the_backward_pass_and_after_it_are_the_same(by_json, train, tmp_path):
    """The second run takes what the first one left in files, and says what AdaFactor does by itself in the first."""
    after = train(tmp_path, by_json=True, stochastic_rounding=True, **HALF)
    assert "latents on disk: 4 used as they are\n" in after.said
    assert "caching text encoder outputs" not in after.said
    assert furthest(after.weights, by_json.weights) == 0


@pytest.mark.rows("C92", "R276")
def test_a_changed_caption_is_encoded_again_and_diffusers_opens_the_folder(by_json, train, data, model, tmp_path):
    """With a negative rate, and a model that predicts v."""
    from diffusers import StableDiffusionXLPipeline

    entries = json.loads((data / "meta.json").read_text(encoding="utf-8"))
    entries["flower_01"]["caption"] = "a red flower"
    (tmp_path / "other.json").write_text(json.dumps(entries), encoding="utf-8")
    run = train(
        tmp_path,
        by_json=True,
        **HALF
        | {
            "in_json": tmp_path / "other.json",
            "learning_rate": -1e-7,
            "v_parameterization": True,
            "save_model_as": "diffusers_safetensors",
            "full_bf16": None,
            "max_train_steps": 1,
        },
    )
    (named,) = re.findall(r"encoded again: (.+_te_outputs\.npz): (.+)", run.said)
    assert Path(named[0]).name == "flower_01_te_outputs.npz"
    assert named[1] == "made for another caption"
    assert re.search(r"caching text encoder outputs: +0%\|.*\| 0/(\d+) ", run.said)[1] == "1"
    assert "v_parameterization" not in run.said
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "tuned", local_files_only=True)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    _, before = cli.load_family("sdxl", [f"--pretrained_model_name_or_path={model}"])
    assert furthest(pipe.vae.state_dict(), before.vae.state_dict()) == 0
    assert 0 < furthest(pipe.unet.state_dict(), before.denoiser.state_dict()) < 1e-5


# ---- mistakes


@pytest.mark.rows("R325", "R330", "R331")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--cache_text_encoder_outputs --shuffle_caption", "shuffle_caption changes the caption during training"),
        ("--cache_text_encoder_outputs --train_text_encoder", "whose outputs are cached cannot be trained"),
        ("--block_lr=1e-4,1e-4", "--block_lr: needs 23 rates, got 2"),
        ("--fused_backward_pass --optimizer_type=AdamW8bit", "--fused_backward_pass: "),
        (
            "--fused_backward_pass --optimizer_type=Adafactor --gradient_accumulation_steps=2",
            "--fused_backward_pass: cannot be used with --gradient_accumulation_steps",
        ),
        (
            "--fused_optimizer_groups=4 --gradient_accumulation_steps=2",
            "--fused_optimizer_groups: cannot be used with --gradient_accumulation_steps",
        ),
        (
            "--fused_optimizer_groups=4 --fused_backward_pass --optimizer_type=Adafactor",
            "--fused_optimizer_groups: cannot be used with --fused_backward_pass",
        ),
        ("--fused_optimizer_groups=4 --optimizer_type=Prodigy", "Prodigy must see all weights at once"),
        ("--fused_optimizer_groups=4 --optimizer_type=DAdaptAdam", "DAdaptAdam must see all weights at once"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_loaded(run_script, model, data, tmp_path, arguments, said):
    done = run_script(
        *("sdxl_train.py", f"--pretrained_model_name_or_path={model}", f"--output_dir={tmp_path}"),
        *(f"--train_data_dir={data / 'train'}", "--resolution=64", "--max_grad_norm=0", *arguments.split()),
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert said in line


def test_the_options_of_the_guides_recipes_go_together():
    guide = Path("docs/sdxl.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^python (\w+)\.py (.+)$", guide, flags=re.M)
    scripts = registry.FAMILIES["sdxl"].scripts
    assert [name for name, _ in commands] == ["sdxl_train_network", "sdxl_train"]
    for name, options in commands:
        opts = parsing.parse_options(registry.groups_for("sdxl", scripts[name]), shlex.split(options))
        found = [line for line in validation.problems(opts, TRAITS) if "there is no f" not in line]  # stand-in names
        assert found == []
        assert list(validation.warnings(opts, TRAITS)) == []
