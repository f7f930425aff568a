"""What the recipes need, by simulation: the tables of docs/recipes.md and docs/memory.md.

    python benchmarks/memory_recipes.py                        # prints a row for each, and whether it fits
    python benchmarks/memory_recipes.py --only flux-lora-8gb
    python benchmarks/memory_recipes.py --write                # and puts the tables into the guides

Nothing is downloaded, no weights are read and no GPU is needed: the models are files without data, of the published
sizes, and each run is what `--plan` shows of it. Status 1: a recipe leaves less than 5 % of its card.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import header_models
from architectures import SD35_LARGE, SD35_MEDIUM
from PIL import Image

from library import checking, registry, session
from library.options import parsing, recipes
from library.options.devices import GIB, device_of_memory
from library.planning.plan import Plan
from library.planning.simulation import Request, simulate
from library.runtime import logs
from library.runtime.processes import Processes

SPARE = 0.05  # of a card's memory, for what no tensor shows: fragmentation, workspaces, a display
MODELS = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL", "sd35m": "SD 3.5 medium", "sd35l": "SD 3.5 large",
          "flux": "FLUX.1 dev"}  # fmt: skip
LARGEST_BATCH = 16
CARDS = (8, 12, 16, 24, 48, 80)  # GB


@dataclass(frozen=True)
class Recipe:
    """A file of recipes/, named MODEL-METHOD-MEMORYgb."""

    name: str

    @property
    def model(self) -> str:
        return self.name.split("-")[0]

    @property
    def kind(self) -> str:
        return self.name.split("-")[1]

    @property
    def about(self) -> recipes.About:
        return recipes.about(recipes.FOLDER / f"{self.name}.toml")


def all_recipes() -> list[Recipe]:
    """By model, method and card."""
    found = map(Recipe, recipes.names())
    models = list(MODELS)
    return sorted(found, key=lambda one: (models.index(one.model), one.kind != "lora", one.kind, one.about.card))


def make_model(name: str, folder: Path) -> list[str]:
    """Writes a published model as files without data. Returns: the flags that name it."""
    from tests.builders.t5 import write_t5_tokenizer

    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    write: dict[str, Callable[[Path], None]] = {"sd15": header_models.write_sd15, "sdxl": header_models.write_sdxl}
    if name in write:
        write[name](folder / "model.safetensors")
        return [f"--pretrained_model_name_or_path={folder / 'model.safetensors'}"]
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")  # of the tests: only lengths matter
    if name == "flux":
        files = header_models.write_flux(folder)
    else:
        files = header_models.write_sd3(folder, name, SD35_MEDIUM if name == "sd35m" else SD35_LARGE)
    return [f"--{option}={file}" for option, file in files.items()] + [f"--tokenizer_cache_dir={folder}"]


def data_flags(method: str, folder: Path, side: int) -> list[str]:
    """A square image with a caption as the method wants it, often enough for any batch. Returns: flags that name it."""
    images = folder / str(side) / f"{LARGEST_BATCH}_a"
    control = folder / str(side) / "control"
    for place in (images, control):
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (90, 120, 150)).save(place / "image.png")
    (images / "image.caption").write_text("a zqxword", encoding="utf-8")
    if method in ("control_net", "lllite"):
        return [f"--train_data_dir={images.parent}", f"--conditioning_data_dir={control}"]
    if method == "finetune":
        config = folder / f"{side}.toml"
        metadata = folder / f"{side}.json"
        metadata.write_text('{"image": {"caption": "a zqxword"}}', encoding="utf-8")
        config.write_text(
            f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images}'\nmetadata_file = '{metadata}'\n"
            f"num_repeats = {LARGEST_BATCH}\n",
            encoding="utf-8",
        )
        return [f"--dataset_config={config}"]
    words = ["--token_string=zqxword", "--init_word=a"] if method == "embedding" else []
    return [f"--train_data_dir={images.parent}", *words]


def plan_of(script: str, card: int, argv: Sequence[str], model: Sequence[str], folder: Path) -> Plan:
    """The plan of a script's command line on a card of so many GB. Raises: UserError: the run would be refused."""
    family_name, method_name = next(
        (name, spec.scripts[script]) for name, spec in registry.FAMILIES.items() if script in spec.scripts
    )
    family, method = registry.FAMILIES[family_name], registry.METHODS[method_name]
    groups, scripts = registry.groups_for(family_name, method_name), registry.scripts_of(family_name, method_name)
    common = [f"--output_dir={folder}", "--seed=1", *model, *argv]
    given = parsing.parse_options(groups, common, scripts=scripts).data
    data = data_flags(method_name, folder, int(str(given.resolution).split(",")[0]))
    opts = parsing.parse_options(groups, [*common, *data], scripts=scripts)
    opts = method.complete_options(family.complete_options(opts))
    specs = checking.check(opts, family, method)
    loaded, length = session.open_data(opts, specs, family.traits, Processes())
    request = Request(opts, family, method, loaded, length, device_of_memory(card * GIB), specs)
    return Plan(request, simulate(request))


