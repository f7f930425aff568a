"""--recipe: what counts before what, and which recipe a script takes. tests/scripts/test_recipes.py runs them."""

from __future__ import annotations

import re

import pytest

from library import embedding
from library.errors import UserError
from library.options import recipes
from library.options.parsing import build_parser, parse_options
from library.preparation.latents.caching import GROUPS, RECIPES
from library.registry import FAMILIES, groups_for, scripts_of

_SCRIPTS = {name: spec.scripts for name, spec in FAMILIES.items()}
OWN = """
[recipe]
script = "train_network.py"

[network]
network_dim = 8
network_alpha = 4
seed = 3
caption_extention = ".old"
optimizer_type = "AdaFactor"
optimizer_args = ["relative_step=False"]
"""


@pytest.fixture
def own(tmp_path):
    """A recipe for train_network.py."""
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    return path


def read(*flags, script=("sd", "network")):
    return parse_options(groups_for(*script), [str(flag) for flag in flags], scripts=scripts_of(*script))


def refused(*flags, script=("sd", "network")):
    with pytest.raises(UserError) as error:
        read(*flags, script=script)
    return error.value.problems


def test_the_command_line_counts_before_the_config_file_and_that_before_the_recipe(own, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("network_alpha = 2\nseed = 5\n")
    opts = read("--recipe", own, "--config_file", config, "--seed=7")
    assert (opts.method.network_dim, opts.method.network_alpha, opts.training.seed) == (8, 2, 7)
    assert [opts.origin(name) for name in ("network_dim", "network_alpha", "seed", "epoch")] == [
        "own.toml", "run.toml", "command line", "default"
    ]  # fmt: skip
    assert opts.remarks == ()  # the table about the recipe is no unknown key


def test_a_newer_spelling_above_wins_over_an_older_one_in_the_recipe(own, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("caption_extension = '.txt'\n")
    assert read("--recipe", own).data.caption_extension == ".old"
    assert read("--recipe", own, "--config_file", config).data.caption_extension == ".txt"


def test_arguments_go_with_what_they_are_for(own):
    """AdaFactor's arguments are none of AdamW's."""
    assert read("--recipe", own, "--optimizer_type=AdaFactor").optimizer.optimizer_args == ["relative_step=False"]
    assert not read("--recipe", own, "--optimizer_type=AdamW").optimizer.optimizer_args
    given = read("--recipe", own, "--optimizer_type=AdamW", "--optimizer_args", "eps=1e-7")
    assert given.optimizer.optimizer_args == ["eps=1e-7"]


def test_a_wrong_value_counts_where_nothing_above_replaces_it(own):
    own.write_text("network_dim = 'many'\n")
    assert refused("--recipe", own) == ("key 'network_dim' in own.toml: must be a whole number, got the text 'many'",)
    assert read("--recipe", own, "--network_dim=2").method.network_dim == 2


def test_a_recipe_can_be_written_as_a_config_file(own, tmp_path, capsys):
    written = tmp_path / "mine.toml"
    with pytest.raises(SystemExit) as ended:
        read("--recipe", own, "--seed=7", "--output_config", "--config_file", written)
    assert ended.value.code == 0
    opts = read("--config_file", written)
    assert (opts.method.network_dim, opts.training.seed) == (8, 7)


@pytest.mark.parametrize(
    ("script", "name", "line"),
    [
        (
            ("flux", "network"),
            "flux-lora-9gb",
            "--recipe flux-lora-9gb: there is no such recipe; for this one there are flux-lora-",
        ),
        (
            ("sdxl", "network"),
            "flux-lora-8gb",
            "--recipe flux-lora-8gb: is a recipe of flux_train_network.py; run that script, or for this one there are "
            "sdxl-lora-",
        ),
        (
            ("sd", "xti"),
            "flux-lora-8gb",
            "--recipe flux-lora-8gb: is a recipe of flux_train_network.py; run that script, or this one has none; give",
        ),
        (("sd", "network"), "./none", "--recipe: there is no file none.toml"),
    ],
)
def test_a_wrong_name_is_one_line_with_what_there_is(script, name, line):
    (problem,) = refused("--recipe", name, script=script)
    assert problem.startswith(line)


def test_a_wrong_table_is_one_line(own):
    own.write_text("[recipe]\nscripts = 'train_network'\n")
    (line,) = refused("--recipe", own)
    assert line == f"--recipe: {own}: [recipe] takes script, a name, and card, a whole number of GB"


def test_caching_tools_take_any_recipe_and_know_the_family_by_it():
    opts = parse_options(GROUPS, ["--recipe=flux-lora-8gb"], scripts=RECIPES)
    assert (opts.family.flux, opts.family.sdxl) == (True, False)
    assert opts.training.gradient_accumulation_steps == 1
    with pytest.raises(UserError) as error:
        parse_options(GROUPS, ["--recipe=flux-lora-8gb", "--sdxl"], scripts=RECIPES)
    assert error.value.problems == (
        "--sdxl: cannot be used with --recipe flux-lora-8gb, which is a recipe of flux_train_network.py",
    )


def test_programs_that_import_the_scripts_take_recipes(own, monkeypatch):
    parser = build_parser(groups_for("sd", "network"))
    parser.scripts = scripts_of("sd", "network")
    monkeypatch.setattr("sys.argv", ["wrapper.py", f"--recipe={own}", "--network_dim=2"])
    args = embedding.read_config_from_file(parser.parse_args(), parser)
    assert (args.network_dim, args.network_alpha) == (2, 4)


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_says_what_it_is_for(name):
    """Its header names the script, which takes all of its keys."""
    path = recipes.FOLDER / f"{name}.toml"
    about = recipes.about(path)
    model, kind, card = name.split("-")
    assert card == f"{about.card}gb"
    family = next(family for family in ("sdxl", "sd3", "flux", "sd") if model.startswith(family))
    (method,) = {scripts.get(about.script) for scripts in _SCRIPTS.values()} - {None}
    assert about.script in scripts_of(family, method)
    assert kind in ("lora", "full", "dreambooth", "embedding", "controlnet", "lllite")
    header = path.read_text("utf-8").partition("\n[recipe]")[0]
    assert all(line.startswith("#") for line in header.splitlines() if line)
    assert f"python {about.script}.py --recipe {name} " in header
    assert read("--recipe", name, script=(family, method)).remarks == ()


@pytest.mark.parametrize("guide", ["recipes.md", "memory.md"])
def test_the_guides_have_all_recipes_and_no_others(guide):
    """Their tables are made by benchmarks/memory_recipes.py --write."""
    text = (recipes.FOLDER.parent / "docs" / guide).read_text("utf-8")
    table = text.partition("<!-- by benchmarks/memory_recipes.py -->")[2].partition("<!-- end -->")[0]
    assert sorted(set(re.findall(r"`(\w+-\w+-\d+gb)`", table))) == recipes.names()
