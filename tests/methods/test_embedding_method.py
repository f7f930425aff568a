"""Textual Inversion against transformers' own way: tokens added to the tokenizer, the embedding resized and filled."""

from __future__ import annotations

import logging
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from library import registry
from library.errors import UserError
from library.methods.embedding import EmbeddingMethod
from library.methods.embedding_spec import check_options, name_by_word
from library.methods.words import ExtendedEmbedding, random_vectors
from library.options.validation import problems, warnings
from library.runtime.logs import LOGGER
from library.training.step import StepParts, training_step
from library.types import Batch
from tests.builders.flux import write_flux, write_parts
from tests.builders.options import options_for
from tests.builders.sd3 import write_tiny_sd3
from tests.builders.sdxl import write_tiny_sdxl
from tests.builders.t5 import write_t5_tokenizer

TINY_SD = Path(__file__).resolve().parents[2] / "examples" / "tiny_model" / "tiny-sd.safetensors"
FAMILIES = [name for name, spec in registry.FAMILIES.items() if "embedding" in spec.scripts.values()]
WORD, COUNT = "zwx", 3
CAPTIONS = ["a photo of zwx on a table", "zwx, in the style of a red house"]
WORDS = [WORD, *(f"{WORD}{number}" for number in range(1, COUNT))]
STYLE = {"token_string": WORD, "num_vectors_per_token": COUNT, "learning_rate": 1e-3, "seed": 3}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, dict]:
    """By family: the options that name a tiny model of it."""
    folder = tmp_path_factory.mktemp("models")
    tokenizers = {"tokenizer_cache_dir": str(folder / "tokenizers")}
    write_t5_tokenizer(folder / "tokenizers" / "google_t5-v1_1-xxl")
    return {
        "sd": {"pretrained_model_name_or_path": str(TINY_SD)},
        "sdxl": {"pretrained_model_name_or_path": str(write_tiny_sdxl(folder / "sdxl.safetensors"))},
        "sd3": {
            "pretrained_model_name_or_path": str(
                write_tiny_sd3(folder / "sd3.safetensors", encoders=("te1", "te2", "te3"))
            ),
            **tokenizers,
            "t5xxl_max_token_length": 16,
            "train_t5xxl": True,
        },
        "flux": {
            "pretrained_model_name_or_path": str(write_flux(folder)),
            **write_parts(folder),
            "t5xxl_max_token_length": 16,
            "train_t5xxl": True,
        },
    }


def loaded(family, **given):
    opts = options_for(family, "embedding", **{**STYLE, **given})
    adapter = registry.FAMILIES[family].adapter(opts)
    return opts, adapter, adapter.loader.load()


def attached(family="sd", **given):
    if family == "sd":
        given = {"pretrained_model_name_or_path": str(TINY_SD), **given}
    opts, adapter, models = loaded(family, **given)
    method = EmbeddingMethod(opts)
    method.attach(adapter, models)
    return SimpleNamespace(opts=opts, family=adapter, models=models, method=method, rows=method.trainable())


def resized(family, models, rows):
    """The same model as transformers extends it: its tokens, its embedding with the rows at the end."""
    for part, vectors in rows.items():
        tokenizer, encoder = deepcopy(models.tokenizers[part]), models.text_encoders[part]
        stripped = [AddedToken(word, normalized=False, lstrip=True, rstrip=True) for word in WORDS]
        assert tokenizer.add_tokens(stripped if part == "te3" else WORDS) == COUNT
        ids = tokenizer.convert_tokens_to_ids(WORDS)
        table = encoder.get_input_embeddings()
        if ids[-1] >= table.num_embeddings:
            table = encoder.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
        table.weight.requires_grad_(True)
        with torch.no_grad():
            table.weight[ids] = vectors.detach()
        models.tokenizers[part] = tokenizer
    return {part: models.tokenizers[part].convert_tokens_to_ids(WORDS) for part in rows}


def expanded(captions):
    return [caption.replace(WORD, " ".join(WORDS)) for caption in captions]


def batch_of(family, captions):
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(len(captions), family.traits.latent_channels, 8, 8, generator=rng)
    sizes = torch.full((len(captions), 2), 64)
    ones, zeros = torch.ones(len(captions)), torch.zeros(len(captions), 2, dtype=torch.long)
    return Batch(captions, latents, None, ones, None, sizes, zeros, sizes)


