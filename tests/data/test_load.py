"""What is said about data as a run reads it: whether captions hold the word that is to be trained."""

from __future__ import annotations

import logging

import pytest

from library.data.config.blueprint import build_specs
from library.data.load import read_data
from library.errors import UserError
from library.registry import FAMILIES
from library.runtime.logs import LOGGER
from library.runtime.processes import Processes
from tests.builders.options import options_for

TRAITS = FAMILIES["sd"].traits


@pytest.fixture
def read(tmp_path, draw):
    """Reads images with these captions as Textual Inversion does; returns the captions of the first epochs."""

    def made(captions, reg=(), **given):
        for number, caption in enumerate(captions):
            draw(tmp_path / "train" / "1_thing" / f"{number}.png", caption=caption)
        for number, caption in enumerate(reg):
            draw(tmp_path / "reg" / "1_thing" / f"{number}.png", caption=caption)
        folders = {
            "train_data_dir": str(tmp_path / "train"),
            **({"reg_data_dir": str(tmp_path / "reg")} if reg else {}),
        }
        given = {
            "token_string": "zwx",
            "resolution": "64",
            "data_index_dir": str(tmp_path / "index"),
            "seed": 1,
            **given,
        }
        opts = options_for("sd", "embedding", **folders, **given, max_data_loader_n_workers=0)
        data = read_data(build_specs(opts, TRAITS), opts, TRAITS, Processes(0, 1))
        epochs = [[caption for batch in data.loader(epoch) for caption in batch.captions] for epoch in (1, 2, 3)]
        return {caption for epoch in epochs for caption in epoch}

    return made


@pytest.fixture
def warnings():
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    LOGGER.addHandler(handler)
    yield found
    LOGGER.removeHandler(handler)


def test_no_caption_holds_the_word(read):
    with pytest.raises(UserError) as caught:
        read(["a cat", "a zwxy"])
    (line,) = caught.value.problems
    assert line.startswith("--token_string: no caption holds 'zwx', so nothing would be learned; write 'zwx' into")


def test_some_captions_do_not_hold_the_word(read, warnings):
    assert read(["a ZWX", "a cat"]) == {"a ZWX", "a cat"}
    (line,) = [line for line in warnings if "zwx" in line]
    assert line.startswith("the captions of 1 of 2 images do not hold 'zwx' and teach it nothing, such as that of ")


@pytest.mark.parametrize("given", [{"caption_prefix": "zwx,"}, {"caption_suffix": "by zwx"}])
def test_the_word_may_be_put_around_captions(read, given, warnings):
    assert len(read(["a cat", "a dog"], **given)) == 2
    assert not [line for line in warnings if "zwx" in line]


def test_templates_replace_captions_but_not_those_of_regularisation(read, warnings):
    found = read(["a cat", "a dog"], reg=["a real dog"], use_object_template=True)
    assert "a real dog" in found
    assert len(found) > 2
    assert all("zwx" in caption for caption in found - {"a real dog"})
    assert not [line for line in warnings if "zwx" in line]
