"""Trained parameters and file sizes of networks on the published architectures, as a Markdown table.

    python benchmarks/network_sizes.py
    python benchmarks/network_sizes.py --dim=32 --only flux

The models are on torch's meta device, so nothing is downloaded and only the networks take memory. Networks of the
denoiser alone are counted, as `--network_train_unet_only` makes them. Files are those of --save_precision=fp16, without
their headers. "-": the arguments do not fit the layers of that family.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from architectures import FLUX_DEV, SD15, SD35_LARGE, SDXL, build_denoiser

from library.errors import UserError
from library.families.flux.targets import transformer_targets
from library.families.sd.targets import unet_targets as sd_targets
from library.families.sd3.targets import mmdit_targets
from library.families.sdxl.targets import unet_targets as sdxl_targets
from library.runtime import logs
from library.types import LoraTarget, Models
from networks import lora, lora_flux, lora_sd3, lycoris, oft, oft_flux
from networks.build import DeclaredBuilder
from networks.spec import NetworkModule

FAMILIES = {
    "sd": ("SD 1.5", SD15, sd_targets),
    "sdxl": ("SDXL", SDXL, sdxl_targets),
    "sd3": ("SD 3.5 Large", SD35_LARGE, mmdit_targets),
    "flux": ("FLUX.1 dev", FLUX_DEV, transformer_targets),
}


@dataclass(frozen=True)
class Row:
    """A network: its arguments, and the module where it is not networks.lycoris: for all families, or for some."""

    args: str
    dim: int | None = None  # None: --dim
    module: NetworkModule = lycoris.MODULE
    modules: Mapping[str, NetworkModule] = field(default_factory=dict)


# attn-mlp: the layers that networks.lora adapts in a U-Net
ROWS = {
    "LoRA": Row("", module=lora.MODULE, modules={"sd3": lora_sd3.MODULE, "flux": lora_flux.MODULE}),
    "LoRA of linear layers and convolutions (LoCon)": Row("algo=lora"),
    "LoRA with DoRA": Row("algo=lora preset=attn-mlp dora_wd=True"),
    "LoHa": Row("algo=loha preset=attn-mlp"),
    "LoKr, factor=8": Row("algo=lokr preset=attn-mlp factor=8"),
    "LoKr, factor=8, full_matrix": Row("algo=lokr preset=attn-mlp factor=8 full_matrix=True"),
    "GLoRA": Row("algo=glora preset=attn-mlp"),
    "(IA)^3": Row("algo=ia3 preset=ia3"),
    "Diag-OFT, blocks of up to 16 rows": Row("algo=diag-oft preset=attn-mlp", dim=16),
    "BOFT, blocks of up to 40 rows": Row("algo=boft preset=attn-mlp", dim=40),
    "networks.oft, networks.oft_flux, 4 blocks": Row("", dim=4, module=oft.MODULE, modules={"flux": oft_flux.MODULE}),
}


@cache
def unloaded(family: str) -> tuple[Models, list[LoraTarget]]:
    """The denoiser without its values, and what networks may adapt in it."""
    _, architecture, find_targets = FAMILIES[family]
    denoiser = build_denoiser(architecture, architecture.config, torch.device("meta"))
    return Models(denoiser, {}, {}, None, None), find_targets(denoiser)


def count(family: str, row: Row, dim: int) -> tuple[int, int]:
    """Trained parameters, and values that the file holds."""
    module = row.modules.get(family, row.module)
    args = dict(pair.split("=", 1) for pair in row.args.split())
    models, targets = unloaded(family)
    network = DeclaredBuilder(module).create(targets, models, dim=row.dim or dim, alpha=None, args=args, seed=0)
    values = sum(tensor.numel() for tensor in network.file_state().values())
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad), values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=16, help="rank of the types that have one (default: 16)")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="families")
    args = parser.parse_args()
    logs.quiet_third_parties()
    names = [FAMILIES[family][0] for family in args.only]
    print(f"| rank {args.dim} | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for label, row in ROWS.items():
        cells = []
        for family in args.only:
            try:
                parameters, values = count(family, row, args.dim)
            except UserError:
                cells.append("-")
            else:
                cells.append(f"{parameters / 1e6:.2f} M, {2 * values / 2**20:.1f} MiB")
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
