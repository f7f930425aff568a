"""Trains a ControlNet for FLUX.1. Guide: docs/controlnet.md"""

from library import cli, embedding

SCRIPT = {"family": "flux", "method": "control_net"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


def train(args):
    embedding.train(args, **SCRIPT)


if __name__ == "__main__":
    cli.run(**SCRIPT)
