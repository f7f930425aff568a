"""Trains a new word (Textual Inversion) for FLUX.1. Guide: docs/textual_inversion.md"""

from library import cli, embedding

SCRIPT = {"family": "flux", "method": "embedding"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


class FluxTextualInversionTrainer(embedding.Trainer):
    script = SCRIPT


if __name__ == "__main__":
    cli.run(**SCRIPT)
