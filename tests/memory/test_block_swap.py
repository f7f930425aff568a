"""Swapped blocks: the same numbers to the bit, in two places of the device, with true weights in CPU memory.

The device is played within CPU memory: places are NaN until somebody waits for their copy, which comes as late as it
may. A forgotten wait, or memory that is used again too early, is a NaN in the loss or in a gradient.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.errors import UserError
from library.families.flux.adapter import FluxFamily
from library.families.sd.adapter import SdFamily
from library.families.sd3.adapter import Sd3Family
from library.memory import block_swap
from library.memory.block_swap import NUM_BUFFERS, BlockSwap
from library.memory.compiling import compile_blocks
from library.memory.low_precision import quantise_to_fp8
from library.memory.offload import offloading_checkpoint
from library.options.optimizer import OptimizerOptions
from library.planning.watching import Watcher
from library.training import placement
from library.training.ema import EMA
from library.training.optimizers import make_optimizer
from library.training.precision import StochasticRounding
from library.training.stepping import step_in_backward
from library.types import LoraTarget, Models
from tests.builders.options import options_for
from tests.networks.builders import lora
from tests.networks.conftest import tiny_unet

CPU = torch.device("cpu")
TEXT = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(9))


def tiny_flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )


def tiny_sd3():
    """Its blocks are of three kinds: the first has a second attention, the last lacks half of the text's side."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def flux_blocks(flux) -> list[nn.Module]:
    return [*flux.transformer_blocks, *flux.single_transformer_blocks]


def sd3_blocks(sd3) -> list[nn.Module]:
    return list(sd3.transformer_blocks)


def unet_blocks(unet) -> list[nn.Module]:
    return SdFamily(None).denoiser.blocks(Models(unet, {}, {}, None, None))


def flux_step(flux, seed: int) -> torch.Tensor:
    device = flux.x_embedder.weight.device
    noisy = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(seed)).to(device)
    places = torch.zeros(12, 3, device=device)
    places[:, 2] = torch.arange(12)
    return flux(
        noisy,
        encoder_hidden_states=TEXT.to(device),
        pooled_projections=TEXT[:, 0, :8].to(device),
        timestep=torch.tensor([0.2, 0.8], device=device),
        img_ids=places,
        txt_ids=torch.zeros(5, 3, device=device),
    ).sample


def sd3_step(sd3, seed: int) -> torch.Tensor:
    device = sd3.proj_out.weight.device
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)
    text = TEXT.to(device)
    times = torch.tensor([10.0, 900.0], device=device)
    return sd3(noisy, encoder_hidden_states=text, pooled_projections=text[:, 0, :8], timestep=times).sample


def unet_step(unet, seed: int) -> torch.Tensor:
    device = unet.conv_in.weight.device
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)
    return unet(noisy, torch.tensor([10, 900], device=device), TEXT.to(device)).sample


KINDS = {
    "flux": (tiny_flux, flux_blocks, flux_step),
    "sd3": (tiny_sd3, sd3_blocks, sd3_step),
    "unet": (tiny_unet, unet_blocks, unet_step),
}


