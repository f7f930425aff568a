"""Loading SDXL. References: the modules a file was made from, diffusers' own single-file converters and pipeline."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from library.errors import UserError
from library.families.sdxl.adapter import SdxlFamily
from library.families.sdxl.loading import load_model, load_vae
from library.families.sdxl.variants import check_paths, check_text_paths
from library.families.shared.clip import public_state
from library.types import Batch, Models
from tests.builders import sd_options, write_tiny_sd1
from tests.builders.fp8 import fp8_scaled
from tests.builders.sdxl import sdxl_options, tiny_sdxl, write_tiny_sdxl

UNET, TE1, TE2 = "model.diffusion_model.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def original() -> Models:
    return tiny_sdxl()


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("single") / "tiny.safetensors")


@pytest.fixture(scope="module")
def pipeline(original):
    """diffusers' pipeline around the models themselves."""
    return StableDiffusionXLPipeline(
        vae=original.vae,
        text_encoder=original.text_encoders["te1"],
        text_encoder_2=original.text_encoders["te2"],
        tokenizer=original.tokenizers["te1"],
        tokenizer_2=original.tokenizers["te2"],
        unet=original.denoiser,
        scheduler=EulerDiscreteScheduler(steps_offset=1),
        add_watermarker=False,
    )


@pytest.fixture(scope="module")
def theirs(pipeline, tmp_path_factory):
    """The folder as diffusers itself writes it."""
    folder = tmp_path_factory.mktemp("theirs") / "pipe"
    pipeline.save_pretrained(folder)
    return folder


