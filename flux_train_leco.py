"""Erases or strengthens a concept of FLUX.1 from prompts alone (LECO). Guide: docs/leco.md"""

from library import cli, embedding

SCRIPT = {"family": "flux", "method": "leco"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


class FluxLecoTrainer(embedding.Trainer):
    script = SCRIPT


if __name__ == "__main__":
    cli.run(**SCRIPT)
