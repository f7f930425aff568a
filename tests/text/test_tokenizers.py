"""Where tokenizers come from."""

from __future__ import annotations

import os
import signal

import pytest

from library.errors import UserError
from library.families.sd.tokenizer import sd_tokenizer
from library.runtime.durable import new_folder
from library.text.tokenizers import bundled_clip_tokenizer, save_clip_tokenizer
from tests.builders import write_tiny_sd1
from tests.builders.rights import without_rights


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))


def test_bundled_vocabulary():
    """Ids that CLIP's published vocabulary gives."""
    tokenizer = bundled_clip_tokenizer()
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (49407, 77)


@pytest.mark.rows("R134")
def test_v2_pads_with_zero():
    assert sd_tokenizer(v2=True).pad_token_id == 0
    assert sd_tokenizer(v2=False).pad_token_id == 49407


def test_cache_folder_is_filled_and_then_used(tmp_path):
    for v2, folder in ((False, "openai_clip-vit-large-patch14"), (True, "stabilityai_stable-diffusion-2")):
        sd_tokenizer(v2, cache_dir=str(tmp_path))
        assert (tmp_path / folder / "vocab.json").is_file()
        changed = sd_tokenizer(v2)
        changed.add_tokens(["<mine>"])
        save_clip_tokenizer(changed, tmp_path / folder)
        again = sd_tokenizer(v2, cache_dir=str(tmp_path))
        assert again("<mine>", add_special_tokens=False).input_ids == [49408]
        assert again.pad_token_id == changed.pad_token_id


def test_processes_that_fill_a_cache_folder_at_once(tmp_path, monkeypatch):
    """Each sees no folder or a whole one, and the first to be ready stays."""
    folder = tmp_path / "openai_clip-vit-large-patch14"
    theirs = bundled_clip_tokenizer()
    theirs.add_tokens(["<theirs>"])

    def slowly(tokenizer, place):
        (place / "tokenizer_config.json").write_text("{}")
        assert not folder.exists(), "half a tokenizer where others look"
        with new_folder(folder) as other:
            save_clip_tokenizer(theirs, other)
        save_clip_tokenizer(tokenizer, place)

    monkeypatch.setattr("library.families.shared.clip_tokenizer.save_clip_tokenizer", slowly)
    sd_tokenizer(v2=False, cache_dir=str(tmp_path))
    assert len(sd_tokenizer(v2=False, cache_dir=str(tmp_path))) == 49409
    assert [path.name for path in tmp_path.iterdir()] == [folder.name], "temporary folders left"


def test_a_cache_folder_that_cannot_be_filled_is_reported_and_not_needed(tmp_path, caplog):
    (tmp_path / "file").touch()
    assert len(sd_tokenizer(v2=False, cache_dir=str(tmp_path / "file" / "cache"))) == 49408
    assert "--tokenizer_cache_dir" in caplog.text
    assert "cannot be written" in caplog.text


def test_a_folder_brings_its_own_and_a_hub_id_needs_no_network(tmp_path):
    folder = write_tiny_sd1(tmp_path / "model")
    own = bundled_clip_tokenizer()
    own.add_tokens(["<mine>"])
    save_clip_tokenizer(own, folder / "tokenizer")
    assert len(sd_tokenizer(False, str(folder))) == 49409
    assert len(sd_tokenizer(False, "someone/not-in-the-cache")) == 49408


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": "{"}, {"vocab.json": "{}", "merges.txt": ""}])
def test_a_broken_tokenizer_is_named(tmp_path, files):
    os.makedirs(tmp_path / "model" / "tokenizer")
    for name, content in files.items():
        (tmp_path / "model" / "tokenizer" / name).write_text(content)
    with pytest.raises(UserError, match="tokenizer: cannot be read"):
        sd_tokenizer(False, str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("place", ["cache", "model"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, place):
    folder = tmp_path / ("openai_clip-vit-large-patch14" if place == "cache" else "tokenizer")
    save_clip_tokenizer(bundled_clip_tokenizer(), folder)
    given = {"cache_dir": str(tmp_path)} if place == "cache" else {"model": str(tmp_path)}
    file = folder / name
    file.chmod(0)
    with pytest.raises(UserError) as caught:
        without_rights(lambda: sd_tokenizer(False, **given))
    assert str(caught.value) == f"{file}: no permission to read it"
    file.unlink()
    os.mkfifo(file)
    signal.alarm(20)
    try:
        with pytest.raises(UserError) as caught:
            sd_tokenizer(False, **given)
    finally:
        signal.alarm(0)
    assert str(caught.value) == f"{file}: a named pipe, not a regular file"
