"""Finds faces, cuts and turns images by them, and puts their places into the names. Guide: docs/preprocessing.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.preparation.common.script import run_script
from library.preparation.images.faces import GROUPS, cut_faces

if __name__ == "__main__":
    run_script(cut_faces, GROUPS, description=str(__doc__))
