"""What every family declares is there, and what is missing is found when the registry is imported."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, fields

import pytest

from library.entry_points import EntryPoint
from library.families.base import Control, Denoiser, Family, Latents, Loader, Targets, TextEncoding, Writer
from library.families.registry import FAMILIES
from library.families.spec import FamilySpec
from library.options.large_models import ModulationOptions
from library.options.parsing import parse_options
from library.registry import groups_for

ROLES = {
    "loader": Loader,
    "latents": Latents,
    "text": TextEncoding,
    "denoiser": Denoiser,
    "targets": Targets,
    "writer": Writer,
}
OPTIONAL = ("opts", "control", "lllite", "text_places", "modulation", "text_layers", "shrinking")


@pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
def test_every_entry_point_can_be_called(spec):
    points = [value for value in vars(spec).values() if isinstance(value, EntryPoint)]
    assert all(callable(point.load()) for point in points)
    adapter = spec.adapter.load()
    assert issubclass(adapter, Family)
    assert adapter.traits is spec.traits
    family = adapter(parse_options(groups_for(spec.name, "network"), []))
    roles = {name: role for name, role in vars(family).items() if name not in OPTIONAL}
    assert roles.keys() == ROLES.keys()
    assert all(isinstance(role, ROLES[name]) for name, role in roles.items())
    assert callable(family.text_layers) == spec.traits.text_regions
    assert callable(family.text_places) == ("xti" in spec.scripts.values())
    assert callable(family.modulation) == (ModulationOptions in spec.groups.get("network", ()))
    for control, method in ((family.control, "control_net"), (family.lllite, "lllite")):
        assert isinstance(control, Control) == (method in spec.scripts.values())


@pytest.mark.parametrize("name", [field.name for field in fields(FamilySpec) if field.default_factory is MISSING])
def test_a_family_without_a_required_part_is_refused(name):
    parts = dict(vars(FAMILIES["sd"]))
    is_required = next(field for field in fields(FamilySpec) if field.name == name).default is MISSING
    del parts[name]
    if is_required:
        with pytest.raises(TypeError, match=f"missing .* '{name}'"):
            FamilySpec(**parts)
    else:
        assert callable(getattr(FamilySpec(**parts), name))


@pytest.mark.parametrize("name", ["name", "scripts", "kinds", "network_layers"])
def test_an_empty_part_is_refused(name):
    with pytest.raises(TypeError, match=f"{name} must not be empty"):
        FamilySpec(**{**vars(FAMILIES["sd"]), name: ()})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("library.families.sd.variants:gone", "library.families.sd.variants does not define gone"),
        ("library.families.sd.gone:check_paths", "no such module"),
        ("library.families.sd.variants", "does not define"),
    ],
)
def test_an_entry_point_to_nothing_is_refused(value, said):
    with pytest.raises(TypeError, match=said):
        EntryPoint(value)


def test_the_registry_does_not_import_torch():
    code = "import sys, library.registry, library.families.shared.recognition; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
