"""Trains a LoRA-type network on Stable Diffusion 3 and 3.5. Guide: docs/train_network.md"""

from library import cli

SCRIPT = {"family": "sd3", "method": "network"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


if __name__ == "__main__":
    cli.run(**SCRIPT)
