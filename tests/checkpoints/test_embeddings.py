"""Files of embeddings, in the layouts that are in circulation."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from library.checkpoints.embeddings import names_by_part, read_embedding, write_embedding
from library.errors import UserError

SD, SDXL = {"te": "emb_params"}, {"te1": "clip_l", "te2": "clip_g"}
ROWS = torch.arange(6.0).reshape(2, 3)


def written(path, content):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "keys", "expected"),
    [
        ("a.safetensors", {"emb_params": ROWS}, SD, {"te": ROWS}),
        ("a.pt", {"emb_params": ROWS.half()}, SD, {"te": ROWS}),
        ("a.pt", {"emb_params": torch.nn.Parameter(ROWS)}, SD, {"te": ROWS}),
        ("a.bin", {"<tok>": ROWS[0]}, SD, {"te": ROWS[:1]}),
        ("a.safetensors", {"<tok>": ROWS}, SD, {"te": ROWS}),
        (
            "a.pt",
            {"string_to_token": {"*": 265}, "string_to_param": {"*": ROWS}, "name": "a", "step": 5},
            SD,
            {"te": ROWS},
        ),
        ("a.safetensors", {"clip_l": ROWS, "clip_g": ROWS[:, :2] + 1}, SDXL, {"te1": ROWS, "te2": ROWS[:, :2] + 1}),
        ("a.safetensors", {"clip_g": ROWS}, SDXL, {"te2": ROWS}),
        ("a.safetensors", {"text_encoders_0": ROWS, "text_encoders_1": ROWS}, SDXL, {"te1": ROWS, "te2": ROWS}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layouts_that_are_read(tmp_path, name, content, keys, expected):
    tensors = {key: value.contiguous() if isinstance(value, torch.Tensor) else value for key, value in content.items()}
    if name.endswith(".safetensors"):
        tensors = {key: value.clone() for key, value in tensors.items()}
    found = read_embedding(written(tmp_path / name, tensors))
    names = names_by_part(found, keys, name)
    assert names.keys() == expected.keys()
    for part, value in expected.items():
        assert found[names[part]].dtype == torch.float32
        assert torch.equal(found[names[part]], value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"emb_params": torch.zeros(2, 3, 4)}, "emb_params has the shape 2x3x4"),
        ({"emb_params": torch.zeros(2, 3, dtype=torch.int32)}, "not an embedding"),
        ({"emb_params": torch.tensor(1.0)}, "the shape of a number"),
        ({"clip_l": torch.zeros(2, 3), "clip_g": torch.zeros(3, 3)}, "the numbers of vectors differ"),
        ({"emb_params": torch.zeros(0, 3)}, "not an embedding"),
    ],
)
def test_what_is_no_embedding(tmp_path, content, message):
    path = written(tmp_path / "a.safetensors", content)
    with pytest.raises(UserError, match=message):
        read_embedding(path)


def test_a_torch_file_without_vectors(tmp_path):
    with pytest.raises(UserError, match=r"a\.pt: holds no embedding"):
        read_embedding(written(tmp_path / "a.pt", {"step": 3}))


@pytest.mark.parametrize(("names", "keys"), [(["emb_params"], SDXL), (["clip_l", "clip_g"], SD), (["x", "y"], SD)])
def test_embeddings_of_other_models(names, keys):
    with pytest.raises(UserError, match=r"^a\.pt: no embedding for this kind of model: holds .* is needed$"):
        names_by_part(names, keys, "a.pt")


@pytest.mark.parametrize("kind", ["safetensors", "pt", "ckpt"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_what_is_written(tmp_path, kind, dtype):
    path = tmp_path / f"a.{kind}"
    write_embedding(path, {"emb_params": torch.nn.Parameter(ROWS)}, dtype, {"modelspec.title": "a"})
    if kind == "safetensors":
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"modelspec.title": "a"}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    else:
        tensors = torch.load(path, weights_only=True)
    assert tensors.keys() == {"emb_params"}
    assert tensors["emb_params"].dtype == (dtype or torch.float32)
    assert torch.equal(tensors["emb_params"].float(), ROWS)
