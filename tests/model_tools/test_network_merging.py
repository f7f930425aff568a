"""Network files added up: against the sum of the changes that the files make one by one, and attached to a model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from library.errors import UserError
from library.model_tools.block_weights import parse
from library.model_tools.network_merging import merge_networks
from library.types import LoraTarget, Models
from networks.files import read
from tests.model_tools.files import SHAPES, assert_same_changes, changes, lora_tensors, write
from tests.networks.builders import lora

LAYER = next(iter(SHAPES))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two LoRA of other ranks and alphas."""
    first, second = lora_tensors(1, rank=3, alpha=2.0), lora_tensors(2, rank=2, alpha=5.0)
    return [write(tmp_path / "first.safetensors", first), write(tmp_path / "second.safetensors", second)]


def _sum(files: list[str], ratios: list[float]) -> dict[str, torch.Tensor]:
    found = [changes(file) for file in files]
    return {layer: sum(r * one[layer] for r, one in zip(ratios, found, strict=True)) for layer in found[0]}


@pytest.mark.rows("R423")
@pytest.mark.parametrize("ratios", [[1.0, 1.0], [0.5, -2.0], [0.3, 0.7]])
@pytest.mark.parametrize("shuffle", [False, True])
def test_concat_is_the_sum(files, tmp_path, ratios, shuffle):
    out = tmp_path / "out.safetensors"
    merge_networks(files, ratios, str(out), concat=True, shuffle=shuffle)
    assert_same_changes(changes(out), _sum(files, ratios))
    assert {len(entry["lora_down.weight"]) for entry in read(out).entries.values()} == {5}


@pytest.mark.rows("R423")
def test_concat_acts_as_both_attached(files, tmp_path):
    out = tmp_path / "out.safetensors"
    merge_networks(files, [0.7, 1.3], str(out), concat=True)
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(10, 12), "conv": nn.Conv2d(6, 10, 3, padding=1, stride=2)})
    models = Models(model, {}, {}, None)
    keys = {"linear": LAYER, "conv": "lora_unet_down_blocks_1_resnets_0_conv1"}
    targets = [LoraTarget(key, "denoiser", (path,)) for path, key in keys.items()]
    inputs = {"linear": torch.randn(3, 10), "conv": torch.randn(2, 6, 8, 8)}

    def outputs(attached: list[tuple[str | Path, float]]) -> list[torch.Tensor]:
        networks = []
        for path, strength in attached:
            network = lora.from_weights(targets, models, lora.read(path), args={})
            network.attach(models)
            network.set_multiplier(strength)
            networks.append(network)
        results = [model[name](x) for name, x in inputs.items()]
        for network in networks:
            network.detach()
        return results

    both, one, bare = outputs([(files[0], 0.7), (files[1], 1.3)]), outputs([(out, 1.0)]), outputs([])
    for together, merged, without in zip(both, one, bare, strict=True):
        torch.testing.assert_close(merged, together, atol=1e-5, rtol=1e-5)
        assert (together - without).abs().max() > 0.1


def test_without_concat_it_is_the_best_of_the_larger_rank(files, tmp_path):
    out = tmp_path / "out.safetensors"
    merge_networks(files, [1.0, 0.5], str(out))
    for layer, whole in _sum(files, [1.0, 0.5]).items():
        u, s, vh = np.linalg.svd(whole.double().flatten(1).numpy(), full_matrices=False)
        best = u[:, :3] * s[:3] @ vh[:3]
        np.testing.assert_allclose(changes(out)[layer].flatten(1), best, atol=1e-5 * s[0])
        assert s[3] > 1e-3  # so that there was something to leave out


