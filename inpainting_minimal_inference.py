"""Draws a part of an image again with a model for inpainting; gen_img.py has more options. Guide: docs/inpainting.md"""

from library.families.shared.inpainting_minimal import InpaintingMinimalOptions
from library.generation.minimal import groups_of, run

GROUPS = groups_of(InpaintingMinimalOptions)

if __name__ == "__main__":
    run(str(__doc__), GROUPS)
