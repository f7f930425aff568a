"""Merging, extracting and resizing networks against plain implementations: everything loaded, decomposed whole.

    python benchmarks/bench_tools.py
    python benchmarks/bench_tools.py --only merge --single 6

extract: LoRA of rank 32 of SDXL's U-Net. Each distinct size of layer is decomposed once in both ways; the CPU times of
all layers follow from how many have that size. The differences have singular values that fall, and some noise.

resize: the same layers' LoRA of rank 128 to rank 32, with random values. Plain decomposes each product.

merge: LoRA of rank 16 into FLUX.1 at its real width, with --double and --single of its 19 and 38 blocks. Each way runs
in a process of its own: its time, and the height of its memory beyond what it has at the start (Linux).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.runtime import logs

logs.quiet_third_parties()  # before they are imported, which is when they speak

import torch
from architectures import FLUX_DEV, SDXL, build_denoiser
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.checkpoints.writing import Deferred, write_safetensors
from library.families.flux.keymap import flux_map
from library.families.registry import TOOLS
from library.families.sdxl.targets import unet_targets
from library.model_tools import network_into_model
from library.model_tools.low_rank import svd_of_product, truncated_svd
from library.model_tools.model_layers import open_model_file
from library.model_tools.network_from_models import lora_entry
from tests.builders.memory import most_memory
from tests.builders.options import options_with

# A toy of FLUX.1 whose heads its rotary axes can share.
TINY_FLUX = {"attention_head_dim": 32, "num_attention_heads": 4, "joint_attention_dim": 64, "pooled_projection_dim": 64}
TINY_FLUX |= {"axes_dims_rope": (4, 14, 14)}
RANK, MERGED_RANK, RESIZED_RANK = 32, 16, 128
CLAMP = 0.99
DOUBLE, SINGLE = 19, 38  # blocks of FLUX.1
ROWS = ("extract", "resize", "merge")


# ---- extracting


def layer_sizes(*, tiny: bool) -> Counter[tuple[int, ...]]:
    """The sizes of the layers of SDXL's U-Net that LoRA adapts, and how many have each."""
    unet = build_denoiser(SDXL, SDXL.config | (SDXL.tiny if tiny else {}), torch.device("meta"))
    targets = [target for target in unet_targets(unet) if not (target.conv_only or target.optional)]
    return Counter(tuple(unet.get_submodule(target.modules[0]).weight.shape) for target in targets)


def difference(shape: tuple[int, ...], seed: int) -> Tensor:
    """Singular values that fall about as 1 / sqrt(n), and noise."""
    rng = torch.Generator().manual_seed(seed)
    inner = min(*shape[:2], 256)
    falling = torch.arange(1, inner + 1).float() ** -0.5
    left, right = torch.randn(shape[0], inner, generator=rng), torch.randn(inner, shape[1], generator=rng)
    return 1e-3 * (left * falling @ right + torch.randn(shape[:2], generator=rng)).reshape(shape)


def our_extraction(change: Tensor) -> dict[str, Tensor]:
    return lora_entry(change, min(RANK, *change.shape[:2]), truncated_svd, clamp=CLAMP)[0]


def plain_extraction(change: Tensor) -> dict[str, Tensor]:
    """The whole decomposition, of which the first columns are taken."""
    matrix, rank = change.flatten(1), min(RANK, *change.shape[:2])
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    up, down = u[:, :rank] @ torch.diag(s[:rank]), vh[:rank]
    values = torch.cat([up.flatten(), down.flatten()]).sort().values
    limit = float(values[int(CLAMP * (len(values) - 1))])
    return {"lora_up.weight": up.clamp(-limit, limit), "lora_down.weight": down.clamp(-limit, limit)}


def extract(options: argparse.Namespace) -> None:
    sizes = layer_sizes(tiny=options.tiny)
    ours, plain, worst = 0.0, 0.0, 0.0
    for work in (our_extraction, plain_extraction):
        work(difference((64, 64), 0))  # what the first call takes, by itself
    for seed, (shape, count) in enumerate(sorted(sizes.items())):
        change = difference(shape, seed)
        own, theirs = (timed(partial(work, change)) for work in (our_extraction, plain_extraction))
        ours, plain = ours + count * own[0], plain + count * theirs[0]
        left = [float((change.flatten(1) - product(entry)).square().sum()) for _, entry in (own, theirs)]
        worst = max(worst, left[0] / left[1] - 1)
    print(f"extract: {sizes.total()} layers of {len(sizes)} sizes, rank {RANK}")
    print(f"  ours {ours:.1f} s of CPU, plain {plain:.1f} s: {plain / ours:.1f} times as fast")
    print(f"  of the change, ours leaves at most {worst:.3%} more than plain")


def product(entry: dict[str, Tensor]) -> Tensor:
    return entry["lora_up.weight"].flatten(1) @ entry["lora_down.weight"].flatten(1)


