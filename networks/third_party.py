"""Networks of other people's modules: those that offer the ecosystem's ``create_network(...)``, such as lycoris.kohya.

Such a module builds its own network on the live U-Net and text encoders, names its layers after the live modules, and
replaces their forward functions. Here it gets the face of our networks, and its layers the names that files have.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.runtime.logs import LOGGER
from library.runtime.seeds import derive
from networks import files
from networks.builder import NetworkBuilder
from networks.file_layout import file_layout, take_over
from networks.file_names import named_format
from networks.network import TrainableNetwork

if TYPE_CHECKING:
    from collections.abc import Callable

    from library.types import BlockLayout, LoraTarget, Models
    from networks.files import NetworkFile

DENOISER = "denoiser"
SHOWN = 4  # of many names, in messages


# ---- names


class LayerNames:
    """Layer names as such modules make them from the live model, and as files have them.

    Modules write ``lora_unet_<path>``, ``lora_te_<path>``, or ``lora_te1_``, ``lora_te2_``... by the encoder's place.
    Live paths may lack a level that files have (newer transformers dropped `text_model.`), or differ altogether; the
    targets know both. A layer that is no target, such as a norm, takes the level of its part.
    """

    def __init__(self, targets: Sequence[LoraTarget], text_encoders: Sequence[str]):
        self._parts = {DENOISER: "lora_unet_"}
        for index, part in enumerate(text_encoders):
            self._parts[part] = "lora_te_" if len(text_encoders) == 1 else f"lora_te{index + 1}_"
        self._public: dict[str, str] = {}
        self._prefixes: dict[str, str] = {}  # live to public
        for target in targets:
            if target.place is None and len(target.modules) != 1:
                continue
            path = (target.modules[0] if target.place is None else target.place.path).replace(".", "_")
            self._public[self._parts[target.part] + path] = target.key
            if target.part != DENOISER and target.key.endswith(path):
                self._prefixes[self._parts[target.part]] = target.key.removesuffix(path)
        self._live = {public: live for live, public in self._public.items()}

    def public(self, name: str) -> str:
        """As files have it."""
        if name in self._public:
            return self._public[name]
        for live, public in self._prefixes.items():
            if name.startswith(live) and not name.startswith(public):
                return public + name.removeprefix(live)
        return name

    def live(self, name: str) -> str:
        """The inverse of `public`; also takes names that are live ones already."""
        if name in self._live:
            return self._live[name]
        for live, public in self._prefixes.items():
            if name.startswith(public):
                return live + name.removeprefix(public)
        return name

    def part(self, live: str) -> str:
        """The model part that a live name belongs to."""
        return next((part for part, prefix in self._parts.items() if live.startswith(prefix)), DENOISER)


def _renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The layer's name stands before the first dot."""
    split = ((name.partition("."), tensor) for name, tensor in tensors.items())
    return {rename(layer) + dot + rest: tensor for (layer, dot, rest), tensor in split}


# ---- the network


