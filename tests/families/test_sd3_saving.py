"""Saving SD3/3.5: the same bytes as were read, encoders' own files, folders that diffusers loads."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from library.errors import UserError
from library.families.sd3.adapter import Sd3Family
from library.families.sd3.loading import load_model
from library.types import Models
from tests.builders.sd3 import VARIANTS, clip_tensors, sd3_options, sd3_tensors, write_encoder_file, write_tiny_sd3
from tests.builders.t5 import t5_weights, write_t5_tokenizer

ALL = ("te1", "te2", "te3")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")
    return str(folder)


def load(path, cache, **options) -> tuple[Sd3Family, Models]:
    family = Sd3Family(sd3_options(path, cache=cache, **options))
    return family, family.loader.load()


def save(family: Sd3Family, models: Models, path, save_as="safetensors", dtype=None, **metadata: str) -> None:
    family.writer.save(models, path, save_as=save_as, dtype=dtype, metadata=metadata)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("encoders", [(), ALL], ids=["bare", "whole"])
def test_reading_and_writing_gives_the_same_bytes(variant, encoders, cache, tmp_path):
    path = write_tiny_sd3(tmp_path / "in.safetensors", variant, torch.float16, encoders=encoders)
    family, models = load(path, cache)
    assert models.source.save_as == "safetensors"
    save(family, models, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == path.read_bytes()
    assert {entry.name for entry in tmp_path.iterdir()} == {"in.safetensors", "out.safetensors"}


def test_odd_files_keep_their_keys_and_bytes(cache, tmp_path):
    """Several formats, a foreign tensor, no projection in CLIP-L, T5's embedding twice, position numbers."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in sd3_tensors(encoders=ALL).items()}
    clip, t5 = "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."
    del tensors[f"{clip}text_projection.weight"]
    tensors[f"{clip}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors[f"{clip}logit_scale"] = torch.tensor(4.6)
    tensors[f"{t5}encoder.embed_tokens.weight"] = tensors[f"{t5}shared.weight"].clone()
    tensors["model.diffusion_model.pos_embed"] = tensors["model.diffusion_model.pos_embed"].float()
    fc1 = "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"
    tensors[fc1] = tensors[fc1].to(torch.float8_e4m3fn)
    tensors["foreign"] = torch.arange(3)
    save_file(tensors, tmp_path / "in.safetensors")
    family, models = load(tmp_path / "in.safetensors", cache)
    save(family, models, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "in.safetensors").read_bytes()


def test_parts_that_were_dropped_since_are_copied_from_the_source(cache, tmp_path):
    path = write_tiny_sd3(tmp_path / "in.safetensors", encoders=ALL)
    family, models = load(path, cache)
    models.vae, models.text_encoders = None, {}
    save(family, models, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == path.read_bytes()


def test_a_file_of_the_denoiser_alone_stays_one(cache, tmp_path):
    tensors = {
        name.removeprefix("model.diffusion_model."): tensor
        for name, tensor in sd3_tensors("5-medium", vae=False).items()
    }
    save_file(tensors, tmp_path / "in.safetensors")
    vae = write_tiny_sd3(tmp_path / "vae.safetensors")
    family = Sd3Family(sd3_options(tmp_path / "in.safetensors", vae=str(vae)))
    save(family, family.loader.load(), tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "in.safetensors").read_bytes()


@pytest.fixture
def trained(cache, tmp_path) -> tuple[Sd3Family, Models, dict[str, torch.Tensor]]:
    """A model in which something of every part was changed, told to save its encoders; and the file's tensors."""
    files = {part: write_encoder_file(tmp_path / f"{part}.safetensors", part, part != "te1") for part in ALL}
    options = {"clip_l": files["te1"], "clip_g": files["te2"], "t5xxl": files["te3"]}
    path = write_tiny_sd3(tmp_path / "in.safetensors")
    family, models = load(path, cache, **options, save_clip=True, save_t5xxl=True)
    models.denoiser.norm_out.linear.bias.data[0] += 1  # of the scale, which the file has last
    for part in ("te1", "te2"):
        models.text_encoders[part].text_model.final_layer_norm.bias.data += 1
    models.text_encoders["te3"].shared.weight.data += 1
    return family, models, load_file(path)


def test_training_changes_its_own_tensors_only(trained, tmp_path):
    family, models, before = trained
    save(family, models, tmp_path / "out.safetensors", ss_steps="3", **{"modelspec.implementation": "diffusers"})
    after = load_file(tmp_path / "out.safetensors")
    assert set(after) == set(before)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.diffusion_model.final_layer.adaLN_modulation.1.bias"]
    difference = after[changed[0]] - before[changed[0]]
    assert difference.nonzero().tolist() == [[64]]
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {
            "ss_steps": "3",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        }


def test_encoders_are_written_to_files_of_their_own_when_asked(trained, tmp_path):
    family, models, _ = trained
    save(family, models, tmp_path / "out.safetensors")
    for part, option in (("te1", "clip_l"), ("te2", "clip_g"), ("te3", "t5xxl")):
        before, after = load_file(tmp_path / f"{part}.safetensors"), load_file(tmp_path / f"out_{option}.safetensors")
        assert set(after) == set(before)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert changed == ["shared.weight" if part == "te3" else "text_model.final_layer_norm.bias"]
    quiet = Sd3Family(sd3_options(""))
    save(quiet, models, tmp_path / "quiet.safetensors")
    assert not list(tmp_path.glob("quiet_*"))


def test_save_precision_holds_for_every_tensor_of_the_model(cache, tmp_path):
    family, models = load(write_tiny_sd3(tmp_path / "in.safetensors", encoders=ALL), cache, save_clip=True)
    save(family, models, tmp_path / "out.safetensors", dtype=torch.bfloat16)
    for name in ("out", "out_clip_l", "out_clip_g"):
        assert {tensor.dtype for tensor in load_file(tmp_path / f"{name}.safetensors").values()} == {torch.bfloat16}


def test_a_ckpt_stays_a_ckpt(cache, tmp_path):
    torch.save({"state_dict": sd3_tensors(), "global_step": 7, "epoch": 2}, tmp_path / "in.ckpt")
    family, models = load(tmp_path / "in.ckpt", cache)
    assert models.source.save_as == "ckpt"
    save(family, models, tmp_path / "out.ckpt", "ckpt", ss_steps="3", ss_epoch="1")
    content = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert (content["global_step"], content["epoch"]) == (10, 3)
    expected = sd3_tensors()
    assert set(content["state_dict"]) == set(expected)
    assert all(torch.equal(content["state_dict"][name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("save_as", ["diffusers_safetensors", "diffusers"])
def test_folders_are_pipelines_of_diffusers_and_can_be_read_again(save_as, cache, tmp_path):
    path = write_tiny_sd3(tmp_path / "in.safetensors", "5-medium", encoders=ALL)
    family, models = load(path, cache)
    save(family, models, tmp_path / "folder", save_as)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert pipeline.scheduler.config.shift == 3.0
    with torch.no_grad():
        theirs, _, pooled, _ = pipeline.encode_prompt(
            ["a red house"], ["a red house"], ["a red house"], do_classifier_free_guidance=False
        )
    assert tuple(pipeline.transformer.config.dual_attention_layers) == (0, 1)
    cond = family.text.encode(models, ["a red house"]).tensors
    assert_close(pooled, cond["lg_pooled"], rtol=1e-4, atol=1e-4)
    assert_close(theirs[:, 77:], cond["t5_out"], rtol=1e-4, atol=1e-4)
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, models.denoiser.state_dict()[name]), name

    again_family, again = load(tmp_path / "folder", None)
    assert again.source.save_as == save_as
    assert again.tokenizers["te2"].pad_token_id == 0
    again_cond = again_family.text.encode(again, ["a red house"]).tensors
    for name, tensor in cond.items():
        assert_close(again_cond[name], tensor, rtol=1e-5, atol=1e-5)
    save(again_family, again, tmp_path / "single.safetensors")
    single, expected = load_file(tmp_path / "single.safetensors"), sd3_tensors("5-medium")
    assert set(single) == set(expected)
    assert all(torch.equal(single[name], tensor) for name, tensor in expected.items())


def test_a_folder_may_lack_t5(cache, tmp_path):
    path = write_tiny_sd3(tmp_path / "in.safetensors", encoders=("te1", "te2"))
    family, models = load(path, cache)
    save(family, models, tmp_path / "folder", "diffusers_safetensors")
    absent = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers wants to be told so
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "folder", local_files_only=True, **absent)
    assert pipeline.text_encoder_2 is not None
    assert list(load_model(str(tmp_path / "folder"), {}).text_encoders) == ["te1", "te2"]


def test_a_folder_gets_dropped_parts_from_their_sources(cache, tmp_path):
    t5 = write_encoder_file(tmp_path / "t5.safetensors", "te3")
    path = write_tiny_sd3(tmp_path / "in.safetensors", encoders=("te1", "te2"))
    family, models = load(path, cache, t5xxl=t5)
    save(family, models, tmp_path / "with", "diffusers_safetensors")
    models.text_encoders, models.vae = {}, None
    save(family, models, tmp_path / "without", "diffusers_safetensors")
    files = [file.relative_to(tmp_path / "with") for file in (tmp_path / "with").rglob("*.safetensors")]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    with pytest.raises(UserError, match="choose one of ckpt, safetensors"):
        save(family, models, tmp_path / "folder", "pt")


def test_clip_folders_have_the_names_that_all_readers_know(cache, tmp_path):
    family, models = load(write_tiny_sd3(tmp_path / "in.safetensors", encoders=ALL), cache)
    save(family, models, tmp_path / "folder", "diffusers_safetensors")
    written = load_file(tmp_path / "folder" / "text_encoder" / "model.safetensors")
    assert set(written) == set(clip_tensors(models.text_encoders["te1"]))
    config = CLIPTextConfig.from_pretrained(tmp_path / "folder" / "text_encoder")
    assert config.architectures == [CLIPTextModelWithProjection.__name__]
    t5 = load_file(tmp_path / "folder" / "text_encoder_3" / "model.safetensors")
    assert set(t5) == set(t5_weights(models.text_encoders["te3"]))
