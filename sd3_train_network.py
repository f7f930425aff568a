"""Trains a LoRA-type network on Stable Diffusion 3 and 3.5. Guide: docs/train_network.md"""

from library import cli, embedding

SCRIPT = {"family": "sd3", "method": "network"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


class Sd3NetworkTrainer(embedding.Trainer):
    script = SCRIPT


if __name__ == "__main__":
    cli.run(**SCRIPT)
