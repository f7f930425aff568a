"""Network files in other layouts: there and back to the bit, and diffusers computes with them what we do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from library.errors import UserError
from library.families.registry import FAMILIES
from library.families.sd.targets import text_targets, unet_targets
from library.families.sdxl.targets import unet_targets as sdxl_unet_targets
from library.families.shared.targets import clip_targets
from library.model_tools import converting
from library.types import LoraTarget, Models
from networks.build import merge
from networks.files import read
from networks.targets import file_modules, rows_of
from tests.builders.sdxl import tiny_sdxl
from tests.model_tools.files import assert_same_changes, changes, write
from tests.model_tools.tools import options
from tests.networks import conftest as small_sd
from tests.networks import dits


class Model(NamedTuple):
    """A tiny model, the layers that networks may have, the denoiser's output, and its name in a pipeline."""

    models: Models
    targets: list[LoraTarget]
    output: Callable[[torch.nn.Module], Tensor]
    part: str


def _sd() -> Model:
    torch.manual_seed(0)
    models = Models(small_sd.tiny_unet().eval(), {"te": small_sd.tiny_text_encoder().eval()}, {}, None)
    targets = text_targets(models.text_encoders["te"]) + unet_targets(models.denoiser)
    return Model(models, targets, small_sd.unet_output, "unet")


def _sdxl() -> Model:
    models = tiny_sdxl()
    targets = [target for name, encoder in models.text_encoders.items() for target in clip_targets(encoder, name)]
    return Model(models, targets + sdxl_unet_targets(models.denoiser), _sdxl_output, "unet")


def _sdxl_output(unet: torch.nn.Module) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    text = torch.randn(1, 7, unet.config.cross_attention_dim, generator=rng)
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(1, width, generator=rng), "time_ids": torch.ones(1, 6)}
    noisy = torch.randn(1, 4, 8, 8, generator=rng)
    return unet(noisy, torch.tensor([500]), text, added_cond_kwargs=added).sample


def _dit(name: str) -> Model:
    torch.manual_seed(0)
    models = getattr(dits, name)()
    return Model(models, getattr(dits, f"{name}_targets")(models), getattr(dits, f"{name}_output"), "transformer")


MAKE = {"sd": _sd, "sdxl": _sdxl, "flux": lambda: _dit("flux"), "sd3": lambda: _dit("sd3")}
EXTRA = {"sd3": ("lora_unet_final_layer_adaLN_modulation_1", "lora_unet_x_embedder_proj")}  # outside the blocks


@pytest.fixture(scope="module", params=MAKE)
def model(request) -> tuple[str, Model]:
    return request.param, MAKE[request.param]()


def chosen(name: str, model: Model) -> list[LoraTarget]:
    """What a network adapts there: all but norms and the layers that are only adapted on request."""
    return [
        t for t in model.targets if not t.norm and (not t.optional or t.part == "te3" or t.key in EXTRA.get(name, ()))
    ]


def lora_of(
    name: str, model: Model, *, ranks: tuple[int, ...] = (3,), alphas: tuple[float, ...] = (2.0,), dora: bool = False
) -> dict[str, Tensor]:
    """A LoRA of the model in kohya's layout; ranks and alphas take turns."""
    rng, tensors = torch.Generator().manual_seed(0), {}
    for number, target in enumerate(chosen(name, model)):
        rank, alpha = ranks[number % len(ranks)], alphas[number % len(alphas)]
        rest = file_modules(model.models, target)[0].weight.shape[1:]
        rows, ones = sum(rows_of(model.models, target)), [1] * (len(rest) - 1)
        tensors[f"{target.key}.lora_down.weight"] = torch.randn(rank, *rest, generator=rng) * 0.2
        tensors[f"{target.key}.lora_up.weight"] = torch.randn(rows, rank, *ones, generator=rng) * 0.2
        tensors[f"{target.key}.alpha"] = torch.tensor(alpha)
        if dora:
            tensors[f"{target.key}.dora_scale"] = torch.rand(rows, 1, *ones, generator=rng) + 0.5
    return tensors