class ThirdPartyNetwork(TrainableNetwork):
    """Another module's network, applied to the models from the start.

    Its state_dict is every parameter and buffer as it is, so that a resumed run continues exactly; `file_state` is what
    the module itself saves. Both have the names of files.
    """

    def __init__(
        self,
        module: str,
        network: nn.Module,
        models: Models,
        denoiser: nn.Module,
        parts: Sequence[str],
        names: LayerNames,
    ):
        """`denoiser`: what the module has seen, the live one or its `file_layout`."""
        super().__init__()
        self.network = network
        self._module, self._models, self._parts, self._names = module, models, list(parts), names
        text = any(part != DENOISER for part in parts)
        with _explained(module, "apply_to"):
            network.apply_to(_text_encoders(models), denoiser, text, DENOISER in parts)
            if hasattr(network, "prepare_grad_etc"):
                network.prepare_grad_etc(_text_encoders(models), denoiser)
            take_over(denoiser)

    def layers(self) -> dict[str, nn.Module]:
        return {self._names.public(name): layer for name, layer in self.network.named_children()}

    def attach(self, models: Models) -> None:
        """Nothing is left to do: such networks are applied when they are made."""

    def parts(self) -> list[str]:
        has_text = bool(getattr(self.network, "text_encoder_loras", True))
        return [part for part in self._parts if part == DENOISER or has_text]

    def counts(self) -> Counter[str]:
        return Counter(self._names.part(name) for name, _ in self.network.named_children())

    def ranks(self) -> set[int]:
        return {layer.lora_dim for layer in self.layers().values() if isinstance(getattr(layer, "lora_dim", None), int)}

    def parameter_groups(self, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """The module's own groups, those without a rate left out; what is in none of them is frozen.

        Raises: UserError: text encoders have different rates, and the module takes one for all.
        """
        text = [rates.get(part) or 0.0 for part in self._parts if part != DENOISER]
        unet = rates.get(DENOISER) or 0.0
        with _explained(self._module, "prepare_optimizer_params"):
            prepared = self._prepare(text, unet)
        found, labels = prepared if isinstance(prepared, tuple) else (prepared, None)
        groups = []
        for index, group in enumerate(found):
            parameters, lr = list(group["params"]), group.get("lr", unet)
            if parameters and lr:
                name = labels[index] if labels and len(labels) == len(found) else f"group {index + 1}"
                groups.append({**group, "params": parameters, "lr": lr, "name": name})
        repeated = Counter(group["name"] for group in groups)
        for index, group in enumerate(groups):
            if repeated[group["name"]] > 1:
                group["name"] += f" {index + 1}"
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        for parameter in self.network.parameters():  # preparing thaws them all
            parameter.requires_grad_(id(parameter) in trained)
        return groups

    def _prepare(self, text: list[float], unet: float) -> Any:
        several = getattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        if several is not None and len(text) > 1:
            return several(text, unet, unet)
        if len(set(text)) > 1:
            raise UserError(f"--text_encoder_lr: {self._module} takes one rate for all text encoders; give one")
        prepare = self.network.prepare_optimizer_params
        rates = (text[0] if text else 0.0, unet, unet)
        try:
            inspect.signature(prepare).bind(*rates)
        except TypeError:
            return prepare(*rates[:2])
        return prepare(*rates)

    # ---- while it is trained

    def set_multiplier(self, multiplier: float) -> None:
        if not hasattr(self.network, "set_multiplier"):
            raise UserError(f"network_multiplier: networks of {self._module} have one strength only; leave it at 1")
        self.network.set_multiplier(multiplier)

    def can_limit_norms(self) -> bool:
        return hasattr(self.network, "apply_max_norm_regularization")

    @torch.no_grad()
    def limit_norms(self, limit: float) -> None:
        self.network.apply_max_norm_regularization(limit, next(self.network.parameters()).device)

    def start_epoch(self) -> None:
        if hasattr(self.network, "on_epoch_start"):
            self.network.on_epoch_start(_text_encoders(self._models), self._models.denoiser)

    def start_step(self) -> None:
        if hasattr(self.network, "on_step_start"):
            self.network.on_step_start(_text_encoders(self._models), self._models.denoiser)

    # ---- what is kept

    def file_state(self) -> dict[str, Tensor]:
        return _renamed(self.network.state_dict(), self._names.public)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """Raises: KeyError: a tensor is missing."""
        for name, tensor in self._tensors().items():
            tensor.copy_(state_dict[name])

    def _tensors(self) -> dict[str, Tensor]:
        # Buffers that a module does not save may still change, such as the factor of a limited norm.
        network = self.network
        return _renamed({**dict(network.named_parameters()), **dict(network.named_buffers())}, self._names.public)

    def load(self, file: NetworkFile) -> int:
        """Copies a file's values; layers that it lacks keep theirs. Returns the number of layers loaded.

        Raises: UserError: nothing fits, or a layer is of another kind, size or alpha.
        """
        entries = {self._names.live(layer): tensors for layer, tensors in file.entries.items()}
        found = {name: layer for name, layer in self.network.named_children() if name in entries}
        if not found:
            raise _nothing_fits(file, self.layers())
        hint = "give the --network_args, --network_dim and --network_alpha of its training, or --dim_from_weights"
        for name, layer in found.items():
            own, entry = layer.state_dict(), entries[name]
            where = f"{file.path}: {self._names.public(name)}"
            if own.keys() - {"alpha"} != entry.keys() - {"alpha"}:
                names = [", ".join(sorted(keys - {"alpha"})[:SHOWN]) for keys in (entry.keys(), own.keys())]
                raise UserError(f"{where}: holds {names[0]}, the network has {names[1]}", hint=hint)
            for key, value in entry.items():
                if key in own and value.shape != own[key].shape:
                    shapes = f"{tuple(value.shape)} does not fit {tuple(own[key].shape)}"
                    raise UserError(f"{where}.{key}: shape {shapes}", hint=hint)
            # A network's scale follows from the alpha that it was made with, not from the one it loads.
            if "alpha" in own and "alpha" in entry and not math.isclose(own["alpha"], entry["alpha"], rel_tol=1e-2):
                alphas = f"alpha is {float(entry['alpha']):g}, the network's {float(own['alpha']):g}"
                raise UserError(f"{where}: {alphas}", hint=hint)
            # Some modules compute in the file's dtype while they load.
            layer.load_state_dict({key: value.to(own[key]) for key, value in entry.items()}, strict=False)
        return len(found)

    def holds(self, file: NetworkFile) -> bool:
        """Whether every layer that the file shares with this network has the file's values.

        Alphas may differ: modules choose another where a layer has no rank to divide by.
        """
        entries = {self._names.live(layer): tensors for layer, tensors in file.entries.items()}
        for layer, module in self.network.named_children():
            own = module.state_dict()
            for name, value in entries.get(layer, {}).items():
                if name not in own or name == "alpha":
                    continue
                mine, theirs = own[name].detach().float().cpu(), value.float()
                if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5):
                    return False
        return True


