"""Draws an image with a network file on a Diffusers model, as library.model_tools.pipelines does from Python."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.model_tools.drawing import GROUPS, draw
from library.preparation.common.script import run_script

if __name__ == "__main__":
    run_script(draw, GROUPS, description=str(__doc__))