def convert(path: str | Path, out: Path, to: str, *arguments: object) -> Path:
    converting.convert_lora(options("convert_lora", "--model", path, "--save_to", out, "--to", to, *arguments))
    return out


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


# ---- names


def test_every_layer_of_a_live_model_has_its_names(model):
    """Of those that networks may have: the key of files, the original's path, and the modules' paths."""
    name, own = model
    parts = FAMILIES[name].layer_names({})
    for target in own.targets:
        public = [
            path if path.startswith("text_model.") or target.part in ("denoiser", "te3") else f"text_model.{path}"
            for path in target.modules
        ]
        for number, path in enumerate(public):
            prefix = target.key.split("_")[1]
            found = next(filter(None, (part.find(f"lora_{prefix}_{path.replace('.', '_')}") for part in parts)))
            assert found.layer.kohya == target.key
            assert found.layer.modules == tuple(public)
            assert found.piece == (number if len(public) > 1 else None)
            assert found.layer.diffusers(number).endswith(path)
        whole = next(filter(None, (part.find(target.key) for part in parts)))
        assert whole.layer.kohya == target.key
        if target.place is not None:
            assert whole.layer.original == target.place.path


@pytest.mark.parametrize(
    ("family", "kohya", "original"),
    [
        ("sd", "unet_down_blocks_1_attentions_0_proj_in", "diffusion_model.input_blocks.4.1.proj_in"),
        ("sd", "unet_up_blocks_3_resnets_2_conv1", "diffusion_model.output_blocks.11.0.in_layers.2"),
        ("sd", "unet_up_blocks_0_upsamplers_0_conv", "diffusion_model.output_blocks.2.1.conv"),
        (
            "sdxl",
            "unet_output_blocks_0_1_transformer_blocks_9_ff_net_0_proj",
            "diffusion_model.output_blocks.0.1.transformer_blocks.9.ff.net.0.proj",
        ),
        ("sdxl", "te2_text_model_encoder_layers_31_mlp_fc1",
         "text_encoders.clip_g.transformer.text_model.encoder.layers.31.mlp.fc1"),
        ("flux", "unet_single_blocks_37_linear1", "diffusion_model.single_blocks.37.linear1"),
        ("flux", "te3_encoder_block_3_layer_0_SelfAttention_q",
         "text_encoders.t5xxl.transformer.encoder.block.3.layer.0.SelfAttention.q"),
        ("sd3", "unet_joint_blocks_0_x_block_attn2_qkv", "diffusion_model.joint_blocks.0.x_block.attn2.qkv"),
    ],
)  # fmt: skip
def test_original_names(family, kohya, original):
    found = next(filter(None, (part.find(f"lora_{kohya}") for part in FAMILIES[family].layer_names({}))))
    assert (found.layer.kohya, found.layer.comfyui) == (f"lora_{kohya}", original)


@pytest.mark.parametrize(("width", "last"), [(1536, 23), (2432, 37)], ids=["medium", "large"])
def test_the_width_says_which_block_is_the_last(width, last):
    """A file of the first blocks only: that the last block's text side ends in its attention follows from the width."""
    sizes = {"lora_unet_joint_blocks_0_x_block_attn_qkv": (3 * width, width)}
    (denoiser, *_) = FAMILIES["sd3"].layer_names(sizes)
    for block in (last - 1, last):
        found = denoiser.find(f"lora_unet_joint_blocks_{block}_context_block_adaLN_modulation_1")
        assert found.layer.swap_halves == (block == last)


# ---- there and back


def same_tensors(first: Path, second: str | Path) -> None:
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name