def test_files_in_the_same_space_lose_nothing_without_concat(tmp_path):
    """The second file has the first one's down matrices, as it would after training on from it for a little."""
    first, second = lora_tensors(1), lora_tensors(2)
    second |= {name: tensor for name, tensor in first.items() if "lora_down" in name}
    paths = [write(tmp_path / "1.safetensors", first), write(tmp_path / "2.safetensors", second)]
    merge_networks(paths, [0.4, 0.6], str(tmp_path / "out.safetensors"))
    assert_same_changes(changes(tmp_path / "out.safetensors"), _sum(paths, [0.4, 0.6]))


@pytest.mark.parametrize("ratio", [1.0, 0.25, -1.5])
def test_one_file_is_multiplied_by_its_ratio_and_otherwise_as_it_was(tmp_path, ratio):
    tensors = lora_tensors()
    out = tmp_path / "out.safetensors"
    merge_networks([write(tmp_path / "in.safetensors", tensors)], [ratio], str(out))
    for name, tensor in load_file(out).items():
        assert torch.equal(tensor, tensors[name] * ratio if "lora_up" in name else tensors[name])


def test_layers_of_one_file_alone_are_kept(files, tmp_path):
    more = {"lora_unet_mid_block_attentions_0_proj_in": (6, 6)}
    third = write(tmp_path / "third.safetensors", lora_tensors(3, shapes=more))
    out = tmp_path / "out.safetensors"
    merge_networks([*files, third], [1.0, 1.0, 0.5], str(out), concat=True)
    assert changes(out).keys() == SHAPES.keys() | more.keys()
    assert_same_changes(
        {"x": changes(out)[next(iter(more))]}, {"x": 0.5 * next(iter(changes(third).values()))}, tolerance=1e-6
    )


@pytest.mark.rows("R468")
def test_blocks_are_weighed_once(files, tmp_path):
    out = tmp_path / "out.safetensors"
    weights = [parse("down_blocks.0=0.5,*=1"), parse("te=0,*=1")]
    merge_networks(files, [2.0, 1.0], str(out), weights=weights, concat=True)
    first, second = changes(files[0]), changes(files[1])
    expected = {}
    for layer in first:
        expected[layer] = first[layer] * (1.0 if "down_blocks_0" in layer else 2.0)
        expected[layer] = expected[layer] + (0 if "_te_" in layer else second[layer])
    assert_same_changes(changes(out), expected)


@pytest.mark.parametrize(("ratio", "acts_as"), [(0.5, 0.25), (-0.5, -0.25), (2.0, 4.0)])
def test_the_legacy_ratio_counts_twice(tmp_path, ratio, acts_as):
    path = write(tmp_path / "in.safetensors", lora_tensors())
    out = tmp_path / "out.safetensors"
    merge_networks([path], [ratio], str(out), legacy_ratio=True)
    assert_same_changes(changes(out), {layer: acts_as * change for layer, change in changes(path).items()})


def test_the_legacy_sum_has_products_of_the_files_with_each_other(tmp_path):
    first, second = lora_tensors(1, alpha=2.0), lora_tensors(2, alpha=8.0)
    paths = [write(tmp_path / "1.safetensors", first), write(tmp_path / "2.safetensors", second)]
    merge_networks(paths, [1.0, 0.5], str(tmp_path / "out.safetensors"), legacy_ratio=True)
    down, up = (first[f"{LAYER}.lora_{side}.weight"] + second[f"{LAYER}.lora_{side}.weight"] for side in ("down", "up"))
    expected = up @ down * (2.0 / 3)  # sqrt(8 / 2) * 0.5 is 1
    torch.testing.assert_close(changes(tmp_path / "out.safetensors")[LAYER], expected, atol=1e-5, rtol=1e-5)


def test_legacy_concat_of_equal_ranks_has_half_the_strength(tmp_path):
    paths = [write(tmp_path / f"{n}.safetensors", lora_tensors(n)) for n in (1, 2)]
    out = tmp_path / "out.safetensors"
    merge_networks(paths, [1.0, 1.0], str(out), concat=True, legacy_ratio=True)
    assert_same_changes(changes(out), {layer: whole / 2 for layer, whole in _sum(paths, [1.0, 1.0]).items()})


