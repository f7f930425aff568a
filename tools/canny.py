"""Draws the edges of images, white on black. Guide: docs/preprocessing.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.preparation.edges import GROUPS, draw_edges
from library.preparation.script import run_script

if __name__ == "__main__":
    run_script(draw_edges, GROUPS, description=str(__doc__))