def step(run, captions):
    parts = StepParts(
        run.family, run.models, run.method.denoise(run.family, run.models), run.family.denoiser.objective(), True
    )
    return training_step(parts, batch_of(run.family, captions), torch.Generator().manual_seed(1)).losses.mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_conditioning_and_gradients_are_those_of_a_resized_model(family, places):
    """float32: sums in another order; the gradient passes through some dozen layers."""
    ours = attached(family, **places[family])
    with torch.no_grad():
        for rows in ours.rows.values():
            rows.add_(0.02 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(9)))
    _, adapter, models = loaded(family, **places[family])
    ids = resized(family, models, ours.rows)
    with torch.no_grad():
        found = ours.family.text.encode(ours.models, CAPTIONS)
        wanted = adapter.text.encode(models, expanded(CAPTIONS))
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, value in wanted.tensors.items():
        torch.testing.assert_close(found.tensors[name], value, rtol=1e-6, atol=1e-6)
    theirs = SimpleNamespace(family=adapter, models=models, method=ours.method)
    step(ours, CAPTIONS).backward()
    step(theirs, expanded(CAPTIONS)).backward()
    for part, rows in ours.rows.items():
        gradient = models.text_encoders[part].get_input_embeddings().weight.grad[ids[part]]
        assert gradient.any(), part
        scale = gradient.abs().max().item()
        torch.testing.assert_close(rows.grad, gradient, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_rows_change(family, places):
    """A step with a large rate and weight decay, which would move every row of a trained embedding."""
    run = attached(family, **places[family], optimizer_type="AdamW")
    encoders = run.models.text_encoders
    before = {part: deepcopy(encoder.state_dict()) for part, encoder in encoders.items()}
    denoiser = deepcopy(run.models.denoiser.state_dict())
    rows = {part: value.detach().clone() for part, value in run.rows.items()}
    assert rows.keys() == registry.FAMILIES[family].traits.embedding_keys.keys()
    optimizer = torch.optim.AdamW(run.method.parameter_groups(), lr=0.1, weight_decay=0.5)
    step(run, CAPTIONS).backward()
    optimizer.step()
    assert all(not torch.equal(run.rows[part], value) for part, value in rows.items())
    for part, encoder in encoders.items():
        assert before[part].keys() == encoder.state_dict().keys(), "names are those of the model as it was read"
        assert all(torch.equal(value, before[part][name]) for name, value in encoder.state_dict().items())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(torch.equal(value, denoiser[name]) for name, value in run.models.denoiser.state_dict().items())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, run.rows.parameters()))


def test_clip_pools_at_eos_even_with_configs_from_before(places):
    """An id above EOS would be taken for the text's end: FLUX.1's own folder has such a config."""
    opts, adapter, models = loaded("flux", **places["flux"])
    plain = adapter.text.encode(models, CAPTIONS).tensors["l_pooled"]
    models.text_encoders["te1"].eos_token_id = models.text_encoders["te1"].config.eos_token_id = 2
    assert torch.equal(adapter.text.encode(models, CAPTIONS).tensors["l_pooled"], plain)
    method = EmbeddingMethod(opts)
    method.attach(adapter, models)
    found = adapter.text.encode(models, CAPTIONS).tensors["l_pooled"]
    assert torch.equal(found, attached_text("flux", places, "l_pooled"))
    assert torch.equal(adapter.text.encode(models, ["a red house"]).tensors["l_pooled"], house(places))


def attached_text(family, places, name):
    run = attached(family, **places[family])
    return run.family.text.encode(run.models, CAPTIONS).tensors[name]


def house(places):
    _, adapter, models = loaded("flux", **places["flux"])
    return adapter.text.encode(models, ["a red house"]).tensors["l_pooled"]


def test_t5_has_vectors_only_on_request(places):
    run = attached("flux", **{**places["flux"], "train_t5xxl": False})
    assert list(run.rows) == run.method.trained_text_encoders() == run.method.live_text_encoders() == ["te1"]
    _, adapter, models = loaded("flux", **places["flux"])
    found = run.family.text.encode(run.models, CAPTIONS).tensors["t5_out"]
    assert torch.equal(found, adapter.text.encode(models, CAPTIONS).tensors["t5_out"]), "T5 reads the word as written"


# ---- where the vectors start


