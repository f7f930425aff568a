"""Networks merged into the weights of models: the result acts as the model with the networks attached."""

from __future__ import annotations

import copy
import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call

import networks.lora_flux
import networks.lycoris
import networks.oft_flux
from library.checkpoints.reading import read_header
from library.errors import UserError
from library.families.registry import TOOLS
from library.families.shared.clip import public_name
from library.model_tools.model_layers import ModelFile, open_model_file
from library.model_tools.network_into_model import merge
from networks.build import DeclaredBuilder
from networks.targets import live_modules, weight_of
from tests.builders.hashes import tensor_hash
from tests.builders.mixed_networks import attached_networks, file_of, input_of, layer_outputs
from tests.builders.model_files import CASES
from tests.builders.options import options_with

MODEL_OPTION = {"sd": "sd_model", "sdxl": "sd_model", "flux": "flux_model", "sd3": "sd3_model"}
SCRIPTS = {"sd": "merge_lora", "sdxl": "sdxl_merge_lora", "flux": "flux_merge_lora", "sd3": "sd3_merge_lora"}


def run(family, **values):
    merge(options_with(TOOLS[SCRIPTS[family]], **values))


def merged_outputs(file: ModelFile, models, targets):
    """What the layers of `models` give with the weights of a file."""
    outputs = {}
    for target in targets:
        rows, found = file.rows(target), {}
        for name in ("weight", "bias"):
            if file.has(target, name):
                whole = file.weight(target, name)
                whole = whole.roll(len(whole) // 2, 0) if target.swap_halves else whole
                found[name] = whole.split(rows)
        outputs[target.key] = [
            functional_call(module, {name: parts[index] for name, parts in found.items()}, input_of(module))
            for index, module in enumerate(live_modules(models, target))
        ]
    return outputs


@pytest.mark.rows("R415", "R464", "R467")
@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux-bundle", "flux-diffusers", "sd3-bundle"])
@torch.no_grad()
def test_the_merged_model_acts_as_the_model_with_networks_of_every_type(name, tmp_path):
    case = CASES[name]
    path = case.write(tmp_path / "model.safetensors")
    models, targets = case.models(path)
    made = attached_networks(case.family, targets, models)
    save_file(file_of(made), tmp_path / "network.safetensors")
    for network in made:
        network.set_multiplier(0.7)
    wanted = layer_outputs(models, targets)
    for network in made:
        network.detach()
    bare = layer_outputs(models, targets)
    option = MODEL_OPTION[case.family]
    values = {"models": [str(tmp_path / "network.safetensors")], "ratios": [0.7]}
    run(case.family, **{option: str(path)}, save_to=str(tmp_path / "merged.safetensors"), **values)
    file = open_model_file(tmp_path / "merged.safetensors", (case.family,))
    found = merged_outputs(file, models, file.targets)
    changed = set()
    for key, outputs in found.items():
        for ours, theirs, before in zip(outputs, wanted[key], bare[key], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
            if not torch.equal(before, theirs):
                changed.add(key)
    adapted = {key for network in made for key in network.layers()} & found.keys()
    assert changed == adapted
    kinds = {type(layer).__name__ for network in made for layer in network.layers().values()}
    assert len(kinds) >= 9, kinds


# --- against others ---------------------------------------------------------------------------------------------------


def randomised(network):
    rng = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    return network


def saved(network):
    return {name: tensor.detach().clone() for name, tensor in network.file_state().items()}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A folder with FLUX.1's files, the loaded model, and its layers."""
    folder = tmp_path_factory.mktemp("flux")
    return folder, *CASES["flux"].models(CASES["flux"].write(folder / "dev.safetensors"))


def test_diffusers_fuses_the_same_weights(flux, tmp_path):
    """A file in diffusers' names, whose layers are parts of ours, with alphas and a scale."""
    folder, models, _ = flux
    transformer, rng = models.denoiser, torch.Generator().manual_seed(1)
    tensors = {}
    for path, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in path:
            tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(4, module.in_features, generator=rng) * 0.1
            tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=rng) * 0.1
    save_file(tensors, tmp_path / "theirs.safetensors")
    fused = copy.deepcopy(transformer)
    fused.load_lora_adapter(tensors, prefix="transformer")
    fused.fuse_lora(lora_scale=0.5)
    fused.unload_lora()
    paths = {"flux_model": str(folder / "dev.safetensors"), "save_to": str(tmp_path / "merged.safetensors")}
    run("flux", **paths, models=[str(tmp_path / "theirs.safetensors")], ratios=[0.5])
    merged, _ = CASES["flux"].models(tmp_path / "merged.safetensors")
    wanted = fused.state_dict()
    for name, tensor in merged.denoiser.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(
        wanted["transformer_blocks.0.attn.to_q.weight"], transformer.transformer_blocks[0].attn.to_q.weight
    )


@pytest.mark.rows("C63", "R415", "R417")
def test_text_encoders_in_files_of_their_own_are_merged_as_peft_does(flux, tmp_path):
    from peft import LoraConfig, get_peft_model

    folder, models, _ = flux
    wanted, tensors = {}, {}
    for number, (part, layers) in enumerate({"te1": ["q_proj", "fc1"], "te3": ["q", "wo"]}.items(), 1):
        encoder = copy.deepcopy(models.text_encoders[part])
        adapted = get_peft_model(encoder, LoraConfig(r=4, lora_alpha=2, target_modules=layers, init_lora_weights=False))
        for name, tensor in adapted.state_dict().items():
            if ".lora_" in name:
                place = name.removeprefix("base_model.model.").replace(".default", "")
                level = "text_model." if part == "te1" and not place.startswith("text_model.") else ""
                tensors[f"text_encoder{'' if number == 1 else '_3'}.{level}{place}"] = tensor.clone()
        public = public_name if part == "te1" else str
        wanted[part] = {public(name): tensor for name, tensor in adapted.merge_and_unload().state_dict().items()}
    config = {f"{part}.lora_alpha": 2 for part in ("text_encoder", "text_encoder_3")}
    save_file(tensors, tmp_path / "peft.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    run(
        "flux",
        models=[str(tmp_path / "peft.safetensors")],
        clip_l=str(folder / "clip_l.safetensors"),
        clip_l_save_to=str(tmp_path / "new_clip_l.safetensors"),
        t5xxl=str(folder / "t5xxl.safetensors"),
        t5xxl_save_to=str(tmp_path / "new_t5xxl.safetensors"),
    )
    for part, name in (("te1", "clip_l"), ("te3", "t5xxl")):
        before, after = load_file(folder / f"{name}.safetensors"), load_file(tmp_path / f"new_{name}.safetensors")
        assert before.keys() == after.keys()
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        assert len(changed) == 4
        for key in changed:
            torch.testing.assert_close(after[key], wanted[part][key], rtol=1e-5, atol=1e-6)


def test_lycoris_merges_the_same_weights(tmp_path):
    """Its LoKr has the scale alpha / rank twice when it is merged (and once when it is attached): here it is 1."""
    from lycoris.utils import merge as lycoris_merge

    path = CASES["sd1"].write(tmp_path / "model.safetensors")
    models, targets = CASES["sd1"].models(path)
    layers, state = [target for target in targets if target.part == "denoiser" and not target.norm], {}
    for number, (args, alpha) in enumerate((({"algo": "lora"}, 2.0), ({"algo": "lokr", "factor": "4"}, 4.0))):
        args = {**args, "conv_dim": "4", "conv_alpha": str(alpha)}
        builder = DeclaredBuilder(networks.lycoris.MODULE)
        state |= saved(randomised(builder.create(layers[number::2], models, dim=4, alpha=alpha, args=args, seed=0)))
    save_file(state, tmp_path / "network.safetensors")
    files = {"sd_model": str(path), "save_to": str(tmp_path / "new.safetensors")}
    run("sd", **files, models=[str(tmp_path / "network.safetensors")], ratios=[0.5])
    lycoris_merge([], models.denoiser, dict(state), 0.5)
    file = open_model_file(tmp_path / "new.safetensors", ("sd",))
    for target in layers:
        torch.testing.assert_close(file.weight(target), weight_of(models, target), rtol=1e-5, atol=1e-6, msg=target.key)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(flux):
    """A LoRA file for the transformer in `flux`, and its changes by the layers' keys."""
    folder, models, targets = flux
    chosen = [target for target in targets if target.part == "denoiser"]
    made = DeclaredBuilder(networks.lora_flux.MODULE).create(chosen, models, dim=4, alpha=2.0, args={}, seed=0)
    state = saved(randomised(made))
    save_file(state, folder / "lora.safetensors", {"modelspec.title": "My LoRA"})
    return folder / "lora.safetensors", {
        key: 0.5 * state[f"{key}.lora_up.weight"] @ state[f"{key}.lora_down.weight"] for key in made.layers()
    }


def into_flux(flux, lora, tmp_path, **values):
    """Merges, and gives the new model's file and how its layers differ from the old one's."""
    folder = flux[0]
    paths = {"flux_model": str(folder / "dev.safetensors"), "save_to": str(tmp_path / "merged.safetensors")}
    run("flux", **{**paths, "models": [str(lora[0])] if lora else None, **values})
    old, new = (open_model_file(path, ("flux",)) for path in (paths["flux_model"], paths["save_to"]))
    return new, {target.key: new.weight(target) - old.weight(target) for target in old.targets}


@pytest.mark.rows("R416")
def test_ratios_add_up_and_blocks_have_weights(flux, lora, tmp_path):
    path = str(lora[0])
    blocks = "double_blocks.1=0.25,*=1"
    _, changes = into_flux(flux, lora, tmp_path, models=[path, path], ratios=[0.5, -2.0], lbws=[blocks, "unet=0.5"])
    for key, change in lora[1].items():
        factor = 0.5 * (0.25 if "double_blocks_1_" in key else 1) - 2.0 * 0.5
        torch.testing.assert_close(changes[key], change * factor, rtol=1e-4, atol=1e-5)


def test_ratios_and_weights_of_blocks_reach_other_types_of_networks(flux, tmp_path):
    """The change of an OFT network is what they scale, too, which earlier scripts ignored."""
    layers = [target for target in flux[2] if target.part == "denoiser"]
    made = DeclaredBuilder(networks.oft_flux.MODULE).create(layers, flux[1], dim=4, alpha=0.5, args={}, seed=0)
    save_file(saved(randomised(made)), tmp_path / "oft.safetensors")
    values = {"models": [str(tmp_path / "oft.safetensors")]}
    _, whole = into_flux(flux, None, tmp_path, **values)
    _, changes = into_flux(flux, None, tmp_path, **values, ratios=[0.5], lbws=["double_blocks.0=0.25"])
    assert {key for key, change in whole.items() if change.any()} == made.layers().keys()
    for key, change in whole.items():
        factor = 0.5 * (0.25 if "double_blocks_0_" in key else 1)
        torch.testing.assert_close(changes[key], change * factor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "dtype", "tolerance"),
    [
        ({}, torch.float32, 1e-6),
        ({"precision": "bf16"}, torch.float32, 2e-2),
        ({"save_precision": "fp16"}, torch.float16, 2e-3),
        ({"save_precision": "bf16"}, torch.bfloat16, 2e-2),
        ({"save_precision": "fp8_e4m3fn"}, torch.float8_e4m3fn, 0.3),
    ],
)
def test_precisions(values, dtype, tolerance, flux, lora, tmp_path):
    new, changes = into_flux(flux, lora, tmp_path, **values)
    assert {new.weights.dtype(key) for key in new.weights} == {dtype}
    for key, change in lora[1].items():
        assert float((changes[key] - change).abs().max()) <= tolerance, key
    rounded = [key for key, change in lora[1].items() if not torch.allclose(changes[key], change, atol=1e-5)]
    assert bool(rounded) == bool(values)


