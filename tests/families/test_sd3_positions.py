"""Where images lie on the table of positions: diffusers' middle, drawn places, and scaled places."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import PatchEmbed
from torch.testing import assert_close

from library.families.sd3.adapter import Sd3Family
from library.families.sd3.positions import place_positions
from tests.builders.sd3 import sd3_options, write_tiny_sd3

SIDE, WIDTH, BASE = 12, 64, 4  # the table's side; the side of an image that takes steps of 1


@pytest.fixture
def denoiser():
    """A model whose table says where its entries are: channel 0 is the row, channel 1 the column."""
    model = SD3Transformer2DModel(
        sample_size=2 * BASE,
        num_layers=1,
        num_attention_heads=1,
        joint_attention_dim=8,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=8,
        pos_embed_max_size=SIDE,
    )
    table = model.pos_embed.pos_embed.reshape(SIDE, SIDE, WIDTH)
    table[:, :, 0] = torch.arange(SIDE, dtype=torch.float32)[:, None]
    table[:, :, 1] = torch.arange(SIDE, dtype=torch.float32)
    return model.train()


def places(model, rows: int, columns: int) -> tuple[list[float], list[float]]:
    """Rows and columns of the table that an image of that many patches gets."""
    found = model.pos_embed.cropped_pos_embed(2 * rows, 2 * columns).reshape(rows, columns, WIDTH)
    assert torch.equal(found[:, :1, 0].expand(rows, columns), found[..., 0])
    assert torch.equal(found[:1, :, 1].expand(rows, columns), found[..., 1])
    return found[:, 0, 0].tolist(), found[0, :, 1].tolist()


def test_the_middle_is_diffusers_own(denoiser):
    before = [denoiser.pos_embed.cropped_pos_embed(2 * rows, 2 * columns) for rows, columns in ((4, 4), (3, 7))]
    place_positions(denoiser, random_crop_rate=0.0, scaled=False)
    after = [denoiser.pos_embed.cropped_pos_embed(2 * rows, 2 * columns) for rows, columns in ((4, 4), (3, 7))]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert isinstance(denoiser.pos_embed, PatchEmbed)
    assert "pos_embed.pos_embed" in denoiser.state_dict()


@pytest.mark.rows("R437")
def test_random_crops_lie_anywhere_on_the_table(denoiser):
    place_positions(denoiser, random_crop_rate=1.0, scaled=False)
    torch.manual_seed(0)
    seen = [places(denoiser, 4, 6) for _ in range(300)]
    for rows, columns in seen:
        assert rows == [rows[0] + step for step in range(4)]
        assert columns == [columns[0] + step for step in range(6)]
    assert {rows[0] for rows, _ in seen} == set(range(SIDE - 4 + 1))
    assert {columns[0] for _, columns in seen} == set(range(SIDE - 6 + 1))


def test_the_rate_is_the_share_of_moved_images_and_repeats_with_the_seed(denoiser):
    place_positions(denoiser, random_crop_rate=0.25, scaled=False)

    def draw() -> list[tuple[list[float], list[float]]]:
        torch.manual_seed(3)
        return [places(denoiser, 2, 2) for _ in range(400)]

    first = draw()
    middle = [float(SIDE // 2 - 1), float(SIDE // 2)]
    moved = sum(place != (middle, middle) for place in first)
    assert 70 <= moved <= 130
    assert draw() == first


def test_crops_are_drawn_in_training_only(denoiser):
    place_positions(denoiser, random_crop_rate=1.0, scaled=False)
    middle = [5.0, 6.0]
    with torch.no_grad():  # validation
        assert all(places(denoiser, 2, 2) == (middle, middle) for _ in range(20))
    denoiser.eval()
    assert all(places(denoiser, 2, 2) == (middle, middle) for _ in range(20))


@pytest.mark.rows("R438")
@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (4, 4, ([4.0, 5.0, 6.0, 7.0], [4.0, 5.0, 6.0, 7.0])),  # the base size: as ever
        (2, 2, ([4.5, 6.5], [4.5, 6.5])),  # half as large: steps twice as large, the same middle
        (8, 8, ([3.75 + index / 2 for index in range(8)],) * 2),
        (2, 8, ([5.0, 6.0], [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])),  # the area counts
    ],
)
def test_scaled_positions_span_the_same_part_of_the_table(denoiser, rows, columns, expected):
    place_positions(denoiser, random_crop_rate=0.0, scaled=True)
    found = places(denoiser, rows, columns)
    assert_close(torch.tensor(found[0]), torch.tensor(expected[0]))
    assert_close(torch.tensor(found[1]), torch.tensor(expected[1]))


def test_scaled_positions_exist_for_images_larger_than_the_table(denoiser):
    place_positions(denoiser, random_crop_rate=0.0, scaled=True)
    rows, columns = places(denoiser, 20, 20)
    assert len(rows) == len(columns) == 20
    assert rows[-1] - rows[0] == pytest.approx(19 * BASE / 20)
    long, _ = places(denoiser, 64, 1)  # of this shape, the ends do not fit
    assert min(long) == 0
    assert max(long) == SIDE - 1


def test_scaled_positions_may_be_drawn_too(denoiser):
    place_positions(denoiser, random_crop_rate=1.0, scaled=True)
    torch.manual_seed(0)
    seen = [places(denoiser, 2, 2)[0] for _ in range(200)]
    assert all(high - low == pytest.approx(2.0) for low, high in seen)
    assert min(low for low, _ in seen) < 1
    assert max(high for _, high in seen) > SIDE - 2


def test_the_options_reach_the_layer_and_name_other_models(tmp_path, caplog):
    path = write_tiny_sd3(tmp_path / "sd3.safetensors", "5-medium")
    models = Sd3Family(sd3_options(path, pos_emb_random_crop_rate=0.5, enable_scaled_pos_embed=True)).loader.load()
    assert models.denoiser.pos_embed.random_crop_rate == 0.5
    assert models.denoiser.pos_embed.scaled
    assert not caplog.text
    assert type(Sd3Family(sd3_options(path)).loader.load().denoiser.pos_embed) is PatchEmbed
    large = write_tiny_sd3(tmp_path / "large.safetensors", "5-large")
    Sd3Family(sd3_options(large, enable_scaled_pos_embed=True)).loader.load()
    assert "meant for Stable Diffusion 3.5 medium" in caplog.text


def test_the_table_is_saved_as_it_was(tmp_path):
    path = write_tiny_sd3(tmp_path / "sd3.safetensors", "5-medium")
    family = Sd3Family(sd3_options(path, enable_scaled_pos_embed=True))
    family.writer.save(
        family.loader.load(), tmp_path / "out.safetensors", save_as="safetensors", dtype=None, metadata={}
    )
    assert (tmp_path / "out.safetensors").read_bytes() == path.read_bytes()


def test_what_is_larger_than_the_table_needs_scaled_positions(tmp_path):
    path = write_tiny_sd3(tmp_path / "sd3.safetensors", "5-medium", encoders=("te1", "te2"))
    plain, scaled = (Sd3Family(sd3_options(path, enable_scaled_pos_embed=flag)).loader.load() for flag in (False, True))
    assert plain.longest_side == 16 * plain.denoiser.pos_embed.pos_embed_max_size
    assert scaled.longest_side is None
