"""Merges whole models into one, as a weighted sum. Guide: docs/model_tools.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.model_tools.model_merging import GROUPS, merge_models
from library.preparation.common.script import run_script

if __name__ == "__main__":
    run_script(merge_models, GROUPS, description=str(__doc__))