def _nothing_fits(file: NetworkFile, layers: Mapping[str, nn.Module]) -> UserError:
    here = f"the {len(layers)} layers that are trained here"
    example = f"; its first is {next(iter(file.entries), 'none')}, here the first is {next(iter(layers), 'none')}"
    return UserError(
        f"{file.path}: none of its {len(file.entries)} layers fits {here}{example}. "
        f"Was it made for another kind of model, or for a part that is not trained?{named_format(file.flat())}"
    )


# ---- building networks


class ThirdPartyBuilder(NetworkBuilder):
    """Makes networks of another's module."""

    def __init__(self, module: ModuleType):
        self.name, self._module = module.__name__, module
        _patch_presets(module)

    def read(self, path: str | Path) -> NetworkFile:
        return files.read(path)

    def create(
        self,
        targets: Sequence[LoraTarget],
        models: Models,
        *,
        dim: int,
        alpha: float | None,
        args: Mapping[str, str],
        seed: int,
        dropout: float | None = None,
        layout: BlockLayout | None = None,
    ) -> ThirdPartyNetwork:
        """A new network on the parts that have targets. The module chooses the layers, and reads `args`.

        The same `seed` draws the same weights. Raises: UserError: the module fails, or makes no layers.
        """
        function, denoiser = self._module.create_network, _seen(targets, models)
        base = (models.vae, _text_encoders(models), denoiser)
        with _explained(self.name, "create_network"), _own_random_stream(seed):
            # The first five by place, as the interface has it; names differ among modules.
            network = function(1.0, dim, alpha, *base, **_accepted(function, _with_dropout(args, dropout)), **args)
            applied = self._applied(network, targets, models, denoiser)
        _require_layers(self.name, applied.counts(), targets, args)
        return applied

    def from_weights(
        self,
        targets: Sequence[LoraTarget],
        models: Models,
        file: NetworkFile,
        *,
        args: Mapping[str, str],
        dropout: float | None = None,
        layout: BlockLayout | None = None,
    ) -> ThirdPartyNetwork:
        """A network with the file's layers, as far as the module finds places for them, and its values.

        Raises: UserError: the module cannot do so, or nothing of the file fits.
        """
        function = getattr(self._module, "create_network_from_weights", None)
        if function is None:
            raise UserError(f"--dim_from_weights: {self.name} has no create_network_from_weights; give --network_dim")
        names = LayerNames(targets, list(models.text_encoders))
        known = {"weights_sd": _renamed(file.flat(), names.live), "for_inference": False}
        denoiser = _seen(targets, models)
        base = (models.vae, _text_encoders(models), denoiser)
        with _explained(self.name, "create_network_from_weights"), _own_random_stream(0):
            extra = _accepted(function, {**known, **_with_dropout(args, dropout)})
            made = function(1.0, str(file.path), *base, **extra, **args)
            network = self._applied(made[0] if isinstance(made, tuple) else made, targets, models, denoiser, file)
            if not network.holds(file):
                network.load(file)
        return network

    def load(self, network: ThirdPartyNetwork, file: NetworkFile) -> tuple[int, int, int]:
        with _explained(self.name, "loading weights"):
            loaded = network.load(file)
        return loaded, len(network.layers()) - loaded, len(file.entries) - loaded

    def _applied(
        self,
        network: Any,
        targets: Sequence[LoraTarget],
        models: Models,
        denoiser: nn.Module,
        file: NetworkFile | None = None,
    ) -> ThirdPartyNetwork:
        parts = list(dict.fromkeys(target.part for target in targets))
        names = LayerNames(targets, list(models.text_encoders))
        applied = ThirdPartyNetwork(self.name, network, models, denoiser, parts, names)
        if not any(True for _ in network.parameters()):
            if file is not None:
                raise _nothing_fits(file, applied.layers())
            raise UserError(f"--network_module: {self.name} found nothing in this model to adapt; see --network_args")
        return applied