@pytest.mark.rows("R463")
@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_there_and_back_changes_no_bit(model, tmp_path, layout, dora):
    """The family is recognised in each layout."""
    name, own = model
    path = write(tmp_path / "in.safetensors", lora_of(name, own, ranks=(3, 2), alphas=(2.0, 1.5, 3.0), dora=dora))
    there = convert(path, tmp_path / "there.safetensors", layout)
    back = convert(there, tmp_path / "back.safetensors", "kohya")
    same_tensors(back, path)
    assert not any(key.startswith("lora_") for key in load_file(there))
    assert "lora_adapter_metadata" not in metadata_of(back)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_there_and_back_in_narrow_dtypes(tmp_path, dtype):
    own = MAKE["flux"]()
    tensors = {name: tensor.to(dtype) for name, tensor in lora_of("flux", own, alphas=(2.0, 0.7)).items()}
    path = write(tmp_path / "in.safetensors", tensors)
    there = convert(path, tmp_path / "there.safetensors", "diffusers")
    back = load_file(convert(there, tmp_path / "back.safetensors", "kohya"))
    for name, tensor in tensors.items():
        if not name.endswith("alpha"):
            assert back[name].dtype == dtype
        assert torch.equal(back[name].float(), tensor.float()), name


def test_parts_with_ranks_of_their_own_become_one_layer_and_parts_again(tmp_path):
    """As other trainers train FLUX.1: query, key, value apart, of other ranks; of another layer some are missing."""
    rng, state = torch.Generator().manual_seed(0), {}
    block = "transformer.single_transformer_blocks.0."
    ranks = {"attn.to_q": 2, "attn.to_k": 3, "attn.to_v": 2, "proj_mlp": 4}
    for path, rank in ranks.items():
        rows = 64 if path == "proj_mlp" else 16
        state[f"{block}{path}.lora_A.weight"] = torch.randn(rank, 16, generator=rng)
        state[f"{block}{path}.lora_B.weight"] = torch.randn(rows, rank, generator=rng)
    for side, shape in (("A", (2, 16)), ("B", (16, 2))):
        state[f"transformer.transformer_blocks.1.attn.to_k.lora_{side}.weight"] = torch.randn(shape, generator=rng)
    path = write(tmp_path / "in.safetensors", state)
    there = convert(path, tmp_path / "there.safetensors", "kohya")
    found = load_file(there)
    assert found["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (11, 16)
    assert found["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (112, 11)
    whole, parts = changes(there), changes(path)
    blocks = [parts[f"lora_unet_single_transformer_blocks_0_{name.replace('.', '_')}"] for name in ranks]
    torch.testing.assert_close(whole["lora_unet_single_blocks_0_linear1"], torch.cat(blocks))
    change = whole["lora_unet_double_blocks_1_img_attn_qkv"]
    torch.testing.assert_close(change[16:32], parts["lora_unet_transformer_blocks_1_attn_to_k"])
    assert not change[:16].any()
    assert not change[32:].any()
    same_tensors(convert(there, tmp_path / "back.safetensors", "diffusers"), path)


def test_parts_with_other_alphas_and_a_missing_one(tmp_path):
    rng, tensors = torch.Generator().manual_seed(0), {}
    for name, rank, alpha in (("to_q", 2, 1.0), ("to_v", 3, 6.0)):
        layer = f"lora_unet_transformer_blocks_0_attn_{name}"
        tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, 8, generator=rng)
        tensors[f"{layer}.lora_up.weight"] = torch.randn(6, rank, generator=rng)
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    path = write(tmp_path / "in.safetensors", tensors)
    arguments = ["kohya", "--family", "flux"]
    (whole,) = changes(convert(path, tmp_path / "out.safetensors", *arguments)).values()
    parts = list(changes(path).values())
    torch.testing.assert_close(whole, torch.cat([parts[0], torch.zeros(6, 8), parts[1]]))


def test_a_layer_under_two_names_is_refused(tmp_path):
    names = ("transformer.transformer_blocks.0.attn.to_out.0", "diffusion_model.double_blocks.0.img_attn.proj")
    sides = (("A", (2, 8)), ("B", (6, 2)))
    tensors = {f"{name}.lora_{side}.weight": torch.ones(shape) for name in names for side, shape in sides}
    path = write(tmp_path / "in.safetensors", tensors)
    with pytest.raises(UserError, match="the file has this layer twice"):
        convert(path, tmp_path / "out.safetensors", "kohya", "--family", "flux")


# ---- others compute the same


@pytest.mark.parametrize(("dora", "fold"), [(False, False), (True, False), (False, True)])
def test_diffusers_computes_the_same(model, tmp_path, dora, fold):
    """Its own loader, on a copy of the model, with ranks and alphas that differ between layers."""
    name, own = model
    tensors = lora_of(name, own, ranks=(3, 2), alphas=(2.0, 1.5, 3.0), dora=dora)
    path = write(tmp_path / "in.safetensors", tensors)
    there = convert(path, tmp_path / "there.safetensors", "diffusers", *(["--fold_alpha"] if fold else []))
    ours = Models(copy.deepcopy(own.models.denoiser), own.models.text_encoders, {}, None)
    merge([target for target in chosen(name, own) if target.part == "denoiser"], ours, read(path), 1.0)
    theirs = copy.deepcopy(own.models.denoiser)
    theirs.load_lora_adapter(tmp_path, prefix=own.part, weight_name=there.name, local_files_only=True)
    with torch.no_grad():
        bare, expected, found = own.output(own.models.denoiser), own.output(ours.denoiser), own.output(theirs)
    assert (expected - bare).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert ("lora_adapter_metadata" in metadata_of(there)) == (not fold)


def test_diffusers_text_encoders_compute_the_same(tmp_path):
    from diffusers import StableDiffusionPipeline

    own = MAKE["sd"]()
    path = write(tmp_path / "in.safetensors", lora_of("sd", own, ranks=(3, 2), alphas=(2.0, 1.5)))
    there = convert(path, tmp_path / "there.safetensors", "diffusers")
    ours, theirs = copy.deepcopy(own.models), copy.deepcopy(own.models.text_encoders["te"])
    merge(chosen("sd", own), ours, read(path), 1.0)
    state, _, about = StableDiffusionPipeline.lora_state_dict(
        tmp_path, weight_name=there.name, local_files_only=True, return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_text_encoder(state, None, theirs, metadata=about)
    with torch.no_grad():
        expected, found = small_sd.text_output(ours.text_encoders["te"]), small_sd.text_output(theirs)
        bare = small_sd.text_output(own.models.text_encoders["te"])
    assert (expected - bare).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ---- which family


def _text_only(tmp_path: Path) -> str:
    layer = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    return write(
        tmp_path / "text.safetensors",
        {f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.lora_up.weight": torch.ones(16, 2)},
    )


def test_layers_of_several_families_need_a_word(tmp_path):
    path = _text_only(tmp_path)
    with pytest.raises(UserError, match=r"its layers are in models of sd, sdxl, sd3, flux; say which with --family"):
        convert(path, tmp_path / "out.safetensors", "diffusers")
    convert(path, tmp_path / "out.safetensors", "diffusers", "--family", "sdxl")
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight" in load_file(tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"lora_unet_a.lora_down.weight": torch.ones(2, 8), "lora_unet_a.lora_up.weight": torch.ones(6, 2)},
            r"1 of its layers are not in any model that is known here: lora_unet_a",
        ),
        (
            {
                f"lora_unet_double_blocks_0_img_attn_qkv.hada_w{end}": torch.ones(4, 4)
                for end in ("1_a", "1_b", "2_a", "2_b")
            },
            r"^lora_unet_double_blocks_0_img_attn_qkv: is LoHa; only LoRA, LoCon and DoRA can be put",
        ),
        (
            {
                f"lora_unet_double_blocks_0_img_attn_proj.hada_w{end}": torch.ones(4, 4)
                for end in ("1_a", "1_b", "2_a", "2_b")
            },
            r"^lora_unet_double_blocks_0_img_attn_proj: is LoHa; only LoRA, LoCon and DoRA can be put",
        ),
        (
            {
                "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 8),
                "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(6, 2),
                "lora_unet_double_blocks_0_img_attn_proj.dora_scale": torch.ones(1, 8),
            },
            r"is DoRA with norms of columns",
        ),
        (
            {
                f"lora_unet_double_blocks_{n}_img_attn_proj.{name}": torch.ones(shape)
                for n, dora in ((0, {}), (1, {"dora_scale": (6, 1)}))
                for name, shape in {"lora_down.weight": (2, 8), "lora_up.weight": (6, 2), **dora}.items()
            },
            r"some layers of transformer are DoRA and some are not",
        ),
        (
            {
                "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 8),
                "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(7, 2),
            },
            r"7 outputs cannot be cut 1:1:1",
        ),
    ],
)
def test_what_cannot_be_converted(tmp_path, tensors, message):
    path = write(tmp_path / "in.safetensors", tensors)
    with pytest.raises(UserError, match=message):
        convert(path, tmp_path / "out.safetensors", "diffusers")


