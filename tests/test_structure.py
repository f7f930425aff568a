"""The shape of the code, held by scanning it: who imports whom, where a family's name may stand, how long things are.

Imports inside functions count. Imports under `if TYPE_CHECKING:` don't: they name types, and nothing runs.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from library.families.registry import FAMILIES
from library.runtime.packages import EXTRAS, THIRD_PARTIES

ROOT = Path(__file__).resolve().parent.parent

# Contracts first: what all others may import. Then upwards; a package imports from levels below its own.
CONTRACTS = (
    "library.types",
    "library.errors",
    "library.screen",
    "library.version",
    "library.families.base",
    "library.methods.base",
)
LEVELS = (
    CONTRACTS,
    (
        "library.objectives",
        "library.text",
        "library.checkpoints",
        "library.options",
        "library.runtime",
        "library.pages",
    ),
    ("library.data", "library.caching", "library.memory", "networks"),
    ("library.families", "library.methods", "library.training", "library.inference"),
    ("library.encoding", "library.registry"),
    ("library.checking", "library.session", "library.doctor"),
    ("library.planning",),
    ("library.cli",),
    ("library.embedding",),
    ("library.train_util", "library.model_util", "library.flux_train_utils", "library.huggingface_util"),
    ("library.preparation",),
    ("library.model_tools",),
    ("library.generation",),
    ("scripts",),  # everything that a user starts
)
SIBLINGS_APART = 3  # the level whose packages meet only through contracts
NOT_ENTRY_SCRIPTS = ("quickstart.py", "setup.py")

FAMILY_WORD = re.compile(rf"({'|'.join(FAMILIES)})\d*")  # with the versions that are no families of their own: sd15
MAY_NAME_FAMILIES = ("library/families/", "library/flux_train_utils.py")  # the latter is a name that others import
ORIGINAL_KEYS = re.compile(
    r"model\.diffusion_model|first_stage_model|cond_stage_model|conditioner\.embedders"
    r"|double_blocks|single_blocks|joint_blocks"
)
MAY_KNOW_ORIGINAL_KEYS = ("library/families/", "library/checkpoints/")

# Words that the field has others for: image, report, shard, dtype, stochastic rounding, CPU memory, again.
UNUSUAL = re.compile(
    r"\b(pictures?|told|tells?|telling|spread(?:s|ing)?|number[\s#]+formats?|by[\s#]+chance|main[\s#]+memory|anew"
    r"|mends?|mended|in[\s#]+its[\s#]+turn|older[\s#]+way|nobody|somebody|anybody|everybody)\b(?!\()",
    re.IGNORECASE,
)
UNUSUAL_ALLOWED = {  # what is said to a model or stands in files, and so cannot be another word
    "library/caching/latent_files.py": "picture",  # a key of the notes in cache files
    "library/data/sample/dataset.py": "picture",  # the name of a random stream, on which results depend
    "library/preparation/captioning/captioners.py": "picture",  # BLIP's prompt
    "library/options/captioning.py": "picture",
    "docs/captioning.md": "picture",
    "docs/options/make_captions.md": "picture",
    "library/preparation/metadata/cleaning_rules.py": "picture",  # words of captions
    "docs/preprocessing.md": "picture",
}

OPTIONAL = {"packaging", "pillow_jxl", "pip"}  # used where the user has it, missed by nobody
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "lycoris": "lycoris-lora",
}  # where the package is not called as its module


@dataclass(frozen=True)
class Import:
    line: int
    module: str


def code_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def entry_scripts() -> list[Path]:
    training = (file for file in ROOT.glob("*.py") if file.name not in NOT_ENTRY_SCRIPTS)
    return sorted(
        [*training, *code_files("finetune"), *(f for f in ROOT.glob("networks/*.py") if is_started(module_of(f)))]
    )


def all_code() -> list[Path]:
    return [*code_files("library", "networks", "tools", "finetune", "examples", "benchmarks"), *ROOT.glob("*.py")]


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def module_of(file: Path) -> str:
    parts = Path(relative(file)).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


@cache
def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def name_of(node: ast.expr) -> str | None:
    """`b` of `b` and of `a.b`; None for what is no name."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)