def _patch_presets(module: ModuleType) -> None:
    """lycoris 4.1 lists the time embedding by class and by name, and then refuses its layers as duplicates."""

    def without_duplicates(classes: list[str], names: list[str]) -> list[str]:
        listed = "time_embedding.linear_1" in names
        return [name for name in classes if not (listed and name == "TimestepEmbedding")]

    for preset in getattr(module, "PRESET", {}).values():
        if "unet_target_module" in preset:
            preset["unet_target_module"] = without_duplicates(
                preset["unet_target_module"], preset.get("unet_target_name", [])
            )
    network = getattr(module, "LycorisNetworkKohya", None)
    if network is not None:  # what it starts from before a preset is chosen
        network.UNET_TARGET_REPLACE_MODULE = without_duplicates(
            network.UNET_TARGET_REPLACE_MODULE, network.UNET_TARGET_REPLACE_NAME
        )


def _seen(targets: Sequence[LoraTarget], models: Models) -> nn.Module:
    """What a module gets as the denoiser: the live one, or where files are laid out otherwise, their layout."""
    return file_layout(targets, models) or models.denoiser


def _require_layers(
    module: str, counts: Mapping[str, int], targets: Sequence[LoraTarget], args: Mapping[str, str]
) -> None:
    """Raises: UserError: a part that is to be trained has got no layers, where the module shows its layers at all."""
    if not counts:
        return
    # T5 is adapted only on request, so it counts only where the arguments have one.
    asked = args.get("train_t5xxl", "").strip().lower() in ("true", "1")
    wanted = dict.fromkeys(target.part for target in targets if asked or not target.optional)
    lost = [part for part in wanted if not counts.get(part)]
    other = "choose another preset in --network_args, or " if "preset" in args else ""
    denoiser = f"{other}add --network_train_text_encoder_only, or use a network of networks.*"
    text = f"{other}give it the rate 0 in --text_encoder_lr, or add --network_train_unet_only"
    if lost:
        raise UserError(
            *(
                f"--network_module: {module} made no layers in {'the denoiser' if part == DENOISER else part}, "
                f"which would stay untrained; {denoiser if part == DENOISER else text}"
                for part in lost
            )
        )


def _text_encoders(models: Models) -> Any:
    """A single one as it is, several as a list: modules name their layers by that."""
    encoders = list(models.text_encoders.values())
    return encoders[0] if len(encoders) == 1 else encoders


def _with_dropout(args: Mapping[str, str], dropout: float | None) -> dict[str, Any]:
    """--network_dropout under the two names that modules know it by."""
    return {name: dropout for name in ("neuron_dropout", "dropout") if name not in args}


def _accepted(function: Callable[..., Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return dict(extra)
    known = {parameter.name for parameter in parameters}
    return {name: value for name, value in extra.items() if name in known}


@contextmanager
def _own_random_stream(seed: int) -> Iterator[None]:
    """Modules draw from torch's global stream; within the block it is one of this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(derive(seed, "network"))
        yield


@contextmanager
def _explained(module: str, doing: str) -> Iterator[None]:
    """Whatever another's code raises becomes one line that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        LOGGER.debug("%s: %s failed", module, doing, exc_info=True)
        reason = (str(error).splitlines() or ["it says no more; see its own lines above"])[0]
        raise UserError(f"--network_module: {module}: {doing} failed: {type(error).__name__}: {reason}") from error
