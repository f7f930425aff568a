"""The whole way of the guides on the bundled images: from a folder to a model trained on what was made of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.text.tokenizers import bundled_clip_tokenizer
from tests.builders.captioners import tiny_blip, write_blip_folder
from tests.scripts.conftest import MODEL
from tests.scripts.starting import OFFLINE

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "examples" / "concept" / "10_sks flower"
TAGGER = ROOT / "examples" / "tiny_tagger"
TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


def from_inside(script: str, *arguments: object) -> str:
    """Runs `python <script>` where the scripts are; returns what it says."""
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=ROOT / "finetune",
        env={**os.environ, **OFFLINE},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return said(done)


def said(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stderr


def seen_from_inside(path: Path) -> str:
    try:
        return os.path.relpath(path, ROOT / "finetune")
    except ValueError:  # on another drive of Windows
        return str(path)


def texts(folder: Path, ending: str) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob(f"*{ending}"))}


def tags_of(caption: str) -> set[str]:
    """What the bundled tagger must find in a bundled image, by the caption that it comes with."""
    words = set(caption.split())
    found = {"flower", "pink_flower"}
    found |= {"light_background"} if words & {"white", "beige"} else set()
    found |= {"dark_background"} if words & {"black", "navy", "brown"} else set()
    places = {"left": "on_the_left", "right": "on_the_right", "top": "at_the_top", "bottom": "at_the_bottom"}
    return found | {tag for word, tag in places.items() if word in words}


def load(file: Path) -> dict[str, dict]:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.rows("C2", "C9", "C11", "C15", "C19", "C21", "R12", "R13", "R56", "R59", "R60", "R90", "R104")
def test_from_images_to_a_model(run_script, tmp_path):
    data = tmp_path / "train_data"
    shutil.copytree(BUNDLED, data, ignore=shutil.ignore_patterns("*.caption"))
    stems = sorted(path.stem for path in data.iterdir())
    assert len(stems) == 16
    (data / "flower_00.caption").write_text("a young woman with a flower\n", encoding="utf-8")
    write_blip_folder(tiny_blip(), tmp_path / "blip")
    shutil.copytree(TAGGER, tmp_path / "wd14_tagger_model" / "SmilingWolf_wd-v1-4-convnext-tagger-v2")

    model = f"--caption_weights={tmp_path / 'blip'}"
    line = ("--batch_size", "8", str(data), model, "--max_length=20", "--skip_existing")
    captioned = said(run_script("finetune/make_captions.py", *line))
    assert "15 done, 1 skipped" in captioned
    assert f"captioning with {tmp_path / 'blip'} on the " in captioned
    captions = texts(data, ".caption")
    assert list(captions) == stems
    assert captions["flower_00"] == "a young woman with a flower"
    assert all(captions.values())
    assert len(set(captions.values())) > 8

    folder = seen_from_inside(data)
    models = seen_from_inside(tmp_path / "wd14_tagger_model")
    tagged = from_inside("tag_images_by_wd14_tagger.py", "--batch_size", 4, folder, "--model_dir", models)
    assert "16 done" in tagged
    tags = texts(data, ".txt")
    assert list(tags) == stems
    for stem, said_of_it in texts(BUNDLED, ".caption").items():
        assert set(tags[stem].split(", ")) == tags_of(said_of_it)

    file = {name: tmp_path / f"meta_{name}.json" for name in ("cap", "cap_dd", "clean", "lat")}
    from_inside("merge_captions_to_metadata.py", folder, seen_from_inside(file["cap"]))
    assert load(file["cap"]) == {stem: {"caption": captions[stem]} for stem in stems}
    from_inside("merge_dd_tags_to_metadata.py", folder, "--in_json", file["cap"], file["cap_dd"])
    assert load(file["cap_dd"]) == {stem: {"caption": captions[stem], "tags": tags[stem]} for stem in stems}

    from_inside("clean_captions_and_tags.py", file["cap_dd"], file["clean"])
    clean = load(file["clean"])
    assert list(clean) == stems
    assert clean["flower_00"] == {"caption": "a girl with a flower", "tags": "light background, pink flower"}
    assert clean["flower_01"]["tags"] == "dark background, pink flower, on the right, at the top"

    sizes = ("--max_resolution", "64,64", "--min_bucket_reso", "64", "--mixed_precision", "no")
    line = (data, file["clean"], file["lat"], MODEL, "--batch_size", "4", *sizes)
    prepared = said(run_script("finetune/prepare_buckets_latents.py", *line))
    assert "bucket 64x64: 16 images" in prepared
    assert "16 done" in prepared
    assert sorted(path.stem for path in data.glob("*.npz")) == stems
    of_image = {path.stem: list(Image.open(path).size) for path in BUNDLED.glob("*.png")}
    assert load(file["lat"]) == {
        stem: {**entry, "train_resolution": [64, 64], "image_size": of_image[stem]} for stem, entry in clean.items()
    }

    for path in data.iterdir():
        if path.suffix != ".npz":
            path.unlink()
    out = tmp_path / "fine_tuned"
    line = (
        *("fine_tune.py", f"--pretrained_model_name_or_path={MODEL}", f"--in_json={file['lat']}"),
        *(f"--train_data_dir={data}", f"--output_dir={out}", "--train_batch_size=8"),
        *("--max_train_steps=2", "--learning_rate=1e-3", "--train_text_encoder", "--optimizer_args", "weight_decay=0"),
        *("--save_model_as=safetensors", "--save_precision=float", "--seed=1", "--max_data_loader_n_workers=0"),
    )
    trained = said(run_script(*line))
    assert "16 images of which only latents are there" in trained
    assert "latents on disk: 16 used as they are\n" in trained

    # Without weight decay, the vectors of those tokens move that were trained on, and of no others.
    before, after = (load_file(path)[TOKENS].float() for path in (MODEL, out / "last.safetensors"))
    moved = set(torch.nonzero((after - before).abs().amax(dim=1)).flatten().tolist())
    tokenizer = bundled_clip_tokenizer()
    assert moved == {
        token for entry in clean.values() for token in tokenizer(f"{entry['caption']},{entry['tags']}").input_ids
    }
