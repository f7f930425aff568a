"""Merges the tag files beside images into a metadata file, from which fine_tune.py trains."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.preparation.common.script import run_script
from library.preparation.metadata.merging import TAG_GROUPS as GROUPS
from library.preparation.metadata.merging import merge_tags

if __name__ == "__main__":
    run_script(merge_tags, GROUPS, description="Merges tag files into a metadata file.")
