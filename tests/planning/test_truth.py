"""A plan's memory against that of the real run: the same watcher over real tensors, on the CPU.

The played device is the CPU here, so that each operation has its real counterpart in the other run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
from accelerate.state import AcceleratorState

from library import checking, registry, session
from library.memory import block_swap
from library.options import parsing
from library.options.devices import GIB, Device, device_of_memory
from library.planning import search
from library.planning.simulation import Request, built, quietly, simulate, steps
from library.planning.watching import Watcher
from library.runtime.processes import Processes
from library.training import distributed, placement
from tests.builders import write_tiny_sd1
from tests.builders.flux import WIDTH, write_flux, write_parts
from tests.builders.sd3 import write_tiny_sd3
from tests.scripts.starting import as_words

CPU = Device("CPU", "cpu", 16 * GIB, 1e10, 1e11, 1e10, "nothing")
ADAFACTOR = {
    "optimizer_type": "AdaFactor",
    "optimizer_args": ["relative_step=False", "scale_parameter=False", "warmup_init=False"],
}
FUSED = {**ADAFACTOR, "fused_backward_pass": True, "max_grad_norm": 0}
ENCODERS = ("te1", "te2", "te3")


@dataclass(frozen=True)
class Case:
    family: str
    method: str
    options: dict[str, object]


LORA = {"network_module": "networks.lora", "network_dim": 4, "learning_rate": 1e-3}
CASES = {
    "sd lora, checkpointing, accumulation, EMA": Case(
        "sd", "network", {**LORA, "gradient_checkpointing": True, "gradient_accumulation_steps": 2, "ema": True}
    ),
    "sd full, EMA": Case("sd", "dreambooth", {"learning_rate": 1e-5, "ema": True, "gradient_checkpointing": True}),
    "sd, concepts from prompts": Case(
        "sd", "leco", {**LORA, "prompts_file": "examples/leco/no_red.toml", "max_denoising_steps": 4,
                       "train_data_dir": None, "resolution": None, "train_batch_size": None, "cache_latents": None},
    ),
    "sd3 lora, 8 bit": Case("sd3", "network", {**LORA, "network_train_unet_only": True, "fp8_base": True,
                                               "mixed_precision": "bf16", "cache_text_encoder_outputs": True}),
    "flux lora, swap, checkpointing": Case(
        "flux", "network", {**LORA, "network_train_unet_only": True, "blocks_to_swap": 1,
                            "gradient_checkpointing": True, "cache_text_encoder_outputs": True},
    ),
    "flux full, swap, fused": Case(
        "flux", "finetune", {"learning_rate": 1e-5, "blocks_to_swap": 1, **FUSED, "cache_text_encoder_outputs": True}
    ),
}  # fmt: skip

RARE = ("sd full, EMA", "sd3 lora, 8 bit")  # what they have is in other cases too
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, dict[str, object]]:
    """By family, the options that name a tiny model."""
    folder = tmp_path_factory.mktemp("models")
    named = "pretrained_model_name_or_path"
    return {
        "sd": {named: write_tiny_sd1(folder / "sd.safetensors")},
        "sd3": {
            named: write_tiny_sd3(folder / "sd3.safetensors", "5-medium", encoders=ENCODERS),
            "tokenizer_cache_dir": folder / "parts",
        },
        "flux": {named: write_flux(folder / "flux"), **write_parts(folder / "parts")},
    }


@pytest.fixture
def swaps_in_cpu_memory(monkeypatch):
    """A device within CPU memory: blocks are swapped as on a GPU."""
    monkeypatch.setattr(placement, "swaps", lambda opts, device: opts.swap.count > 0)
    monkeypatch.setattr(block_swap, "BlockSwap", partial(block_swap.BlockSwap, simulate=True))


def request_of(case: Case, files: dict[str, object], folder) -> Request:
    family, method = registry.FAMILIES[case.family], registry.METHODS[case.method]
    values = {
        "train_data_dir": "examples/concept",
        "output_dir": folder,
        "resolution": 64,
        "train_batch_size": 2,
        "max_train_steps": 4,
        "max_data_loader_n_workers": 0,
        "cache_latents": True,
        "seed": 1,
        **case.options,
        **files,
    }
    opts = parsing.parse_options(registry.groups_for(case.family, case.method), as_words(values))
    opts = quietly(method.complete_options(family.complete_options(opts)))
    specs = checking.check(opts, family, method)
    data, length = session.open_data(opts, specs, family.traits, Processes(), method.data)
    return Request(opts, family, method, data, length, CPU, specs)


def watched(request: Request) -> Watcher:
    """The real run, seen by the watcher of a plan."""
    opts = request.opts
    AcceleratorState._reset_state(reset_partial_state=True)  # runs before this one had their own precision
    accelerator = distributed.join_processes(opts.memory.mixed_precision, None)
    real = session.Session(
        opts, request.family.adapter(opts), request.method.method(opts), request.data, request.run_plan, accelerator
    )
    real.check(takes_control=False)
    watcher = Watcher()
    with watcher:
        run = built(real, watcher, watcher.phase, request.method)
        steps(run, next(iter(request.data.loader(1))), watcher, watcher.phase)
        if real.swap is not None:
            real.swap.detach()
    return watcher


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name in RARE else ()) for name in CASES])
@pytest.mark.usefixtures("swaps_in_cpu_memory")
def test_a_planned_peak_is_that_of_the_real_run(name, files, tmp_path):
    """By the same watcher within 2 %, and the caches in CPU memory, which a plan adds up without making them."""
    case = CASES[name]
    request = request_of(case, files[case.family], tmp_path)
    simulated = simulate(request, whole=False)
    caches = sum(simulated.caches_in_memory.values())
    planned = {phase.name: phase.peaks["cpu"] for phase in simulated.phases}
    real = {phase.name: phase.peaks["cpu"] for phase in watched(request).phases}
    for phase in ("placing the denoiser", "first step", "second step"):
        assert planned[phase].size + caches == pytest.approx(real[phase].size, rel=0.02), (phase, planned, real)


def test_swapped_blocks_of_an_8_bit_base_are_planned_for_a_gpu(files, tmp_path):
    """A step needs less GPU memory then."""
    options = {**CASES["flux lora, swap, checkpointing"].options, "fp8_base": True, "mixed_precision": "bf16"}
    peaks = []
    for swapped in (0, 1):
        case = Case("flux", "network", {**options, "blocks_to_swap": swapped})
        request = replace(request_of(case, files["flux"], tmp_path), device=device_of_memory(GIB))
        phases = {phase.name: phase for phase in simulate(request, whole=False).phases}
        peaks.append(phases["second step"].peaks["gpu"].size)
    assert 0 < peaks[1] < peaks[0]


def test_evicted_modulation_is_planned_for_a_gpu(files, tmp_path):
    """The GPU has all of these weights less, but the outputs of three batches more."""
    options = {**LORA, "network_train_unet_only": True, "cache_text_encoder_outputs": True, "mixed_precision": "bf16"}
    found, seconds = [], []
    for count in (0, 3, 6):
        case = Case("flux", "network", {**options, "evict_modulation": count})
        request = replace(request_of(case, files["flux"], tmp_path), device=device_of_memory(GIB))
        simulated = simulate(request, whole=False)
        seconds.append(simulated.modulation_seconds)
        if count == 6:
            break
        phases = {phase.name: phase for phase in simulated.phases}
        weights = "weights of the denoiser"
        found.append([phases["second step"].peaks[kind].kinds[weights] for kind in ("gpu", "cpu")])
        found[-1].append(phases["second step"].peaks["gpu"].size)
    (plain, _, most), (rest, away, evicted) = found
    rows = 2 * 2 * 6 * WIDTH + 2 * 3 * WIDTH + 2 * WIDTH  # of two blocks of each kind, and behind them
    weights, outputs = 2 * rows * (WIDTH + 1), 2 * rows * 2  # in bf16; those of a batch of two
    assert plain - rest == away == pytest.approx(weights, rel=0.01)  # memory comes in pieces of 512 bytes
    assert weights - 3 * outputs <= most - evicted <= weights * 1.01
    copying = weights / request.device.bus  # once in so many batches, each a step; besides there are small products
    assert seconds[0] == 0
    assert all(copying / count <= share for count, share in zip((3, 6), seconds[1:], strict=True))
    assert seconds[2] <= seconds[1]  # of a tiny model, launches take longer than copies


def test_evicted_modulation_is_tried_for_networks_alone(files, tmp_path):
    """With the caches that it needs."""
    evicting = {"cache_latents": True, "cache_text_encoder_outputs": True, "evict_modulation": 32}
    assert evicting in search.AGAINST_WEIGHTS
    for method, options, expected in (
        ("network", {**LORA, "network_train_unet_only": True}, True),
        ("network", {**LORA, "network_train_unet_only": True, "blocks_to_swap": 1}, False),
        ("finetune", {"learning_rate": 1e-5}, False),
    ):
        opts = request_of(Case("flux", method, options), files["flux"], tmp_path).opts
        assert search.usable(opts, evicting, registry.FAMILIES["flux"].traits) is expected
