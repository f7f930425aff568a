"""Loading SD3/3.5. References: diffusers' single-file converters, and the modules that files were made from."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.families.sd3.adapter import Sd3Family
from library.families.sd3.loading import load_model
from library.families.sd3.variants import check_paths, mmdit_shape
from library.memory.low_precision import Fp8Linear
from library.training import placement
from library.types import Models
from tests.builders import write_tiny_sd1
from tests.builders.options import options_for
from tests.builders.sd3 import (
    DUAL,
    T5,
    TABLE,
    VARIANTS,
    clip_tensors,
    mmdit_tensors,
    sd3_options,
    sd3_tensors,
    tiny_clip,
    tiny_vae,
    write_encoder_file,
    write_tiny_sd3,
)
from tests.builders.t5 import t5_weights, tiny_t5, write_t5_tokenizer

ALL = ("te1", "te2", "te3")


@pytest.fixture(scope="module")
def encoder_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {part: write_encoder_file(folder / f"{part}.safetensors", part) for part in ALL}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_tiny_sd3(tmp_path_factory.mktemp("whole") / "sd3.safetensors", encoders=ALL)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Denoiser and VAE only, as most published files are."""
    return write_tiny_sd3(tmp_path_factory.mktemp("bare") / "sd3.safetensors")


def assert_same_state(ours, expected) -> None:
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def flags(files) -> dict[str, str]:
    return {"clip_l": str(files["te1"]), "clip_g": str(files["te2"]), "t5xxl": str(files["te3"])}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_denoiser_is_what_diffusers_makes_of_the_file(variant, tmp_path):
    path = write_tiny_sd3(tmp_path / "sd3.safetensors", variant)
    parts = load_model(str(path), {})
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(mmdit_tensors(variant))
    assert_same_state(parts.denoiser.state_dict(), theirs)
    assert not parts.denoiser.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in parts.denoiser.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kind_and_shape_are_read_from_the_weights(variant, tmp_path):
    parts = load_model(str(write_tiny_sd3(tmp_path / "sd3.safetensors", variant)), {})
    config = parts.denoiser.config
    assert parts.source.variant == variant
    assert config.num_attention_heads == 1
    assert config.num_layers == 3
    assert config.pos_embed_max_size == TABLE
    assert tuple(config.dual_attention_layers) == (tuple(range(DUAL)) if variant == "5-medium" else ())
    assert config.qk_norm == (None if variant == "medium" else "rms_norm")


def published(width, depth, table, dual):
    """Shapes of a published model's file, as far as the kind is read from them."""
    shapes = {
        "x_embedder.proj.weight": (width, 16, 2, 2),
        "pos_embed": (1, table * table, width),
        "context_embedder.weight": (width, 4096),
        "y_embedder.mlp.0.weight": (width, 2048),
        "final_layer.linear.weight": (64, width),
    }
    for block in range(depth):
        shapes[f"joint_blocks.{block}.x_block.attn.ln_k.weight"] = (64,)
        if block < dual:
            shapes[f"joint_blocks.{block}.x_block.attn2.qkv.weight"] = (3 * width, width)
    return {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}


@pytest.mark.parametrize(("width", "depth", "table", "dual"), [(1536, 24, 384, 13), (2432, 38, 192, 0)])
def test_published_shapes_give_the_published_configuration(width, depth, table, dual):
    config = mmdit_shape(published(width, depth, table, dual)).diffusers_config()
    assert config == {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": depth,
        "attention_head_dim": 64,
        "num_attention_heads": depth,
        "joint_attention_dim": 4096,
        "caption_projection_dim": width,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": table,
        "dual_attention_layers": tuple(range(dual)),
        "qk_norm": "rms_norm",
    }


def test_encoders_inside_the_file_are_found(whole):
    parts = load_model(str(whole), {})
    assert list(parts.text_encoders) == list(ALL)
    for part in ("te1", "te2"):
        assert_same_state(clip_tensors(parts.text_encoders[part]), clip_tensors(tiny_clip(part)))
        assert parts.text_encoders[part].config.hidden_act == tiny_clip(part).config.hidden_act
    assert_same_state(t5_weights(parts.text_encoders["te3"]), t5_weights(tiny_t5(T5)))


