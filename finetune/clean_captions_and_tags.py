"""Cleans the captions and tags of a metadata file.

The rules are yours to change: library/preparation/metadata/cleaning_rules.py

`python finetune/clean_captions_and_tags.py meta.json meta_clean.json`
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.preparation.common.script import run_script
from library.preparation.metadata.cleaning import GROUPS, clean

if __name__ == "__main__":
    run_script(clean, GROUPS, description="Cleans the captions and tags of a metadata file.")
