"""Erases or strengthens a concept of Stable Diffusion 3/3.5 from prompts alone (LECO). Guide: docs/leco.md"""

from library import cli, embedding

SCRIPT = {"family": "sd3", "method": "leco"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


class Sd3LecoTrainer(embedding.Trainer):
    script = SCRIPT


if __name__ == "__main__":
    cli.run(**SCRIPT)
