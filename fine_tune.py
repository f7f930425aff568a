"""Fine-tunes a whole Stable Diffusion 1.x/2.x model on the images of a metadata file. Guide: docs/fine_tuning.md"""

from library import cli, embedding

SCRIPT = {"family": "sd", "method": "finetune"}


def setup_parser():
    return cli.build_parser(**SCRIPT)


def train(args):
    embedding.train(args, **SCRIPT)


if __name__ == "__main__":
    cli.run(**SCRIPT)
