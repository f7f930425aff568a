"""Trains a new word with vectors for each cross-attention layer (XTI). Guide: docs/textual_inversion.md"""

from library import cli, embedding

SCRIPT = {"family": "sd", "method": "xti"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


def train(args):
    embedding.train(args, **SCRIPT)


if __name__ == "__main__":
    cli.run(**SCRIPT)
