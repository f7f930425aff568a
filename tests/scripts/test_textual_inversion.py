"""The scripts of Textual Inversion from the outside, for every family, on tiny models."""

from __future__ import annotations

import re
import shlex
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library import registry
from library.checkpoints.reading import read_metadata
from library.inference.generate import sample_latents
from library.inference.prompts import SamplePrompt
from library.methods.embedding import EmbeddingMethod
from tests.builders.flux import write_flux, write_parts
from tests.builders.options import options_for
from tests.builders.sd3 import write_tiny_sd3
from tests.builders.sdxl import write_tiny_sdxl
from tests.builders.t5 import write_t5_tokenizer
from tests.scripts.conftest import MODEL
from tests.scripts.starting import as_words
from tests.scripts.weights import furthest

WORD = "sks"  # of the captions in examples/concept
TEXT = f"a {WORD} flower on a black background"
STEPS = 6


@pytest.fixture(scope="module")
def arguments():
    """A short command line of train_textual_inversion.py; keywords add options, see `as_words`."""

    def build(out: Path, **changes: object) -> list[str]:
        options: dict[str, object] = {
            "pretrained_model_name_or_path": MODEL,
            "train_data_dir": "examples/concept",
            "output_dir": out,
            "token_string": WORD,
            "init_word": "flower",
            "num_vectors_per_token": 2,
            "save_model_as": "safetensors",
            "resolution": 64,
            "enable_bucket": True,
            "min_bucket_reso": 64,
            "bucket_reso_steps": 64,
            "train_batch_size": 2,
            "max_train_steps": STEPS,
            "learning_rate": 1e-2,
            "max_data_loader_n_workers": 0,
            "seed": 1,
            **changes,
        }
        return ["train_textual_inversion.py", *as_words(options)]

    return build


OPTIONS = {"save_every_n_steps": 2, "save_state": True, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}