class Case:
    """A model of one kind, always the same, with or without a LoRA."""

    def __init__(self, kind: str, checkpointing: bool = False, with_lora: bool = True):
        make, self._blocks, self._step = KINDS[kind]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = make().requires_grad_(not with_lora).train()
        self.network = with_lora and self._add_lora()
        if checkpointing:
            self.model.enable_gradient_checkpointing()

    def _add_lora(self) -> lora.LoraNetwork:
        models = Models(self.model, {}, {}, None, None)
        inner = {path for path, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        targets = [LoraTarget("lora_" + path.replace(".", "_"), "denoiser", (path,)) for path in sorted(inner)]
        network = lora.create(targets[::2], models, dim=2, alpha=1.0, dropout=None, args={}, seed=0)
        for number, parameter in enumerate(network.parameters()):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
        network.attach(models)
        return network

    @property
    def blocks(self) -> list[nn.Module]:
        return self._blocks(self.model)

    def swap(self, count: int) -> BlockSwap:
        swap = BlockSwap(self.blocks, count, CPU, simulate=True)
        swap.attach()
        return swap

    def loss(self, seed: int) -> torch.Tensor:
        return self._step(self.model, seed).float().square().mean()

    def sample(self) -> torch.Tensor:
        with torch.no_grad():
            return self._step(self.model, 100)

    def train(self, steps: int = 2, sampling: bool = False) -> list[torch.Tensor]:
        """Losses, all gradients of every step, samples in between, and the trained weights."""
        trained = list((self.network or self.model).parameters())
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        seen = []
        for step in range(steps):
            loss = self.loss(step)
            loss.backward()
            seen += [loss.detach(), *(p.grad for p in trained if p.grad is not None)]
            optimizer.step()
            optimizer.zero_grad()
            if sampling:
                seen += [self.sample(), self.sample()]
        return [*seen, *(p.detach().clone() for p in trained)]


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    assert all(tensor.isfinite().all() for tensor in expected)
    different = [number for number, pair in enumerate(zip(got, expected, strict=True)) if not torch.equal(*pair)]
    assert not different


def most(case: Case) -> int:
    return len(case.blocks) - 2


@pytest.mark.rows("R402")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_a_network_gives_the_same_to_the_bit(kind, checkpointing):
    expected = Case(kind, checkpointing).train(sampling=True)
    for count in (2, most(Case(kind))):
        case = Case(kind, checkpointing)
        before = [p.clone() for p in case.model.parameters()]
        swap = case.swap(count)
        assert_same(case.train(sampling=True), expected)
        assert_same(list(case.model.parameters()), before)
        assert swap.bytes_written_back == 0


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_torch_that_does_not_expose_its_hooks(checkpointing, monkeypatch):
    expected = Case("flux", checkpointing).train()
    monkeypatch.setattr(block_swap, "_outer_hooks", block_swap._OuterHooksByAutograd)
    case = Case("flux", checkpointing)
    case.swap(most(case))
    assert_same(case.train(), expected)


def test_each_pass_copies_as_many_blocks_as_are_swapped():
    blocks = [nn.Linear(64, 64).requires_grad_(False) for _ in range(9)]
    size = 64 * 64 * 4 + 64 * 4
    for count in (1, 4, 7):
        swap = BlockSwap(blocks, count, CPU, simulate=True)
        swap.attach()
        assert swap.bytes_saved == count * size
        seen = []
        for _ in range(3):
            x = torch.randn(2, 64, requires_grad=True)
            for block in blocks:
                x = checkpoint(block.__call__, x, use_reentrant=False)
            seen.append(swap.bytes_moved)
            x.sum().backward()
            seen.append(swap.bytes_moved)
        for _ in range(2):
            with torch.no_grad():
                for block in blocks:
                    x = block(x)
            seen.append(swap.bytes_moved)
        swap.detach()
        moved = [later - earlier for earlier, later in itertools.pairwise(seen)]
        assert moved[:5] == [count * size] * 5
        # Samples go round and round, so each one needs all that take turns, but never more.
        assert max(moved[5:]) <= (count + NUM_BUFFERS) * size


@pytest.mark.rows("R404")
@pytest.mark.parametrize("kind", KINDS)
def test_no_more_than_the_buffers_is_on_the_device(kind, monkeypatch):
    """Two places, used again and again by blocks of every kind; the parameters stay the objects that they were."""
    case = Case(kind)
    parameters = [id(parameter) for parameter in case.model.parameters()]
    swap = case.swap(most(case))
    fetched, together = [], []
    real = BlockSwap._call

    def watching(self, block, run, *args, **kwargs):
        def inside(*args, **kwargs):
            places = [other for other in self._blocks if other.tensors[0].tensor.data_ptr() != other.host.data_ptr()]
            together.append(len(places))
            fetched.append(block.tensors[0].tensor.untyped_storage().data_ptr())
            return run(*args, **kwargs)

        return real(self, block, inside, *args, **kwargs)

    monkeypatch.setattr(BlockSwap, "_call", watching)
    swap.detach()
    swap.attach()
    case.train()
    assert [id(parameter) for parameter in case.model.parameters()] == parameters
    assert set(together) == {1}, "the others' weights are those in CPU memory"
    assert set(fetched) == {buffer.pointer for buffer in swap._buffers}
    assert len(swap._buffers) == NUM_BUFFERS
    assert sum(buffer.storage.nbytes for buffer in swap._buffers) == NUM_BUFFERS * max(
        block.size for block in swap._blocks
    )


@pytest.mark.rows("R405")
def test_what_is_outside_the_swapped_blocks_is_on_the_device_for_good():
    """Blocks of SD3 that differ from the others take turns like them."""
    case, device = Case("sd3", with_lora=False), torch.device("meta")  # what every build has besides the CPU
    swap = BlockSwap(case.blocks, most(case), device, simulate=True)
    swap.attach()
    case.model.to(device)
    swapped = {f"transformer_blocks.{number}" for number in range(5)}
    assert len(swap._blocks) == len(swapped) == 5
    for name, parameter in case.model.named_parameters():
        inside = ".".join(name.split(".")[:2]) in swapped
        assert parameter.device.type == ("cpu" if inside else "meta"), name
    fewer = BlockSwap(case.blocks[1:], 1, CPU, simulate=True)
    assert len(fewer._resident) == 1
    assert {id(module) for module in fewer._resident}.isdisjoint(id(block.module) for block in fewer._blocks)


def published(kind: str, **config: object) -> nn.Module:
    """A model of published sizes that takes no memory."""
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, kind)(**config)


