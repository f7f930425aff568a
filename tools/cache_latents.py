"""Encodes the images of a data set, for training with --cache_latents_to_disk. Guide: docs/preprocessing.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.preparation.common.script import run_script
from library.preparation.latents.caching import GROUPS, RECIPES, cache_latents, traits_of

if __name__ == "__main__":
    run_script(cache_latents, GROUPS, description=str(__doc__), traits=traits_of, recipes=RECIPES)
