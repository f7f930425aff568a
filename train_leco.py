"""Erases or strengthens a concept of Stable Diffusion 1.x/2.x from prompts alone (LECO). Guide: docs/leco.md"""

from library import cli, embedding

SCRIPT = {"family": "sd", "method": "leco"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


class LecoTrainer(embedding.Trainer):
    script = SCRIPT


if __name__ == "__main__":
    cli.run(**SCRIPT)
