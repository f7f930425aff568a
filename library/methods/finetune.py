"""Trains the model itself: the denoiser, and the text encoders where the options say so."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.methods.base import Method
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from library.families.base import Family
    from library.options.base import Options
    from library.types import Models

DENOISER = "denoiser"
FOLDERS = ("diffusers", "diffusers_safetensors")


class FinetuneMethod(Method):
    """Full fine-tuning and DreamBooth; text encoders are frozen from step `opts.method.text_encoder_stop` on."""

    def __init__(self, opts: Options):
        super().__init__(opts)
        self._stop = opts.method.text_encoder_stop
        self._rates: dict[str, float] = {}

    # ---- what is trained

    def attach(self, family: Family, models: Models) -> None:
        parts = {DENOISER: models.denoiser, **models.text_encoders}
        models.freeze()
        self._rates = part_rates(self.opts, family.traits.text_encoders)
        given = {part: rate for part, rate in self._rates.items() if part in parts}  # some text encoders may be absent
        trained = {part: parts[part].requires_grad_(True) for part, rate in given.items() if rate}
        if not trained:
            raise UserError("nothing would be trained with a learning rate of 0; set --learning_rate above 0")
        if DENOISER in trained:
            self._leave_blocks(family, models)
        self._trained = TrainedParts(trained)
        self._family = family
        # What training leaves alone is saved as it was read, whatever format it computes in.
        kept = {part: module if part in trained else unmoved(module) for part, module in parts.items()}
        self._as_read = {module: frozen_state(module) for module in trained.values()}
        self._whole = replace(
            models,
            denoiser=kept.pop(DENOISER),
            text_encoders=kept,
            vae=None if models.vae is None else unmoved(models.vae),
        )
        counts = {group["name"]: sum(p.numel() for p in group["params"]) for group in self.parameter_groups()}
        shown = ", ".join(f"{count / 1e6:.1f} million of {name}" for name, count in counts.items())
        LOGGER.info("trained weights: %s", shown)

    def _leave_blocks(self, family: Family, models: Models) -> None:
        """Freezes the blocks of the denoiser that the options leave as they are."""
        options, blocks = self.opts.method, family.denoiser.blocks(models)
        if options.frozen_blocks > len(blocks):
            raise UserError(
                f"--num_last_block_to_freeze: {options.frozen_blocks} are more than this model has, {len(blocks)}"
            )
        for block in blocks[len(blocks) - options.frozen_blocks :]:
            block.requires_grad_(False)
        if options.block_rates is not None:
            for name, weight in models.denoiser.named_parameters():
                if not options.block_rates[family.denoiser.block_number(models, name)]:
                    weight.requires_grad_(False)

    def trainable(self) -> TrainedParts:
        return self._trained

    def parameter_groups(self) -> list[dict[str, Any]]:
        # As logs call them: where several text encoders are trained, with their numbers among the family's.
        encoders = enumerate(self._family.traits.text_encoders, 1)
        numbered = {part: f"text_encoder{number}" for number, part in encoders if part in self._trained}
        names = {DENOISER: "unet", **(numbered if len(numbered) > 1 else dict.fromkeys(numbered, "text_encoder"))}
        groups = []
        for part, module in self._trained.items():
            block_rates = self.opts.method.block_rates if part == DENOISER else None
            by_label: dict[str, dict[str, Any]] = {}
            for name, weight in module.named_parameters():
                if not (weight.requires_grad or part in self._trained.stopped):
                    continue
                label, rate = names[part], self._rates[part]
                if block_rates is not None:
                    number = self._family.denoiser.block_number(self._whole, name)
                    label, rate = f"{label} block {number}", block_rates[number]
                by_label.setdefault(label, {"params": [], "lr": rate, "name": label})["params"].append(weight)
            groups += by_label.values()
        return groups

    def trained_text_encoders(self) -> list[str]:
        return [part for part in self._trained if part not in (DENOISER, *self._trained.stopped)]

    def live_text_encoders(self) -> list[str]:
        trained = self.trained_text_encoders()
        numbers = {part: number for number, part in enumerate(self._family.traits.text_encoders)}
        uncached = (part for part in self._whole.text_encoders if not self.opts.method.reads_cache_of(numbers[part]))
        return list(dict.fromkeys([*trained, *uncached]))

    def start_step(self, step: int) -> None:
        if self._stop is None or step < self._stop or not self.trained_text_encoders():
            return
        for part, module in self._trained.items():
            if part != DENOISER:
                self._trained.stop(part)
                for parameter in module.parameters():
                    parameter.grad = None  # so that the optimizer passes over it, weight decay included
        LOGGER.info("the text encoders are not trained from step %d on", self._stop)

    # ---- what is saved

    def file_suffix(self) -> str:
        save_as = self._save_as()
        return "" if save_as in FOLDERS else f".{save_as}"

    def metadata(self) -> dict[str, Any]:
        return {}  # a whole model says what it is, not how it was trained

    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """Writes the whole model. Parts that were not trained are those that were read, bit for bit without `dtype`."""
        save_as = self._save_as()
        metadata = metadata or {}
        if save_as != "ckpt":  # which keeps counts of steps and epochs, and nothing else
            metadata = {name: value for name, value in metadata.items() if not name.startswith("ss_")}
        # The weights of a folder's part are all of one format, that of training.
        with nullcontext() if save_as in FOLDERS else holding(self._as_read):
            self._family.writer.save(self._whole, path, save_as=save_as, dtype=dtype, metadata=metadata)

    def companions(self, path: Path) -> list[Path]:
        return [] if self._save_as() in FOLDERS else self._family.writer.extra_files(self._whole, path)

    def _save_as(self) -> str:
        options = self.opts.saving
        if options.save_model_as:
            return options.save_model_as
        as_read = self._whole.source.save_as
        if options.use_safetensors:
            return "diffusers_safetensors" if as_read in FOLDERS else "safetensors"
        return as_read


class TrainedParts(nn.ModuleDict):
    """The trained models by part. A stopped one stays among them, for the state is theirs together, but rests."""

    def __init__(self, parts: dict[str, nn.Module]):
        super().__init__(parts)
        self.stopped: set[str] = set()

    def stop(self, part: str) -> None:
        self.stopped.add(part)
        self[part].requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TrainedParts:
        super().train(mode)
        for part in self.stopped:
            self[part].eval()
        return self


def unmoved(module: nn.Module) -> nn.Module:
    """The same weights in a module of their own, which stay as they are when `module` is moved or cast.

    Nothing is copied: moving a module gives its parameters new memory, and what they had before lives on here.
    """
    own: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    own |= {id(b): b.detach() for b in module.buffers()}
    return copy.deepcopy(module, own)


def frozen_state(module: nn.Module) -> dict[str, Tensor]:
    """The entries of the state dict that training leaves alone, as they are now; nothing is copied."""
    trained = {name for name, weight in module.named_parameters(remove_duplicate=False) if weight.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in trained}


@contextmanager
def holding(states: Mapping[nn.Module, Mapping[str, Tensor]]) -> Iterator[None]:
    """Within the block, state dicts of these modules hold these tensors in place of their own."""

    def put(own: Mapping[str, Tensor], _module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
        state.update({prefix + name: tensor for name, tensor in own.items()})

    hooks = [module.register_state_dict_post_hook(partial(put, own)) for module, own in states.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def part_rates(opts: Options, text_encoders: tuple[str, ...]) -> dict[str, float]:
    """Learning rate of every part that is trained from the first step; 0 freezes it.

    Where the denoiser's blocks have rates of their own, its rate is the largest of them.
    """
    common, options = opts.optimizer.learning_rate, opts.method
    rates = {DENOISER: common or 0.0}
    if options.block_rates is not None:
        rates[DENOISER] = max(options.block_rates, key=abs)
    if options.text_encoder_stop != 0:
        for number, part in enumerate(text_encoders):
            rate = options.text_rate(number)
            rates[part] = (common if rate is None else rate) or 0.0
    return rates