@cache
def nodes_of(tree: ast.Module) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree))


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node below `tree`, but for the bodies of `if TYPE_CHECKING:`."""
    left = [tree]
    while left:
        for child in ast.iter_child_nodes(left.pop()):
            if isinstance(child, ast.If) and name_of(child.test) == "TYPE_CHECKING":
                yield from child.orelse
                left += child.orelse
            else:
                yield child
                left.append(child)


@cache
def imports(tree: ast.Module, *, for_types: bool = False) -> tuple[Import, ...]:
    """What a module imports when it runs, by `import`, by `from ... import` or by a literal `import_module(...)`.

    `for_types`: also what it imports under `if TYPE_CHECKING:`.
    """
    return tuple(_imports(nodes_of(tree) if for_types else runtime_nodes(tree)))


def _imports(nodes: Iterable[ast.AST]) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(node.lineno, whole if is_module(whole) else str(node.module))
        elif isinstance(node, ast.Call) and name_of(node.func) in ("import_module", "__import__"):
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield Import(node.lineno, argument.value)


def is_started(module: str) -> bool:
    """Whether a module of `networks` is a script that users start, and no part of the package."""
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return module.startswith("networks.") and file.is_file() and "__main__" in file.read_text(encoding="utf-8")


@cache
def place_of(module: str) -> tuple[int, str] | None:
    """(level, package) of one of our modules; None for others' packages and for namespace parents."""
    if is_started(module):
        return len(LEVELS) - 1, "scripts"
    for level, packages in enumerate(LEVELS):
        for package in packages:
            if module == package or module.startswith(package + "."):
                return level, package
    if module.split(".")[0] in ("tools", "finetune", "examples", "benchmarks", "quickstart", "setup"):
        return len(LEVELS) - 1, "scripts"
    if (ROOT / f"{module}.py").is_file():
        return len(LEVELS) - 1, "scripts"
    return None


def import_faults(importer: str, tree: ast.Module) -> Iterator[str]:
    """One line for each import that does not point down."""
    here = place_of(importer)
    if here is None:  # a package's bare `library/__init__.py`
        yield from (f"{importer}:{one.line} imports {one.module}" for one in imports(tree) if place_of(one.module))
        return
    for one in imports(tree):
        there = place_of(one.module)
        if there is None or here[1] == "scripts" or (here[1] == there[1] and here[0] > 0):
            continue
        if there[0] > here[0]:
            yield f"{importer}:{one.line} imports {one.module}, which lies above it"
        elif there[0] == here[0] == SIBLINGS_APART:
            yield f"{importer}:{one.line} imports its sibling {one.module}; they meet through the contracts"


