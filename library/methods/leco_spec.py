"""Concept editing from prompts, as a method: its spec, and what is checked before torch is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.entry_points import EntryPoint
from library.errors import UserError
from library.methods import network_spec
from library.methods.leco_pairs import read_pairs
from library.methods.spec import MethodSpec
from library.options.leco import LECO_GROUPS

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import FamilyTraits


def check_options(opts: Options, traits: FamilyTraits) -> list[str]:
    """One line for each mistake in the options of the network, and in the prompt file."""
    problems = network_spec.check_options(opts, traits)
    try:
        read_pairs(opts.method.prompts_file, traits)
    except UserError as error:
        problems += error.problems
    return problems


def of_the_denoiser(opts: Options) -> Options:
    """The options with the network on the denoiser alone: texts are what steers, so they stay as they are."""
    return network_spec.with_file_format(opts.replaced(network_train_unet_only=True))


LECO = MethodSpec(
    name="leco",
    title="Erases or strengthens a concept of {model}, or makes a slider of it, from prompts alone (LECO).",
    tracker="leco_train",
    usage=network_spec.NETWORK.usage,
    groups=LECO_GROUPS,
    method=EntryPoint("library.methods.network:NetworkMethod"),
    check=check_options,
    complete_options=of_the_denoiser,
    data=EntryPoint("library.methods.leco_data:PromptData"),
    draw=EntryPoint("library.methods.leco:make_draw"),
    planned_draw=EntryPoint("library.methods.leco:make_planned_draw"),
)
