"""Trains a network beside the frozen model: LoRA and what else `--network_module` names."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.checkpoints.embeddings import BUNDLED, read_bundled, write_embedding
from library.checkpoints.hashes import weights_fingerprint
from library.checkpoints.metadata import finalise
from library.checkpoints.writing import write_safetensors, write_torch
from library.errors import UserError
from library.methods.base import Method
from library.methods.embedding_spec import as_name, trained_keys
from library.methods.network_spec import require_network_module, split_args
from library.methods.words import TrainedWords
from library.options.network import resolved_module
from library.runtime.logs import LOGGER
from networks.build import merge
from networks.file_names import require_places, require_types
from networks.files import names_in_files, names_of, read, warn_of_words
from networks.inputs import with_inputs_of
from networks.spec import DeclaredModule

if TYPE_CHECKING:
    from library.families.base import Family
    from library.options.base import Options
    from library.types import FamilyTraits, LoraTarget, Models
    from networks.builder import NetworkBuilder
    from networks.network import TrainableNetwork


class NetworkMethod(Method):
    """A network of `--network_module` on the parts that have a learning rate.

    The loop calls `after_step` after every optimizer step, `trainable().train()` before training and `.eval()` before
    validating or sampling.
    """

    def __init__(self, opts: Options):
        super().__init__(opts)
        self._builder = network_builder(opts.method.network_module)
        self._args = split_args(opts.method.network_args)
        self._network: TrainableNetwork | None = None
        self._words: TrainedWords | None = None
        if opts.words.caption_words:  # those that --network_weights holds go on from there
            file = opts.method.network_weights
            held = read_bundled(file) if file else {}
            files = {word: (file, held[word]) for word in opts.words.caption_words if word in held}
            self._words = TrainedWords(opts.words, opts.training.seed, files)
        self._multiplier = 1.0  # as the network is now
        self._rates: dict[str, float] = {}

    # ---- what is trained

    def attach(self, family: Family, models: Models) -> None:
        models.freeze()
        options = self.opts.method
        targets = family.targets.lora(models)
        self._merge_base_weights(targets, models)
        self._rates = part_rates(self.opts, family.traits.text_encoders)
        file = self._builder.read(options.network_weights) if options.network_weights else None
        if file is not None:
            require_places(file.path, file.entries, names_in_files(targets))
        # A part at rate 0 has a place in the network only where a file gives it values: they act, and are saved again.
        kept = file.entries if file else {}
        wanted = [
            t for t in targets if self._rates.get(t.part) or (t.part in self._rates and kept.keys() & names_of(t))
        ]
        if not wanted:
            raise UserError(_nothing_trained(self._rates))
        self._network = self._build(wanted, models, file, family.traits)
        if options.scale_weight_norms and not self._network.can_limit_norms():
            raise UserError(f"--scale_weight_norms: {options.network_module} does not offer it; leave it out")
        trained = {id(parameter) for group in self.parameter_groups() for parameter in group["params"]}
        for parameter in self._network.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self._network.attach(models)
        if self._words is not None:
            self._words.attach(models, trained_keys(self.opts, family.traits))
        counts = ", ".join(f"{count} in {part}" for part, count in self._network.counts().items())
        alpha = "" if options.dim_from_weights else f", alpha {options.network_alpha:g}"  # else those of the file
        rank = f"; rank {self._dim_text()}{alpha}" if self._network.ranks() else ""
        LOGGER.info("network %s: layers: %s%s", options.network_module, counts, rank)

    def _build(self, targets: list[LoraTarget], models: Models, file: Any, traits: FamilyTraits) -> TrainableNetwork:
        options = self.opts.method
        common = {"dropout": options.network_dropout, "args": self._args, "layout": traits.block_layout}
        if options.dim_from_weights:
            network = self._builder.from_weights(targets, models, file, **common)
            loaded, missing = len(network.layers()), 0
            unused = len(file.unused(targets))
        else:
            seed = self.opts.training.seed
            network = self._builder.create(
                targets,
                models,
                dim=options.network_dim or self._builder.usual_dim,
                alpha=options.network_alpha,
                seed=torch.initial_seed() if seed is None else seed,
                **common,
            )
            if file is None:
                return network
            loaded, missing, unused = self._builder.load(network, file)
        warn_of_words(file, self.opts.words.caption_words)
        LOGGER.log(
            logging.WARNING if missing or unused else logging.INFO,
            "%s: %d layers loaded; %d layers of the network are not in the file and start fresh; "
            "%d layers of the file are not used",
            *(file.path, loaded, missing, unused),
        )
        return network

    def _merge_base_weights(self, targets: list[LoraTarget], models: Models) -> None:
        multipliers = list(self.opts.method.base_weights_multiplier or [])
        for index, path in enumerate(self.opts.method.base_weights or []):
            multiplier = multipliers[index] if index < len(multipliers) else 1.0
            file = with_inputs_of(read(path), targets, models)
            require_types(file.path, file.flat())
            require_places(file.path, file.entries, names_in_files(targets))
            warn_of_words(file)
            merged, unused = merge(targets, models, file, multiplier)
            LOGGER.log(
                logging.WARNING if unused else logging.INFO,
                "%s: %d layers merged into the model at %g; %d layers of the file have no place here",
                *(path, merged, multiplier, unused),
            )

    def trainable(self) -> nn.Module:
        return self.added()

    def added(self) -> nn.Module:
        network = self._attached()
        return network if self._words is None else nn.ModuleDict({"network": network, "words": self._words.rows})

    def text_fingerprint(self) -> dict[str, str]:
        changes = self._words.fingerprint() if self._words is not None else {}
        if not self.opts.method.network_weights or self.opts.method.network_train_unet_only:
            return changes  # a network that has learned nothing leaves the encoders' outputs as they are
        for part in self._attached().parts():
            if part != "denoiser":
                own = f"network {weights_fingerprint(self._attached())}"
                changes[part] = f"{own} and {changes[part]}" if part in changes else own
        return changes

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = self._attached().parameter_groups(self._rates)
        if not groups:
            raise UserError(_nothing_trained(self._rates))
        return groups if self._words is None else [*groups, *self._words.groups(self.opts.words.embedding_lr)]

    def trained_text_encoders(self) -> list[str]:
        adapted = [part for part in self._attached().parts() if part != "denoiser" and self._rates.get(part)]
        return list(dict.fromkeys([*adapted, *(self._words.keys if self._words is not None else ())]))

    def start_epoch(self, epoch: int) -> None:
        self._attached().start_epoch()

    def start_step(self, step: int) -> None:
        self._attached().start_step()

    def set_strength(self, strength: float) -> None:
        if strength != self._multiplier:
            self._attached().set_multiplier(strength)
            self._multiplier = strength

    def before_step(self) -> None:
        self._attached().before_step()

    def after_step(self) -> None:
        self.set_strength(1.0)  # what is sampled is the network as it will be used
        if self.opts.method.scale_weight_norms:
            self._attached().limit_norms(self.opts.method.scale_weight_norms)

    def _attached(self) -> TrainableNetwork:
        if self._network is None:
            raise RuntimeError("attach() comes first")
        return self._network

    # ---- what is saved

    def file_suffix(self) -> str:
        return "." + (self.opts.saving.save_model_as or "safetensors")

    def metadata(self) -> dict[str, Any]:
        options = self.opts.method
        text_lr = list(options.text_encoder_lr or [])
        values = {
            "ss_network_module": options.network_module,
            "ss_network_dim": self._dim_text(),
            "ss_network_alpha": options.network_alpha,
            "ss_network_dropout": options.network_dropout,
            "ss_scale_weight_norms": options.scale_weight_norms,
            "ss_unet_lr": options.unet_lr,
            "ss_text_encoder_lr": (text_lr[0] if len(text_lr) == 1 else text_lr) if text_lr else None,
            "ss_training_comment": options.training_comment,
            "modelspec.suffix": "/lora",
        }
        if self._words is not None:  # a key of our own, so only where it is set
            values["ss_token_string"] = json.dumps(self._words.names)
        if self._args:
            values["ss_network_args"] = json.dumps(self._args)
        if self.opts.memory.quantize_base:  # a key of our own, so only where it is set
            values["ss_quantize_base"] = self.opts.memory.quantize_base
        return values

    def _dim_text(self) -> str:
        """The rank as merge and resize tools read it: a number, or "Dynamic" where a file gave several."""
        if not self.opts.method.dim_from_weights or self._network is None:
            return str(self.opts.method.network_dim or self._builder.usual_dim)
        ranks = self._network.ranks()
        return str(ranks.pop()) if len(ranks) == 1 else "Dynamic"

    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """Every tensor, alpha too, in `dtype`, or as trained where that is None. .ckpt and .pt hold `torch_content`.

        Vectors of new words are in the network's file, and in one of their own for each word.
        """
        state, vectors = self._attached().file_state(), self._words.vectors() if self._words is not None else {}
        state |= {f"{BUNDLED}{word}.{key}": rows for word, own in vectors.items() for key, rows in own.items()}
        tensors = {name: value.detach().to("cpu", dtype or value.dtype).contiguous() for name, value in state.items()}
        for word, file in self._word_files(path).items():
            write_embedding(file, vectors[word], dtype, None)
        if path.suffix in (".ckpt", ".pt"):
            write_torch(path, self._attached().torch_content(tensors, path.stem, metadata or {}))
        else:
            write_safetensors(path, tensors, None if metadata is None else finalise(metadata, tensors))

    def companions(self, path: Path) -> list[Path]:
        return list(self._word_files(path).values())

    def _word_files(self, path: Path) -> dict[str, Path]:
        """By word, the file of its vectors beside a network's file."""
        words = self._words.names if self._words is not None else ()
        return {word: path.with_name(f"{path.stem}_{as_name(word)}{path.suffix}") for word in words}