def test_metadata_says_what_the_model_was_made_from(flux, lora, tmp_path):
    into_flux(flux, lora, tmp_path, ratios=[0.5], lbws=["*=1"])
    metadata, _ = read_header(tmp_path / "merged.safetensors")
    made = json.loads(metadata["sd_merge_recipe"])
    sha256 = hashlib.sha256(lora[0].read_bytes()).hexdigest()
    assert made["networks"] == [{"name": "lora.safetensors", "sha256": sha256, "ratio": 0.5, "lbw": "*=1"}]
    assert made["model"]["name"] == "dev.safetensors"
    assert metadata["modelspec.architecture"] == "flux-1-dev"
    assert metadata["modelspec.merged_from"] == "dev, My LoRA"
    assert metadata["modelspec.title"] == "merged"
    assert metadata["modelspec.hash_sha256"] == f"0x{tensor_hash(tmp_path / 'merged.safetensors')}"
    into_flux(flux, lora, tmp_path, no_metadata=True)
    assert read_header(tmp_path / "merged.safetensors")[0] == {}


def test_a_ckpt_stays_one_with_its_counters(tmp_path):
    path = CASES["sd1"].write(tmp_path / "model.safetensors")
    state = load_file(path)
    torch.save({"state_dict": state, "epoch": 3, "global_step": 70}, tmp_path / "model.ckpt")
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    down, up = torch.ones(1, 64), torch.ones(128, 1)
    torch.save({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, tmp_path / "lora.pt")
    run(
        "sd",
        sd_model=str(tmp_path / "model.ckpt"),
        models=[str(tmp_path / "lora.pt")],
        save_to=str(tmp_path / "new.ckpt"),
    )
    content = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 70)
    name = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    assert content["state_dict"].keys() == state.keys()
    assert [key for key in state if not torch.equal(content["state_dict"][key], state[key])] == [name]
    torch.testing.assert_close(content["state_dict"][name], state[name] + 1)


