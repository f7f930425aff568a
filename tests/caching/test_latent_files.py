"""Latent files: names and arrays as other trainers have them, and nothing used that was made from something else."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from library.caching import latent_files, store
from library.caching.entry import CacheRequest, Entry, Fingerprint, StoredArray
from library.caching.latent_files import LatentCache
from library.data.sample.buckets import crop_ltrb
from library.errors import UserError
from library.types import CacheLayout, Size

PLAIN = CacheLayout("_sd.npz", 4, keys_by_size=False)
SIZED = CacheLayout("_flux.npz", 16, keys_by_size=True)
FINGERPRINT = Fingerprint("image digest", "vae fingerprint", None)
LARGE, SMALL = Size(64, 48), Size(32, 24)
OF_OURS = ("latents", "original_size", "crop_ltrb", "provenance")  # in every entry that we write


@pytest.fixture
def wanted(tmp_path) -> CacheRequest:
    """An image of 130x97, for the bucket 64x48. Its content is never looked at here."""
    image = tmp_path / "a b.v2.png"
    image.write_bytes(b"image")
    return CacheRequest(
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


def in_bucket(wanted: CacheRequest, bucket: Size) -> CacheRequest:
    return replace(wanted, bucket=bucket, crop_ltrb=crop_ltrb(bucket, wanted.size))


def make(wanted: CacheRequest, layout: CacheLayout = PLAIN, number: float = 0.0) -> dict[str, np.ndarray]:
    """Arrays that tell by their numbers which they are."""
    made = {}
    for name, shape in wanted.shapes(layout).items():
        count = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + np.float32(number)
        made[name] = {"latents_flipped": -count, "alpha_mask": count / count.max()}.get(name, count)
    if "loss_mask" in made:
        made["loss_mask"] = np.full_like(made["loss_mask"], 0.5)
    return made


def cache(layout=PLAIN, fingerprint=FINGERPRINT, check=True) -> LatentCache:
    return LatentCache(layout, lambda _: fingerprint, check=check)


def find(wanted, layout=PLAIN, fingerprint=FINGERPRINT, check=True):
    return cache(layout, fingerprint, check).find(wanted)


def save(wanted, layout=PLAIN, fingerprint=FINGERPRINT, number=0.0) -> Entry:
    return cache(layout).save(wanted, make(wanted, layout, number), fingerprint)


def read(wanted, layout=PLAIN, fingerprint=FINGERPRINT) -> np.ndarray:
    return latents_in(find(wanted, layout, fingerprint))


def latents_in(entry: Entry) -> np.ndarray:
    return entry.read("latents")["latents"]


def file_of(entry: Entry) -> Path:
    return entry.arrays["latents"].file


def suffix_of(entry: Entry) -> str:
    return entry.arrays["latents"].name.removeprefix("latents")


def entry_in(file: Path, suffix: str, shape: tuple[int, int, int], **others: StoredArray) -> Entry:
    return Entry({"latents": StoredArray(file, f"latents{suffix}", shape), **others})


def theirs(file: Path, wanted: CacheRequest, suffix: str = "", channels: int = 4, **changes) -> dict[str, np.ndarray]:
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


def named(wanted: CacheRequest, layout: CacheLayout = PLAIN) -> Path:
    return latent_files.files_of(wanted, layout)[-1]


def oldest(wanted: CacheRequest) -> Path:
    return wanted.image.with_name(f"{wanted.image.stem}.npz")


# ---- the format


@pytest.mark.rows("R13")
def test_numpy_finds_the_arrays_of_the_format(wanted, tmp_path):
    wanted = replace(wanted, flip=True, alpha=True)
    latents = make(wanted)
    entry = save(wanted)
    file = tmp_path / "a b.v2_0130x0097_sd.npz"
    others = {"latents_flipped": (4, 6, 8), "alpha_mask": (48, 64)}
    stored = {name: StoredArray(file, f"{name}_6x8", shape) for name, shape in others.items()}
    assert entry == entry_in(file, "_6x8", (4, 6, 8), **stored)
    with np.load(file_of(entry), allow_pickle=False) as archive:
        assert all(name.endswith("_6x8") for name in archive)
        arrays = {name.removesuffix("_6x8"): array for name, array in archive.items()}
    assert arrays.keys() == {"latents", "latents_flipped", "alpha_mask", "original_size", "crop_ltrb", "provenance"}
    assert [(arrays[name].dtype, arrays[name].shape) for name in ("latents", "latents_flipped", "alpha_mask")] == [
        (np.float32, (4, 6, 8)),
        (np.float32, (4, 6, 8)),
        (np.float32, (48, 64)),
    ]
    assert np.array_equal(arrays["latents"], latents["latents"])
    assert np.array_equal(arrays["latents_flipped"], latents["latents_flipped"])
    assert arrays["original_size"].tolist() == [130, 97]
    assert arrays["crop_ltrb"].tolist() == list(wanted.crop_ltrb)
    note = json.loads(arrays["provenance"].tobytes())
    assert note.keys() == {"picture", "vae", "alpha", "mask", "resized", "interpolation", "made_by"}
    assert (note["picture"], note["vae"], note["alpha"]) == ("image digest", "vae fingerprint", True)
    assert find(wanted) == entry
    assert pickle.loads(pickle.dumps(entry)) == entry
    again = entry.read("alpha_mask", "latents_flipped")
    assert list(again) == ["alpha_mask", "latents_flipped"]
    assert all(np.array_equal(again[name], latents[name]) for name in again)


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
    assert np.load(file_of(entry))[f"crop_ltrb{suffix_of(entry)}"].tolist() == pytest.approx(expected, abs=5e-4)


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
    """Their names end in the size of the latents, height first, whichever was there first."""
    sizes = {bucket: in_bucket(wanted, bucket) for bucket in (first, LARGE, SMALL)}
    entries = {bucket: save(one, number=bucket.width) for bucket, one in sizes.items()}
    assert len({file_of(entry) for entry in entries.values()}) == 1
    names = set(store.names(named(wanted)))
    assert {name for name in names if name.startswith("latents")} == {"latents_6x8", "latents_3x4"}
    for check in (True, False):
        for bucket, one in sizes.items():
            found = find(one, check=check)
            assert found == entries[bucket]
            assert np.array_equal(latents_in(found), make(one, number=bucket.width)["latents"])
    for bucket, one in sizes.items():  # made again, each stays where it is
        assert save(one, number=7.0) == entries[bucket]
        assert read(one)[0, 0, 0] == 7.0
    assert set(store.names(named(wanted))) == names


@pytest.mark.rows("R500")
@pytest.mark.parametrize("check", [True, False])
def test_latents_without_a_size_are_of_the_bucket_of_their_shape_alone(wanted, check):
    """Trainers since March 2026 take them for every bucket; two datasets of different sizes then share latents."""
    theirs(named(wanted), wanted)
    assert find(wanted, check=check) == entry_in(named(wanted), "", (4, 6, 8))
    for bucket in (SMALL, Size(48, 64)):
        small = in_bucket(wanted, bucket)
        height, width = bucket.height // 8, bucket.width // 8
        shapes = f"latents has the shape 4x6x8, not 4x{height}x{width}"
        assert find(small, check=check) == f"{named(wanted)}: {shapes}"
        assert suffix_of(save(small)) == f"_{height}x{width}"
        assert latents_in(find(small, check=check)).shape == (4, height, width)
    assert latents_in(find(wanted, check=check)).max() == 1


@pytest.mark.rows("R500")
@pytest.mark.parametrize("check", [True, False])
def test_a_file_with_both_forms_is_read_by_size_first(wanted, check):
    """As a trainer leaves it that has added sizes to a file of an earlier version of itself."""
    old = theirs(named(wanted), wanted, latents_flipped=np.full((4, 6, 8), 3, np.float32))
    new = {f"{name}_6x8": 2 * old[name] if name == "latents" else old[name] for name in old if "flipped" not in name}
    small = theirs(named(wanted), in_bucket(wanted, SMALL), "_3x4")
    np.savez(named(wanted), **old, **new, **small)
    assert latents_in(find(wanted, check=check)).max() == 2
    assert suffix_of(find(in_bucket(wanted, SMALL), check=check)) == "_3x4"
    flipped = find(replace(wanted, flip=True), check=check)  # which only the older entry has, as a whole
    assert set(flipped.read("latents", "latents_flipped")["latents"].flat) == {1}
    save(wanted, number=5.0)  # takes the place of both
    assert sorted(store.names(named(wanted))) == sorted([*small, *(f"{name}_6x8" for name in OF_OURS)])


def test_runs_that_write_to_one_file_lose_nothing(wanted, tmp_path):
    """Each reads the file, adds its size and replaces it; without waiting, the last one's would be all there is."""
    sizes = [in_bucket(wanted, Size(8 * (one + 1), 8)) for one in range(6)]
    pids = []
    for one in sizes:
        pid = os.fork()
        if pid == 0:
            try:
                save(one)
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    assert all(isinstance(find(one), Entry) for one in sizes)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_a_second_size_does_not_overwrite_an_earlier_trainers(wanted):
    kept = theirs(named(wanted), wanted, latents_flipped=np.ones((4, 6, 8), np.float32))
    assert suffix_of(save(in_bucket(wanted, SMALL))) == "_3x4"
    arrays = dict(np.load(named(wanted)))
    assert all(np.array_equal(arrays[name], array) for name, array in kept.items())
    assert find(wanted) == entry_in(named(wanted), "", (4, 6, 8))
    assert find(in_bucket(wanted, SMALL)) == entry_in(named(wanted), "_3x4", (4, 3, 4))


