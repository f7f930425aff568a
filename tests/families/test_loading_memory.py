"""Loading takes about as much CPU memory as the file has bytes: never a second copy, never in wider numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.families.flux.adapter import FluxFamily
from library.families.sd3.adapter import Sd3Family
from library.families.sdxl.adapter import SdxlFamily
from tests.builders import sd3
from tests.builders.flux import flux_options, flux_tensors, write_parts
from tests.builders.memory import most_memory, needs_linux
from tests.builders.sdxl import sdxl_options, write_tiny_sdxl


def flux(folder: Path, patch: pytest.MonkeyPatch) -> tuple[Path, FluxFamily]:
    save_file(flux_tensors(width=1024, head=32, blank=True), folder / "flux.safetensors")
    return folder / "flux.safetensors", FluxFamily(flux_options(folder / "flux.safetensors", **write_parts(folder)))


def stable_diffusion_3(folder: Path, patch: pytest.MonkeyPatch) -> tuple[Path, Sd3Family]:
    patch.setattr(sd3, "WIDTH", 768)
    path = sd3.write_tiny_sd3(folder / "sd3.safetensors", "5-large", torch.float16, depth=5)
    return path, Sd3Family(sd3.sd3_options(path))


def sdxl(folder: Path, patch: pytest.MonkeyPatch) -> tuple[Path, SdxlFamily]:
    path = write_tiny_sdxl(folder / "sdxl.safetensors", dtype=torch.float16, channels=(192, 384, 512))
    return path, SdxlFamily(sdxl_options(path))


@needs_linux
@pytest.mark.parametrize("make", [flux, stable_diffusion_3, sdxl])
def test_loading_takes_one_copy(make, tmp_path, monkeypatch):
    path, family = make(tmp_path, monkeypatch)
    size = path.stat().st_size
    assert size > 120e6
    kept = []
    taken = most_memory(lambda: kept.append(family.loader.load()))
    # Beside the copy: what is mapped of the file at a time, 64 MiB, and what loading imports.
    assert 0.9 * size < taken < 1.05 * size + 130e6
