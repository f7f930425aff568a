"""Trains a new word (Textual Inversion) for Stable Diffusion 1.x/2.x. Guide: docs/textual_inversion.md"""

from library import cli, embedding

SCRIPT = {"family": "sd", "method": "embedding"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


class TextualInversionTrainer(embedding.Trainer):
    script = SCRIPT


if __name__ == "__main__":
    cli.run(**SCRIPT)