@pytest.mark.parametrize("stale", ["old", "nan", "other channels", "other image"])
def test_what_is_of_no_use_is_overwritten(wanted, stale):
    latents = np.ones((3 if stale == "other channels" else 4, 6, 8), np.float32)
    latents[0, 0, 0] = np.nan if stale == "nan" else 1
    size = np.array([1, 1]) if stale == "other image" else np.array(wanted.size)
    theirs(named(wanted), wanted, latents=latents, original_size=size)
    if stale == "old":
        os.utime(named(wanted), (1, 1))
    save(in_bucket(wanted, SMALL))
    assert set(store.names(named(wanted))) == {f"{name}_3x4" for name in OF_OURS}


def test_entries_of_another_origin_go_when_a_new_one_comes(wanted):
    other = replace(FINGERPRINT, vae="another VAE")
    save(wanted)
    save(in_bucket(wanted, SMALL))
    save(in_bucket(wanted, SMALL), fingerprint=other)
    assert set(store.names(named(wanted))) == {f"{name}_3x4" for name in OF_OURS}
    assert isinstance(find(in_bucket(wanted, SMALL), fingerprint=other), Entry)
    save(wanted, fingerprint=other)
    assert len(store.names(named(wanted))) == 2 * len(OF_OURS)
    save(wanted, fingerprint=replace(other, image="new digest"))
    assert set(store.names(named(wanted))) == {f"{name}_6x8" for name in OF_OURS}


