"""Headers of .safetensors files in any shape: what the format does not allow is one line, everywhere."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from library.checkpoints.header import parse_header
from library.checkpoints.reading import SafetensorsFile, read_header, read_metadata, require_weights
from library.errors import UserError
from library.families.shared.reading import PlainFile

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def file_of(path, header, data=bytes(8)):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


BROKEN = {
    "one offset": {"a": {**ONE, "data_offsets": [0]}},
    "three offsets": {"a": {**ONE, "data_offsets": [0, 4, 8]}},
    "offsets as texts": {"a": {**ONE, "data_offsets": ["0", "4"]}},
    "offsets as an object": {"a": {**ONE, "data_offsets": {"0": 0, "1": 4}}},
    "offsets that are true": {"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}},
    "fractions": {"a": {**ONE, "data_offsets": [0.0, 4.0]}},
    "backwards": {"a": {**ONE, "data_offsets": [4, 0]}},
    "negative": {"a": {**ONE, "data_offsets": [-4, 0]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "no dtype": {"a": {"shape": [1], "data_offsets": [0, 4]}},
    "a dtype of numbers": {"a": {**ONE, "dtype": 32}},
    "a text as shape": {"a": {**ONE, "shape": "1"}},
    "a negative side": {"a": {**ONE, "shape": [-1]}},
    "a nested shape": {"a": {**ONE, "shape": [[1]]}},
    "another size": {"a": {**ONE, "shape": [2]}},
    "a size beyond all numbers": {"a": {**ONE, "shape": [1 << 62, 1 << 62]}},
    "overlapping": {"a": ONE, "b": {**ONE, "data_offsets": [2, 6]}},
    "the same place twice": {"a": ONE, "b": ONE},
    "a gap": {"a": ONE, "b": {**ONE, "data_offsets": [5, 9]}},
    "an entry of text": {"a": "F32"},
    "an entry of null": {"a": None},
    "metadata as a list": {"__metadata__": [1], "a": ONE},
    "metadata as a number": {"__metadata__": 1, "a": ONE},
    "metadata of numbers": {"__metadata__": {"x": 1}, "a": ONE},
    "nested metadata": {"__metadata__": {"x": {"y": "z"}}, "a": ONE},
    "a list": [ONE],
    "a text": "header",
    "null": None,
    "no JSON": b"{",
    "no text": b"\xff\xfe{}",
    "endless nesting": b"[" * 200_000,
    "endless nesting in an entry": b'{"a":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "a number without end": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
    "beyond the file": {"a": {**ONE, "shape": [3], "data_offsets": [0, 12]}},
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("read", [read_header, read_metadata, require_weights, SafetensorsFile, PlainFile])
def test_a_broken_header_is_one_line_that_names_the_file(tmp_path, kind, read):
    path = file_of(tmp_path / "a.safetensors", BROKEN[kind])
    with pytest.raises(UserError) as caught:
        read(path)
    (line,) = caught.value.problems
    assert line.startswith(f"{path}: ")
    assert len(line) < 400


@pytest.mark.parametrize("kind", BROKEN)
def test_the_library_refuses_these_headers_too(tmp_path, kind):
    with pytest.raises(SafetensorError):
        load_file(file_of(tmp_path / "a.safetensors", BROKEN[kind]))


def test_whole_files_of_the_library_are_read_by_all(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.float16).reshape(2, 3),
        "a": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0),
        "ü": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"x": "y"})
    for weights in (SafetensorsFile(tmp_path / "a.safetensors"), PlainFile(tmp_path / "a.safetensors")):
        assert weights.metadata == {"x": "y"}
        assert {key: weights[key].tolist() for key in weights} == {key: t.tolist() for key, t in tensors.items()}


def test_a_dtype_of_tomorrow_is_listed_and_refused_when_it_is_asked_for(tmp_path):
    entry = {"dtype": "F2_E1M0", "shape": [16], "data_offsets": [0, 4]}
    assert parse_header(json.dumps({"a": entry}).encode()).end == 4
    weights = PlainFile(file_of(tmp_path / "a.safetensors", {"a": entry}, bytes(4)))
    with pytest.raises(UserError, match="'a' is of the type F2_E1M0"):
        weights["a"]


def test_a_pipe_and_a_device_are_named(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").symlink_to("/dev/zero")
    for name, what in (("a", "a named pipe"), ("b", "a device")):
        with pytest.raises(UserError, match=f"{name}.safetensors: {what}, not a regular file"):
            read_header(tmp_path / f"{name}.safetensors")
