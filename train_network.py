"""Trains a LoRA-type network on Stable Diffusion 1.x/2.x. Guide: docs/train_network.md"""

from library import cli, embedding

SCRIPT = {"family": "sd", "method": "network"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


class NetworkTrainer(embedding.Trainer):
    script = SCRIPT


if __name__ == "__main__":
    cli.run(**SCRIPT)
