"""Upscales images by two as latents, with a latent upscaler of diffusers. Guide: docs/model_tools.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.model_tools.upscaling import GROUPS, create_upscaler, upscale_images
from library.preparation.common.script import run_script

__all__ = ["create_upscaler"]  # for --highres_fix_upscaler tools.latent_upscaler

if __name__ == "__main__":
    run_script(upscale_images, GROUPS, description=str(__doc__))