SD35 = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm"}
LARGE = SD35 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
MEDIUM = SD35 | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
MEDIUM["dual_attention_layers"] = tuple(range(13))


@pytest.mark.rows("R432")
@pytest.mark.parametrize(("config", "largest"), [(LARGE, 36), (MEDIUM, 22)], ids=["3.5 large", "3.5 medium"])
def test_how_many_blocks_of_the_published_models_can_be_swapped(config, largest):
    models = Models(published("SD3Transformer2DModel", **config), {}, {}, None, None)
    blocks = Sd3Family(None).denoiser.blocks(models)
    assert Sd3Family.traits.blocks_per_swap == 1
    assert len(BlockSwap(blocks, largest, CPU)._blocks) == len(blocks) == largest + NUM_BUFFERS
    with pytest.raises(UserError, match=f"give a number from 0 to {largest}$"):
        BlockSwap(blocks, largest + 1, CPU)


@pytest.mark.rows("R363", "R398")
def test_a_number_that_is_too_large_is_refused_in_the_users_units():
    """Of FLUX.1's 19 double and 38 single blocks, two small ones count as one."""
    models = Models(published("FluxTransformer2DModel", guidance_embeds=True), {}, {}, None, None)
    asked = options_for("flux", "network", blocks_to_swap=37)
    with pytest.raises(UserError, match=r"--blocks_to_swap: 37 are more than this model can swap; at most 36$"):
        placement.swap_blocks(FluxFamily(None), models, asked, torch.device("cuda"))


@pytest.mark.rows("R403")
@pytest.mark.parametrize("count", [8, 16, 28, 35])
def test_what_each_swapped_block_of_flux_saves(count):
    """Counted from the weights. The two buffers are subtracted, so few blocks save a little less each."""
    model = published("FluxTransformer2DModel", guidance_embeds=True, pooled_projection_dim=768)
    blocks = FluxFamily(None).denoiser.blocks(Models(model, {}, {}, None, None))
    swap = BlockSwap(blocks, math.ceil(count * FluxFamily.traits.blocks_per_swap), CPU)
    in_bf16 = swap.bytes_saved / 2
    assert in_bf16 / count == pytest.approx(640e6, rel=0.15)