def test_shuffling_changes_the_order_alone(tmp_path):
    path = write(tmp_path / "in.safetensors", lora_tensors(rank=8))
    for name in ("a", "b"):
        merge_networks([path], [1.0], str(tmp_path / f"{name}.safetensors"), shuffle=True)
    before, after = load_file(path), load_file(tmp_path / "a.safetensors")
    name = f"{LAYER}.lora_down.weight"
    assert not torch.equal(before[name], after[name])
    torch.testing.assert_close(before[name].sum(0), after[name].sum(0))
    assert_same_changes(changes(tmp_path / "a.safetensors"), changes(path))
    assert (tmp_path / "a.safetensors").read_bytes()[-500:] == (tmp_path / "b.safetensors").read_bytes()[-500:]


def test_tucker_form_is_added_up_with_plain_lora(tmp_path):
    layer = "lora_unet_down_blocks_1_resnets_0_conv1"
    rng = torch.Generator().manual_seed(0)
    shapes = {"lora_down": (3, 6, 1, 1), "lora_mid": (3, 3, 3, 3), "lora_up": (10, 3, 1, 1)}
    core = {f"{layer}.{name}.weight": torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    core[f"{layer}.alpha"] = torch.tensor(6.0)
    paths = [
        write(tmp_path / "tucker.safetensors", core),
        write(tmp_path / "plain.safetensors", lora_tensors(shapes={layer: SHAPES[layer]})),
    ]
    merge_networks(paths, [1.0, 2.0], str(tmp_path / "out.safetensors"), concat=True)
    assert_same_changes(changes(tmp_path / "out.safetensors"), _sum(paths, [1.0, 2.0]))


def test_whole_differences_are_added_up(tmp_path):
    one, two = torch.randn(4, 3), torch.randn(4, 3)
    first = write(tmp_path / "1.safetensors", {"lora_unet_a.diff": one, "lora_unet_a.diff_b": one[:, 0]})
    second = write(tmp_path / "2.safetensors", {"lora_unet_a.diff": two})
    merge_networks([first, second], [0.5, 2.0], str(tmp_path / "out.safetensors"))
    found = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(found["lora_unet_a.diff"], 0.5 * one + 2 * two)
    torch.testing.assert_close(found["lora_unet_a.diff_b"], 0.5 * one[:, 0])


def _hada(scale: float = 1.0) -> dict[str, torch.Tensor]:
    shapes = {"hada_w1_a": (5, 2), "hada_w1_b": (2, 4), "hada_w2_a": (5, 2), "hada_w2_b": (2, 4)}
    return {f"lora_unet_a.{name}": torch.ones(shape) * scale for name, shape in shapes.items()}


def test_other_types_are_kept_alone_and_refused_together(tmp_path):
    paths = [write(tmp_path / f"{n}.safetensors", _hada(n)) for n in (1, 2)]
    merge_networks(paths[:1], [0.5], str(tmp_path / "out.safetensors"))
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["lora_unet_a.hada_w1_a"], torch.full((5, 2), 0.5))
    assert torch.equal(found["lora_unet_a.hada_w2_a"], torch.ones(5, 2))
    with pytest.raises(UserError, match=r"^lora_unet_a: is LoHa in .*1\.safetensors, which cannot be added up"):
        merge_networks(paths, [1.0, 1.0], str(tmp_path / "out.safetensors"))


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        (lora_tensors(dora=True), "DoRA"),
        ({"lora_unet_a.oft_blocks": torch.ones(2, 3, 3), "lora_unet_a.alpha": torch.tensor(1.0)}, "OFT"),
    ],
)
def test_what_is_not_proportional_to_a_ratio_has_the_ratio_1_only(tmp_path, tensors, name):
    path = write(tmp_path / "in.safetensors", tensors)
    merge_networks([path], [1.0], str(tmp_path / "out.safetensors"))
    assert load_file(tmp_path / "out.safetensors").keys() == tensors.keys()
    with pytest.raises(UserError, match=f"is {name} in .* ratio 1 .* got 0.5"):
        merge_networks([path], [0.5], str(tmp_path / "out2.safetensors"))
    assert not (tmp_path / "out2.safetensors").exists()


