"""How large the weights of a model are: a file, a folder with variants of its parts, a name that is no path."""

from __future__ import annotations

import pytest

from library.checkpoints.sizes import weights_size, with_size


def written(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)  # of a file without contents the disk holds nothing
    return path


@pytest.mark.parametrize(
    ("size", "said"), [(4_250_000_000, " (4.2 GB)"), (44_000_000, " (44.0 MB)"), (1500, " (1.5 kB)"), (12, "")]
)
def test_a_file(tmp_path, size, said):
    path = written(tmp_path / "model.safetensors", size)
    assert weights_size(path) == size
    assert with_size(path) == f"{path}{said}"


def test_of_a_folder_the_largest_file_of_each_part_counts(tmp_path):
    for name, size in (("unet/a.safetensors", 3000), ("unet/a.fp16.safetensors", 1500), ("vae/b.bin", 200)):
        written(tmp_path / name, size)
    written(tmp_path / "vae" / "config.json", 9000)
    assert weights_size(tmp_path) == 3200


def test_a_name_at_the_hub():
    assert (weights_size("owner/model"), with_size("owner/model")) == (0, "owner/model")
