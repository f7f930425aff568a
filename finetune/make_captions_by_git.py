"""Captions the images of a folder with GIT."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.preparation.captioning.make_captions import GIT_GROUPS as GROUPS
from library.preparation.captioning.make_captions import make_captions_by_git
from library.preparation.common.script import run_script

if __name__ == "__main__":
    run_script(make_captions_by_git, GROUPS, description=__doc__)