@pytest.mark.parametrize(
    ("forgotten", "checkpointing"),
    [("wait", False), ("wait", True), ("place", False), ("place", True), ("autograd", False)],
)
def test_a_mistake_would_show(forgotten, checkpointing, monkeypatch):
    """What the tests above rest on: each of these makes numbers wrong, or stops the run."""
    case = Case("flux", checkpointing)
    expected = Case("flux", checkpointing).train()
    case.swap(most(case))
    if forgotten == "wait":
        monkeypatch.setattr("library.memory.copying._DelayedCopyEvent.before_use", lambda self: None)
    elif forgotten == "autograd":  # which then saves the memory of the buffer
        monkeypatch.setattr(BlockSwap, "_reference", lambda self, tensor: None)
    else:
        monkeypatch.setattr(BlockSwap, "_buffer_of", lambda self, block: self._buffers[0])
    try:
        got = case.train()
    except RuntimeError:
        return
    assert not all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_what_the_model_says_of_itself_stays_whole():
    case = Case("unet")
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    swap = case.swap(most(case))
    case.model.to(CPU)
    for seed in range(2):
        loss = case.loss(seed)
        assert_same(list(case.model.state_dict().values()), list(before.values()))
        loss.backward()
    assert case.model.state_dict().keys() == before.keys()
    assert_same(list(case.model.state_dict().values()), list(before.values()))
    with pytest.raises(RuntimeError, match="cast the model before"):
        swap._blocks[0].module.to(torch.bfloat16)

    # Other weights, in place: the next pass has them.
    other = Case("unet")
    changed = {name: tensor + 0.01 for name, tensor in before.items()}
    other.model.load_state_dict(changed)
    case.model.load_state_dict(changed)
    assert torch.equal(case.sample(), other.sample())

    loss = case.loss(0)
    for block in swap._blocks:
        block.module.load_state_dict({name: 2 * tensor for name, tensor in block.module.state_dict().items()})
    with pytest.raises(RuntimeError, match="changed between"):
        loss.backward()
    case.model.load_state_dict(before)
    swap.detach()
    assert torch.equal(case.sample(), Case("unet").sample())


def test_detached_blocks_are_what_they_were():
    case, plain = Case("flux"), Case("flux")
    before = [set(vars(module)) for module in case.model.modules()]
    swap = case.swap(4)
    case.train(1)
    swap.detach()
    moved = swap.bytes_moved
    assert [set(vars(module)) for module in case.model.modules()] == before
    plain.train(1)
    assert_same(case.train(1), plain.train(1))
    assert swap.bytes_moved == moved
    assert len({p.untyped_storage().data_ptr() for p in case.model.parameters()}) == len(list(case.model.parameters()))
    swap.attach()
    assert_same(case.train(1), plain.train(1))
    assert swap.bytes_moved > moved


def test_nothing_to_swap_and_too_much():
    case = Case("flux")
    swap = case.swap(0)
    case.train(1)
    assert (swap.bytes_moved, swap.bytes_saved, swap._buffers) == (0, 0, [])
    swap.detach()
    for count in (7, 8, -1):
        with pytest.raises(UserError, match=r"--blocks_to_swap: -?\d of 8 blocks; give a number from 0 to 6"):
            BlockSwap(case.blocks, count, CPU)
    with pytest.raises(UserError, match="from 0 to 0"):
        BlockSwap(case.blocks[:2], 1, CPU)


def test_weights_in_8_bits_and_in_several_formats():
    def case():
        made = Case("flux", checkpointing=False)
        made.model.to(torch.bfloat16)
        made.model.x_embedder.float(), made.model.context_embedder.float()
        quantise_to_fp8(made.model.transformer_blocks)
        quantise_to_fp8(made.model.single_transformer_blocks)
        return made

    def trained(made):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = [made.loss(seed) for seed in range(2)]
        sum(losses).backward()
        return [*(loss.detach() for loss in losses), *(p.grad for p in made.network.parameters() if p.grad is not None)]

    expected = trained(case())
    swapped = case()
    swap = swapped.swap(most(swapped))
    assert {piece.tensor.dtype for block in swap._blocks for piece in block.tensors} >= {torch.uint8, torch.bfloat16}
    assert_same(trained(swapped), expected)


