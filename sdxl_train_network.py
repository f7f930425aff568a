"""Trains a LoRA-type network on SDXL. Guide: docs/train_network.md"""

from library import cli, embedding

SCRIPT = {"family": "sdxl", "method": "network"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


class SdxlNetworkTrainer(embedding.Trainer):
    script = SCRIPT


if __name__ == "__main__":
    cli.run(**SCRIPT)