@pytest.fixture
def messages():
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage()) if record.levelno == logging.WARNING else None
    LOGGER.addHandler(handler)
    yield records
    LOGGER.removeHandler(handler)


@cache
def table():
    _, _, models = loaded("sd", pretrained_model_name_or_path=str(TINY_SD))
    return models.text_encoders["te"].get_input_embeddings().weight.detach(), models.tokenizers["te"]


@pytest.mark.parametrize(
    ("word", "order", "warning"),
    [("red", [0, 0, 0], "1 token"), ("red house", [0, 1, 0], "2 tokens"), ("red house on a", [0, 1, 2], "4 tokens")],
)
def test_the_tokens_of_the_first_word_in_turn(word, order, warning, messages):
    weights, tokenizer = table()
    ids = tokenizer(word, add_special_tokens=False).input_ids
    assert torch.equal(attached(init_word=word).rows["te"], weights[[ids[number] for number in order]])
    assert [line for line in messages if warning in line]


def test_as_many_tokens_as_vectors_need_no_warning(messages):
    attached(init_word="a red house")
    assert messages == []


def test_random_vectors_look_like_words_and_follow_the_seed():
    weights, _ = table()
    found = random_vectors(weights, 4000, torch.Generator().manual_seed(0))
    # of 4,000 draws a mean is off by 0.016 deviations, a deviation by 1.1 %; five times that are never seen
    assert ((found.mean(0) - weights.mean(0)) / weights.std(0)).abs().max() < 0.08
    assert (found.std(0) / weights.std(0) - 1).abs().max() < 0.06
    assert torch.equal(attached(seed=5).rows["te"], attached(seed=5).rows["te"])
    assert not torch.equal(attached(seed=5).rows["te"], attached(seed=6).rows["te"])


@pytest.mark.parametrize("given", [{}, {"num_vectors_per_token": 2}])
def test_weights_are_the_start(given, tmp_path):
    rows = torch.randn(2, 64)
    save_file({"emb_params": rows.half()}, tmp_path / "a.safetensors")
    common = {key: value for key, value in STYLE.items() if key != "num_vectors_per_token"}
    opts = options_for(
        "sd", "embedding", **common, **given, pretrained_model_name_or_path=str(TINY_SD),
        weights=str(tmp_path / "a.safetensors"),
    )  # fmt: skip
    adapter = registry.FAMILIES["sd"].adapter(opts)
    models, method = adapter.loader.load(), EmbeddingMethod(opts)
    method.attach(adapter, models)
    assert torch.equal(method.trainable()["te"], rows.half().float())
    assert len(models.tokenizers["te"](WORD, add_special_tokens=False).input_ids) == 2


def test_a_text_encoder_that_the_file_lacks_starts_fresh(places, tmp_path, messages):
    save_file({"clip_g": torch.ones(3, 128)}, tmp_path / "a.safetensors")
    run = attached("sdxl", **places["sdxl"], weights=str(tmp_path / "a.safetensors"))
    assert torch.equal(run.rows["te2"], torch.ones(3, 128))
    assert [line for line in messages if "holds no clip_l, whose vectors start as new ones" in line]


# ---- mistakes


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        ({"emb_params": torch.zeros(2, 64)}, {}, "--num_vectors_per_token: .* has 2 vectors, not 3"),
        ({"emb_params": torch.zeros(3, 768)}, {}, "the width 768, and this model's 64; it is of another kind"),
        ({}, {"init_word": " "}, "--init_word: .* has no token"),
        ({}, {"learning_rate": 0.0}, "nothing would be trained"),
        ({}, {"token_string": "house"}, "--token_string: 'house' is a token of the text encoder already"),
    ],
)
def test_one_line_for_what_cannot_be(content, given, message, tmp_path):
    if content:
        save_file(content, tmp_path / "a.safetensors")
        given = {**given, "weights": str(tmp_path / "a.safetensors")}
    with pytest.raises(UserError, match=message) as caught:
        attached(**given)
    assert len(caught.value.problems) == 1


