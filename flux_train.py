"""Trains a whole FLUX.1 model. Guide: docs/fine_tuning.md"""

from library import cli, embedding

SCRIPT = {"family": "flux", "method": "finetune"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


def train(args):
    embedding.train(args, **SCRIPT)


if __name__ == "__main__":
    cli.run(**SCRIPT)
