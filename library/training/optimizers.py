"""Optimizers by the names that command lines use."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from library.errors import UserError
from library.options.optimizer import (
    literal_args,
    optimizer_name,
    optimizer_path,
    sets_own_rate,
)
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from library.options.optimizer import OptimizerOptions

T = TypeVar("T")
_ONE_RATE = ("dadaptation", "prodigyopt")  # packages whose optimizers use one rate for everything
_RATE_OF_ONE = (*_ONE_RATE, "prodigyplus")  # packages whose optimizers find the rate; the given one is a factor
_LOW_FACTOR = 0.1


def make_optimizer(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimizer over `groups` ({"params", "lr", "name"}), ready to train; `groups` stay as they are.

    Rates may be negative where the optimizer's rule allows it: training then leads away from the images.

    Raises: UserError: the class is not there, refuses its arguments, or cannot run on this device.
    """
    cls, name, arguments = _chosen(options)
    groups = _with_fitting_rates([{"lr": options.learning_rate, **group} for group in groups], options, name)
    rate = None
    if not sets_own_rate(options):
        # classes refuse a default below 0, though they follow such a rate in a group
        rate = abs(options.learning_rate) or max(abs(group["lr"]) for group in groups)
    _try(cls, name, arguments, rate, groups[0]["params"][0])
    optimizer = construct(cls, name, "--optimizer_args", arguments, groups, lr=rate)
    optimizer_mode(optimizer, training=True)
    return optimizer


def dry_run(options: OptimizerOptions, device: torch.device, mesh: DeviceMesh | None = None) -> None:
    """Finds out, before anything large is read, whether the optimizer takes its arguments and can step on `device`.

    Args: mesh: of the processes that weights are sharded over, if they are.
    Raises: UserError, as `make_optimizer` does.
    """
    import torch

    cls, name, arguments = _chosen(options)
    rate = None if sets_own_rate(options) else abs(options.learning_rate or 1.0)  # a part's own rate may be meant
    _try(cls, name, arguments, rate, torch.zeros((), device=device))
    if mesh is not None:
        from library.training.sharding import check_optimizer

        def make(weights: list[torch.Tensor]) -> torch.optim.Optimizer:
            made = construct(cls, name, "--optimizer_args", arguments, weights, lr=rate)
            optimizer_mode(made, training=True)
            return made

        with _apart(device):
            check_optimizer(make, name, mesh)


def optimizer_class(options: OptimizerOptions) -> type:
    """The class that the options name. Raises: UserError: it is not there."""
    return import_class("--optimizer_type", optimizer_path(options), "torch.optim.Optimizer")


def _chosen(options: OptimizerOptions) -> tuple[type, str, dict[str, Any]]:
    """The class, the name that it was chosen by, and its arguments but for the rate: the user's, then our defaults."""
    name, path = optimizer_name(options), optimizer_path(options)
    cls = optimizer_class(options)
    arguments = literal_args("--optimizer_args", options.optimizer_args)
    if "lr" in arguments:
        raise UserError("--optimizer_args: the rate is not given here; use --learning_rate")
    if sets_own_rate(options):
        arguments["relative_step"] = True
    if path == "torch.optim.AdamW" and not {"foreach", "differentiable"} & arguments.keys():
        arguments = {"fused": True, **arguments}  # one kernel per step on CUDA, one pass over memory on CPU
    elif name.lower().startswith("sgdnesterov"):
        arguments = {"nesterov": True, "momentum": 0.9, **arguments}
    return cls, name, arguments


def describe_optimizer(optimizer: torch.optim.Optimizer, options: OptimizerOptions) -> str:
    """The text of ss_optimizer: the qualified class, then the arguments the user gave."""
    arguments = literal_args("--optimizer_args", options.optimizer_args)
    cls = type(optimizer)
    text = f"{cls.__module__}.{cls.__name__}"
    return text + (f"({','.join(f'{k}={v}' for k, v in arguments.items())})" if arguments else "")


def optimizer_mode(optimizer: torch.optim.Optimizer, *, training: bool) -> None:
    """Turns the weights of schedule-free optimizers into those to train on, or into the average to save and to use.

    Nothing happens with other optimizers. Those that accelerate has wrapped are reached too.
    """
    switch = getattr(optimizer, "train" if training else "eval", None)
    if callable(switch):
        switch()


@contextlib.contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A context in which the weights are the average of a schedule-free optimizer; afterwards exactly what they were.

    Its own way back rounds: a run would depend on how often it saved, and processes would drift apart where only the
    first one samples. The copies lie in CPU memory. Nothing happens with other optimizers.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has the method for all
    if not callable(getattr(inner, "eval", None)):
        yield
        return
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [weight.detach().to("cpu", copy=True) for weight in weights]
    optimizer_mode(optimizer, training=False)
    try:
        yield
    finally:
        optimizer_mode(optimizer, training=True)
        for weight, value in zip(weights, kept, strict=True):
            weight.detach().copy_(value)


