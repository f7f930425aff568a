"""Erases or strengthens a concept of SDXL from prompts alone (LECO). Guide: docs/leco.md"""

from library import cli, embedding

SCRIPT = {"family": "sdxl", "method": "leco"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


class SdxlLecoTrainer(embedding.Trainer):
    script = SCRIPT


if __name__ == "__main__":
    cli.run(**SCRIPT)
