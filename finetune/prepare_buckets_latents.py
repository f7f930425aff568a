"""Sorts images into buckets and encodes them, for fine_tune.py --in_json. Guide: docs/preprocessing.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.preparation.common.script import run_script
from library.preparation.latents.buckets import GROUPS, prepare

if __name__ == "__main__":
    run_script(prepare, GROUPS, description=str(__doc__))