def tokens(name: str) -> set[str]:
    """The words of an identifier: ``is_sdxl``, ``SdxlThing`` and ``SDXL_KEYS`` all have the word "sdxl"."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return {word.lower() for word in re.split(r"[^A-Za-z0-9]+", spaced) if word}


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name that the code gives or uses, with its line; type annotations and imports for types included."""
    for node in nodes_of(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.keyword(arg=str(name)):
                yield node.value.lineno, name
            case ast.alias(name=name, asname=asname):
                yield node.lineno, f"{name} {asname or ''}"
            case ast.ImportFrom(module=str(name)):
                yield node.lineno, name


def family_faults(tree: ast.Module) -> Iterator[str]:
    """Family names as words of identifiers, or as whole strings, which is what one compares with."""
    for line, name in identifiers(tree):
        if any(map(FAMILY_WORD.fullmatch, tokens(name))):
            yield f"{line}: the name {name.strip()}"
    for node in nodes_of(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            word = re.sub(r"[^a-z0-9]", "", node.value.lower())
            if FAMILY_WORD.fullmatch(word):
                yield f"{node.lineno}: the text {node.value!r}"


def key_faults(tree: ast.Module) -> Iterator[str]:
    for node in nodes_of(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and ORIGINAL_KEYS.search(node.value):
            yield f"{node.lineno}: {ORIGINAL_KEYS.search(node.value)[0]}"


def wording_faults(text: str, allowed: str = "") -> Iterator[str]:
    """`UNUSUAL` words in text or code, also as words of identifiers; `allowed` is one that may stand."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", text)
    for found in UNUSUAL.finditer(spaced):
        if found[0].lower() != allowed:
            yield f"{1 + spaced.count(chr(10), 0, found.start())}: {found[0]}"


def package_graph() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for file in code_files("library", "networks"):
        here = place_of(module_of(file))
        for one in imports(tree_of(file)) if here else ():
            there = place_of(one.module)
            if there and there[0] > 0 and there[1] != here[1] and here[0] > 0:
                graph.setdefault(here[1], set()).add(there[1])
    return graph


def module_graph() -> dict[str, set[str]]:
    """Which of our modules each imports, for types too."""
    files = {module_of(file): file for file in code_files("library", "networks")}
    return {
        name: {one.module for one in imports(tree_of(file), for_types=True)} & files.keys() - {name}
        for name, file in files.items()
    }


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """The packages or modules that can reach themselves."""

    def reachable(start: str) -> set[str]:
        found, todo = set(), [start]
        while todo:
            for following in graph.get(todo.pop(), ()):
                if following not in found:
                    found.add(following)
                    todo.append(following)
        return found

    return sorted(package for package in graph if package in reachable(package))


def members(file: Path, name: str) -> list[str]:
    """Methods and declared attributes of a class, without `__init__`."""
    (found,) = (n for n in tree_of(file).body if isinstance(n, ast.ClassDef) and n.name == name)
    names = [n.name for n in found.body if isinstance(n, ast.FunctionDef) and n.name != "__init__"]
    return names + [ast.unparse(n.target) for n in found.body if isinstance(n, ast.AnnAssign)]


# ---- the code as it is


def test_imports_point_down():
    faults = [fault for file in all_code() for fault in import_faults(module_of(file), tree_of(file))]
    assert not faults, "\n".join(faults)


def test_packages_do_not_import_each_other_in_a_circle():
    assert cycles(package_graph()) == []


def test_no_circle_of_modules_not_even_of_types():
    assert cycles(module_graph()) == []


def test_only_families_know_their_names():
    allowed = [
        relative(file)
        for file in code_files("networks", "tools", "finetune")
        if any(map(FAMILY_WORD.fullmatch, tokens(file.stem)))
    ]
    faults = [
        f"{relative(file)}:{fault}"
        for file in code_files("library", "networks", "tools", "finetune")
        if not relative(file).startswith((*MAY_NAME_FAMILIES, *allowed))
        for fault in family_faults(tree_of(file))
    ]
    assert not faults, "\n".join(faults)


def test_only_families_know_original_key_names():
    faults = [
        f"{relative(file)}:{fault}"
        for file in code_files("library", "networks", "tools", "finetune")
        if not relative(file).startswith(MAY_KNOW_ORIGINAL_KEYS)
        for fault in key_faults(tree_of(file))
    ]
    assert not faults, "\n".join(faults)


def test_names_messages_and_docs_use_the_words_of_the_field():
    scanned = [*code_files("library", "networks", "tools", "finetune"), *ROOT.glob("*.py"), *ROOT.glob("*.md")]
    scanned += (ROOT / "docs").rglob("*.md")
    faults = [
        f"{relative(file)}:{fault}"
        for file in scanned
        for fault in wording_faults(file.read_text(encoding="utf-8"), UNUSUAL_ALLOWED.get(relative(file), ""))
    ]
    assert not faults, "\n".join(faults)


def test_entry_scripts_are_thin():
    assert entry_scripts()
    long = {relative(file): lines for file in entry_scripts() if (lines := line_count(file)) > 30}
    assert not long


def test_modules_are_short():
    long = {relative(file): lines for file in all_code() if (lines := line_count(file)) >= 600}
    assert not long


def line_count(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


ROLES = ("Loader", "Latents", "TextEncoding", "Denoiser", "Targets", "Writer", "Control")


@pytest.mark.parametrize(
    ("package", "name", "most"), [("methods", "Method", 18), *(("families", role, 6) for role in ROLES)]
)
def test_base_classes_stay_small(package, name, most):
    found = members(ROOT / "library" / package / "base.py", name)
    assert 0 < len(found) <= most, found


def required_packages() -> list[str]:
    files = [ROOT / "requirements.txt", ROOT / "requirements-dev.txt", *(ROOT / "requirements").glob("*.txt")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [re.match(r"[A-Za-z0-9_.-]+", line)[0] for line in lines if line and not line.startswith(("#", "-r"))]


def explained_packages() -> dict[str, str]:
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", page, flags=re.MULTILINE))


def test_every_requirement_is_explained():
    explained = explained_packages()
    assert sorted(explained) == sorted(required_packages())
    assert all(len(reason) > 10 for reason in explained.values())


def test_what_is_missing_is_in_the_file_that_messages_name():
    for module, extra in EXTRAS.items():
        text = (ROOT / "requirements" / f"{extra}.txt").read_text(encoding="utf-8")
        assert re.search(rf"^{module.replace('_', '-')}\b", text, flags=re.MULTILINE), module
    for package in THIRD_PARTIES.values():
        assert package in required_packages()  # the tests have them


def test_everything_imported_is_required():
    """Also what is imported on some Python versions only, so that it is there on a bare machine of any kind."""
    required = {name.lower().replace("_", "-") for name in required_packages()}
    known = sys.stdlib_module_names | {"tomllib"} | {path.stem for path in ROOT.iterdir()}  # tomllib: Python 3.11
    faults = set()
    for file in all_code():
        beside = {other.stem for other in file.parent.glob("*.py")}  # scripts find their neighbours
        for one in imports(tree_of(file)):
            top = one.module.split(".")[0]
            name = DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
            if top not in known | beside | OPTIONAL and name not in required and file.name != "setup.py":
                faults.add(f"{relative(file)}:{one.line} imports {top}, which no requirements file names")
    assert not faults, "\n".join(sorted(faults))


# ---- the scanners see what they must see


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("library.objectives.losses", "import library.data.sample.buckets"),
        ("library.checkpoints.reading", "def f():\n    from library.families.base import x\n    import library.cli"),
        ("library.data.sample.images", "from library.training import loop"),
        ("library.training.loop", "from library.families.sd import keymap"),
        ("library.training.loop", "from library.inference.preview import Preview"),
        ("library.inference.preview", "import library.methods.network"),
        ("library.families.sd.adapter", "from library.methods import network"),
        ("library.memory.attention", "importlib.import_module('library.training.loop')"),
        ("library.types", "if not TYPE_CHECKING:\n    from library.options.base import Options"),
        ("library.families.base", "from library.options import base"),
        ("library.training.loop", "import train_network"),
        ("library", "from library.training import loop"),
    ],
)
def test_an_import_that_points_up_or_across_is_seen(importer, source):
    assert len(list(import_faults(importer, ast.parse(source)))) == 1


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("library.training.loop", "if TYPE_CHECKING:\n    from library.inference.preview import Preview"),
        (
            "library.training.loop",
            "from library.families.base import Family\nfrom library.data.sample import dataset\nimport torch",
        ),
        ("library.training.loop", "from library.training import step"),
        ("library.families.sd.adapter", "from library.families.shared.clip import public_state"),
        ("library.data.sample.dataset", "from library.runtime.seeds import derive\nfrom library.types import Batch"),
        ("library.cli", "from library.training import loop\nfrom library.methods import network"),
        ("train_network", "from library import cli"),
        ("library.errors", "import library.types"),
    ],
)
def test_an_import_that_points_down_is_let_be(importer, source):
    assert list(import_faults(importer, ast.parse(source))) == []


@pytest.mark.parametrize(
    "source",
    [
        'if family == "sdxl": ...',
        "match x:\n    case 'FLUX': ...",
        "is_sdxl = True",
        "def load_flux(): ...",
        "class Sd3Thing: ...",
        "f(sd3=1)",
        "if args.is_sdxl: ...",
        "from library.families.sd import keymap",
        "name.startswith('sdxl_')",
    ],
)
def test_a_family_name_is_seen(source):
    assert list(family_faults(ast.parse(source)))


@pytest.mark.parametrize("source", ['"""For SDXL and FLUX."""', "sdpa = fluxional = state_dict", "'ss_sd_model_name'"])
def test_words_that_only_look_like_a_family_are_let_be(source):
    assert list(family_faults(ast.parse(source))) == []


@pytest.mark.parametrize(
    "text",
    [
        "picture_ids = 1",
        "class SpreadWeights: ...",
        '"""In another number format."""',
        "f(x)  # rounds_by_chance",
        "# main\n    # memory",
    ],
)
def test_an_unusual_word_is_seen(text):
    assert list(wording_faults(text))


def test_words_that_only_look_unusual_are_let_be():
    assert list(wording_faults("stream.tell() + intelligent + widespread + recommend")) == []
    assert list(wording_faults("picture", allowed="picture")) == []


def test_an_original_key_is_seen():
    assert list(key_faults(ast.parse("f'model.diffusion_model.{i}'"))) == ["1: model.diffusion_model"]
    assert list(key_faults(ast.parse("'unet.down_blocks'"))) == []


def test_a_circle_is_seen():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def test_no_module_beside_a_script_hides_one_of_python():
    """Python looks into a script's own folder first."""
    folders = {file.parent for file in [*entry_scripts(), *code_files("tools", "finetune")]}
    beside = {path.stem for folder in folders for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not beside & sys.stdlib_module_names