@pytest.fixture(scope="module")
def whole(run_script, arguments, tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("whole")
    prompts = out / "prompts.txt"
    prompts.write_text(f"{TEXT} --n blue {WORD} --w 64 --h 64 --s 2 --d 7\na red circle --w 64 --h 64 --s 2 --d 7\n")
    done = run_script(*arguments(out, **OPTIONS, sample_prompts=prompts, sample_at_first=True, sample_every_n_steps=6))
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(out=out, said=done.stderr, file=out / f"{WORD}.safetensors")


def ran(run_script, line, *, fails: bool = False, processes: int = 1) -> str:
    done = run_script(*line, processes=processes)
    assert done.returncode == (2 if fails else 0), done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stderr


def test_the_word_names_the_files_and_they_hold_its_vectors(whole):
    names = sorted(path.name for path in whole.out.iterdir() if path.is_file() and path.suffix != ".txt")
    copies = [f"{WORD}-step0000000{step}.safetensors" for step in (2, 4, 6)]
    assert names == [*copies, f"{WORD}.html", f"{WORD}.safetensors"]
    vectors = load_file(whole.file)
    assert {name: tuple(value.shape) for name, value in vectors.items()} == {"emb_params": (2, 64)}
    assert not torch.equal(vectors["emb_params"][0], vectors["emb_params"][1]), "each has been trained"
    metadata = read_metadata(whole.file)
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert "--init_word: 'flower' has 1 token for emb_params, and the word 2 vectors" in whole.said


def test_sample_images_use_the_word(whole):
    """Of the two prompts, only that with the word changes while it is trained."""
    images = sorted((whole.out / "sample").iterdir())
    assert len(images) == 4
    before, after = ([Image.open(path).tobytes() for path in images[at : at + 2]] for at in (0, 2))
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_a_run_goes_on_exactly(whole, run_script, arguments, tmp_path):
    state = whole.out / f"{WORD}-step00000002-state"
    assert set(load_file(state / "model.safetensors")) == {"te"}
    ran(run_script, arguments(tmp_path, **OPTIONS, resume=state))
    found, wanted = load_file(tmp_path / f"{WORD}.safetensors"), load_file(whole.file)
    assert torch.equal(found["emb_params"], wanted["emb_params"])


def test_three_kills_change_nothing(whole, start_script, arguments, tmp_path):
    for attempt in range(4):
        states = sorted(tmp_path.glob("*-step*-state"))
        script = start_script(*arguments(tmp_path, **OPTIONS, resume=states[-1] if states else None))
        while attempt < 3 and script.is_running() and len(list(tmp_path.glob("*-step*-state"))) <= len(states):
            time.sleep(0.02)
        if attempt < 3:
            script.kill()
        done = script.result()
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(load_file(tmp_path / f"{WORD}.safetensors")["emb_params"], load_file(whole.file)["emb_params"])


def test_two_processes_train_as_one_that_accumulates(run_script, arguments, tmp_path):
    """float32: the mean of two gradients is taken in another place."""
    common = {"max_train_steps": 3, "lr_scheduler": "constant"}
    ran(run_script, arguments(tmp_path / "one", **common, gradient_accumulation_steps=2))
    ran(run_script, arguments(tmp_path / "two", **common), processes=2)
    one, two = (load_file(tmp_path / name / f"{WORD}.safetensors") for name in ("one", "two"))
    assert furthest(one, two) < 1e-6


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_diffusers_reads_the_file(whole, run_script, arguments, tmp_path, kind):
    """The same latents there and here, of order 1, after three DDIM steps in float32."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    file = whole.file
    if kind == "pt":
        ran(run_script, arguments(tmp_path, save_model_as=None, weights=file, init_word=None, max_train_steps=1))
        file = tmp_path / f"{WORD}.pt"
    opts = options_for("sd", "embedding", **given_to_use(file))
    family = registry.FAMILIES["sd"].adapter(opts)
    models = family.loader.load()
    family.writer.save(models, tmp_path / "model", save_as="diffusers_safetensors", dtype=torch.float32, metadata={})
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    shape = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
    plain = pipe(TEXT, latents=noise, **shape).images
    pipe.load_textual_inversion(str(file.parent), weight_name=file.name, token=WORD, local_files_only=True)
    theirs = pipe(TEXT, latents=noise, **shape).images
    EmbeddingMethod(opts).attach(family, models)
    prompt = SamplePrompt(
        prompt=TEXT, negative_prompt="", width=64, height=64, seed=5, steps=3, scale=5.0, sampler="ddim"
    )
    ours = sample_latents(family, models, [prompt], torch.device("cpu"))
    assert (theirs - plain).abs().max() > 1e-2, "the embedding does something"
    assert (theirs - ours).abs().max() < 1e-4


def given_to_use(file: Path) -> dict[str, object]:
    return {
        "pretrained_model_name_or_path": MODEL, "token_string": WORD, "weights": str(file), "learning_rate": 1e-3,
    }  # fmt: skip


def test_templates_average_validation_and_memory(run_script, arguments, small_model, tmp_path):
    """What the loop offers to every method, in half precision with a base in 8 bits, from images without the word."""
    said = ran(
        run_script,
        arguments(
            tmp_path,
            pretrained_model_name_or_path=small_model,
            token_string="zwx",
            use_object_template=True,
            train_data_dir="examples/regularisation",
            max_train_steps=2,
            mixed_precision="bf16",
            full_bf16=True,
            save_precision="fp16",
            gradient_checkpointing=True,
            fp8_base=True,
            ema=True,
            validation_split=0.2,
            validate_every_n_steps=2,
            max_validation_steps=1,
            cache_latents=True,
            optimizer_type="AdamW8bit",
        ),
    )
    assert "validation loss" in said
    (vectors,) = load_file(tmp_path / "zwx.safetensors").values()
    assert vectors.dtype == torch.float16
    assert vectors.isfinite().all()


def test_the_recipe_of_the_guide(run_script, tmp_path):
    """As it is printed, but for fewer steps and another place."""
    (printed,) = re.findall(r"```\n(python train_textual.*?)```", Path("docs/textual_inversion.md").read_text(), re.S)
    _, *words = shlex.split(printed.replace("\\\n", " "))
    short = [f"--output_dir={tmp_path}", "--max_train_steps=2", "--sample_every_n_steps=2", "--sample_prompts"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a sks flower --w 64 --h 64 --s 2 --d 1\n")
    ran(run_script, [*words, *short, str(prompts)])
    assert load_file(tmp_path / "sks.safetensors")["emb_params"].shape == (8, 64)


def test_cached_outputs_of_the_word_are_no_other_runs(run_script, arguments, large, tmp_path):
    """T5's are shared, but what CLIP gave for the new word must not reach a run that does not know it."""
    options = {**large["flux"], "max_train_steps": 1, "cache_text_encoder_outputs_to_disk": True}
    data = shutil.copytree("examples/concept", tmp_path / "data")
    _, *words = arguments(tmp_path / "out", **options, train_data_dir=data)
    files = len(list(data.glob("*/*.png")))
    said = ran(run_script, ["flux_train_textual_inversion.py", *words])
    assert f"text encoder outputs on disk: {files} new" in said
    said = ran(run_script, ["flux_train_textual_inversion.py", *words, "--seed=2", "--init_word=red"])
    assert f"text encoder outputs on disk: {files} used as they are\n" in said
    network = [word for word in words if not word.startswith(("--token_string", "--init_word", "--num_vectors"))]
    network += ["--network_module=networks.lora_flux", "--network_train_unet_only", "--output_name=lora"]
    said = ran(run_script, ["flux_train_network.py", *network])
    assert f"text encoder outputs on disk: {files} made again" in said


# ---- mistakes


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"token_string": None},
            "error: --token_string: missing; give the new word that captions and prompts will use",
        ),
        ({"token_string": "house"}, "error: --token_string: 'house' is a token of the text encoder already; choose a "),
        ({"token_string": "zwx"}, "error: --token_string: no caption holds 'zwx', so nothing would be learned; write "),
        ({"weights": "README.md"}, "error: README.md: cannot be read"),
        ({"cache_text_encoder_outputs": True}, "error: "),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_read(run_script, arguments, tmp_path, given, line):
    said = ran(run_script, arguments(tmp_path, **given), fails=True)
    (error,) = [text for text in said.splitlines() if text.startswith("error")]
    assert error.startswith(line)
    assert "loaded" not in said
    assert not list(tmp_path.iterdir())


