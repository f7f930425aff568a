"""An embedding must measurably learn a concept that the model can draw, from images whose captions do not name it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import images as pic
import measure
import pytest
import torch

from library import registry
from library.methods.embedding import EmbeddingMethod
from tests.builders.options import options_for

ROOT = Path(__file__).resolve().parents[2]
WORD, COLOR, SHAPE = "zwx", "blue", "heart"
COUNT, STEPS = 24, 80


@pytest.fixture(scope="module")
def embedding(tmp_path_factory) -> Path:
    """Two vectors from a random start, trained on sixteen blue hearts that the captions call zwx."""
    folder = tmp_path_factory.mktemp("embedding")
    data, rng = folder / "train" / "10_zwx", Random(5)
    data.mkdir(parents=True)
    for number in range(16):
        seen = pic.random_scene(rng)
        scene = pic.Scene(SHAPE, COLOR, seen.background, seen.size, seen.position)
        pic.draw(scene, rng).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(pic.full_caption(scene).replace(f"{COLOR} {SHAPE}", WORD))
    command = [
        "train_textual_inversion.py", f"--pretrained_model_name_or_path={measure.MODEL}",
        f"--train_data_dir={data.parent}", f"--output_dir={folder}", f"--token_string={WORD}",
        "--num_vectors_per_token=2", "--resolution=64", "--enable_bucket", "--min_bucket_reso=64",
        "--train_batch_size=4", f"--max_train_steps={STEPS}", "--learning_rate=1e-2", "--lr_scheduler=cosine",
        "--cache_latents", "--max_data_loader_n_workers=0", "--seed=1",
    ]  # fmt: skip
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder / f"{WORD}.pt"


@torch.no_grad()
def right(file: Path | None) -> int:
    """How many of COUNT images of the word show the concept."""
    given = {} if file is None else {"weights": str(file)}
    opts = options_for(
        "sd",
        "embedding",
        pretrained_model_name_or_path=str(measure.MODEL),
        token_string=WORD,
        learning_rate=1e-3,
        **given,
    )
    family = registry.FAMILIES["sd"].adapter(opts)
    models = family.loader.load()
    if file is not None:
        EmbeddingMethod(opts).attach(family, models)
    names = list(pic.BACKGROUNDS)
    texts = [f"a large {WORD} on a {names[number % len(names)]} background" for number in range(COUNT)]
    readings = map(pic.read, measure.sample(family, models, texts, 500, steps=20, scale=5.0))
    return sum((reading.shape, reading.color) == (SHAPE, COLOR) for reading in readings)


@pytest.mark.slow
def test_the_concept_is_learned(embedding):
    before, after = right(None), right(embedding)
    print(f"images that show the concept: {before} of {COUNT} without, {after} of {COUNT} with the embedding")
    assert before <= COUNT * 0.1
    assert after >= COUNT * 0.8
