"""The old name of train_control_net.py. Guide: docs/controlnet.md"""

import sys

from library import cli
from train_control_net import SCRIPT, setup_parser, train

__all__ = ["SCRIPT", "setup_parser", "train"]

if __name__ == "__main__":
    print("train_controlnet.py: deprecated; use train_control_net.py", file=sys.stderr)
    cli.run(**SCRIPT)