# ---- the other families


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> dict[str, dict[str, object]]:
    """By script: the options of a tiny model."""
    folder = tmp_path_factory.mktemp("models")
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")
    encoders = ("te1", "te2", "te3")
    common = {"bucket_reso_steps": 32, "t5xxl_max_token_length": 16, "tokenizer_cache_dir": folder}
    return {
        "sdxl": {
            "pretrained_model_name_or_path": write_tiny_sdxl(folder / "sdxl.safetensors"),
            "bucket_reso_steps": 32,
        },
        "sd3": {
            "pretrained_model_name_or_path": write_tiny_sd3(folder / "sd3.safetensors", encoders=encoders),
            **common,
        },
        "flux": {
            "pretrained_model_name_or_path": write_flux(folder),
            **write_parts(folder),
            **common,
            "model_prediction_type": "raw",
        },
    }


@pytest.mark.rows("R332")
@pytest.mark.parametrize(
    ("family", "given", "keys"),
    [
        ("sdxl", {"disable_mmap_load_safetensors": True}, {"clip_l": 64, "clip_g": 128}),
        ("sd3", {"cache_text_encoder_outputs": True}, {"clip_l": 64, "clip_g": 64}),
        ("sd3", {"train_t5xxl": True}, {"clip_l": 64, "clip_g": 64, "t5xxl": 160}),
        ("flux", {"cache_text_encoder_outputs": True}, {"clip_l": 64}),
        ("flux", {"train_t5xxl": True, "gradient_checkpointing": True}, {"clip_l": 64, "t5xxl": 48}),
    ],
)
def test_large_families(run_script, arguments, large, tmp_path, family, given, keys):
    """Two steps with a sample image; and the same from a state after the first of them."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{TEXT} --w 64 --h 64 --s 2 --d 7\n")
    options = {**large[family], **given, "max_train_steps": 2, "save_state": True, "save_every_n_steps": 1}
    options |= {"sample_prompts": prompts, "sample_at_first": True, "sample_every_n_steps": 2, "init_word": "red"}

    def train(out: Path, **more: object) -> dict[str, torch.Tensor]:
        _, *words = arguments(out, **options, **more)
        ran(run_script, [f"{family}_train_textual_inversion.py", *words])
        return load_file(out / f"{WORD}.safetensors")

    vectors = train(tmp_path / "whole")
    assert {key: value.shape[1] for key, value in vectors.items()} == keys
    assert all(len(value) == 2 and not torch.equal(value[0], value[1]) for value in vectors.values())
    before, after = (Image.open(path).tobytes() for path in sorted((tmp_path / "whole" / "sample").iterdir()))
    assert before != after
    if "train_t5xxl" not in given:
        again = train(tmp_path / "again", resume=tmp_path / "whole" / f"{WORD}-step00000001-state")
        assert furthest(vectors, again) == 0


# ---- several words, vectors by layer, and words beside a network


def test_several_words_with_vectors_for_each_layer(run_script, arguments, small_model, tmp_path):
    """What the loop offers: sample images, an average, validation, and a run that goes on exactly."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a {WORD} --w 64 --h 64 --s 2 --d 1\na circle --w 64 --h 64 --s 2 --d 1\n")
    more = {"token_string": None, "init_word": None, "pretrained_model_name_or_path": small_model, "max_train_steps": 4}
    more |= {"ema": True, "validation_split": 0.2, "validate_every_n_steps": 2, "max_validation_steps": 1}
    more |= {"save_state": True, "save_every_n_steps": 2, "cache_latents": True, "gradient_checkpointing": True}
    more["caption_prefix"] = "a rewolf and"
    samples = {"sample_prompts": prompts, "sample_at_first": True, "sample_every_n_steps": 4}

    def line(out, **given):
        _, *words = arguments(out, **more, **given)
        return ["train_textual_inversion_XTI.py", *words, "--token_string", WORD, "rewolf"]

    said = ran(run_script, line(tmp_path / "whole", **samples))
    files = [tmp_path / "whole" / f"{word}.safetensors" for word in (WORD, "rewolf")]
    tensors = [load_file(file) for file in files]
    places = sorted(tensors[0])
    assert {"IN01", "MID"} <= set(places) == set(tensors[1])
    before = load_file(tmp_path / "whole" / f"{WORD}-step00000002.safetensors")
    assert all(not torch.equal(before[place], tensors[0][place]) for place in places), "each has been trained"
    images = sorted((tmp_path / "whole" / "sample").iterdir())
    shown = [Image.open(path).tobytes() for path in images]
    assert len(shown) == 4
    assert shown[0] != shown[2], "only the prompt with the word changes"
    assert shown[1] == shown[3]
    assert said.count("validation loss") == 2
    state = tmp_path / "whole" / f"{WORD}-step00000002-state"
    ran(run_script, line(tmp_path / "again", resume=state))
    for file, wanted in zip(files, tensors, strict=True):
        assert furthest(load_file(tmp_path / "again" / file.name), wanted) == 0


