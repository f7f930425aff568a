"""Trains a whole Stable Diffusion 1.x/2.x model on folders of images (DreamBooth). Guide: docs/fine_tuning.md"""

from library import cli, embedding

SCRIPT = {"family": "sd", "method": "dreambooth"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


def train(args):
    embedding.train(args, **SCRIPT)


if __name__ == "__main__":
    cli.run(**SCRIPT)