def effective_rates(optimizer: torch.optim.Optimizer) -> list[float] | None:
    """Rate of each group in the coming step where the optimizer finds it itself (d * lr); None with all others.

    To be called before `step()`. Most keep d as a number; DAdaptAdanIP keeps a tensor, which its step reads as well.
    """
    groups = optimizer.param_groups
    if not all("d" in group for group in groups):
        return None
    return [float(group["d"]) * group["lr"] for group in groups]


# ---- classes and their arguments


def import_class(flag: str, path: str, base: str) -> type:
    """The class at a full import path, which must be one of `base`, a path too.

    Raises: UserError: there is none; names `flag`.
    """
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except AttributeError:
        raise UserError(f"{flag}: {module} has no class {attribute!r}") from None
    except Exception as error:  # whatever a package raises when it cannot be imported on this machine
        raise UserError(f"{flag}: {path} cannot be imported ({_first_line(error)})") from error
    base_module, _, base_name = base.rpartition(".")
    if not isinstance(found, type) or not issubclass(found, getattr(importlib.import_module(base_module), base_name)):
        raise UserError(f"{flag}: {path} is no {base}")
    return found


def construct(cls: Callable[..., T], name: str, flag: str, arguments: dict[str, Any], target: Any, **fixed: Any) -> T:
    """``cls(target, **fixed, **arguments)``.

    Raises: UserError: names arguments that `cls` does not take, or what it says to their values.
    """
    parameters = list(inspect.signature(cls).parameters.values())[1:]  # the first is for `target`
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        known = [p.name for p in parameters if p.name not in fixed and p.kind is not inspect.Parameter.VAR_POSITIONAL]
        unknown = [argument for argument in arguments if argument not in known]
        if unknown:
            raise UserError(f"{flag}: {name} has no argument {unknown[0]!r}; it takes {', '.join(known)}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some print their arguments
            return cls(target, **fixed, **arguments)
    except Exception as error:  # what a class raises at its arguments is of any kind, AssertionError too
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
        raise UserError(f"{flag}: {name} refuses {given}: {_first_line(error)}") from error


def _try(cls: type, name: str, arguments: dict[str, Any], rate: float | None, like: torch.Tensor) -> None:
    """One step on a small tensor of the device that is trained on: some classes fail there only then.

    Raises: UserError.
    """
    import torch

    probe = torch.nn.Parameter(torch.zeros(64, 64, dtype=like.dtype, device=like.device))
    probe.grad = torch.full_like(probe, 1e-3)
    with _apart(like.device):
        optimizer = construct(cls, name, "--optimizer_args", arguments, [probe], lr=rate)
        try:
            optimizer_mode(optimizer, training=True)
            optimizer.step()
        except Exception as error:  # kernels that are missing show as errors of any kind
            raise UserError(
                f"--optimizer_type: {name} cannot train on {like.device.type} here: {_first_line(error)}"
            ) from error


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Lets a trial leave nothing behind: no text, no warnings, the random generators as they were."""
    import torch

    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ---- rates


def _with_fitting_rates(groups: list[dict[str, Any]], options: OptimizerOptions, name: str) -> list[dict[str, Any]]:
    """The groups with the rates that the optimizer can use: their own, one for all, or none. Warns of those unused.

    Raises: UserError: a rate of 0 or below where it is a factor.
    """
    package = optimizer_path(options).split(".")[0]
    rates = list(dict.fromkeys(group["lr"] for group in groups))
    listed = ", ".join(f"{rate:g}" for rate in rates)
    if sets_own_rate(options):
        if len(rates) > 1:
            LOGGER.warning("%s sets the rate itself (relative_step): the rates %s are not used", name, listed)
        return [{key: value for key, value in group.items() if key != "lr"} for group in groups]
    if package in _ONE_RATE:
        if len(rates) > 1:
            LOGGER.warning(
                "%s takes one rate for everything: %g, that of %s, counts; of %s the others are not used",
                *(name, rates[0], groups[0].get("name", "the first group"), listed),
            )
        groups = [{**group, "lr": rates[0]} for group in groups]
    if package in _RATE_OF_ONE:
        lowest = min(group["lr"] for group in groups)
        if lowest <= 0:
            raise UserError(f"--learning_rate: {name} needs a rate above 0, about 1, got {lowest:g}")
        if lowest < _LOW_FACTOR:
            LOGGER.warning(
                "%s finds the rate itself and multiplies it by the one given, usually 1; with %g it will learn little",
                *(name, lowest),
            )
    return groups