def test_the_layout_stays_where_all_files_have_it(tmp_path):
    """Diffusers' layout has no alpha: it is in the matrices afterwards."""
    names = [f"transformer.transformer_blocks.0.attn.{layer}" for layer in ("to_q", "to_out.0")]
    paths = []
    for seed in (1, 2):
        rng = torch.Generator().manual_seed(seed)
        tensors = {f"{name}.lora_A.weight": torch.randn(2, 6, generator=rng) for name in names}
        tensors |= {f"{name}.lora_B.weight": torch.randn(5, 2, generator=rng) for name in names}
        paths.append(write(tmp_path / f"{seed}.safetensors", tensors))
    out = tmp_path / "out.safetensors"
    merge_networks(paths, [0.5, 1.0], str(out), concat=True)
    assert load_file(out).keys() == load_file(paths[0]).keys()
    assert_same_changes(changes(out), _sum(paths, [0.5, 1.0]))


def test_files_of_different_layouts_meet_in_kohyas(tmp_path):
    """One file has query, key and value of a layer apart, the other has them in one."""
    rng = torch.Generator().manual_seed(0)
    block = "transformer.transformer_blocks.0.attn."
    apart = {}
    for name in ("to_q", "to_k", "to_v"):
        apart[f"{block}{name}.lora_A.weight"] = torch.randn(2, 6, generator=rng)
        apart[f"{block}{name}.lora_B.weight"] = torch.randn(4, 2, generator=rng)
    layers = {"lora_unet_double_blocks_0_img_attn_qkv": (12, 6), "lora_unet_single_blocks_0_linear2": (4, 8)}
    one = write(tmp_path / "1.safetensors", lora_tensors(shapes=layers, rank=3, alpha=1.5))
    apart["transformer.single_transformer_blocks.0.proj_out.lora_A.weight"] = torch.ones(2, 8)
    apart["transformer.single_transformer_blocks.0.proj_out.lora_B.weight"] = torch.ones(4, 2)
    two = write(tmp_path / "2.safetensors", apart)
    merge_networks([one, two], [0.5, 2.0], str(tmp_path / "out.safetensors"), concat=True)
    found, first, second = changes(tmp_path / "out.safetensors"), changes(one), changes(two)
    pieces = [second[f"lora_unet_transformer_blocks_0_attn_{name}"] for name in ("to_q", "to_k", "to_v")]
    other = {
        "lora_unet_double_blocks_0_img_attn_qkv": torch.cat(pieces),
        "lora_unet_single_blocks_0_linear2": second["lora_unet_single_transformer_blocks_0_proj_out"],
    }
    assert_same_changes(found, {layer: 0.5 * first[layer] + 2.0 * other[layer] for layer in first})


@pytest.mark.rows("R466")
def test_metadata_says_what_it_is_and_what_it_was_made_from(files, tmp_path):
    shared = {"ss_v2": "False", "ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora"}
    first = write(tmp_path / "a.safetensors", lora_tensors(1), {**shared, "modelspec.title": "A", "ss_steps": "7"})
    second = write(tmp_path / "b.safetensors", lora_tensors(2), shared)
    out = tmp_path / "my merge.safetensors"
    merge_networks([first, second], [0.5, 1.0], str(out), concat=True, save_precision="fp16")
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    expected = {"ss_network_dim": "6", "ss_network_alpha": "4.0", "modelspec.merged_from": "A, b", **shared}
    assert expected.items() <= metadata.items()
    assert metadata["modelspec.title"] == "my merge"
    assert "ss_steps" not in metadata
    made = json.loads(metadata["ss_merge_recipe"])
    assert made["type"] == "concat"
    assert [model["ratio"] for model in made["models"]] == [0.5, 1.0]
    assert made["models"][0]["name"] == "a.safetensors"
    assert made["models"][0]["sha256"] == hashlib.sha256(Path(first).read_bytes()).hexdigest()
    content = out.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    merge_networks([first, second], [0.5, 1.0], str(out), concat=True, no_metadata=True)
    with safe_open(out, "pt") as file:
        assert "ss_merge_recipe" not in file.metadata()
        assert file.metadata()["ss_network_dim"] == "6"


