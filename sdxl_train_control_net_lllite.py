"""Trains a ControlNet-LLLite for SDXL. Guide: docs/controlnet.md"""

from library import cli, embedding

SCRIPT = {"family": "sdxl", "method": "lllite"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


def train(args):
    embedding.train(args, **SCRIPT)


if __name__ == "__main__":
    cli.run(**SCRIPT)
