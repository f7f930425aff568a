"""Captions the images of a folder with BLIP, or with another image-text-to-text model."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.preparation.captioning.make_captions import GROUPS, make_captions
from library.preparation.common.script import run_script

if __name__ == "__main__":
    run_script(make_captions, GROUPS, description=__doc__)