def test_other_types_keep_their_tensors_in_comfyuis_layout(tmp_path):
    tensors = {f"lora_unet_double_blocks_0_img_attn_qkv.lokr_w{n}": torch.randn(3, 3) for n in (1, 2)} | {
        "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(1.0)
    }
    path = write(tmp_path / "in.safetensors", tensors)
    there = convert(path, tmp_path / "there.safetensors", "comfyui")
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lokr_w1" in load_file(there)
    same_tensors(convert(there, tmp_path / "back.safetensors", "kohya"), path)


# ---- the scripts


def test_the_script(run_script, tmp_path):
    path = write(tmp_path / "in.safetensors", lora_of("sd3", MAKE["sd3"]()), {"ss_steps": "7", "ss_network_dim": "3"})
    out = tmp_path / "out.safetensors"
    done = run_script("networks/convert_lora.py", f"--model={path}", f"--save_to={out}", "--to=diffusers")
    assert done.returncode == 0, done.stderr
    assert metadata_of(out)["ss_steps"] == "7"
    config = json.loads(metadata_of(out)["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (3, 2.0)
    done = run_script("networks/convert_lora.py", f"--model={path}", f"--save_to={path}")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)


@pytest.mark.rows("R412", "R414")
def test_the_pair_of_sd_scripts_and_ai_toolkit(run_script, tmp_path):
    """Alphas are in the matrices there; text encoders come along; and nothing grows on the way back."""
    path = write(tmp_path / "in.safetensors", lora_of("flux", MAKE["flux"](), ranks=(4,), alphas=(1.0, 2.0)))
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    line = ["networks/convert_flux_lora.py", "--src", "sd-scripts", "--dst", "ai-toolkit"]
    done = run_script(*line, f"--src_path={path}", f"--dst_path={there}")
    assert done.returncode == 0, done.stderr
    names = load_file(there).keys()
    assert {name.rpartition(".lora_")[2] for name in names} == {"A.weight", "B.weight"}
    assert any(name.startswith("text_encoder_2.encoder.block.0.") for name in names)
    assert "lora_adapter_metadata" not in metadata_of(there)
    done = run_script("networks/convert_flux_lora.py", f"--src_path={there}", f"--dst_path={back}")
    assert done.returncode == 0, done.stderr
    assert_same_changes(changes(back), changes(path), tolerance=1e-6)
    assert {n: t.shape for n, t in load_file(back).items()} == {n: t.shape for n, t in load_file(path).items()}
    assert {float(t) for name, t in load_file(back).items() if name.endswith("alpha")} == {4.0}
    done = run_script("networks/convert_flux_lora.py", f"--src_path={path}", f"--dst_path={back}")
    assert done.returncode == 2
    assert "has the names of kohya, not of diffusers" in done.stderr