def test_files_with_sizes_in_all_names_are_added_to(wanted):
    kept = theirs(named(wanted, SIZED), in_bucket(wanted, SMALL), "_3x4", 16)
    assert suffix_of(find(in_bucket(wanted, SMALL), SIZED)) == "_3x4"
    assert "it has no latents_6x8" in find(wanted, SIZED)
    assert save(wanted, SIZED) == entry_in(named(wanted, SIZED), "_6x8", (16, 6, 8))
    arrays = dict(np.load(named(wanted, SIZED)))
    ours = {f"{name}_6x8" for name in ("latents", "original_size", "crop_ltrb", "provenance")}
    assert arrays.keys() == kept.keys() | ours
    assert all(np.array_equal(arrays[name], array) for name, array in kept.items())
    assert np.array_equal(read(wanted, SIZED), make(wanted, SIZED)["latents"])
    assert read(in_bucket(wanted, SMALL), SIZED).max() == 1


@pytest.mark.rows("R253")
def test_datasets_with_different_needs_share_an_entry(wanted, tmp_path):
    mask, masked = tmp_path / "mask.png", replace(FINGERPRINT, mask="mask digest")
    flipped, weighed = replace(wanted, flip=True), replace(wanted, mask=mask)
    save(flipped)
    assert "it has no loss_mask" in find(weighed, fingerprint=masked)
    save(weighed, fingerprint=masked)
    save(wanted, number=3.0)
    for one, fingerprint in ((wanted, FINGERPRINT), (flipped, FINGERPRINT), (weighed, masked)):
        assert isinstance(find(one, fingerprint=fingerprint), Entry)
    both = replace(weighed, flip=True)
    loaded = find(both, fingerprint=masked).read("latents", "latents_flipped", "loss_mask")
    assert loaded["latents"][0, 0, 0] == 3.0
    assert np.array_equal(loaded["latents_flipped"], make(flipped)["latents_flipped"])
    assert np.array_equal(loaded["loss_mask"], make(weighed)["loss_mask"])
    assert "made with another mask" in find(weighed, fingerprint=replace(masked, mask="new digest"))


