"""What the guides print is what the code does: configs, captions, buckets, flags and links."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from random import Random
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

import library.families
from library import registry
from library.data.config.blueprint import build_specs
from library.data.config.schema import KEYS
from library.data.sample import buckets
from library.data.sample.captions import CaptionOptions, make_caption
from library.data.sample.dataset import build_training_data
from library.families.sd.options import TRAITS
from library.inference import prompt_lines
from library.options import parsing
from library.preparation.metadata.cleaning import clean_caption, clean_tags
from library.runtime.documents import parse_toml
from library.types import Size
from tools.option_tables import preparation_groups, preparation_scripts

DOCS = Path(__file__).resolve().parent.parent / "docs"
GUIDES = (
    "dataset_config.md",
    "captions.md",
    "caching.md",
    "images.md",
    "optimizers.md",
    "resuming.md",
    "memory.md",
    "fine_tuning.md",
    "logging.md",
    "results_page.md",
    "timesteps.md",
    "textual_inversion.md",
    "inpainting.md",
    "leco.md",
    "sdxl.md",
    "sd3.md",
    "flux.md",
    "controlnet.md",
    "preprocessing.md",
    "captioning.md",
    "tagging.md",
    "image_tools.md",
    "model_tools.md",
    "gen_img.md",
)
FAMILIES = sorted(file.parent.name for file in Path(library.families.__path__[0]).glob("*/options.py"))
GROUPS = registry.groups_for("sd", "network")


def blocks(guide: str, language: str) -> list[tuple[str, str]]:
    """(heading above it, text) of every fenced block of a language."""
    found, heading = [], ""
    for part in re.split(r"^(#+ [^\n]*|```\w*\n.*?^```)$", (DOCS / guide).read_text("utf-8"), flags=re.M | re.S):
        if part.startswith("#"):
            heading = part.lstrip("# ")
        elif part.startswith(f"```{language}\n"):
            found.append((heading, part.removeprefix(f"```{language}\n").removesuffix("```")))
    return found


def tables(guide: str, first: str) -> list[list[str]]:
    """The rows below every table whose first column is called so."""
    rows, inside = [], False
    for line in (DOCS / guide).read_text("utf-8").splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if inside and not set(line) <= set("|-"):
            rows.append(cells)
        inside = inside or cells[0] == first
    return rows


# ---- dataset configs

CONFIGS = blocks("dataset_config.md", "toml")
ENTRIES, JSON_FORM = (json.loads(text) for _, text in blocks("dataset_config.md", "json"))


def prepare(config: dict) -> list[str]:
    """Makes the files that a config names, below the working directory; returns the options that it needs."""
    arguments: set[str] = set()
    for dataset in config["datasets"]:
        for subset in dataset["subsets"]:
            for key in ("image_dir", "conditioning_data_dir"):
                if key in subset:
                    folder = Path(subset[key])
                    folder.mkdir(parents=True, exist_ok=True)
                    for number in range(16):
                        Image.new("RGB", (128, 128), (number, 0, 0)).save(folder / f"flower_{number:02}.png")
            if "metadata_file" in subset:
                Path(subset["metadata_file"]).parent.mkdir(exist_ok=True)
                Path(subset["metadata_file"]).write_text(json.dumps(ENTRIES), encoding="utf-8")
            if "conditioning_data_dir" in subset:
                arguments.add("--masked_loss")
    return sorted(arguments)


def data_of(file: Path, *more: str):
    options = ("--output_dir=out", "--network_module=networks.lora", "--pretrained_model_name_or_path=none", "--seed=1")
    opts = parsing.parse_options(GROUPS, [f"--dataset_config={file}", *options, *more])
    specs = build_specs(opts, TRAITS)
    return specs, build_training_data(specs, opts, TRAITS, 1)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", [text for _, text in CONFIGS], ids=[heading for heading, _ in CONFIGS])
def test_every_config_of_the_guide_makes_a_data_set(elsewhere, text):
    config = parse_toml(text, "the guide")
    more = prepare(config)
    (elsewhere / "data.toml").write_text(text, encoding="utf-8")
    specs, data = data_of(Path("data.toml"), *more)
    assert len(specs) == len(config["datasets"])
    for spec, dataset in zip(specs, config["datasets"], strict=True):
        table = config.get("general", {}) | dataset
        size = table["resolution"]
        assert spec.resolution == (tuple(size) if isinstance(size, list) else (size, size))
        assert spec.batch_size == table.get("batch_size", 1)
        assert spec.network_multiplier == table.get("network_multiplier", 1.0)
        for subset, said in zip(spec.subsets, dataset["subsets"], strict=True):
            assert str(subset.image_dir) == said["image_dir"]
            assert subset.num_repeats == said.get("num_repeats", 1)
            for key in ("keep_tokens", "shuffle_caption", "caption_prefix"):
                assert getattr(subset.captions, key) == (table | said).get(key, KEYS[key].default)
    assert data.num_train_images > 0


def test_what_the_guide_says_of_single_configs(elsewhere):
    by_heading = dict(CONFIGS)

    def data(heading):
        prepare(parse_toml(by_heading[heading], "the guide"))
        Path("data.toml").write_text(by_heading[heading], encoding="utf-8")
        return data_of(Path("data.toml"))[1]

    assert data("A metadata file").num_train_images == 10 * len(ENTRIES)
    assert len(data("Images kept for validation").held_out.records) == 2
    assert data("One folder at three resolutions").num_train_images == 16 + 16 + 2 * 16
    regular = data("Regularisation images")
    assert regular.num_reg_images == regular.num_train_images == 160


def test_the_json_form(elsewhere):
    prepare(JSON_FORM)
    Path("data.json").write_text(json.dumps(JSON_FORM), encoding="utf-8")
    specs, data = data_of(Path("data.json"))
    assert specs[0].batch_size == 4
    assert data.num_train_images == 160


# ---- captions


CAPTIONS = tables("captions.md", "caption")


@pytest.mark.parametrize(("raw", "options", "result", "count"), CAPTIONS, ids=[row[0] + row[1] for row in CAPTIONS])
def test_every_worked_caption(raw, options, result, count):
    said = parse_toml("\n".join(re.findall(r"`(.+?)`", options)), "the guide")
    epoch, step = said.pop("epoch", 1), said.pop("step", 0)
    caption = raw.strip("`").replace("⏎", "\n")

    def make(seed: int) -> str:
        return make_caption(caption, CaptionOptions(**said), Random(seed), epoch, step)

    assert make(0) == ("" if result == "(empty)" else result.strip("`"))
    assert len({make(seed) for seed in range(2000)}) == int(count)


def test_there_are_worked_captions():
    assert len(CAPTIONS) > 20


def test_weighted_and_nested_wildcards():
    options = CaptionOptions(enable_wildcard=True)
    drawn = [make_caption("{a {red|blue} hat|no hat}", options, Random(seed), 1, 0) for seed in range(4000)]
    shares = {caption: drawn.count(caption) / 4000 for caption in set(drawn)}
    # 4 standard deviations of a share are 0.032 at most
    expected = {"no hat": 1 / 2, "a red hat": 1 / 4, "a blue hat": 1 / 4}
    assert shares == {caption: pytest.approx(share, abs=0.032) for caption, share in expected.items()}


# ---- cleaning

CLEANED = tables("preprocessing.md", "caption or tags")


@pytest.mark.parametrize(("before", "after"), [row[:2] for row in CLEANED], ids=[row[0] for row in CLEANED])
def test_every_worked_cleaning(before, after):
    make = clean_tags if "," in before else clean_caption
    assert make(before.strip("`")) == after.strip("`")


def test_there_are_worked_cleanings():
    assert len(CLEANED) > 4


# ---- buckets


def size_of(text: str) -> Size:
    return Size(*map(int, text.split("x")))


BUCKETS = tables("images.md", "image")


@pytest.mark.parametrize("row", BUCKETS, ids=[" ".join(row[:3]) for row in BUCKETS])
def test_every_worked_bucket(row):
    image, resolution, limits, bucket, resized, cut = row
    if limits == "none":
        fit = buckets.choose_no_upscale(size_of(image), size_of(resolution), 64)
    else:
        low, high = map(int, limits.split(" to "))
        fit = buckets.choose(size_of(image), buckets.bucket_sizes(size_of(resolution), low, high, 64))
    assert fit == (size_of(bucket), size_of(resized))
    assert size_of(cut) == (fit.resized.width - fit.bucket.width, fit.resized.height - fit.bucket.height)


def test_there_are_worked_buckets():
    assert len(BUCKETS) > 10


# ---- the start-up report


def figure(seed: int, size: tuple[int, int] = (128, 128)) -> Image.Image:
    """An image with enough in it to tell it from those of other seeds."""
    fields = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(fields).resize(size, Image.Resampling.BICUBIC)


def test_the_printed_report_is_what_such_a_folder_gives(elsewhere):
    folder = elsewhere / "messy" / "1_sks flower"
    folder.mkdir(parents=True)
    figure(1).save(folder / "plain.png")
    figure(1).save(folder / "twin.jpg", quality=95)
    (folder / "plain.caption").write_text("a flower", encoding="utf-8")
    for name, seed in (("dup_a", 2), ("dup_b", 2), ("silent", 3), ("twin", 4)):
        figure(seed).save(folder / f"{name}.png")
    (folder / "silent.caption").write_text("", encoding="utf-8")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    figure(5, (120, 160)).save(folder / "photo.jpg", exif=exif)
    figure(6).save(folder / "anim.webp", save_all=True, append_images=[figure(7)])
    figure(8, (2000, 10)).save(folder / "narrow.png")
    figure(9).convert("RGBA").save(folder / "see_through.png")
    figure(10).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.asarray(figure(11).convert("L")).astype(np.uint16) * 257).save(folder / "grey16.png")
    (folder / "broken.png").write_bytes((folder / "plain.png").read_bytes()[:300])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello", encoding="utf-8")
    arguments = ["--train_data_dir=messy", "--resolution=64", "--enable_bucket", "--min_bucket_reso=64"]
    opts = parsing.parse_options(GROUPS, [*arguments, "--output_dir=out", "--network_module=networks.lora"])
    data = build_training_data(build_specs(opts, TRAITS), opts, TRAITS, 1)
    (printed,) = [text for heading, text in blocks("images.md", "") if heading == "The start-up report"]
    assert [line.replace(os.sep, "/") for line in data.report()] == printed.splitlines()


# ---- commands and links


@pytest.mark.parametrize("guide", GUIDES)
def test_flags_and_commands_exist(guide):
    text = (DOCS / guide).read_text("utf-8")
    groups = {
        script: registry.groups_for(family, method)
        for family in FAMILIES
        for script, method in registry.FAMILIES[family].scripts.items()
    }
    groups |= {script.stem: preparation_groups(script) for script in preparation_scripts()}
    # Of accelerate launch, of tensorboard, of prompt lines, and of the bundled model's scripts.
    known = {"--num_cpu_threads_per_process", "--multi_gpu", "--num_processes", "--logdir", "--cn"}
    known |= {"--scenes", "--count", "--controlnet", "--sheet", "--network", "--color", "--multipliers"}
    known |= {"--steps", "--text", "--figures", "--i", "--img"}
    known |= {f"--{option.letter}" for option in prompt_lines.GENERATION}
    for own in groups.values():
        known |= set(parsing.build_parser(own, prog="x", description="x")._option_string_actions)
    assert set(re.findall(r"--\w+", text)) - known == set()
    for _, block in blocks(guide, ""):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.match(r"python (?:\w+/)?(\w+)\.py ", line)
            if command and command[1] in groups:
                parsing.parse_options(groups[command[1]], shlex.split(line)[2:])


@pytest.mark.parametrize("page", [*GUIDES, "train_network.md", "architecture.md", "../README.md", "../CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    source = DOCS / page
    for target in re.findall(r"\]\(([^)\s]+)\)", source.read_text("utf-8")):
        if target.startswith("http"):
            continue
        place, _, anchor = unquote(target).partition("#")
        file = (source.parent / place).resolve() if place else source.resolve()
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), flags=re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}: {target}"
