"""Encodes captions, for training with --cache_text_encoder_outputs_to_disk. Guide: docs/preprocessing.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.preparation.common.script import run_script
from library.preparation.latents.caching import GROUPS, RECIPES, cache_texts, traits_of

if __name__ == "__main__":
    run_script(cache_texts, GROUPS, description=str(__doc__), traits=traits_of, recipes=RECIPES)
