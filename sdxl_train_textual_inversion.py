"""Trains a new word (Textual Inversion) for SDXL. Guide: docs/textual_inversion.md"""

from library import cli, embedding

SCRIPT = {"family": "sdxl", "method": "embedding"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


class SdxlTextualInversionTrainer(embedding.Trainer):
    script = SCRIPT


if __name__ == "__main__":
    cli.run(**SCRIPT)