@pytest.mark.parametrize(
    ("precision", "save_precision", "dtype"),
    [("float", None, torch.float32), ("bf16", None, torch.bfloat16), ("float", "fp16", torch.float16)],
)
def test_precisions(files, tmp_path, precision, save_precision, dtype):
    out = tmp_path / "out.safetensors"
    merge_networks(files, [1.0, 1.0], str(out), concat=True, precision=precision, save_precision=save_precision)
    assert {tensor.dtype for tensor in load_file(out).values()} == {dtype}
    assert_same_changes(changes(out), _sum(files, [1.0, 1.0]), tolerance=0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_inputs_of_narrow_dtypes_without_alpha(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in lora_tensors(alpha=None).items()}
    path = write(tmp_path / "in.safetensors", tensors)
    merge_networks([path, path], [0.25, 0.75], str(tmp_path / "out.safetensors"), concat=True)
    assert_same_changes(changes(tmp_path / "out.safetensors"), changes(path))


def _of_another_size() -> dict[str, torch.Tensor]:
    return lora_tensors(shapes={LAYER: (12, 20)})


@pytest.mark.parametrize(
    ("second", "ratios", "message"),
    [
        (lora_tensors(2), [1.0], r"--ratios: 1 given for 2 --models"),
        (lora_tensors(2), [0.0, 0.0], r"every layer would have the weight 0"),
        (_of_another_size(), [1.0, 1.0], rf"^{LAYER}: sizes differ: 12x10 in .*, 12x20 in .*different models"),
        ({"model.diffusion_model.out.2.weight": torch.ones(2)}, [1.0, 1.0], r"this is a whole model"),
        (
            {**lora_tensors(2), f"{LAYER}.alpha": torch.tensor(float("nan"))},
            [1.0, 1.0],
            r"alpha: 1 of 1 values are NaN",
        ),
        ({f"{LAYER}.lora_down.weight": torch.ones(2, 10)}, [1.0, 1.0], r"lora_down.weight, which is not LoRA"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path, second, ratios, message):
    paths = [write(tmp_path / "1.safetensors", lora_tensors(1)), write(tmp_path / "2.safetensors", second)]
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"as it was")
    with pytest.raises(UserError, match=message):
        merge_networks(paths, ratios, str(out))
    assert out.read_bytes() == b"as it was"


def test_a_file_that_is_read_is_not_replaced(files, tmp_path):
    with pytest.raises(UserError, match=r"--save_to: .*first\.safetensors would replace what is read"):
        merge_networks(files, [1.0, 1.0], files[0])
    with pytest.raises(UserError, match=r"must end in .safetensors"):
        merge_networks(files, [1.0, 1.0], str(tmp_path))


def test_values_that_do_not_fit_the_precision(tmp_path):
    path = write(tmp_path / "in.safetensors", lora_tensors())
    with pytest.raises(UserError, match=r"values are NaN or infinite in float16; .* too large for this precision"):
        merge_networks([path], [1e6], str(tmp_path / "out.safetensors"), save_precision="fp16")


def test_torch_files_are_read_and_written(tmp_path):
    torch.save(lora_tensors(), tmp_path / "in.pt")
    merge_networks([str(tmp_path / "in.pt")], [1.0], str(tmp_path / "out.ckpt"))
    found = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert all(torch.equal(tensor, lora_tensors()[name]) for name, tensor in found.items())
