"""Network files added up at a new rank: networks/svd_merge_lora.py."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.errors import UserError
from library.model_tools import svd_merging
from tests.builders.memory import needs_linux
from tests.model_tools.files import SHAPES, assert_same_changes, changes, lora_tensors, write
from tests.model_tools.tools import options

KERNEL = "lora_unet_down_blocks_1_resnets_0_conv1"


def merge(paths: list[str], ratios: list[float], out: Path, *arguments: object) -> None:
    line = ["--models", *paths, "--ratios", *ratios, "--save_to", out, *arguments]
    svd_merging.svd_merge(options("svd_merge_lora", *line))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """LoRA of other ranks and alphas."""
    return [
        write(tmp_path / f"{rank}.safetensors", lora_tensors(rank, rank=rank, alpha=alpha))
        for rank, alpha in ((3, 2.0), (2, 5.0), (4, 4.0))
    ]


def test_one_file_at_its_own_rank_is_itself(files, tmp_path):
    merge(files[:1], [1.0], tmp_path / "out.safetensors", "--new_rank", 3)
    assert_same_changes(changes(tmp_path / "out.safetensors"), changes(files[0]))


def test_at_all_ranks_together_it_is_the_sum(files, tmp_path):
    ratios = [0.5, -1.0, 2.0]
    merge(files, ratios, tmp_path / "out.safetensors", "--new_rank", 9)
    parts = [changes(file) for file in files]
    expected = {layer: sum(r * part[layer] for r, part in zip(ratios, parts, strict=True)) for layer in SHAPES}
    # The 1x1 convolution and the text encoder's layer have a side of 8: that is their largest rank, and still exact.
    assert_same_changes(changes(tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize(("rank", "conv_rank"), [(2, None), (4, 1)])
def test_at_a_smaller_rank_it_is_the_best(files, tmp_path, rank, conv_rank):
    more = [] if conv_rank is None else ["--new_conv_rank", conv_rank]
    merge(files, [1.0, 1.0, 1.0], tmp_path / "out.safetensors", "--new_rank", rank, *more)
    parts = [changes(file) for file in files]
    found = load_file(tmp_path / "out.safetensors")
    for layer in SHAPES:
        own = (conv_rank or rank) if layer == KERNEL else rank
        whole = sum(part[layer] for part in parts).double().flatten(1).numpy()
        u, s, vh = np.linalg.svd(whole, full_matrices=False)
        up, down = (found[f"{layer}.lora_{side}.weight"].flatten(1) for side in ("up", "down"))
        np.testing.assert_allclose(up @ down, u[:, :own] * s[:own] @ vh[:own], atol=1e-5 * s[0])
        np.testing.assert_allclose(up.norm(dim=0), s[:own], rtol=1e-4)  # the singular values are in the up matrix
        assert float(found[f"{layer}.alpha"]) == own


def test_clamping_is_off_unless_it_is_asked_for(files, tmp_path):
    merge(files, [1.0, 1.0, 1.0], tmp_path / "a.safetensors", "--new_rank", 4)
    merge(files, [1.0, 1.0, 1.0], tmp_path / "b.safetensors", "--new_rank", 4, "--clamp_quantile", 0.99)
    whole, cut = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    for layer in SHAPES:
        names = [f"{layer}.lora_{side}.weight" for side in ("up", "down")]
        limit = float(np.quantile(np.concatenate([whole[name].numpy().ravel() for name in names]), 0.99))
        for name in names:
            torch.testing.assert_close(cut[name], whole[name].clamp(-limit, limit), atol=1e-5, rtol=1e-5)


@pytest.mark.rows("R468")
def test_blocks_are_weighed(files, tmp_path):
    """As a list of 17 numbers for one file, and by name for the other."""
    numbers = [0.0, 0.25, *[1.0] * 15]  # text encoders, then the first blocks on the way down
    lbws = ["--lbws", json.dumps(numbers), "down_blocks.1=0.5,*=1"]
    merge(files[:2], [1.0, 2.0], tmp_path / "out.safetensors", "--new_rank", 5, *lbws)
    first, second = changes(files[0]), changes(files[1])
    weights = {"te_": (0.0, 2.0), "down_blocks_0": (0.25, 2.0), "down_blocks_1": (None, 1.0)}
    found = changes(tmp_path / "out.safetensors")
    for layer in SHAPES:
        own, other = next(value for name, value in weights.items() if name in layer)
        own = 1.0 if own is None else own  # block 1's resnet is IN04
        expected = own * first[layer] + other * second[layer]
        assert_same_changes({layer: found[layer]}, {layer: expected})


@pytest.mark.rows("R466")
def test_metadata(files, tmp_path):
    out = tmp_path / "out.safetensors"
    merge(files[:2], [1.0, 0.5], out, "--new_rank", 2, "--save_precision", "bf16")
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "2.0")
    made = json.loads(metadata["ss_merge_recipe"])
    assert (made["type"], [model["ratio"] for model in made["models"]]) == ("svd", [1.0, 0.5])
    content = out.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()


def test_what_has_no_product_is_refused(files, tmp_path):
    dora = write(tmp_path / "dora.safetensors", lora_tensors(dora=True))
    with pytest.raises(UserError, match=r"is DoRA in .*dora\.safetensors, which cannot be added up"):
        merge([files[0], dora], [1.0, 1.0], tmp_path / "out.safetensors")


def test_the_script(run_script, files, tmp_path):
    out = tmp_path / "out.safetensors"
    done = run_script(
        "networks/svd_merge_lora.py", "--models", *files[:2], "--ratios", "0.6", "0.4", f"--save_to={out}"
    )
    assert done.returncode == 0, done.stderr
    assert "4 layers of 2 files" in done.stderr
    assert len(load_file(out)) == 12
    done = run_script("networks/svd_merge_lora.py", "--models", *files, "--ratios", "1", f"--save_to={out}")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert "--ratios: 1 given for 3 --models" in done.stderr
    done = run_script("networks/svd_merge_lora.py")
    assert done.returncode == 2
    assert "--models is required" in done.stderr


MEASURED = """
import sys
from library.model_tools.svd_merging import svd_merge
from tests.builders.memory import most_memory
from tests.model_tools.tools import options

def merge(file, *others):
    svd_merge(options("svd_merge_lora", "--models", file, *others, *sys.argv[4:]))

first, second, small = sys.argv[1:4]
merge(small, "--ratios", 1)  # what its libraries take once
print(most_memory(lambda: merge(first, second, "--ratios", 1, 1)))
"""


@pytest.mark.rows("R465")
@needs_linux
def test_memory_is_that_of_the_files(run_script, tmp_path):
    """Only small matrices of one layer at a time are in float32: the products of all layers have 1.28 GB."""
    shapes = {f"lora_unet_blocks_{n}": (4000, 4000) for n in range(20)}
    size, paths = 0, []
    for seed in (1, 2):
        tensors = {name: t.half() for name, t in lora_tensors(seed, rank=100, shapes=shapes).items()}
        paths.append(write(tmp_path / f"{seed}.safetensors", tensors))
        size += Path(paths[-1]).stat().st_size
    small = write(tmp_path / "small.safetensors", lora_tensors())
    done = run_script("-c", MEASURED, *paths, small, "--new_rank=4", f"--save_to={tmp_path / 'out.safetensors'}")
    assert done.returncode == 0, done.stderr
    assert size > 60e6
    assert 0.5 * size < int(done.stdout) < 2 * size + 200e6
