"""Generates images with SDXL; gen_img.py does so with every model. Guide: docs/gen_img.md"""

from library.generation.script import ONE_FAMILY as GROUPS
from library.generation.script import run

if __name__ == "__main__":
    run(str(__doc__), GROUPS, fixed="sdxl")