def timed(work: Callable[[], dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


# ---- resizing


def our_resizing(up: Tensor, down: Tensor) -> dict[str, Tensor]:
    up, down = svd_of_product(up, down).factors(RANK)
    return {"lora_up.weight": up, "lora_down.weight": down}


def plain_resizing(up: Tensor, down: Tensor) -> dict[str, Tensor]:
    u, s, vh = torch.linalg.svd(up @ down, full_matrices=False)
    return {"lora_up.weight": u[:, :RANK] * s[:RANK], "lora_down.weight": vh[:RANK]}


def resize(options: argparse.Namespace) -> None:
    sizes = layer_sizes(tiny=options.tiny)
    ours, plain, worst, rng = 0.0, 0.0, 0.0, torch.Generator().manual_seed(0)
    for shape, count in sorted(sizes.items()):
        up, down = (torch.randn(size, generator=rng) for size in ((shape[0], RESIZED_RANK), (RESIZED_RANK, shape[1])))
        our_resizing(up, down)  # the first call of a size takes its memory; whole decompositions take too long for two
        own, theirs = (timed(partial(work, up, down)) for work in (our_resizing, plain_resizing))
        ours, plain = ours + count * own[0], plain + count * theirs[0]
        expected = product(theirs[1])
        worst = max(worst, float((product(own[1]) - expected).abs().max() / expected.abs().max()))
    print(f"resize: {sizes.total()} layers of {len(sizes)} sizes, rank {RESIZED_RANK} to {RANK}")
    print(f"  ours {ours:.1f} s of CPU, plain {plain:.1f} s: {plain / max(ours, 1e-9):.1f} times as fast")
    print(f"  results differ by at most {worst:.0e} of the largest value")


# ---- merging


def write_model(folder: Path, options: argparse.Namespace) -> dict[str, int]:
    """A model in bfloat16 and a network for all layers of its blocks. Returns: the files' sizes in bytes."""
    config = FLUX_DEV.config | {"num_layers": options.double, "num_single_layers": options.single}
    config |= TINY_FLUX if options.tiny else {}
    live = build_denoiser(FLUX_DEV, config, torch.device("meta")).state_dict()
    tensors = {name: tuple(tensor.shape) for name, tensor in flux_map().to_file(live).items()}
    rng = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        return (0.02 * torch.randn(shape, generator=rng)).bfloat16()

    model = {name: Deferred(torch.bfloat16, shape, partial(drawn, shape)) for name, shape in tensors.items()}
    write_safetensors(folder / "model.safetensors", model)
    file, network = open_model_file(folder / "model.safetensors", ("flux",)), {}
    for target in (target for target in file.targets if not target.optional):
        out, inside = file.shape(target)
        network[f"{target.key}.lora_down.weight"] = drawn((MERGED_RANK, inside))
        network[f"{target.key}.lora_up.weight"] = drawn((out, MERGED_RANK))
    save_file(network, folder / "network.safetensors")
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def our_merge(folder: Path) -> None:
    names = {"flux_model": "model", "save_to": "ours"}
    values = {option: str(folder / f"{name}.safetensors") for option, name in names.items()}
    network = str(folder / "network.safetensors")
    network_into_model.merge(options_with(TOOLS["flux_merge_lora"], **values, models=[network], no_metadata=True))


def plain_merge(folder: Path) -> None:
    """Everything in float32 in memory at once, then everything in bfloat16."""
    state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    network = load_file(folder / "network.safetensors")
    names = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": name for name in state}
    for key in (key.removesuffix(".lora_up.weight") for key in network if key.endswith(".lora_up.weight")):
        up, down = (network[f"{key}.lora_{side}.weight"].float() for side in ("up", "down"))
        state[names[key]] = state[names[key]] + up @ down
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, folder / "plain.safetensors")


def measured(way: str, folder: Path) -> dict[str, float]:
    """The seconds that merging takes in this process, and the height of its memory in bytes."""
    work = {"ours": our_merge, "plain": plain_merge}[way]
    start = time.perf_counter()
    height = most_memory(partial(work, folder))
    return {"seconds": time.perf_counter() - start, "bytes": height}


def measured_apart(way: str, folder: Path) -> dict[str, float]:
    """`measured` in a process of its own."""
    command = [sys.executable, __file__, "--child", way, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def merge(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        sizes = write_model(Path(name), options)
        seen: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
        for _ in range(options.rounds):
            for way, results in seen.items():
                results.append((measured if options.tiny else measured_apart)(way, Path(name)))
        ours, plain = (load_file(Path(name) / f"{way}.safetensors") for way in ("ours", "plain"))
        assert all(torch.equal(tensor, plain[key]) for key, tensor in ours.items())
    size = sizes["model.safetensors"]
    print(f"merge: {options.double} + {options.single} blocks of {DOUBLE} + {SINGLE}, {size / 1e9:.2f} GB in bfloat16")
    for way, results in seen.items():
        seconds, height = (statistics.median(result[key] for result in results) for key in ("seconds", "bytes"))
        print(f"  {way}: {seconds:.1f} s, {height / 1e6:.0f} MB of memory")
    ratios = [one["seconds"] / other["seconds"] for one, other in zip(seen["plain"], seen["ours"], strict=True)]
    heights = [one["bytes"] / other["bytes"] for one, other in zip(seen["plain"], seen["ours"], strict=True)]
    print(f"  plain / ours: time {statistics.median(ratios):.2f}, memory {statistics.median(heights):.1f}; equal files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--double", type=int, default=1, help="blocks with two streams to merge into")
    parser.add_argument("--single", type=int, default=3, help="blocks with one stream to merge into")
    parser.add_argument("--rounds", type=int, default=3, help="times that each way of merging runs")
    parser.add_argument("--folder", help="where to write the models; the system's place for temporary files by default")
    parser.add_argument("--tiny", action="store_true", help="toys of the same kind, to see that it works")
    parser.add_argument("--child", choices=("ours", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.child, Path(options.folder))))
        return
    for row in options.only:
        {"extract": extract, "resize": resize, "merge": merge}[row](options)


if __name__ == "__main__":
    main()
