"""Draws the edges of images, white on black. Guide: docs/preprocessing.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.preparation.common.script import run_script
from library.preparation.images.edges import GROUPS, draw_edges

if __name__ == "__main__":
    run_script(draw_edges, GROUPS, description=str(__doc__))