def test_channels_last_and_weights_of_several_blocks():
    """Convolutions keep their order in memory. What two blocks share stays on the device."""
    shared = nn.Linear(6, 6)

    class Block(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.shared, self.conv, self.bias = shared, nn.Conv2d(6, 6, 3, padding=1), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x + self.shared(self.conv(x).movedim(1, -1)).movedim(-1, 1).tanh() + self.bias

    def run(blocks):
        x = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        given = x
        for block in blocks:
            x = block(x)
        x.square().sum().backward()
        return [x.detach(), given.grad]

    with torch.random.fork_rng():
        blocks = [Block(seed).requires_grad_(False).to(memory_format=torch.channels_last) for seed in range(5)]
    expected = run(blocks)
    swap = BlockSwap(blocks, 3, CPU, simulate=True)
    swap.attach()
    assert_same(run(blocks), expected)
    assert all(block.conv.weight.is_contiguous(memory_format=torch.channels_last) for block in blocks)
    assert all(piece.tensor is not shared.weight for block in swap._blocks for piece in block.tensors)


@pytest.mark.parametrize("order", ["as told", "reversed", "some left out"])
def test_any_order_of_calls_is_right(order):
    """The order only says what to fetch early."""

    def run(blocks):
        turns = {"as told": range(6), "reversed": range(5, -1, -1), "some left out": (0, 4, 1, 5, 4)}[order]
        x = given = torch.ones(2, 8, requires_grad=True)
        for turn in turns:
            x = blocks[turn](x).tanh()
        x.sum().backward()
        return [x.detach(), given.grad]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [nn.Linear(8, 8).requires_grad_(False) for _ in range(6)]
    expected = run(blocks)
    BlockSwap(blocks, 4, CPU, simulate=True).attach()
    for _ in range(3):
        assert_same(run(blocks), expected)


@pytest.mark.rows("R364", "R433")
@pytest.mark.parametrize("kind", KINDS)
def test_with_activations_kept_in_cpu_memory_too(kind):
    expected = Case(kind, checkpointing=True).train()
    case = Case(kind)
    case.model.enable_gradient_checkpointing(offloading_checkpoint(CPU, smallest=0))
    case.swap(most(case))
    assert_same(case.train(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks(checkpointing):
    torch._dynamo.reset()
    plain = Case("flux", checkpointing)
    compile_blocks(plain.blocks, "aot_eager", CPU)
    expected = plain.train(2)
    case = Case("flux", checkpointing)
    compile_blocks(case.blocks, "aot_eager", CPU)
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    swap = case.swap(most(case))
    assert_same(case.train(2), expected)
    assert swap.bytes_moved > 0
    graphs = counters["stats"]["unique_graphs"] - before
    case.train(2)
    assert counters["stats"]["unique_graphs"] - before == graphs, "another buffer causes no new compilation"
    torch._dynamo.reset()


# --- trained weights --------------------------------------------------------------------------------------------------


def fine_tuned(case: Case, name: str, *, swapped: int = 0, dtype=torch.float32, rounding=False, average=False):
    """Trains all weights inside the backward pass; what comes out after every step."""
    case.model.to(dtype)
    swap = case.swap(swapped)
    optimizer = optimizer_of(case, name)
    swap.manage_optimizer(optimizer)
    rounds = StochasticRounding(optimizer, 1) if rounding else None
    step_in_backward(optimizer)
    mean = EMA(list(case.model.parameters()), 0.9) if average else None
    seen = []
    for step in range(3):
        if rounds is not None:
            rounds.step = step
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounding):
            loss = case.loss(step)
        loss.backward()
        seen += [loss.detach(), *(tensor.clone() for tensor in case.model.state_dict().values())]
        if mean is not None:
            mean.update(step + 1)
            with mean.in_place():
                seen.append(case.sample())
        elif not rounding:
            seen.append(case.sample())
    return seen, swap, optimizer


def optimizer_of(case: Case, name: str) -> torch.optim.Optimizer:
    options = OptimizerOptions(
        optimizer_type=name, learning_rate=1e-2, optimizer_args=["relative_step=False"][: name == "AdaFactor"]
    )
    return make_optimizer([{"params": list(case.model.parameters()), "lr": 1e-2, "name": "a"}], options)


@pytest.mark.rows("R402")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(("kind", "name"), [("flux", "AdaFactor"), ("unet", "AdamW")])
def test_training_the_weights_themselves_gives_the_same_to_the_bit(kind, name, checkpointing):
    expected, _, _ = fine_tuned(Case(kind, checkpointing, with_lora=False), name)
    for count in (1, most(Case(kind))):
        got, swap, _ = fine_tuned(Case(kind, checkpointing, with_lora=False), name, swapped=count)
        assert_same(got, expected)
        assert swap.bytes_written_back == 3 * sum(p.tensor.nbytes for block in swap._blocks for p in block.tensors)


def test_trained_in_bf16_with_stochastic_rounding():
    expected, _, _ = fine_tuned(Case("flux", True, False), "AdaFactor", dtype=torch.bfloat16, rounding=True)
    got, _, _ = fine_tuned(Case("flux", True, False), "AdaFactor", swapped=6, dtype=torch.bfloat16, rounding=True)
    assert_same(got, expected)


def test_an_average_of_the_weights_is_sampled():
    expected, _, _ = fine_tuned(Case("unet", with_lora=False), "AdamW", average=True)
    got, _, _ = fine_tuned(Case("unet", with_lora=False), "AdamW", swapped=4, average=True)
    assert_same(got, expected)


def test_weights_stepped_after_the_backward_pass_are_refused():
    case = Case("flux", with_lora=False)
    case.swap(4)
    with pytest.raises(UserError, match="--fused_backward_pass"):
        case.loss(0).backward()


def test_some_weights_of_a_block_are_trained():
    def trained(swapped):
        case = Case("flux", with_lora=False)
        for name, parameter in case.model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        case.swap(swapped)
        optimizer = torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], lr=0.1)
        step_in_backward(optimizer)
        for seed in range(2):
            case.loss(seed).backward()
        return [p.detach() for p in case.model.parameters()]

    assert_same(trained(6), trained(0))


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_a_loaded_state_goes_to_the_device(name):
    """The played device is CPU memory, so the optimizer's numbers are followed to another one.

    AdamW is made with torch's fused kernel, which reads the count on the device; Adam counts in CPU memory.
    """
    case = Case("flux", with_lora=False)
    _, swap, optimizer = fine_tuned(case, name, swapped=4)
    state = copy.deepcopy(optimizer.state_dict())
    swap.device = torch.device("meta")
    optimizer.load_state_dict(state)
    swapped = {id(piece.tensor) for block in swap._blocks for piece in block.tensors}
    for weight, numbers in optimizer.state.items():
        assert numbers["exp_avg"].device.type == ("meta" if id(weight) in swapped else "cpu")
        assert numbers["step"].device.type == ("meta" if id(weight) in swapped and name == "AdamW" else "cpu")