def test_mistakes_that_are_found_without_torch(places, tmp_path):
    save_file({"clip_l": torch.zeros(3, 64), "clip_g": torch.zeros(3, 64)}, tmp_path / "a.safetensors")
    traits = registry.FAMILIES["sd"].traits

    def found(**given):
        return check_options(options_for("sd", "embedding", **{**STYLE, **given}), traits)

    assert found() == []
    (line,) = found(token_string="House")
    assert line == "--token_string: 'House' is a token of the text encoder already; choose a word that it does not know"
    (line,) = found(weights=str(tmp_path / "a.safetensors"))
    assert "no embedding for this kind of model: holds clip_g, clip_l; emb_params is needed" in line
    (tmp_path / "b.pt").write_text("nothing")
    (line,) = found(weights=str(tmp_path / "b.pt"))
    assert "cannot be read" in line


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"token_string": None}, "--token_string: missing; give the new word that captions and prompts will use"),
        ({"token_string": "a\x1bb"}, "--token_string: must be a word, got 'a\\x1bb'"),
    ],
)
def test_words_that_are_none(given, line, tmp_path):
    opts = options_for("sd", "embedding", **{**STYLE, **given}, output_dir=str(tmp_path))
    assert line in list(problems(opts, registry.FAMILIES["sd"].traits))


def test_advice(tmp_path):
    opts = options_for(
        "sd", "embedding", token_string="[zwx]", use_object_template=True, use_style_template=True, weights="a",
        init_word="red", output_dir=str(tmp_path),
    )  # fmt: skip
    lines = [line.partition(":")[0] for line in warnings(opts, registry.FAMILIES["sd"].traits)]
    assert {"--use_style_template", "--init_word", "--token_string"} <= set(lines)


def test_t5_cannot_be_cached_and_trained(tmp_path):
    for family in ("sd3", "flux"):
        opts = options_for(family, "embedding", **STYLE, train_t5xxl=True, cache_text_encoder_outputs=True)
        assert any(
            line.startswith("--train_t5xxl: needs T5") for line in problems(opts, registry.FAMILIES[family].traits)
        )


# ---- templates, names, files


@pytest.mark.parametrize(
    ("given", "part"),
    [({"use_object_template": True}, "a photo of a zwx"), ({"use_style_template": True}, "in the style of zwx")],
)
def test_templates_hold_the_word(given, part):
    templates = options_for("sd", "embedding", **STYLE, **given).method.caption_templates
    assert len(set(templates)) == len(templates) > 10
    assert all(template.count(WORD) == 1 and "{" not in template for template in templates)
    assert any(part in template for template in templates)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"token_string": "zwx"}, "zwx"),
        ({"token_string": "<a/b>"}, "<a_b>"),
        ({"token_string": "zwx", "output_name": "a"}, "a"),
    ],
)
def test_the_word_names_the_files(given, name):
    assert name_by_word(options_for("sd", "embedding", **given)).saving.output_name == name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_files_have_the_keys_of_the_family(family, dtype, places, tmp_path):
    run = attached(family, **places[family], save_model_as="safetensors")
    path = tmp_path / f"a{run.method.file_suffix()}"
    run.method.save(path, dtype, {"ss_steps": "1", "modelspec.title": "a"})
    tensors = load_file(path)
    keys = registry.FAMILIES[family].traits.embedding_keys
    assert tensors.keys() == set(keys.values())
    for part, key in keys.items():
        assert torch.equal(tensors[key], run.rows[part].detach().to(dtype or torch.float32))
    again = attached(family, **places[family], weights=str(path))
    assert all(torch.equal(again.rows[part], tensors[key].float()) for part, key in keys.items())


