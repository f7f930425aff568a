"""Writes images in smaller sizes, for training at several resolutions. Guide: docs/preprocessing.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.preparation.common.script import run_script
from library.preparation.images.resizing import GROUPS, resize_images

if __name__ == "__main__":
    run_script(resize_images, GROUPS, description=str(__doc__))
