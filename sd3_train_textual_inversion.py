"""Trains a new word (Textual Inversion) for Stable Diffusion 3/3.5. Guide: docs/textual_inversion.md"""

from library import cli, embedding

SCRIPT = {"family": "sd3", "method": "embedding"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


class Sd3TextualInversionTrainer(embedding.Trainer):
    script = SCRIPT


if __name__ == "__main__":
    cli.run(**SCRIPT)