@pytest.mark.rows("R434")
def test_encoders_come_from_files_of_their_own(bare, encoder_files):
    parts = load_model(str(bare), {part: str(path) for part, path in encoder_files.items()})
    assert list(parts.text_encoders) == list(ALL)
    for part in ("te1", "te2"):
        assert_same_state(clip_tensors(parts.text_encoders[part]), clip_tensors(tiny_clip(part)))
    assert_same_state(t5_weights(parts.text_encoders["te3"]), t5_weights(tiny_t5(T5)))


def test_an_encoder_that_is_not_given_is_absent(bare, encoder_files):
    assert load_model(str(bare), {}).text_encoders == {}
    assert list(load_model(str(bare), {"te2": str(encoder_files["te2"])}).text_encoders) == ["te2"]


def test_clip_l_without_projection_gets_the_identity(bare, tmp_path):
    path = write_encoder_file(tmp_path / "clip_l.safetensors", "te1", projection=False)
    encoder = load_model(str(bare), {"te1": str(path)}).text_encoders["te1"]
    assert torch.equal(encoder.text_projection.weight, torch.eye(64))
    with pytest.raises(UserError, match=r"CLIP-G lacks the tensor text_projection\.weight"):
        load_model(str(bare), {"te2": str(write_encoder_file(tmp_path / "g.safetensors", "te2", projection=False))})


def test_the_vae_is_what_diffusers_makes_of_it_and_may_come_from_elsewhere(bare, tmp_path):
    vae = load_model(str(bare), {}).vae
    assert_same_state(vae.state_dict(), convert_ldm_vae_checkpoint(load_file(bare), vae.config))
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.5305, 0.0609)
    other = tiny_vae(seed=7)
    other.save_pretrained(tmp_path / "vae")
    without = write_tiny_sd3(tmp_path / "sd3.safetensors", vae=False)
    assert load_model(str(without), {}).vae is None
    assert_same_state(load_model(str(without), {}, str(tmp_path / "vae")).vae.state_dict(), other.state_dict())


def test_weights_keep_the_formats_of_the_file(tmp_path):
    path = tmp_path / "sd3.safetensors"
    tensors = {name: tensor.half() for name, tensor in sd3_tensors(encoders=ALL).items()}
    in_8_bits = "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"
    tensors[in_8_bits] = tensors[in_8_bits].to(torch.float8_e4m3fn)
    save_file(tensors, path)
    parts = load_model(str(path), {})
    dtypes = {name: tensor.dtype for name, tensor in parts.denoiser.state_dict().items()}
    assert dtypes.pop("transformer_blocks.0.ff.net.0.proj.weight") == torch.bfloat16  # nothing computes in 8 bits
    assert set(dtypes.values()) == {torch.float16}
    assert {p.dtype for encoder in parts.text_encoders.values() for p in encoder.parameters()} == {torch.float16}
    assert {p.dtype for p in parts.vae.parameters()} == {torch.float32}