def test_transparency_decides_over_colours_and_so_over_latents(wanted):
    seen = replace(wanted, alpha=True)
    save(seen)
    assert np.array_equal(find(seen).read("alpha_mask")["alpha_mask"], make(seen)["alpha_mask"])
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
    save(wanted, fingerprint=replace(FINGERPRINT, **stale))
    assert not {"latents_flipped", "alpha_mask"} & set(store.names(named(wanted)))


def test_an_unmarked_entry_that_lacks_something_is_replaced_as_a_whole(wanted):
    theirs(named(wanted), wanted, latents_flipped=np.ones((4, 6, 8), np.float32))
    save(replace(wanted, alpha=True))
    assert "latents_flipped" not in store.names(named(wanted))


# ---- what cannot be used


@pytest.mark.parametrize(
    ("change", "fingerprint", "reason"),
    [
        ({}, {"image": "new digest"}, "the image has changed since"),
        ({}, {"vae": "another"}, "made by another VAE"),
        ({"resized": Size(66, 48)}, {}, "the image was resized to 65x48, not to 66x48"),
        ({"resized": None}, {}, "the image was resized to 65x48, not to nothing"),
        ({"interpolation": "lanczos"}, {}, "resized with interpolation None, not lanczos"),
        ({"flip": True}, {}, "it has no latents_flipped_6x8"),
        ({"alpha": True}, {}, "it has no alpha_mask_6x8"),
        ({"mask": Path("mask.png")}, {"mask": "digest"}, "it has no loss_mask_6x8"),
        ({"bucket": SMALL}, {}, "it has no latents_3x4"),
        ({"bucket": Size(48, 64)}, {}, "it has no latents_8x6"),
    ],
)
def test_our_entries_are_used_only_for_what_they_are(wanted, change, fingerprint, reason):
    save(wanted)
    found = find(replace(wanted, **change), fingerprint=replace(FINGERPRINT, **fingerprint))
    assert found == f"{named(wanted)}: {reason}"
    save(replace(wanted, **change), fingerprint=replace(FINGERPRINT, **fingerprint))
    assert isinstance(find(replace(wanted, **change), fingerprint=replace(FINGERPRINT, **fingerprint)), Entry)


def test_our_entries_do_not_depend_on_times(wanted):
    entry = save(wanted)
    os.utime(file_of(entry), (1, 1))
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
        ({"latents": None}, {}, "it has no latents_6x8"),
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
def test_entries_without_a_note_are_judged_by_what_they_name(wanted, arrays, change, reason):
    wanted = replace(wanted, **change)
    theirs(named(wanted), wanted, **arrays)
    found = find(wanted, fingerprint=None)
    stored = {name: StoredArray(named(wanted), name, shape) for name, shape in wanted.shapes(PLAIN).items()}
    assert found == (Entry(stored) if reason is None else f"{named(wanted)}: {reason}")
    if reason is None:
        loaded = found.read(*stored)["latents"]
        assert loaded.dtype == np.float32
        assert np.array_equal(loaded, np.ones((4, 6, 8)))


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
    found = find(wanted, fingerprint=None)
    assert file_of(found) == oldest(wanted)
    assert latents_in(found).tolist() == np.full((4, 6, 8), 5.0).tolist()
    os.utime(oldest(wanted), (1, 1))
    assert file_of(find(wanted)) == named(wanted)
    named(wanted).unlink()
    assert find(wanted) == f"{oldest(wanted)}: older than the image"
    save(wanted)  # never into a file that may be somebody else's
    assert store.names(oldest(wanted)) == [by]
    assert file_of(find(wanted)) == named(wanted)
    assert file_of(find(wanted, check=False)) == named(wanted)


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
    shape = (4, 6, 8)
    stored = {"latents": (oldest(wanted), "arr_0"), "latents_flipped": (flip_file, by)}
    assert found == Entry({name: StoredArray(*place, shape) for name, place in stored.items()})
    loaded = found.read("latents", "latents_flipped")
    assert (loaded["latents"].max(), loaded["latents_flipped"].min()) == (5, 6)
    only = found.read("latents_flipped")
    assert list(only) == ["latents_flipped"]
    assert only["latents_flipped"].dtype == np.float32
    assert list(find(wanted, check=check).arrays) == ["latents"]