def _nothing_trained(rates: dict[str, float]) -> str:
    shown = ", ".join(f"{'U-Net' if part == 'denoiser' else part} {lr:g}" for part, lr in rates.items())
    return (
        f"nothing would be trained with the learning rates {shown}; "
        "set --learning_rate, --unet_lr or --text_encoder_lr above 0, or fewer blocks to 0"
    )


def network_builder(name: str | None) -> NetworkBuilder:
    """What `--network_module` names: a declared one, or the wrapper that makes another's look like one.

    Raises: UserError: missing, not a network, or not importable.
    """
    require_network_module(name)
    name = resolved_module(name)
    try:
        module = importlib.import_module(name)
    except Exception as error:  # another's code may raise anything
        LOGGER.debug("importing %s failed", name, exc_info=True)
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"--network_module: {name} cannot be imported: {type(error).__name__}: {reason}") from error
    declared = getattr(module, "MODULE", None)
    if isinstance(declared, DeclaredModule):
        return declared.builder(declared)
    if not hasattr(module, "create_network"):
        raise UserError(f"--network_module: {name} is no kind of network, it has no create_network; try networks.lora")
    from networks.third_party import ThirdPartyBuilder

    return ThirdPartyBuilder(module)


def part_rates(opts: Options, text_encoders: tuple[str, ...]) -> dict[str, float]:
    """Learning rate of every part that may be trained; 0 freezes it.

    Own rates default to --learning_rate. Of several text encoders, those without an entry take the list's last.
    """
    options, common = opts.method, opts.optimizer.learning_rate
    rates: dict[str, float] = {}
    if not options.network_train_unet_only:
        for part, rate in zip(text_encoders, options.text_rates(len(text_encoders)), strict=True):
            rates[part] = (common if rate is None else rate) or 0.0
    if not options.network_train_text_encoder_only:
        rates["denoiser"] = (common if options.unet_lr is None else options.unet_lr) or 0.0
    return rates