def assert_same_state(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def assert_same_model(parts, original: Models) -> None:
    assert_same_state(parts.denoiser.state_dict(), original.denoiser.state_dict())
    assert_same_state(parts.vae.state_dict(), original.vae.state_dict())
    assert list(parts.text_encoders) == ["te1", "te2"]
    for name, encoder in parts.text_encoders.items():
        assert_same_state(public_state(encoder), public_state(original.text_encoders[name]))
    for model in (parts.denoiser, parts.vae, *parts.text_encoders.values()):
        assert not model.training
        assert not any(p.requires_grad or p.is_meta or p.dtype != torch.float32 for p in model.parameters())


def test_file_ckpt_and_folder_are_the_same_model(original, single_file, theirs, tmp_path):
    for path in (single_file, write_tiny_sdxl(tmp_path / "tiny.ckpt"), theirs):
        assert_same_model(load_model(str(path)), original)


def test_without_a_memory_map_the_file_is_the_same(original, single_file, monkeypatch):
    monkeypatch.setattr("safetensors.safe_open", lambda *_, **__: pytest.fail("mapped the file"))
    options = sdxl_options(single_file, disable_mmap_load_safetensors=True)
    assert_same_model(load_model(str(single_file), mapped=False), original)
    assert_same_state(SdxlFamily(options).loader.load().denoiser.state_dict(), original.denoiser.state_dict())


def test_the_architecture_is_the_original_one(original, single_file):
    ours, wanted = load_model(str(single_file)).denoiser.config, original.denoiser.config
    same = (
        "block_out_channels down_block_types up_block_types layers_per_block transformer_layers_per_block "
        "cross_attention_dim attention_head_dim use_linear_projection addition_embed_type addition_time_embed_dim "
        "projection_class_embeddings_input_dim"
    )
    for name in same.split():
        assert ours[name] == wanted[name], name


def test_parts_agree_with_diffusers_converters(single_file):
    """diffusers reads the file with code of its own; names and values must be those of our models."""
    parts, file = load_model(str(single_file)), load_file(single_file)
    unet = convert_ldm_unet_checkpoint(dict(file), parts.denoiser.config)
    assert_same_state(unet, parts.denoiser.state_dict())
    assert_same_state(convert_ldm_vae_checkpoint(dict(file), parts.vae.config), parts.vae.state_dict())
    te1, te2 = parts.text_encoders.values()
    assert_same_state(convert_ldm_clip_checkpoint(dict(file), remove_prefix=TE1), public_state(te1))
    assert_same_state(convert_open_clip_checkpoint(te2, dict(file), prefix=TE2), public_state(te2))
    # the trap: applied from the right in the file, a linear layer here
    assert torch.equal(file[f"{TE2}text_projection"].T, te2.text_projection.weight)
    assert file[f"{TE2}text_projection"].shape == (128, 64)


def test_projection_under_the_name_of_a_layer(original, single_file, tmp_path):
    tensors = load_file(single_file)
    tensors[f"{TE2}text_projection.weight"] = tensors.pop(f"{TE2}text_projection").T.contiguous()
    save_file(tensors, tmp_path / "odd.safetensors")
    family = SdxlFamily(sdxl_options(tmp_path / "odd.safetensors"))
    models = family.loader.load()
    assert_same_state(public_state(models.text_encoders["te2"]), public_state(original.text_encoders["te2"]))
    family.writer.save(models, tmp_path / "again.safetensors", save_as="safetensors", dtype=None, metadata={})
    assert_same_state(load_file(tmp_path / "again.safetensors"), tensors)


def test_text_equals_the_pipelines(pipeline, single_file):
    """float32, same kernels; 1e-5."""
    family = SdxlFamily(sdxl_options(single_file))
    models = family.loader.load()
    captions = ["a red house", "", "! " * 30 + "beside a lake, " * 20]
    with torch.no_grad():
        ours = family.text.encode(models, captions).tensors
        states, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    assert_close(torch.cat([ours["hidden_state1"], ours["hidden_state2"]], -1), states, atol=1e-5, rtol=0)
    assert_close(ours["pool2"], pooled, atol=1e-5, rtol=0)


def test_one_prediction_and_latents_equal_the_pipelines(pipeline, single_file):
    family = SdxlFamily(sdxl_options(single_file))
    models = family.loader.load()
    noisy, times = torch.randn(2, 4, 8, 16), torch.tensor([10, 900])
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    original, crop, target = (1920, 1080), (12, 34), (128, 64)  # (w, h), (top, left), (w, h)
    batch = Batch(
        captions=["", ""],
        latents=None,
        pixels=None,
        loss_weights=torch.ones(2),
        masks=None,
        original_sizes=torch.tensor([original] * 2),
        crop_top_lefts=torch.tensor([crop] * 2),
        target_sizes=torch.tensor([target] * 2),
    )
    with torch.no_grad():
        cond = family.text.encode(models, ["a red house", "!"])
        states, _, pooled, _ = pipeline.encode_prompt(["a red house", "!"], do_classifier_free_guidance=False)

        def expected(original, crop, target):
            # the pipeline's order is (height, width)
            ids = pipeline._get_add_time_ids(
                original[::-1], crop, target[::-1], torch.float32, text_encoder_projection_dim=64
            )
            added = {"text_embeds": pooled, "time_ids": ids.repeat(2, 1)}
            return pipeline.unet(noisy, times, states, added_cond_kwargs=added).sample

        told = family.denoiser.predict(models, noisy, times, cond, batch)
        assert_close(told, expected(original, crop, target), atol=1e-5, rtol=0)
        whole = family.denoiser.predict(models, noisy, times, cond)
        assert_close(whole, expected((128, 64), (0, 0), (128, 64)), atol=1e-5, rtol=0)
        assert (told - whole).abs().max() > 1e-3, "sizes matter"

        latents = family.latents.encode(models, pixels, torch.Generator().manual_seed(3))
        posterior = pipeline.vae.encode(pixels).latent_dist
        eps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        assert_close(latents, posterior.mean + posterior.std * eps, atol=1e-5, rtol=0)
        assert_close(family.latents.scale(latents), latents * 0.13025)
        decoded = family.latents.decode(models, family.latents.scale(latents))
        assert_close(decoded, pipeline.vae.decode(latents).sample, atol=1e-4, rtol=0)


def test_vae_from_other_places(tmp_path):
    other = tiny_sdxl(seed=9).vae.state_dict()
    model = write_tiny_sdxl(tmp_path / "other.safetensors", seed=9)
    inside = {k: v for k, v in load_file(model).items() if k.startswith("first_stage_model.")}
    save_file({k.removeprefix("first_stage_model."): v for k, v in inside.items()}, tmp_path / "bare.safetensors")
    for place in (model, tmp_path / "bare.safetensors"):
        assert_same_state(load_vae(str(place))[0].state_dict(), other)
    base = write_tiny_sdxl(tmp_path / "base.safetensors")
    assert_same_state(load_model(str(base), str(model)).vae.state_dict(), other)
    with pytest.raises(UserError, match=r"this is a Stable Diffusion 1\.x model; a VAE, or an SDXL model, is needed"):
        load_vae(str(write_tiny_sd1(tmp_path / "sd1.safetensors")))


def test_a_vae_with_other_latents_is_refused(tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(32,), latent_channels=16).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="latents have 16 channels; 4 are needed"):
        load_vae(str(tmp_path / "vae"))