def test_a_flip_file_that_cannot_be_used(wanted):
    flipped = replace(wanted, flip=True)
    flip_file = wanted.image.with_name("a b.v2_flip.npz")
    np.savez(oldest(wanted), np.ones((4, 6, 8), np.float32))
    np.savez(flip_file, np.ones((4, 8, 6), np.float32))
    assert find(flipped).endswith("arr_0 has the shape 4x8x6, not 4x6x8 (a b.v2_flip.npz)")
    with pytest.raises(UserError, match=r"_flip\.npz: .* shape 4x8x6"):
        find(flipped, check=False).read("latents_flipped")
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
    assert find(absent) == entry_in(named(absent), "", (4, 6, 8))
    save(wanted := replace(absent, present=True))
    nobody = replace(FINGERPRINT, image=None)
    assert find(absent, fingerprint=nobody) == find(wanted)
    assert "made by another VAE" in find(absent, fingerprint=replace(nobody, vae="another"))


# ---- damage, and unchecked use


@pytest.mark.rows("R256")
@pytest.mark.parametrize("damage", [b"", b"not a zip", "half", "flipped byte"])
def test_a_broken_file_is_named(wanted, damage):
    entry = save(wanted)
    content = file_of(entry).read_bytes()
    at = content.index(make(wanted)["latents"].tobytes()) + 50
    if damage == "half":
        damage = content[: len(content) // 2]
    elif damage == "flipped byte":
        damage = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
    file_of(entry).write_bytes(damage)
    reason = find(wanted)
    assert reason.startswith(f"{file_of(entry)}: ")
    with pytest.raises(UserError) as caught:
        latents_in(entry)
    assert caught.value.problems[0].startswith(f"{file_of(entry)}: the cached latents cannot be used (")
    assert reason.removeprefix(f"{file_of(entry)}: ") in caught.value.problems[0]
    save(wanted)
    assert file_of(entry).read_bytes() == content


@pytest.mark.rows("R256")
def test_a_file_that_changed_after_it_was_found_is_named(wanted):
    entry = save(replace(wanted, flip=True))
    theirs(file_of(entry), wanted, "_6x8", latents=np.ones((4, 6, 9), np.float32))
    with pytest.raises(UserError, match=r"_sd\.npz: .*latents_6x8 has the shape 4x6x9, not 4x6x8"):
        latents_in(entry)
    with pytest.raises(UserError, match=r"_sd\.npz: .*it has no array latents_flipped_6x8"):
        entry.read("latents_flipped")
    theirs(file_of(entry), wanted, "_6x8", latents=np.ones((4, 6, 8), np.int64))
    with pytest.raises(UserError, match=r"_sd\.npz: .*latents_6x8 is of type int64"):
        latents_in(entry)
    file_of(entry).unlink()
    with pytest.raises(UserError, match=r"_sd\.npz: .*No such file"):
        latents_in(entry)


def test_unchecked_files_need_the_right_names_only(wanted):
    entry = save(wanted)
    fingerprint = Fingerprint("other", "other", "other")

    def forbidden(*_):
        raise AssertionError("nothing is to be looked into")

    for change in ({}, {"resized": None, "interpolation": "box"}, {"shared_stem": False}):
        unchecked = LatentCache(PLAIN, forbidden, forbidden, check=False)
        found = unchecked.find(replace(wanted, **change))
        assert found == entry
    assert "made by another VAE" in find(wanted, fingerprint=replace(fingerprint, image=FINGERPRINT.image))
    assert find(replace(wanted, flip=True), check=False) == f"{file_of(entry)}: it has no latents_flipped_6x8"
    small = in_bucket(wanted, SMALL)
    assert find(small, check=False) == f"{file_of(entry)}: it has no latents_3x4"
    theirs(file_of(entry), small, "_3x4", latents=np.ones((4, 6, 8), np.float32))
    with pytest.raises(UserError, match="latents_3x4 has the shape 4x6x8, not 4x3x4"):
        latents_in(find(small, check=False))
    file_of(entry).write_bytes(b"damaged")
    assert find(wanted, check=False) == f"{file_of(entry)}: it is no .npz file"


def test_latents_of_another_shape_than_request_are_not_written(wanted):
    save(wanted)
    before = named(wanted).read_bytes()
    with pytest.raises(ValueError, match="latents must have the shape"):
        cache().save(wanted, make(in_bucket(wanted, SMALL)), FINGERPRINT)
    with pytest.raises(ValueError, match="latents_flipped must have the shape"):
        cache().save(replace(wanted, flip=True), make(wanted), FINGERPRINT)
    assert named(wanted).read_bytes() == before


def test_damage_does_not_stand_in_the_way_of_new_latents(wanted):
    named(wanted).write_bytes(b"damaged")
    assert find(wanted) == f"{named(wanted)}: it is no .npz file"
    save(wanted)
    assert isinstance(find(wanted), Entry)
