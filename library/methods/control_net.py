"""Trains a ControlNet beside the frozen model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.memory.attention import set_attention
from library.memory.selective import selective_checkpoint
from library.methods.base import Method
from library.runtime import seeds
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.families.base import Control, Family
    from library.options.base import Options
    from library.types import Denoise, Models

ADDED = "controlnet_"  # how the names of layers begin that the denoiser does not have


class ControlNetMethod(Method):
    """A ControlNet, new or read from a file. It acts in every prediction whose batch has control images."""

    title, new = "ControlNet", "with copies of the base model's weights"  # for the log
    label = "controlnet"  # of the learning rate in the logs
    suffix = "/controlnet"  # of the architecture in metadata

    def __init__(self, opts: Options):
        super().__init__(opts)
        self._net: nn.Module | None = None
        self._control: Control | None = None

    # ---- what is trained

    def attach(self, family: Family, models: Models) -> None:
        models.freeze()
        control = self._control_of(family)
        name = self.opts.method.start_from
        net = control.load(models, name) if name else self._build(control, models)
        self._control, self._net = control, net
        for weight, rate in zip(net.parameters(), self._rates(), strict=True):
            weight.requires_grad_(bool(rate))  # the options have made sure that one of the rates is not 0
        self._prepare(net)
        count = sum(weight.numel() for weight in net.parameters() if weight.requires_grad)
        source = f"read from {name}" if name else self.new
        LOGGER.info("%s %s: %.1f million weights are trained", self.title, source, count / 1e6)

    def _prepare(self, net: nn.Module) -> None:
        set_attention(net, self.opts.memory)
        if self.opts.memory.gradient_checkpointing:
            ratio = self.opts.memory.selective_checkpointing
            net.enable_gradient_checkpointing(selective_checkpoint(ratio) if ratio else None)

    def _control_of(self, family: Family) -> Control:
        assert family.control is not None, "a family that offers this method has ControlNets"
        return family.control

    def _build(self, control: Control, models: Models) -> nn.Module:
        """A new one; the layers that the denoiser does not have begin as the run's seed says, in every process."""
        import torch

        seed = self.opts.training.seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed() if seed is None else seeds.derive(seed, "controlnet"))
            return control.build(models)

    def trainable(self) -> nn.Module:
        return self._attached()

    def added(self) -> nn.Module:
        return self._attached()

    def denoise(self, family: Family, models: Models) -> Denoise:
        """The family's denoiser with the ControlNet; alone where the batch has no control images."""
        return partial(self._control_of(family).predict, models, self._attached())

    def needs_vae(self) -> bool:
        return self._control is not None and self._control.needs_vae

    def parameter_groups(self) -> list[dict[str, Any]]:
        net, by_name = self._attached(), {}
        for (name, weight), rate in zip(net.named_parameters(), self._rates(), strict=True):
            if weight.requires_grad:
                label = self.label if name.startswith(ADDED) or self.opts.method.added_rate is None else "unet"
                by_name.setdefault(label, {"params": [], "lr": rate, "name": label})["params"].append(weight)
        return list(by_name.values())

    def _rates(self) -> list[float]:
        """The learning rate of every weight of the ControlNet, in its order."""
        common, added = self.opts.optimizer.learning_rate or 0.0, self.opts.method.added_rate
        added = common if added is None else added
        return [added if name.startswith(ADDED) else common for name, _ in self._attached().named_parameters()]

    def trained_text_encoders(self) -> list[str]:
        return []

    def _attached(self) -> nn.Module:
        if self._net is None:
            raise RuntimeError("attach() comes first")
        return self._net

    # ---- what is saved

    def file_suffix(self) -> str:
        save_as = self._save_as()
        return "" if save_as.startswith("diffusers") else f".{save_as}"

    def metadata(self) -> dict[str, Any]:
        return {"modelspec.suffix": self.suffix}

    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """Writes the ControlNet in its family's layout, with what the metadata says about the model alone."""
        assert self._control is not None
        facts = {name: value for name, value in (metadata or {}).items() if name.startswith("modelspec.")}
        self._control.save(self._attached(), path, save_as=self._save_as(), dtype=dtype, metadata=facts)

    def _save_as(self) -> str:
        return self.opts.saving.save_model_as or "safetensors"


class LlliteMethod(ControlNetMethod):
    """A ControlNet-LLLite, new or read from a file."""

    title, new = "ControlNet-LLLite", "new"
    label = "lllite"
    suffix = "/control-net-lllite"

    def _control_of(self, family: Family) -> Control:
        assert family.lllite is not None, "a family that offers this method has such networks"
        return family.lllite

    def _prepare(self, net: nn.Module) -> None:
        """It has no attention, and is recomputed with the layers of the model that it stands before."""