def test_layers_of_parts_that_are_not_given_are_named(flux, lora, tmp_path, caplog):
    layer, sizes = "lora_te1_text_model_encoder_layers_0_mlp_fc1", {"up": (96, 1), "down": (1, 64)}
    extra = {f"{layer}.lora_{side}.weight": torch.ones(size) for side, size in sizes.items()}
    save_file({**load_file(lora[0]), **extra}, tmp_path / "both.safetensors")
    with caplog.at_level("WARNING"):
        into_flux(flux, lora, tmp_path, models=[str(tmp_path / "both.safetensors")])
    assert "1 of its" in caplog.text
    assert "to merge them, too, give the model's other files" in caplog.text
    caplog.clear()
    clip_l = {"clip_l": str(flux[0] / "clip_l.safetensors"), "clip_l_save_to": str(tmp_path / "clip_l.safetensors")}
    with caplog.at_level("WARNING"):
        run("flux", **clip_l, models=[str(tmp_path / "both.safetensors")])
    assert f"{len(lora[1])} of its {len(lora[1]) + 1} layers have no place in what is given" in caplog.text


# --- mistakes ---------------------------------------------------------------------------------------------------------


def broken(folder, lora, kind):
    """A network file with something wrong."""
    tensors, path = load_file(lora[0]), folder / f"{kind}.safetensors"
    name = "lora_unet_single_blocks_1_linear2.lora_up.weight"
    if kind == "nan":
        tensors[name][0, 0] = math.nan
    elif kind == "size":
        tensors[name] = tensors[name][:-1]
    elif kind == "half":
        del tensors[name]
    elif kind == "other":
        tensors = {
            f"lora_unet_down_blocks_0_attentions_0_proj_in.lora_{side}.weight": torch.ones(1, 1)
            for side in ("up", "down")
        }
    save_file(tensors, path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    return str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", r"lora_unet_single_blocks_1_linear2.lora_up.weight: 1 of 256 values are NaN"),
        ("size", r"size.safetensors: lora_unet_single_blocks_1_linear2: shape \(63, 320\) does not fit \(64, 320\)"),
        ("half", r"holds lora_unet_single_blocks_1_linear2.lora_down.weight, which is not"),
        ("other", r"none of its 1 layers fits the \d+ layers"),
        ("cut", r"cut short"),
    ],
)
def test_a_network_that_cannot_be_merged_leaves_the_earlier_file(kind, message, flux, lora, tmp_path):
    (tmp_path / "merged.safetensors").write_bytes(b"earlier")
    with pytest.raises(UserError, match=message):
        into_flux(flux, lora, tmp_path, models=[broken(tmp_path, lora, kind)])
    assert (tmp_path / "merged.safetensors").read_bytes() == b"earlier"
    assert [path for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": ["model"]}, "this is a whole model|not LoRA"),
        (
            {"flux_model": "lora"},
            r"--flux_model: .*: this is a LoRA \(or similar network\) file; a FLUX model is needed",
        ),
        ({"flux_model": "clip_l"}, "this is a text encoder by itself; a FLUX model is needed"),
        ({"clip_l": "t5xxl", "clip_l_save_to": "new"}, "--clip_l: .*: this is a T5 text encoder; CLIP-L in"),
        ({"flux_model": "folder"}, "is a folder; give a single file"),
        ({"save_to": "model"}, r"--save_to: .* would replace what is read"),
        ({"save_to": "lora"}, r"--save_to: .* would replace what is read"),
        ({"save_to": "new.bin"}, r"must end in .safetensors or .ckpt or .pt"),
        ({"working_device": "gpu"}, r"--device: gpu cannot be used here"),
        ({"lbws": ["joint_blocks=1"]}, r"no layer of the network is in joint_blocks"),
        ({"save_precision": "fp16", "ratios": [1e9]}, "values are NaN or infinite in float16"),
    ],
)
def test_mistakes(values, message, flux, lora, tmp_path):
    folder = flux[0]
    places = {"model": folder / "dev.safetensors", "lora": lora[0], "folder": folder, "new": tmp_path / "x.safetensors"}
    places |= {name: folder / f"{name}.safetensors" for name in ("clip_l", "t5xxl")}
    places |= {"new.bin": tmp_path / "new.bin"}
    before = {path: path.read_bytes() for path in places.values() if path.is_file()}
    named = lambda value: str(places[value]) if isinstance(value, str) and value in places else value  # noqa: E731
    given = {
        name: list(map(named, value)) if isinstance(value, list) else named(value) for name, value in values.items()
    }
    with pytest.raises(UserError, match=message):
        into_flux(flux, lora, tmp_path, **given)
    assert {path: path.read_bytes() for path in before} == before
    assert list(tmp_path.iterdir()) == []


