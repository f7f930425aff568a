"""What holds for every type of network on every family: merged = attached, at 0 bare, continued = uninterrupted."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.families.flux.targets import transformer_targets
from library.families.sd.targets import unet_targets as sd_targets
from library.families.sd3.targets import mmdit_targets
from library.families.sdxl.targets import unet_targets as sdxl_targets
from library.methods.network import network_builder
from library.types import Models
from networks.build import merge
from tests.networks import dits
from tests.networks.conftest import unet_output


def unet(**options):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    )


def sdxl_unet():
    added = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 56}
    return unet(use_linear_projection=True, addition_embed_type="text_time", **added)


def sdxl_output(unet):
    rng = torch.Generator().manual_seed(5)
    noisy, text = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 7, 16, generator=rng)
    added = {"text_embeds": torch.randn(2, 8, generator=rng), "time_ids": torch.full((2, 6), 64.0)}
    return unet(noisy, torch.tensor([3, 700]), text, added_cond_kwargs=added).sample


@dataclass(frozen=True)
class Family:
    build: Callable[[], nn.Module]
    targets: Callable
    output: Callable[[nn.Module], Tensor]


FAMILIES = {
    "sd": Family(unet, sd_targets, unet_output),
    "sdxl": Family(sdxl_unet, sdxl_targets, sdxl_output),
    "sd3": Family(lambda: dits.sd3_transformer(layers=2, dual=(0,)), mmdit_targets, dits.sd3_forward),
    "flux": Family(lambda: dits.flux_transformer(double=1, single=1), transformer_targets, dits.flux_forward),
}
UNETS = ("sd", "sdxl")
# module, or the module of each family; its arguments; --network_dim
TYPES = {
    "lora": ({"sd3": "lora_sd3", "flux": "lora_flux"}, "", 2),
    "lora_fa": ("lora_fa", "", 2),
    "dylora": ("dylora", "unit=2", 4),
    "locon": ("lycoris", "algo=locon conv_dim=3 use_tucker=True", 2),
    "dora": ("lycoris", "algo=locon dora_wd=True", 2),
    "dora of columns": ("lycoris", "algo=locon dora_wd=True wd_on_output=False", 2),
    "loha": ("loha", "", 2),
    "loha with dora": ("lycoris", "algo=loha dora_wd=True", 5),
    "lokr": ("lokr", "factor=4", 2),
    "full lokr": ("lycoris", "algo=lokr full_matrix=True factor=4 dora_wd=True", 2),
    "oft": ({"flux": "oft_flux", "": "oft"}, "enable_all_linear=True enable_conv=True", 4),
    "diag-oft": ("lycoris", "algo=diag-oft rescaled=True", 4),
    "boft": ("lycoris", "algo=boft constraint=0.01 preset=attn-mlp", 18),
    "glora": ("lycoris", "algo=glora", 2),
    "ia3": ("lycoris", "algo=ia3", 1),
    "full": ("lycoris", "algo=full", 1),
    "norms": ("lycoris", "algo=lokr train_norm=True", 2),
}
ONLY_UNETS = (
    "dylora",
    "lora_fa",
    "norms",
)  # the first two know no fused layers, and no targets of transformers are norms
COMBINATIONS = [(name, family) for name in TYPES for family in FAMILIES if name not in ONLY_UNETS or family in UNETS]


class Run:
    """A network of some type on a new model of a family, with an optimizer."""

    def __init__(self, name: str, family: str, bare: nn.Module, *, seed: int = 0, file=None):
        module, args, dim = TYPES[name]
        if isinstance(module, dict):
            module = module.get(family, module.get("", "lora"))
        self.builder = network_builder(f"networks.{module}")
        self.models = Models(copy.deepcopy(bare), {}, {}, None)
        self.targets = FAMILIES[family].targets(self.models.denoiser)
        args = dict(pair.split("=") for pair in args.split())
        if module == "oft_flux":
            del args["enable_conv"]
        if file is None:
            given = {"dim": dim, "alpha": 1.0, "args": args, "seed": seed}
            self.network = self.builder.create(self.targets, self.models, **given)
        else:
            self.network = self.builder.from_weights(self.targets, self.models, file, args=args)
        self.network.attach(self.models)
        self.output = lambda: FAMILIES[family].output(self.models.denoiser)
        self.optimizer = torch.optim.AdamW(self.network.parameter_groups({"denoiser": 0.02}))

    def step(self) -> None:
        self.network.train()
        torch.manual_seed(8)  # of types that draw in training
        (self.output() - 1).square().mean().backward()
        self.network.before_step()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def result(self) -> Tensor:
        self.network.eval()
        with torch.no_grad():
            return self.output()

    def write(self, path):
        state = {name: tensor.detach().clone().contiguous() for name, tensor in self.network.file_state().items()}
        save_file(state, path)
        return path


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("name", "family"), COMBINATIONS)
def test_a_network_is_merged_switched_off_and_continued(name, family, tmp_path):
    torch.manual_seed(0)
    bare = FAMILIES[family].build().eval().requires_grad_(False)
    with torch.no_grad():
        expected = FAMILIES[family].output(bare)
    run = Run(name, family, bare)
    torch.testing.assert_close(run.result(), expected, rtol=0, atol=1e-5)  # a new network changes nothing
    run.step()
    network, optimizer = copy.deepcopy([run.network.state_dict(), run.optimizer.state_dict()])
    file = run.builder.read(run.write(tmp_path / "half.safetensors"))

    attached = run.result()
    assert (attached - expected).abs().max() > 1e-3  # or the rest would show nothing
    merged = Models(copy.deepcopy(bare), {}, {}, None)
    assert merge(run.targets, merged, file, 1.0) == (len(run.network.layers()), 0)
    torch.testing.assert_close(FAMILIES[family].output(merged.denoiser).detach(), attached, rtol=1e-4, atol=1e-5)
    run.network.set_multiplier(0)
    assert torch.equal(run.result(), expected)
    run.network.set_multiplier(1)

    run.step()
    whole = sha256(run.write(tmp_path / "whole.safetensors"))
    resumed, from_file = Run(name, family, bare, seed=1), Run(name, family, bare, file=file)
    resumed.network.load_state_dict(network)
    for continued in (resumed, from_file):
        continued.optimizer.load_state_dict(copy.deepcopy(optimizer))  # it changes what it is given
        continued.step()
        assert sha256(continued.write(tmp_path / "continued.safetensors")) == whole
