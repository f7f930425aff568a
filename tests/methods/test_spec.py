"""Every method says all that scripts need of it, and a part that is missing is found when its spec is made."""

from __future__ import annotations

from dataclasses import MISSING, fields

import pytest

from library.methods.base import Method
from library.methods.spec import MethodSpec
from library.options.loss import LossOptions
from library.registry import FAMILIES, METHODS


@pytest.mark.parametrize("spec", METHODS.values(), ids=METHODS)
def test_the_method_is_one(spec):
    assert issubclass(spec.method.load(), Method)


def test_scripts_name_methods_that_exist():
    assert {method for family in FAMILIES.values() for method in family.scripts.values()} == METHODS.keys()


def parts(**changes):
    spec = METHODS["network"]
    return {field.name: getattr(spec, field.name) for field in fields(spec)} | changes


def test_no_part_may_be_missing():
    for name in (field.name for field in fields(MethodSpec) if field.default is MISSING):
        with pytest.raises(TypeError, match=name):
            MethodSpec(**{key: value for key, value in parts().items() if key != name})


def test_images_beside_images_are_masks_and_nothing_more_is_checked_where_a_spec_says_nothing():
    spec = MethodSpec(**{name: value for name, value in parts().items() if name not in ("image_role", "check")})
    assert spec.image_role == "mask"
    assert spec.check(None, None) == []


def test_a_method_needs_a_group_of_its_own():
    with pytest.raises(TypeError, match="none of its groups is its own"):
        MethodSpec(**parts(groups=(LossOptions,)))


def test_a_method_without_images_says_so_everywhere():
    leco = METHODS["leco"]
    for some in ({"data": leco.data}, {"draw": leco.draw}, {"data": leco.data, "draw": leco.draw}):
        with pytest.raises(TypeError, match="without images it has data, draw, planned_draw, and options"):
            MethodSpec(**parts(**some))
    with pytest.raises(TypeError, match="without images"):
        MethodSpec(**parts(groups=leco.groups))