def test_metadata_says_what_it_is(places, tmp_path):
    from library.checkpoints.metadata import training_metadata
    from library.checkpoints.reading import read_metadata

    run = attached(save_model_as="safetensors", output_name="zwx")
    made = training_metadata(run.opts, run.family.writer.metadata(run.models), run.method.metadata(), {}, {})
    run.method.save(tmp_path / "a.safetensors", None, made)
    found = read_metadata(tmp_path / "a.safetensors")
    assert found["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert found["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert found["modelspec.title"] == "zwx"
    assert all(name.startswith("modelspec.") for name in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_extended_embedding(dtype):
    """Ids below are the frozen table's, whatever rows are; gradients reach the rows that were used."""
    base = torch.nn.Embedding(6, 4).to(dtype)
    rows = torch.nn.Parameter(torch.randn(2, 4))
    extended = ExtendedEmbedding(base, 5, 2, lambda: rows)  # as T5's table, which is longer than its vocabulary
    assert (extended.num_embeddings, list(extended.state_dict()), extended.weight.requires_grad) == (
        7,
        ["weight"],
        False,
    )
    ids = torch.tensor([[0, 5, 4], [6, 6, 1]])
    found = extended(ids)
    assert found.dtype == dtype
    assert torch.equal(found[0, 0], base.weight[0])
    assert torch.equal(found[1, :2], rows.to(dtype)[[1, 1]])
    found.float().sum().backward()
    assert torch.equal(rows.grad, torch.tensor([[1.0], [2.0]]).expand(2, 4))
    with pytest.raises(IndexError):
        extended(torch.tensor([7]))


# ---- several words


def test_each_word_has_its_vectors_and_its_place_in_captions(tmp_path):
    """float32, against transformers' own way of adding the tokens of both words."""
    run = attached(token_string=[WORD, "<qpr>"], init_word=["red house", "blue"])
    alone = attached(init_word="red house")
    (first, second), table = run.method._words.vectors().values(), run.models.text_encoders["te"].get_input_embeddings()
    assert torch.equal(first["emb_params"], alone.rows["te"])
    (blue,) = alone.models.tokenizers["te"]("blue", add_special_tokens=False).input_ids
    assert torch.equal(second["emb_params"], table.weight[[blue] * COUNT].float())
    with torch.no_grad():
        run.rows["te"].add_(0.02 * torch.randn(run.rows["te"].shape, generator=torch.Generator().manual_seed(9)))
    words = [*WORDS, *(f"<qpr>{number}" for number in range(COUNT))]
    _, adapter, models = loaded("sd", pretrained_model_name_or_path=str(TINY_SD))
    tokenizer, encoder = deepcopy(models.tokenizers["te"]), models.text_encoders["te"]
    assert tokenizer.add_tokens(words) == len(words)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids(words)
    with torch.no_grad():
        encoder.get_input_embeddings().weight[ids] = run.rows["te"].detach()
    models.tokenizers["te"] = tokenizer
    captions = [f"a {WORD} beside a <qpr>", "<QPR> in the style of zwx"]
    theirs = [f"a {' '.join(WORDS)} beside a {' '.join(words[COUNT:])}"]
    theirs += [f"{' '.join(words[COUNT:])} in the style of {' '.join(WORDS)}"]
    with torch.no_grad():
        found, wanted = run.family.text.encode(run.models, captions), adapter.text.encode(models, theirs)
    torch.testing.assert_close(found.tensors["context"], wanted.tensors["context"], rtol=1e-6, atol=1e-6)
    assert run.method.text_fingerprint() != {"te": alone.method.text_fingerprint()["te"]}


@pytest.mark.parametrize(
    ("given", "names"),
    [({}, ["zwx-step2.pt", "q_r-step2.pt"]), ({"output_name": "a"}, ["a-step2.pt", "a_q_r-step2.pt"])],
)
def test_each_word_has_its_file(given, names, tmp_path):
    opts = name_by_word(options_for("sd", "embedding", **STYLE | {"token_string": [WORD, "q/r"]}, **given))
    method = EmbeddingMethod(opts.replaced(pretrained_model_name_or_path=str(TINY_SD)))
    adapter = registry.FAMILIES["sd"].adapter(method.opts)
    models = adapter.loader.load()
    method.attach(adapter, models)
    path = tmp_path / f"{opts.saving.output_name}-step2.pt"
    method.save(path, None, None)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)
    assert method.companions(path) == [tmp_path / names[1]]
    files = [str(tmp_path / name) for name in names]
    again = attached(token_string=[WORD, "q/r"], weights=files)
    assert torch.equal(again.rows["te"], method.trainable()["te"])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"token_string": [WORD, "ZWX"]}, "--token_string: zwx is given twice; capitals make no other word"),
        ({"init_word": ["red", "blue"]}, "--init_word: 2 are given for 1 of --token_string; give one for each, in quo"),
        ({"token_string": [WORD, "b"], "use_style_template": True}, "--use_style_template: its texts hold one word"),
        ({"weights": ["a", "b"]}, "--weights: there are 2 files for 1 of --token_string"),
    ],
)
def test_what_several_words_cannot_have(given, line, tmp_path):
    opts = options_for("sd", "embedding", **{**STYLE, **given}, output_dir=str(tmp_path))
    assert any(problem.startswith(line) for problem in problems(opts, registry.FAMILIES["sd"].traits))