@pytest.fixture(scope="module")
def pivotal(run_script, train_arguments, tmp_path_factory) -> SimpleNamespace:
    """A LoRA and a word at once, the LoRA on the U-Net alone."""
    out = tmp_path_factory.mktemp("pivotal")
    options = {"token_string": WORD, "num_vectors_per_token": 2, "init_word": "flower", "embedding_lr": 1e-2}
    options |= {"network_train_unet_only": True, "save_state": True, "save_every_n_steps": 2, "ema": True}
    ran(run_script, train_arguments(out, **options))
    return SimpleNamespace(out=out, options=options, weights=load_file(out / "lora.safetensors"))


def test_a_word_is_trained_beside_a_network(pivotal, run_script, train_arguments, tmp_path):
    """Its vectors are in the network's file and in one of their own; neither is as it is without the other."""
    inside = {key: value for key, value in pivotal.weights.items() if not key.startswith("lora_unet_")}
    assert inside.keys() == {f"bundle_emb.{WORD}.emb_params"}
    (vectors,) = inside.values()
    assert torch.equal(vectors, load_file(pivotal.out / f"lora_{WORD}.safetensors")["emb_params"])
    earlier = load_file(pivotal.out / f"lora-step00000002_{WORD}.safetensors")["emb_params"]
    assert (vectors - earlier).abs().min() > 0
    ups = {key: value for key, value in pivotal.weights.items() if "lora_up" in key}
    assert any(value.any() for value in ups.values())
    assert read_metadata(pivotal.out / "lora.safetensors")["ss_token_string"] == f'["{WORD}"]'
    alone = {"token_string": None, "num_vectors_per_token": None, "init_word": None, "embedding_lr": None}
    ran(run_script, train_arguments(tmp_path, **{**pivotal.options, **alone}))
    plain = load_file(tmp_path / "lora.safetensors")
    assert plain.keys() == pivotal.weights.keys() - inside.keys()
    assert furthest(plain, {key: pivotal.weights[key] for key in plain}) > 0