@pytest.mark.rows("R431")
def test_denoiser_and_t5_in_8_bits_keep_their_numbers_with_fp8_base(tmp_path):
    t5 = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in t5_weights(tiny_t5(T5)).items()}
    save_file(t5, tmp_path / "t5xxl_fp8_e4m3fn.safetensors")
    prefix = "model.diffusion_model."
    narrow = {
        name: tensor.to(torch.float8_e4m3fn) if name.startswith(prefix) else tensor
        for name, tensor in sd3_tensors("5-large").items()
    }
    save_file(narrow, tmp_path / "sd3.5_large_fp8.safetensors")
    parts = load_model(
        str(tmp_path / "sd3.5_large_fp8.safetensors"), {"te3": str(tmp_path / "t5xxl_fp8_e4m3fn.safetensors")}
    )
    models = Models(parts.denoiser, parts.text_encoders, {}, parts.vae, parts.source)
    opts = options_for("sd3", "network", mixed_precision="bf16", fp8_base=True)
    placement.place_text_encoders(models, opts, torch.device("cpu"), grad_text=False)
    placement.place_denoiser(models, opts, torch.device("cpu"))
    mmdit = {name.removeprefix(prefix): t.float() for name, t in narrow.items() if name.startswith(prefix)}
    expected = {
        "te3": {name: tensor.float() for name, tensor in t5.items()},
        "denoiser": convert_sd3_transformer_checkpoint_to_diffusers(mmdit),
    }
    for part, module in (("te3", models.text_encoders["te3"]), ("denoiser", models.denoiser)):
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
        assert len(layers) > 10
        for name, layer in layers.items():
            assert isinstance(layer, Fp8Linear), name
            assert layer.weight.float().equal(expected[part][f"{name}.weight"]), name


@pytest.mark.rows("R435")
def test_files_that_are_not_mapped(whole, encoder_files, tmp_path, monkeypatch):
    write_t5_tokenizer(tmp_path / "google_t5-v1_1-xxl")
    options = {"cache": str(tmp_path), **flags(encoder_files)}
    mapped = Sd3Family(sd3_options(whole, **options)).loader.load()
    monkeypatch.setattr("safetensors.safe_open", lambda *_, **__: pytest.fail("mapped the file"))
    read = Sd3Family(sd3_options(whole, **options, mapless=True)).loader.load()
    assert_same_state(read.denoiser.state_dict(), mapped.denoiser.state_dict())
    assert_same_state(read.vae.state_dict(), mapped.vae.state_dict())
    for part, encoder in read.text_encoders.items():
        assert_same_state(encoder.state_dict(), mapped.text_encoders[part].state_dict())


def test_files_of_the_denoiser_alone_need_no_prefix(tmp_path):
    save_file(mmdit_tensors(), tmp_path / "mmdit.safetensors")
    parts = load_model(str(tmp_path / "mmdit.safetensors"), {})
    assert_same_state(parts.denoiser.state_dict(), convert_sd3_transformer_checkpoint_to_diffusers(mmdit_tensors()))


def test_parts_that_do_not_fit_together_are_refused(bare, encoder_files, tmp_path):
    tensors = clip_tensors(tiny_clip("te2"))
    tensors["text_projection.weight"] = tensors["text_projection.weight"][:80].clone()
    save_file(tensors, tmp_path / "g.safetensors")
    with pytest.raises(UserError, match="pooled vectors of width 144 together, the model needs 160"):
        load_model(str(bare), {"te1": str(encoder_files["te1"]), "te2": str(tmp_path / "g.safetensors")})
    save_file(t5_weights(tiny_t5(32)), tmp_path / "t5.safetensors")
    with pytest.raises(UserError, match="T5 gives states of width 32, the model needs 160"):
        load_model(str(bare), {"te3": str(tmp_path / "t5.safetensors")})


def test_diffusers_folders_are_loaded_with_their_own_configuration(tmp_path):
    model = SD3Transformer2DModel(
        sample_size=16, num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=T5,
        caption_projection_dim=64, pooled_projection_dim=160, pos_embed_max_size=8,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "transformer")
    tiny_clip("te1").save_pretrained(tmp_path / "text_encoder")
    parts = load_model(str(tmp_path), {})
    assert parts.denoiser.config.num_attention_heads == 2  # the shapes alone would say 1
    assert_same_state(parts.denoiser.state_dict(), model.state_dict())
    assert list(parts.text_encoders) == ["te1"]
    assert parts.source.save_as == "diffusers_safetensors"


# --- mistakes that are seen before anything is loaded -----------------------------------------------------------------


def test_a_complete_choice_of_files_has_no_problems(whole, bare, encoder_files):
    assert check_paths(sd3_options(whole)) == []
    assert check_paths(sd3_options(bare, **flags(encoder_files))) == []
    assert check_paths(sd3_options(bare, clip_l=encoder_files["te1"], clip_g=encoder_files["te2"])) == []  # no T5