# --- a real device ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind, checkpointing):
    device = torch.device("cuda")

    def trained(count):
        case = Case(kind, checkpointing)
        swap = BlockSwap(case.blocks, count, device)
        swap.attach()
        case.model.to(device)
        case.network.to(device)
        seen = case.train(sampling=True)
        torch.cuda.synchronize()
        if count:
            assert all(block.host.is_pinned() for block in swap._blocks)
            assert all(piece.tensor.device.type == "cpu" for block in swap._blocks for piece in block.tensors)
            assert swap.bytes_moved > 0
        swap.detach()
        return seen

    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert_same(trained(most(Case(kind))), trained(0))
    finally:
        torch.use_deterministic_algorithms(deterministic)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_the_weights_themselves_on_a_gpu(checkpointing):
    device = torch.device("cuda")

    def trained(count):
        case = Case("flux", checkpointing, with_lora=False)
        swap = BlockSwap(case.blocks, count, device)
        swap.attach()
        case.model.to(device)
        optimizer = optimizer_of(case, "AdamW")
        swap.manage_optimizer(optimizer)
        step_in_backward(optimizer)
        losses = []
        for step in range(3):
            losses.append(case.loss(step))
            losses[-1].backward()
        seen = [*(loss.detach().cpu() for loss in losses), *(p.detach().cpu() for p in case.model.parameters())]
        swap.detach()
        return seen

    assert_same(trained(6), trained(0))


def test_a_step_leaves_nothing_for_the_collector_of_python():
    """A circle of references would keep what checkpointing has saved: the inputs of all blocks, step after step."""
    blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(5)).requires_grad_(False)
    swap = BlockSwap(list(blocks), 2, CPU, simulate=True)
    swap.attach()
    watcher, left = Watcher(), []
    gc.collect()
    gc.disable()
    try:
        with watcher:
            for _ in range(3):
                x = output = torch.ones(32, 64, requires_grad=True)
                for block in blocks:
                    output = checkpoint(block, output, use_reentrant=False)
                output.sum().backward()
                del x, output
                left.append(watcher.in_use("cpu"))
    finally:
        gc.enable()
    assert left[0] == left[1] == left[2]