def test_a_word_beside_a_network_goes_on_exactly_and_from_the_file(pivotal, run_script, train_arguments, tmp_path):
    state = pivotal.out / "lora-step00000002-state"
    ran(run_script, train_arguments(tmp_path / "state", **pivotal.options, resume=state))
    assert furthest(load_file(tmp_path / "state" / "lora.safetensors"), pivotal.weights) == 0
    kept = {"network_weights": pivotal.out / "lora.safetensors", "embedding_lr": 1e-12, "learning_rate": 1e-12}
    given = {**pivotal.options, **kept, "num_vectors_per_token": None, "max_train_steps": 1, "save_state": None}
    ran(run_script, train_arguments(tmp_path / "file", **given))
    assert furthest(load_file(tmp_path / "file" / "lora.safetensors"), pivotal.weights) < 1e-9


def test_the_recipe_with_a_network(run_script, tmp_path):
    """As it is printed, but for fewer steps and another place."""
    (printed,) = re.findall(r"```\n(python train_network.*?)```", Path("docs/textual_inversion.md").read_text(), re.S)
    _, *words = shlex.split(printed.replace("\\\n", " "))
    ran(run_script, [*words, f"--output_dir={tmp_path}", "--max_train_steps=1", "--max_data_loader_n_workers=0"])
    assert load_file(tmp_path / "flower_sks.safetensors")["emb_params"].shape == (2, 64)


def test_what_words_beside_a_network_cannot_be(run_script, train_arguments, tmp_path):
    said = ran(run_script, train_arguments(tmp_path, token_string="house"), fails=True)
    assert "error: --token_string: 'house' is a token of the text encoder already" in said
    said = ran(run_script, train_arguments(tmp_path, token_string="a.b"), fails=True)
    assert "error: --token_string: a.b has a dot, which divides names in network files" in said
    said = ran(run_script, train_arguments(tmp_path, token_string="zwx"), fails=True)
    assert "no caption holds 'zwx', so nothing would be learned; write 'zwx' into the captions" in said
    assert "template" not in said
