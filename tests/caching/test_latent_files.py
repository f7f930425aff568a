"""Latent files: names and arrays as other trainers have them, and nothing used that was made from something else."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from library.caching import latent_files, store
from library.caching.latent_files import Entry, Identity, Latents, Wanted
from library.data.buckets import crop_ltrb
from library.errors import UserError
from library.types import CacheLayout, Size

PLAIN = CacheLayout("_sd.npz", 4, keys_by_size=False)
SIZED = CacheLayout("_flux.npz", 16, keys_by_size=True)
IDENTITY = Identity("image digest", "vae fingerprint", None)
LARGE, SMALL = Size(64, 48), Size(32, 24)


@pytest.fixture
def wanted(tmp_path) -> Wanted:
    """An image of 130x97, for the bucket 64x48. Its content is never looked at here."""
    image = tmp_path / "a b.v2.png"
    image.write_bytes(b"image")
    return Wanted(
        image=image,
        present=True,
        shared_stem=False,
        size=Size(130, 97),
        bucket=LARGE,
        resized=Size(65, 48),
        crop_ltrb=crop_ltrb(LARGE, Size(130, 97)),
        interpolation=None,
        flip=False,
        alpha=False,
        mask=None,
    )


def in_bucket(wanted: Wanted, bucket: Size) -> Wanted:
    return replace(wanted, bucket=bucket, crop_ltrb=crop_ltrb(bucket, wanted.size))


def make(wanted: Wanted, layout: CacheLayout = PLAIN, number: float = 0.0) -> Latents:
    """Latents that tell by their numbers which they are."""
    width, height = wanted.bucket
    shape = (layout.channels, height // 8, width // 8)
    plain = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + np.float32(number)
    return Latents(
        plain,
        -plain if wanted.flip else None,
        np.linspace(0, 1, height * width, dtype=np.float32).reshape(height, width) if wanted.alpha else None,
        np.full(shape[1:], 0.5, np.float32) if wanted.mask is not None else None,
    )


def stamp(file: Path) -> tuple[int, int] | None:
    return (file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else None


def find(wanted, layout=PLAIN, identity=IDENTITY, check=True):
    return latent_files.find(wanted, layout, lambda: identity, store.summary, stamp, check=check)


def save(wanted, layout=PLAIN, identity=IDENTITY, number=0.0) -> Entry:
    return latent_files.save(wanted, layout, make(wanted, layout, number), identity)


def read(wanted, layout=PLAIN, identity=IDENTITY) -> np.ndarray:
    return latent_files.load(find(wanted, layout, identity)).plain


def theirs(file: Path, wanted: Wanted, suffix: str = "", channels: int = 4, **changes) -> dict[str, np.ndarray]:
    """Writes what other trainers write; `changes` replaces arrays, None leaves one out."""
    width, height = wanted.bucket
    arrays = {
        "latents": np.ones((channels, height // 8, width // 8), np.float32),
        "original_size": np.array(wanted.size),
        "crop_ltrb": np.array(wanted.crop_ltrb),
    }
    arrays = {name + suffix: array for name, array in (arrays | changes).items() if array is not None}
    np.savez(file, **arrays)
    return arrays


def named(wanted: Wanted, layout: CacheLayout = PLAIN) -> Path:
    return latent_files.files_of(wanted, layout)[-1]


def oldest(wanted: Wanted) -> Path:
    return wanted.image.with_name(f"{wanted.image.stem}.npz")


# ---- the format


@pytest.mark.rows("R13")
def test_numpy_finds_the_arrays_of_the_format(wanted, tmp_path):
    wanted = replace(wanted, flip=True, alpha=True)
    latents = make(wanted)
    entry = save(wanted)
    assert entry == Entry(tmp_path / "a b.v2_0130x0097_sd.npz", "", (4, 6, 8))
    with np.load(entry.file, allow_pickle=False) as archive:
        arrays = dict(archive)
    assert arrays.keys() == {"latents", "latents_flipped", "alpha_mask", "original_size", "crop_ltrb", "provenance"}
    assert [(arrays[name].dtype, arrays[name].shape) for name in ("latents", "latents_flipped", "alpha_mask")] == [
        (np.float32, (4, 6, 8)),
        (np.float32, (4, 6, 8)),
        (np.float32, (48, 64)),
    ]
    assert np.array_equal(arrays["latents"], latents.plain)
    assert np.array_equal(arrays["latents_flipped"], latents.flipped)
    assert arrays["original_size"].tolist() == [130, 97]
    assert arrays["crop_ltrb"].tolist() == list(wanted.crop_ltrb)
    assert find(wanted) == entry
    assert pickle.loads(pickle.dumps(entry)) == entry
    again = latent_files.load(entry, flip=True, alpha=True)
    assert np.array_equal(again.plain, latents.plain)
    assert np.array_equal(again.flipped, latents.flipped)
    assert np.array_equal(again.alpha, latents.alpha)
    assert again.mask is None


@pytest.mark.parametrize(
    ("image", "bucket", "expected"),
    [
        ((512, 512), (512, 512), (0, 0, 512, 512)),
        ((1920, 1080), (640, 384), (0, 12, 640, 372)),
        ((800, 1200), (384, 640), (0, 32, 384, 608)),
        ((1333, 2000), (832, 1216), (10, 0, 820.464, 1216)),
        ((640, 480), (640, 448), (21, 0, 618.333, 448)),
    ],
)
def test_recorded_crops(wanted, image, bucket, expected):
    """Worked values: what an earlier trainer wrote for these images and buckets."""
    crop = crop_ltrb(Size(*bucket), Size(*image))
    entry = save(replace(wanted, size=Size(*image), bucket=Size(*bucket), crop_ltrb=crop))
    assert np.load(entry.file)["crop_ltrb"].tolist() == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(
    ("image", "shared", "layout", "expected"),
    [
        ("a.png", False, PLAIN, ["a.npz", "a_0130x0097_sd.npz"]),
        ("a.b.jpg", False, PLAIN, ["a.b.npz", "a.b_0130x0097_sd.npz"]),
        ("a.png", False, SIZED, ["a_0130x0097_flux.npz"]),
        ("a.png", True, PLAIN, ["a.png_0130x0097_sd.npz"]),
        ("a.JPG", True, SIZED, ["a.JPG_0130x0097_flux.npz"]),
    ],
)
def test_file_names(wanted, tmp_path, image, shared, layout, expected):
    wanted = replace(wanted, image=tmp_path / image, shared_stem=shared)
    assert latent_files.files_of(wanted, layout) == [tmp_path / name for name in expected]


def test_large_sizes_are_not_cut(wanted):
    assert named(replace(wanted, size=Size(12345, 7))).name == "a b.v2_12345x0007_sd.npz"


# ---- entries beside each other


@pytest.mark.rows("R253")
@pytest.mark.parametrize("first", [LARGE, SMALL])
def test_two_sizes_live_in_one_file(wanted, first):
    """The first has no size in its names, so that earlier trainers still read it."""
    sizes = {bucket: in_bucket(wanted, bucket) for bucket in (first, LARGE, SMALL)}
    entries = {bucket: save(one, number=bucket.width) for bucket, one in sizes.items()}
    assert len({entry.file for entry in entries.values()}) == 1
    names = set(store.names(named(wanted)))
    second = SMALL if first == LARGE else LARGE
    assert {"latents", f"latents_{second.height // 8}x{second.width // 8}"} <= names
    assert entries[first].suffix == ""
    for check in (True, False):
        for bucket, one in sizes.items():
            found = find(one, check=check)
            assert found == entries[bucket]
            assert np.array_equal(latent_files.load(found).plain, make(one, number=bucket.width).plain)
    for bucket, one in sizes.items():  # made again, each stays where it is
        assert save(one, number=7.0) == entries[bucket]
        assert read(one)[0, 0, 0] == 7.0
    assert set(store.names(named(wanted))) == names


def test_a_second_size_does_not_overwrite_an_earlier_trainers(wanted):
    kept = theirs(named(wanted), wanted, latents_flipped=np.ones((4, 6, 8), np.float32))
    assert save(in_bucket(wanted, SMALL)).suffix == "_3x4"
    arrays = dict(np.load(named(wanted)))
    assert all(np.array_equal(arrays[name], array) for name, array in kept.items())
    assert find(wanted) == Entry(named(wanted), "", (4, 6, 8))
    assert find(in_bucket(wanted, SMALL)) == Entry(named(wanted), "_3x4", (4, 3, 4))


@pytest.mark.parametrize("stale", ["old", "nan", "other channels", "other image"])
def test_what_is_of_no_use_is_overwritten(wanted, stale):
    latents = np.ones((3 if stale == "other channels" else 4, 6, 8), np.float32)
    latents[0, 0, 0] = np.nan if stale == "nan" else 1
    size = np.array([1, 1]) if stale == "other image" else np.array(wanted.size)
    theirs(named(wanted), wanted, latents=latents, original_size=size)
    if stale == "old":
        os.utime(named(wanted), (1, 1))
    assert save(in_bucket(wanted, SMALL)).suffix == ""
    assert np.load(named(wanted))["latents"].shape == (4, 3, 4)


def test_entries_of_another_origin_go_when_a_new_one_comes(wanted):
    other = replace(IDENTITY, vae="another VAE")
    save(wanted)
    assert save(in_bucket(wanted, SMALL)).suffix == "_3x4"
    assert save(in_bucket(wanted, SMALL), identity=other).suffix == ""
    assert set(store.names(named(wanted))) == {"latents", "original_size", "crop_ltrb", "provenance"}
    assert "made by another VAE" not in str(find(in_bucket(wanted, SMALL), identity=other))
    assert save(wanted, identity=other).suffix == "_6x8"
    changed = replace(other, image="new digest")
    assert save(wanted, identity=changed).suffix == ""
    assert np.load(named(wanted))["latents"].shape == (4, 6, 8)
    assert not any(name.endswith(("_3x4", "_6x8")) for name in store.names(named(wanted)))


def test_files_with_sizes_in_all_names_are_added_to(wanted):
    kept = theirs(named(wanted, SIZED), in_bucket(wanted, SMALL), "_3x4", 16)
    assert find(in_bucket(wanted, SMALL), SIZED).suffix == "_3x4"
    assert "it has no latents_6x8" in find(wanted, SIZED)
    assert save(wanted, SIZED) == Entry(named(wanted, SIZED), "_6x8", (16, 6, 8))
    arrays = dict(np.load(named(wanted, SIZED)))
    ours = {f"{name}_6x8" for name in ("latents", "original_size", "crop_ltrb", "provenance")}
    assert arrays.keys() == kept.keys() | ours
    assert all(np.array_equal(arrays[name], array) for name, array in kept.items())
    assert np.array_equal(read(wanted, SIZED), make(wanted, SIZED).plain)
    assert read(in_bucket(wanted, SMALL), SIZED).max() == 1


@pytest.mark.rows("R253")
def test_datasets_with_different_needs_share_an_entry(wanted, tmp_path):
    mask, masked = tmp_path / "mask.png", replace(IDENTITY, mask="mask digest")
    flipped, weighed = replace(wanted, flip=True), replace(wanted, mask=mask)
    save(flipped)
    assert "it has no loss_mask" in find(weighed, identity=masked)
    save(weighed, identity=masked)
    save(wanted, number=3.0)
    for one, identity in ((wanted, IDENTITY), (flipped, IDENTITY), (weighed, masked)):
        assert isinstance(find(one, identity=identity), Entry)
    loaded = latent_files.load(find(weighed, identity=masked), flip=True, mask=True)
    assert loaded.plain[0, 0, 0] == 3.0
    assert np.array_equal(loaded.flipped, make(flipped).flipped)
    assert np.array_equal(loaded.mask, make(weighed).mask)
    assert "made with another mask" in find(weighed, identity=replace(masked, mask="new digest"))


def test_transparency_decides_over_colours_and_so_over_latents(wanted):
    seen = replace(wanted, alpha=True)
    save(seen)
    assert np.array_equal(latent_files.load(find(seen), alpha=True).alpha, make(seen).alpha)
    assert "made with alpha_mask" in find(wanted)
    save(wanted)
    assert "it has no alpha_mask" in find(seen)


def test_another_look_of_one_run_has_a_file_of_its_own(wanted):
    other = replace(wanted, alpha=True, variant="~1a2b3c4d")
    save(wanted, number=1.0)
    save(other, number=2.0)
    assert (read(wanted)[0, 0, 0], read(other)[0, 0, 0]) == (1.0, 2.0)


@pytest.mark.parametrize("stale", [{"vae": "another"}, {"image": "another"}])
def test_mirrored_latents_of_another_origin_do_not_stay(wanted, stale):
    save(replace(wanted, flip=True, alpha=True))
    save(wanted, identity=replace(IDENTITY, **stale))
    assert not {"latents_flipped", "alpha_mask"} & set(store.names(named(wanted)))


def test_an_unmarked_entry_that_lacks_something_is_replaced_as_a_whole(wanted):
    theirs(named(wanted), wanted, latents_flipped=np.ones((4, 6, 8), np.float32))
    save(replace(wanted, alpha=True))
    assert "latents_flipped" not in store.names(named(wanted))


# ---- what cannot be used


@pytest.mark.parametrize(
    ("change", "identity", "reason"),
    [
        ({}, {"image": "new digest"}, "the image has changed since"),
        ({}, {"vae": "another"}, "made by another VAE"),
        ({"resized": Size(66, 48)}, {}, "the image was resized to 65x48, not to 66x48"),
        ({"resized": None}, {}, "the image was resized to 65x48, not to nothing"),
        ({"interpolation": "lanczos"}, {}, "resized with interpolation None, not lanczos"),
        ({"flip": True}, {}, "it has no latents_flipped"),
        ({"alpha": True}, {}, "it has no alpha_mask"),
        ({"mask": Path("mask.png")}, {"mask": "digest"}, "it has no loss_mask"),
        ({"bucket": SMALL}, {}, "latents has the shape 4x6x8, not 4x3x4"),
        ({"bucket": Size(48, 64)}, {}, "latents has the shape 4x6x8, not 4x8x6"),
    ],
)
def test_our_entries_are_used_only_for_what_they_are(wanted, change, identity, reason):
    save(wanted)
    found = find(replace(wanted, **change), identity=replace(IDENTITY, **identity))
    assert found == f"{named(wanted)}: {reason}"
    save(replace(wanted, **change), identity=replace(IDENTITY, **identity))
    assert isinstance(find(replace(wanted, **change), identity=replace(IDENTITY, **identity)), Entry)


def test_our_entries_do_not_depend_on_times(wanted):
    entry = save(wanted)
    os.utime(entry.file, (1, 1))
    assert find(wanted) == entry


def test_nothing_is_there(wanted):
    assert find(wanted) is None
    assert find(wanted, check=False) is None


def not_finite(value):
    latents = np.ones((4, 6, 8), np.float16)
    latents[1, 2, 3] = value
    return latents


@pytest.mark.rows("R253")
@pytest.mark.parametrize(
    ("arrays", "change", "reason"),
    [
        ({}, {}, None),
        ({"original_size": None, "crop_ltrb": None}, {}, None),
        ({"latents": np.ones((4, 6, 8), np.float16)}, {}, None),
        ({"latents": np.ones((4, 6, 8))}, {}, None),
        ({"crop_ltrb": np.array([1.0, 0.5, 64, 48])}, {}, None),
        ({"alpha_mask": np.ones((48, 64), np.float32)}, {}, None),
        ({"alpha_mask": np.ones((48, 64), np.float32)}, {"alpha": True}, None),
        ({"latents_flipped": np.ones((4, 6, 8), np.float32)}, {"flip": True}, None),
        ({}, {"flip": True}, "it has no latents_flipped"),
        ({}, {"alpha": True}, "it has no alpha_mask"),
        ({"latents": None}, {}, "it has no latents"),
        ({"latents": np.ones((16, 6, 8), np.float32)}, {}, "latents has the shape 16x6x8, not 4x6x8"),
        ({"latents": np.ones((4, 8, 6), np.float32)}, {}, "latents has the shape 4x8x6, not 4x6x8"),
        ({"latents": np.float32(1)}, {}, "latents has the shape nothing, not 4x6x8"),
        ({"latents": np.ones((4, 6, 8), np.int32)}, {}, "latents is of type int32"),
        ({"latents": not_finite(np.nan)}, {}, "latents holds NaN or infinite numbers"),
        ({"latents": not_finite(-np.inf)}, {}, "latents holds NaN or infinite numbers"),
        ({"latents_flipped": not_finite(np.nan)}, {"flip": True}, "latents_flipped holds NaN or infinite numbers"),
        (
            {"latents_flipped": np.ones((4, 6, 7), np.float32)},
            {"flip": True},
            "latents_flipped has the shape 4x6x7, not 4x6x8",
        ),
        ({"alpha_mask": np.ones((6, 8), np.float32)}, {"alpha": True}, "alpha_mask has the shape 6x8, not 48x64"),
        ({"original_size": np.array([131, 97])}, {}, "made from an image of 131x97"),
        ({"original_size": np.array([97, 130])}, {}, "made from the image before it was turned"),
        ({"original_size": np.array(130)}, {}, "made from an image of nothing"),
        ({"original_size": np.array([[130], [97]])}, {}, "made from an image of nothing"),
        ({"crop_ltrb": np.array([2.5, 0.0, 64, 48])}, {}, "made with another crop"),
        ({"crop_ltrb": np.array([0.0, np.nan, 64, 48])}, {}, "made with another crop"),
        ({"crop_ltrb": np.array([0, 0, 64])}, {}, "made with another crop"),
        (
            {},
            {"shared_stem": True},
            "it does not say which of the images of this name it was made from",
        ),
    ],
)
def test_entries_without_a_note_are_judged_by_what_they_tell(wanted, arrays, change, reason):
    wanted = replace(wanted, **change)
    theirs(named(wanted), wanted, **arrays)
    found = find(wanted, identity=None)
    assert found == (Entry(named(wanted), "", (4, 6, 8)) if reason is None else f"{named(wanted)}: {reason}")
    if reason is None:
        loaded = latent_files.load(found, flip=wanted.flip, alpha=wanted.alpha)
        assert loaded.plain.dtype == np.float32
        assert np.array_equal(loaded.plain, np.ones((4, 6, 8)))


def test_an_unmarked_entry_must_not_be_older_than_its_image(wanted):
    theirs(named(wanted), wanted)
    now = named(wanted).stat().st_mtime_ns
    os.utime(wanted.image, ns=(now, now))
    assert isinstance(find(wanted), Entry)
    os.utime(wanted.image, ns=(now + 10**9, now + 10**9))
    assert find(wanted) == f"{named(wanted)}: older than the image"


# ---- files of the oldest layout


@pytest.mark.parametrize("by", ["arr_0", "latents"])
def test_the_oldest_file_is_used_first(wanted, by):
    save(wanted)
    np.savez(oldest(wanted), **{by: np.full((4, 6, 8), 5, np.float16)})
    found = find(wanted, identity=None)
    assert found.file == oldest(wanted)
    assert latent_files.load(found).plain.tolist() == np.full((4, 6, 8), 5.0).tolist()
    os.utime(oldest(wanted), (1, 1))
    assert find(wanted).file == named(wanted)
    named(wanted).unlink()
    assert find(wanted) == f"{oldest(wanted)}: older than the image"
    save(wanted)  # never into a file that may be somebody else's
    assert store.names(oldest(wanted)) == [by]
    assert find(wanted).file == named(wanted)
    assert find(wanted, check=False).file == named(wanted)


def test_the_oldest_file_is_not_for_shared_stems_or_sized_names(wanted):
    np.savez(oldest(wanted), np.ones((4, 6, 8), np.float32))
    assert find(replace(wanted, shared_stem=True)) is None
    assert find(wanted, CacheLayout("_x.npz", 4, keys_by_size=True)) is None


@pytest.mark.rows("R110")
@pytest.mark.parametrize("by", ["arr_0", "latents"])
@pytest.mark.parametrize("check", [True, False])
def test_mirrored_latents_in_a_file_of_their_own(wanted, by, check):
    flipped = replace(wanted, flip=True)
    flip_file = wanted.image.with_name("a b.v2_flip.npz")
    np.savez(oldest(wanted), np.full((4, 6, 8), 5, np.float32))
    assert find(flipped, check=check) == f"{oldest(wanted)}: it has no latents_flipped"
    np.savez(flip_file, **{by: np.full((4, 6, 8), 6, np.float16)})
    found = find(flipped, check=check)
    assert found == Entry(oldest(wanted), "", (4, 6, 8), True, flip_file)
    loaded = latent_files.load(found, flip=True)
    assert (loaded.plain.max(), loaded.flipped.min()) == (5, 6)
    only = latent_files.load(found, plain=False, flip=True)
    assert only.plain is None
    assert only.flipped.dtype == np.float32
    assert find(wanted, check=check).flip_file is None


def test_a_flip_file_that_cannot_be_used(wanted):
    flipped = replace(wanted, flip=True)
    flip_file = wanted.image.with_name("a b.v2_flip.npz")
    np.savez(oldest(wanted), np.ones((4, 6, 8), np.float32))
    np.savez(flip_file, np.ones((4, 8, 6), np.float32))
    assert find(flipped).endswith("arr_0 has the shape 4x8x6, not 4x6x8 (a b.v2_flip.npz)")
    with pytest.raises(UserError, match=r"_flip\.npz: .* shape 4x8x6"):
        latent_files.load(find(flipped, check=False), flip=True)
    np.savez(flip_file, other=np.ones(3))
    assert find(flipped).endswith("it has no latents (a b.v2_flip.npz)")
    flip_file.write_bytes(b"")
    assert find(flipped).endswith("the file is empty (a b.v2_flip.npz)")
    np.savez(flip_file, np.ones((4, 6, 8), np.float32))
    os.utime(flip_file, (1, 1))
    assert find(flipped).endswith("older than the image (a b.v2_flip.npz)")


# ---- images of one stem, and latents without an image


@pytest.mark.rows("R13")
def test_images_that_differ_in_the_extension_have_files_of_their_own(wanted, tmp_path):
    png, jpg = (replace(wanted, image=tmp_path / name, shared_stem=True) for name in ("a.png", "a.jpg"))
    save(png, number=1.0)
    save(jpg, number=2.0)
    assert (read(png)[0, 0, 0], read(jpg)[0, 0, 0]) == (1.0, 2.0)
    alone = replace(wanted, image=tmp_path / "a.png")
    assert named(alone) not in (named(png), named(jpg))


def test_latents_without_an_image(wanted):
    absent = replace(wanted, image=wanted.image.with_name("gone.png"), present=False)
    assert find(absent) is None
    theirs(named(absent), absent)
    os.utime(named(absent), (1, 1))
    assert find(absent) == Entry(named(absent), "", (4, 6, 8))
    save(wanted := replace(absent, present=True))
    nobody = replace(IDENTITY, image=None)
    assert find(absent, identity=nobody) == find(wanted)
    assert "made by another VAE" in find(absent, identity=replace(nobody, vae="another"))


# ---- damage, and unchecked use


@pytest.mark.rows("R256")
@pytest.mark.parametrize("damage", [b"", b"not a zip", "half", "flipped byte"])
def test_a_broken_file_is_named(wanted, damage):
    entry = save(wanted)
    content = entry.file.read_bytes()
    at = content.index(make(wanted).plain.tobytes()) + 50
    if damage == "half":
        damage = content[: len(content) // 2]
    elif damage == "flipped byte":
        damage = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
    entry.file.write_bytes(damage)
    reason = find(wanted)
    assert reason.startswith(f"{entry.file}: ")
    with pytest.raises(UserError) as caught:
        latent_files.load(entry)
    assert caught.value.problems[0].startswith(f"{entry.file}: the cached latents cannot be used (")
    assert reason.removeprefix(f"{entry.file}: ") in caught.value.problems[0]
    save(wanted)
    assert entry.file.read_bytes() == content


@pytest.mark.rows("R256")
def test_a_file_that_changed_after_it_was_found_is_named(wanted):
    entry = save(replace(wanted, flip=True))
    theirs(entry.file, wanted, latents=np.ones((4, 6, 9), np.float32))
    with pytest.raises(UserError, match=r"_sd\.npz: .*latents has the shape 4x6x9, not 4x6x8"):
        latent_files.load(entry)
    with pytest.raises(UserError, match=r"_sd\.npz: .*it has no array latents_flipped"):
        latent_files.load(entry, flip=True)
    theirs(entry.file, wanted, latents=np.ones((4, 6, 8), np.int64))
    with pytest.raises(UserError, match=r"_sd\.npz: .*latents is of type int64"):
        latent_files.load(entry)
    entry.file.unlink()
    with pytest.raises(UserError, match=r"_sd\.npz: .*No such file"):
        latent_files.load(entry)


def test_unchecked_files_need_the_right_names_only(wanted):
    entry = save(wanted)
    identity = Identity("other", "other", "other")

    def forbidden(*_):
        raise AssertionError("nothing is to be looked into")

    for change in ({}, {"resized": None, "interpolation": "box"}, {"shared_stem": False}):
        found = latent_files.find(replace(wanted, **change), PLAIN, forbidden, forbidden, stamp, check=False)
        assert found == entry
    assert "made by another VAE" in find(wanted, identity=replace(identity, image=IDENTITY.image))
    assert find(replace(wanted, flip=True), check=False) == f"{entry.file}: it has no latents_flipped"
    small = in_bucket(wanted, SMALL)
    with pytest.raises(UserError, match="latents has the shape 4x6x8, not 4x3x4"):
        latent_files.load(find(small, check=False))
    entry.file.write_bytes(b"damaged")
    assert find(wanted, check=False) == f"{entry.file}: it is no .npz file"


def test_latents_of_another_shape_than_wanted_are_not_written(wanted):
    save(wanted)
    before = named(wanted).read_bytes()
    with pytest.raises(ValueError, match="latents must have the shape"):
        latent_files.save(wanted, PLAIN, make(in_bucket(wanted, SMALL)), IDENTITY)
    with pytest.raises(ValueError, match="latents_flipped must have the shape"):
        latent_files.save(replace(wanted, flip=True), PLAIN, make(wanted), IDENTITY)
    assert named(wanted).read_bytes() == before


def test_damage_does_not_stand_in_the_way_of_new_latents(wanted):
    named(wanted).write_bytes(b"damaged")
    assert find(wanted) == f"{named(wanted)}: it is no .npz file"
    save(wanted)
    assert isinstance(find(wanted), Entry)
