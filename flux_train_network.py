"""Trains a LoRA-type network on FLUX.1. Guide: docs/train_network.md"""

from library import cli, embedding

SCRIPT = {"family": "flux", "method": "network"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


class FluxNetworkTrainer(embedding.Trainer):
    script = SCRIPT


if __name__ == "__main__":
    cli.run(**SCRIPT)