def share(plan: Plan) -> float:
    """Of the card's memory, what the run needs."""
    return plan.device_bytes / plan.request.device.memory


HEAD = """| recipe | script | pixels | batch | GiB of GPU memory | where | GiB of CPU memory | seconds a step | on |
|---|---|---|---|---|---|---|---|---|"""


def row(recipe: Recipe, plan: Plan) -> str:
    """The row of docs/recipes.md."""
    device, opts = plan.request.device, plan.request.opts
    _, phase = plan.simulated.peak(device.kind)
    side = str(opts.data.resolution).split(",")[0]
    return (
        f"| `{recipe.name}` | `{recipe.about.script}.py` | {side} | {opts.data.train_batch_size} | "
        f"{plan.device_bytes / GIB:.1f} of {recipe.about.card} | {phase.name} | {plan.cpu_bytes / GIB:.1f} | "
        f"{plan.step_seconds:.2g} | {device.basis.removeprefix('public figures of ')} |"
    )


def by_card(names: Sequence[str]) -> str:
    """The table of docs/memory.md: for each model and method, the recipe of each card."""
    lines = ["| | " + " | ".join(f"{card} GB" for card in CARDS) + " |", "|---" * (len(CARDS) + 1) + "|"]
    found = {(one.model, one.kind, one.about.card): one.name for one in map(Recipe, names)}
    for model, kind in dict.fromkeys((model, kind) for model, kind, _ in found):
        cells = [f"`{found[model, kind, card]}`" if (model, kind, card) in found else "" for card in CARDS]
        lines.append(f"| {MODELS[model]}, {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def between_marks(path: Path, table: str | None = None) -> str:
    """The table between the marks of a guide, after it was replaced by another one, if there is one."""
    found = re.search(
        r"(?<=<!-- by benchmarks/memory_recipes.py -->\n).*?(?=<!-- end -->)", path.read_text("utf-8"), re.S
    )
    if found is None:
        raise SystemExit(f"{path}: the marks of the table are missing")
    if table is not None:
        text = found.string
        path.write_text(f"{text[: found.start()]}{table}\n{text[found.end() :]}", encoding="utf-8")
    return table or found[0]


def write(rows: dict[str, str]) -> None:
    """Puts rows by their recipes' names into docs/recipes.md, and all names into docs/memory.md."""
    guide = ROOT / "docs" / "recipes.md"
    before = {line.split("`")[1]: line for line in between_marks(guide).splitlines() if line.startswith("| `")}
    names = [one.name for one in all_recipes()]
    between_marks(guide, "\n".join([HEAD, *({**before, **rows}[name] for name in names)]))
    between_marks(ROOT / "docs" / "memory.md", by_card(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=recipes.names(), help="recipes; by default all")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/recipes.md and docs/memory.md")
    args = parser.parse_args()
    logs.quiet_third_parties()
    logs.setup_logging("ERROR")
    chosen = [one for one in all_recipes() if not args.only or one.name in args.only]
    rows, tight = {}, []
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        models = {name: make_model(name, Path(temporary)) for name in dict.fromkeys(one.model for one in chosen)}
        for recipe in chosen:
            started, about = time.process_time(), recipe.about
            plan = plan_of(about.script, about.card, ["--recipe", recipe.name], models[recipe.model], Path(temporary))
            rows[recipe.name] = row(recipe, plan)
            print(rows[recipe.name], flush=True)
            print(f"{recipe.name}: {time.process_time() - started:.1f} s of CPU", file=sys.stderr, flush=True)
            if share(plan) > 1 - SPARE:
                tight.append(f"{recipe.name}: {share(plan):.0%} of the card; at most {1 - SPARE:.0%} are meant")
    if args.write:
        write(rows)
    if tight:
        raise SystemExit("\n".join(tight))


if __name__ == "__main__":
    main()