FILES = {"models": ["a"], "save_to": "b"}


@pytest.mark.parametrize(
    ("script", "values", "problem"),
    [
        ("merge_lora", {"save_to": "a"}, "--models is required"),
        ("merge_lora", {"models": ["a"]}, "--save_to is required: name the file to write"),
        ("merge_lora", {"models": ["a"], "sd_model": "b"}, "--save_to is required with --sd_model"),
        ("merge_lora", {**FILES, "ratios": [1.0, 2.0]}, "--ratios: 2 for 1 --models"),
        ("sdxl_merge_lora", {**FILES, "lbws": ["x", "y"]}, "--lbws: 2 for 1 --models"),
        ("flux_merge_lora", {**FILES, "clip_l": "b", "clip_l_save_to": "c"}, "--save_to: needs --flux_model"),
        ("flux_merge_lora", {**FILES, "t5xxl_save_to": "c"}, "--t5xxl_save_to: needs --t5xxl"),
        (
            "flux_merge_lora",
            {**FILES, "flux_model": "m", "clip_l": "c", "clip_l_save_to": "b"},
            "b: two files would be",
        ),
        ("flux_merge_lora", {**FILES, "precision": "fp8"}, "--precision: fp8: nothing can be computed"),
        ("flux_merge_lora", {**FILES, "save_precision": "int8"}, "--save_precision: must be one of"),
    ],
)
def test_options_that_cannot_work_are_known_before_anything_is_read(script, values, problem):
    opts = options_with(TOOLS[script], **values)
    problems = list(opts.merge.check(opts, None))
    assert any(text.startswith(problem) for text in problems), problems


def test_what_has_no_effect_with_a_model_is_said():
    opts = options_with(TOOLS["merge_lora"], **FILES, sd_model="c", concat=True, shuffle=True)
    warnings = list(opts.merge.warnings(opts, None))
    assert warnings == [f"--{name}: has no effect when a model is given" for name in ("concat", "shuffle")]