def test_hub_id_is_found_in_the_cache_without_the_network(original, tmp_path, monkeypatch):
    import huggingface_hub.constants

    repository, revision = tmp_path / "hub" / "models--someone--tiny", "0" * 40
    write_tiny_sdxl(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    models = SdxlFamily(sdxl_options("someone/tiny")).loader.load()
    assert_same_state(models.denoiser.state_dict(), original.denoiser.state_dict())
    assert [models.tokenizers[name].pad_token_id for name in ("te1", "te2")] == [49407, 0]


def test_other_models_are_refused_early_and_at_loading(single_file, tmp_path):
    from library.families.sd.loading import load_model as load_sd
    from library.families.sd.variants import check_paths as check_sd_paths

    folder = write_tiny_sdxl(tmp_path / "folder")
    assert check_paths(sdxl_options(single_file, vae=str(folder))) == []
    assert check_paths(sdxl_options(folder)) == []
    assert check_paths(sdxl_options("owner/model")) == []
    assert "name a model" in check_paths(sdxl_options(""))[0]
    for name, text in (("m.safetensors", "Stable Diffusion 1.x model"), ("folder1", "Diffusers model with one text")):
        sd1 = write_tiny_sd1(tmp_path / name)
        (problem,) = check_paths(sdxl_options(sd1))
        assert text in problem
        with pytest.raises(UserError, match="a whole SDXL model is needed here"):
            load_model(str(sd1))
    assert "this is an SDXL model" in check_sd_paths(sd_options(single_file))[0]
    with pytest.raises(UserError, match="this is an SDXL model"):
        load_sd(str(folder), False)

    refiner = {k.replace("embedders.1.", "embedders.0."): v for k, v in load_file(single_file).items() if TE1 not in k}
    save_file(refiner, tmp_path / "refiner.safetensors")
    assert "refiner" in check_paths(sdxl_options(tmp_path / "refiner.safetensors"))[0]
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    assert "inpainting" in check_paths(sdxl_options(folder))[0]


def test_a_vae_that_is_replaced_is_not_needed(single_file, original, tmp_path):
    tensors = {k: v for k, v in load_file(single_file).items() if not k.startswith("first_stage_model.")}
    save_file(tensors, tmp_path / "0a1b2c")
    vae = write_tiny_sdxl(tmp_path / "other.safetensors", seed=9)
    path = tmp_path / "0a1b2c"
    assert check_paths(sdxl_options(path, vae=str(vae))) == []
    assert check_text_paths(sdxl_options(path)) == []
    assert "holds no VAE; give one with --vae" in check_paths(sdxl_options(path))[0]
    for mapped in (True, False):
        parts = load_model(str(path), str(vae), mapped=mapped)
        assert_same_state(parts.denoiser.state_dict(), original.denoiser.state_dict())
    with pytest.raises(UserError, match="0a1b2c: holds no VAE; give one with --vae"):
        load_model(str(path))
    folder = write_tiny_sdxl(tmp_path / "folder")
    shutil.rmtree(folder / "vae")
    assert check_paths(sdxl_options(folder, vae=str(vae))) == []
    assert load_model(str(folder), str(vae)).source.vae_name == str(vae)
    assert "holds no VAE; give one with --vae" in check_paths(sdxl_options(folder))[0]


def test_fp8_scaled_models_are_multiplied(single_file, tmp_path):
    chosen = lambda key, _: "_blocks." in key or ".layers." in key or ".resblocks." in key  # noqa: E731
    stored, meant = fp8_scaled(load_file(single_file), chosen, prefix=UNET)
    save_file(stored, tmp_path / "scaled.safetensors")
    save_file({key: tensor.contiguous() for key, tensor in meant.items()}, tmp_path / "meant.safetensors")
    assert check_paths(sdxl_options(tmp_path / "scaled.safetensors")) == []
    scaled, plain = (load_model(str(tmp_path / f"{name}.safetensors")) for name in ("scaled", "meant"))
    for part in ("te1", "te2", "denoiser"):
        one, other = (parts.denoiser if part == "denoiser" else parts.text_encoders[part] for parts in (scaled, plain))
        state = other.state_dict()
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    assert scaled.source.preserved == plain.source.preserved


def test_incomplete_files_are_refused(single_file, tmp_path):
    whole = load_file(single_file)

    def message(drop: str) -> str:
        save_file({k: v for k, v in whole.items() if drop not in k}, tmp_path / "odd.safetensors")
        with pytest.raises(UserError) as caught:
            load_model(str(tmp_path / "odd.safetensors"))
        return str(caught.value)

    assert "odd.safetensors: the U-Net lacks the tensor model.diffusion_model.label_emb" in message("label_emb")
    assert "lacks the tensor conditioner.embedders.1.model.text_projection" in message("text_projection")
    assert "the text encoder at conditioner.embedders.0.transformer" in message("final_layer_norm.bias")