def test_a_missing_clip_is_named_at_once_unless_outputs_are_cached(bare, encoder_files):
    opts = sd3_options(bare, clip_l=encoder_files["te1"])
    (problem,) = check_paths(opts)
    assert problem.startswith("--clip_g: missing, and the model brings no CLIP-G")
    opts = opts.replaced(cache_text_encoder_outputs_to_disk=True)
    assert check_paths(opts) == []
    models = Sd3Family(opts).loader.load()
    with pytest.raises(UserError, match="--clip_g: missing"):
        Sd3Family(opts).text.encode(models, ["a house"])


def test_a_missing_vae_is_named_at_once(tmp_path):
    path = write_tiny_sd3(tmp_path / "sd3.safetensors", vae=False, encoders=("te1", "te2"))
    assert check_paths(sd3_options(path)) == [f"--vae: missing, and {path} brings no VAE of its own"]


def test_files_of_the_wrong_kind_are_named(bare, encoder_files, tmp_path):
    sd1 = write_tiny_sd1(tmp_path / "sd1.safetensors")
    (problem,) = check_paths(sd3_options(sd1))
    assert "this is a Stable Diffusion 1.x model; a Stable Diffusion 3 or 3.5 model is needed here" in problem
    mixed = sd3_options(bare, clip_l=encoder_files["te3"], clip_g=tmp_path / "gone.safetensors", t5xxl=bare, vae=sd1)
    problems = check_paths(mixed)
    assert [problem.split(":")[0] for problem in problems] == ["--clip_l", "--clip_g", "--t5xxl", "--vae"]
    assert "this is a T5 text encoder; CLIP-L in transformers' layout is needed here" in problems[0]
    assert "no such file" in problems[1]
    assert "this is a Stable Diffusion 3 model; T5 in transformers' layout is needed here" in problems[2]
    with pytest.raises(UserError, match=r"a Stable Diffusion 3 or 3\.5 model is needed here"):
        load_model(str(sd1), {})


@pytest.mark.parametrize(
    ("width", "option", "message"),
    [
        (1280, "clip_l", "this is CLIP-G; give it with --clip_g"),
        (768, "clip_g", "this is CLIP-L; give it with --clip_l"),
    ],
)
def test_swapped_clip_files_are_noticed(bare, tmp_path, width, option, message):
    path = tmp_path / "clip.safetensors"
    save_file({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(1, width)}, path)
    assert any(message in problem for problem in check_paths(sd3_options(bare, **{option: path})))


def test_a_folder_of_another_family_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (problem,) = check_paths(sd3_options(tmp_path))
    assert "this is a FLUX model" in problem
    (tmp_path / "model_index.json").unlink()
    (problem,) = check_paths(sd3_options(tmp_path))
    assert "transformer/config.json is missing" in problem


def test_a_lacking_tensor_is_named(tmp_path):
    tensors = sd3_tensors()
    del tensors["model.diffusion_model.joint_blocks.1.x_block.mlp.fc2.bias"]
    save_file(tensors, tmp_path / "sd3.safetensors")
    with pytest.raises(UserError, match=r"the denoiser lacks 1 tensors: transformer_blocks\.1\.ff\.net\.2\.bias"):
        load_model(str(tmp_path / "sd3.safetensors"), {})


def test_options_and_checks_import_nothing_heavy(bare):
    code = f"""
import sys
from library.options.parsing import parse_options
from library.registry import FAMILIES, groups_for
from library.options.validation import problems
opts = parse_options(groups_for("sd3", "network"), ["--pretrained_model_name_or_path", {str(bare)!r}])
problems(opts, FAMILIES["sd3"].traits)
from library.families.sd3.variants import check_paths
assert len(check_paths(opts)) == 2, check_paths(opts)
print(*{{"torch", "numpy", "diffusers", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
