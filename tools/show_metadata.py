"""Shows what a safetensors file says about itself: training, hashes and the like. Guide: docs/preprocessing.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.preparation.common.script import run_script
from library.preparation.metadata.safetensors_metadata import GROUPS, show_metadata

if __name__ == "__main__":
    run_script(show_metadata, GROUPS, description=str(__doc__))
