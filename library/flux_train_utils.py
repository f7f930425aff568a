"""A name under which other programs import what they need."""

from argparse import ArgumentParser

from library.embedding import add_missing_options
from library.families.flux.options import FluxOptions


def add_flux_train_arguments(parser: ArgumentParser) -> None:
    """Adds the options of FLUX.1, but for those that the parser has already."""
    add_missing_options(parser, "flux", FluxOptions.group)
