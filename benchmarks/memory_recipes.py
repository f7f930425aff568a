"""Whether the recipes of the guides fit the cards that they are for, by simulation: the table of docs/memory.md.

    python benchmarks/memory_recipes.py
    python benchmarks/memory_recipes.py --only flux-lora-12

Nothing is downloaded, no weights are read and no GPU is needed: the models are files without data, and each run is what
`--plan` shows of it. It prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import header_models
from PIL import Image

from library import checking, registry, session
from library.options import parsing
from library.options.devices import GIB, device_of_memory
from library.planning.plan import Plan
from library.planning.simulation import Request, simulate
from library.runtime import logs
from library.runtime.processes import Processes

LORA = "--network_dim=16 --network_alpha=16 --network_train_unet_only --learning_rate=1e-4"
CACHED = "--cache_latents --cache_text_encoder_outputs --gradient_checkpointing --mixed_precision=bf16"
FLUX_LORA = f"--network_module=networks.lora_flux {LORA} {CACHED}"
ADAFACTOR = (
    "--optimizer_type=AdaFactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False "
    "--max_grad_norm=0 --learning_rate=1e-5"
)
FUSED = f"{ADAFACTOR} --fused_backward_pass --full_bf16"


@dataclass(frozen=True)
class Recipe:
    """A command for a card."""

    family: str
    method: str
    memory: int  # GB of the card
    side: int  # pixels
    arguments: str


RECIPES = {
    "flux-lora-24": Recipe("flux", "network", 24, 1024, f"{FLUX_LORA} --fp8_base --optimizer_type=AdamW8bit"),
    "flux-lora-16": Recipe("flux", "network", 16, 1024, f"{FLUX_LORA} --fp8_base {ADAFACTOR}"),
    "flux-lora-12": Recipe(
        "flux", "network", 12, 1024, f"{FLUX_LORA} --fp8_base --optimizer_type=AdamW8bit --blocks_to_swap=16"
    ),
    "flux-lora-10": Recipe(
        "flux", "network", 10, 1024, f"{FLUX_LORA} --fp8_base --optimizer_type=AdamW8bit --blocks_to_swap=22"
    ),
    "flux-lora-8": Recipe(
        "flux", "network", 8, 1024, f"{FLUX_LORA} --fp8_base --optimizer_type=AdamW8bit --blocks_to_swap=28"
    ),
    "flux-full-24": Recipe("flux", "finetune", 24, 1024, f"{CACHED} {FUSED} --blocks_to_swap=8"),
    "sdxl-lora-12": Recipe("sdxl", "network", 12, 1024, f"--network_module=networks.lora {LORA} {CACHED}"),
    "sdxl-lora-8": Recipe("sdxl", "network", 8, 1024, f"--network_module=networks.lora {LORA} {CACHED}"),
    "sdxl-full-10": Recipe("sdxl", "finetune", 10, 1024, f"{CACHED} {FUSED}"),
    "sd1-full-12": Recipe(
        "sd", "dreambooth", 12, 512,
        "--cache_latents --gradient_checkpointing --mixed_precision=bf16 --optimizer_type=AdamW8bit "
        "--learning_rate=2e-6",
    ),
    "sd1-lora-8": Recipe(
        "sd", "network", 8, 512, f"--network_module=networks.lora {LORA} --cache_latents --mixed_precision=bf16"
    ),
}  # fmt: skip


def make_files(folder: Path) -> dict[str, list[str]]:
    """By family, the flags that name its published model as a file without data."""
    from tests.builders.t5 import write_t5_tokenizer

    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")  # of the tests: only lengths matter
    header_models.write_sd15(folder / "sd15.safetensors")
    header_models.write_sdxl(folder / "sdxl.safetensors")
    flux = header_models.write_flux(folder)
    model = "--pretrained_model_name_or_path="
    return {
        "sd": [f"{model}{folder / 'sd15.safetensors'}"],
        "sdxl": [f"{model}{folder / 'sdxl.safetensors'}"],
        "flux": [f"--{name}={file}" for name, file in flux.items()] + [f"--tokenizer_cache_dir={folder}"],
    }


def make_images(folder: Path, side: int) -> Path:
    """One image of this size, with a caption."""
    place = folder / str(side) / "1_a"
    place.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (90, 120, 150)).save(place / "image.png")
    (place / "image.caption").write_text("an image", encoding="utf-8")
    return place.parent


def plan_of(recipe: Recipe, model: list[str], folder: Path) -> Plan:
    """The plan of a recipe. Raises: UserError: the run would be refused."""
    family, method = registry.FAMILIES[recipe.family], registry.METHODS[recipe.method]
    images = make_images(folder, recipe.side)
    common = [f"--train_data_dir={images}", f"--output_dir={folder}", f"--resolution={recipe.side}", "--seed=1"]
    argv = [*common, *model, *recipe.arguments.split()]
    opts = parsing.parse_options(registry.groups_for(recipe.family, recipe.method), argv)
    opts = method.complete_options(family.complete_options(opts))
    specs = checking.check(opts, family, method)
    data, length = session.open_data(opts, specs, family.traits, Processes())
    device = device_of_memory(recipe.memory * GIB)
    request = Request(opts, family, method, data, length, device, specs)
    return Plan(request, simulate(request, whole=False))


def row(name: str, recipe: Recipe, plan: Plan) -> str:
    kind = plan.request.device.kind
    _, phase = plan.simulated.peak(kind)
    fits = "yes" if plan.fits else "**no**"
    return (
        f"| {name} | {recipe.memory} GB | {recipe.side} | `{recipe.arguments}` | {plan.device_bytes / GIB:.2f} | "
        f"{fits} | {phase.name} | {plan.cpu_bytes / GIB:.1f} |"
    )


HEAD = """| recipe | card | pixels | options | GiB needed | fits | where | GiB of CPU memory |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RECIPES, help="recipes to try; by default all")
    parser.add_argument("--files", help="folder of files without data that an earlier run has left")
    args = parser.parse_args()
    logs.quiet_third_parties()
    logs.setup_logging("ERROR")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.files or temporary)
        model = make_files(folder)
        print(HEAD, flush=True)
        for name in args.only or RECIPES:
            started = time.process_time()
            recipe = RECIPES[name]
            print(row(name, recipe, plan_of(recipe, model[recipe.family], folder)), flush=True)
            print(f"{name}: {time.process_time() - started:.1f} s of CPU", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
