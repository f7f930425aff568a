"""Tags the images of a folder with a WD14 tagger of SmilingWolf's, or with DeepDanbooru."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.preparation.common.script import run_script
from library.preparation.tagging.tag_images import GROUPS, tag_images

if __name__ == "__main__":
    run_script(tag_images, GROUPS, description=__doc__)
