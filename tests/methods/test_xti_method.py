"""XTI against a model to which each cross-attention layer is given its own text by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from library import registry
from library.errors import UserError
from library.families.sd.targets import text_places
from library.methods.embedding import EmbeddingMethod
from library.methods.xti import XtiMethod
from library.types import Models
from tests.builders.options import options_for
from tests.methods.test_embedding_method import CAPTIONS, COUNT, STYLE, TINY_SD, WORD, batch_of

PLACES = ["IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{number:02d}" for number in range(3, 12))]


def attached(**given):
    opts = options_for("sd", "xti", **{**STYLE, "pretrained_model_name_or_path": str(TINY_SD), **given})
    family = registry.FAMILIES["sd"].adapter(opts)
    models, method = family.loader.load(), XtiMethod(opts)
    method.attach(family, models)
    return SimpleNamespace(family=family, models=models, method=method, rows=method.trainable())


def shaken(run):
    rows = run.rows["te"]
    with torch.no_grad():
        rows.add_(0.05 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(9)))
    return rows


def test_the_places_of_the_published_model():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    found = text_places(Models(unet, {}, {}, None))
    assert list(found) == PLACES
    assert all(len(paths) == 1 for paths in found.values())
    assert found["IN05"] == ["down_blocks.1.attentions.1.transformer_blocks.0.attn2"]
    assert found["MID"] == ["mid_block.attentions.0.transformer_blocks.0.attn2"]
    assert found["OUT03"] == ["up_blocks.1.attentions.0.transformer_blocks.0.attn2"]
    assert found["OUT11"] == ["up_blocks.3.attentions.2.transformer_blocks.0.attn2"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prediction_and_gradients_are_those_of_a_text_for_each_layer(checkpointing):
    """float32; the same sums in the same order, but for the gradient of the text encoder."""
    run = attached(init_word="red")
    rows = shaken(run)
    places = list(text_places(run.models).items())
    assert rows.shape == (len(places) * COUNT, 64)
    opts = options_for("sd", "embedding", **STYLE, pretrained_model_name_or_path=str(TINY_SD))
    family = registry.FAMILIES["sd"].adapter(opts)
    models, plain = family.loader.load(), EmbeddingMethod(opts)
    plain.attach(family, models)
    values = [rows.detach()[number * COUNT :][:COUNT].clone().requires_grad_() for number in range(len(places))]
    contexts = []
    for value in values:
        models.text_encoders["te"].get_input_embeddings().rows = lambda value=value: value
        contexts.append(family.text.encode(models, CAPTIONS).tensors["context"])
    for context, (_, paths) in zip(contexts, places, strict=True):
        for path in paths:
            layer = models.denoiser.get_submodule(path)
            own = layer.forward

            def read(states, encoder_hidden_states=None, own=own, context=context, **more):
                return own(states, encoder_hidden_states=context, **more)

            layer.forward = read
    if checkpointing:
        run.models.denoiser.train()
        run.models.denoiser.enable_gradient_checkpointing()
    cond = run.family.text.encode(run.models, CAPTIONS)
    assert cond.tensors["context"].shape[:2] == (len(CAPTIONS), len(places))
    noisy, times, batch = torch.randn(2, 4, 8, 8), torch.tensor([17, 803]), batch_of(family, CAPTIONS)
    found = run.method.denoise(run.family, run.models)(noisy, times, cond, batch)
    expected = family.denoiser.predict(models, noisy, times, family.text.encode(models, CAPTIONS), batch)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    found.square().mean().backward()
    expected.square().mean().backward()
    gradient = torch.cat([value.grad for value in values])
    assert all(value.grad.any() for value in values)
    torch.testing.assert_close(rows.grad, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_a_new_one_is_a_plain_embedding_at_every_place(tmp_path):
    """So is one that begins with a plain embedding's file."""
    plain = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    save_file({"emb_params": plain}, tmp_path / "a.safetensors")
    given = {"weights": str(tmp_path / "a.safetensors")}
    style = {name: value for name, value in STYLE.items() if name != "num_vectors_per_token"}
    opts = options_for("sd", "xti", **style, **given, pretrained_model_name_or_path=str(TINY_SD))
    family = registry.FAMILIES["sd"].adapter(opts)
    models, method = family.loader.load(), XtiMethod(opts)
    method.attach(family, models)
    assert all(torch.equal(own, plain) for own in method.trainable()["te"].split(2))
    found = family.text.encode(models, CAPTIONS).tensors["context"]
    assert torch.equal(found, found[:, :1].expand_as(found))


def test_files_have_a_tensor_for_each_place_and_go_on(tmp_path):
    run = attached(token_string=[WORD, "qpr"])
    rows, path = shaken(run), tmp_path / f"{WORD}{run.method.file_suffix()}"
    run.method.opts = run.method.opts.replaced(output_name=WORD)
    run.method.save(path, torch.float16, {"modelspec.title": "a"})
    tensors, places = load_file(path), list(text_places(run.models))
    assert sorted(tensors) == places
    assert {tuple(value.shape) for value in tensors.values()} == {(COUNT, 64)}
    assert b"__metadata__" not in path.read_bytes()[:2000]
    half = rows.detach().unflatten(0, (len(places), -1)).half()
    assert all(torch.equal(tensors[place], half[number, :COUNT]) for number, place in enumerate(places))
    (other,) = run.method.companions(path)
    assert torch.equal(load_file(other)["MID"], half[places.index("MID"), COUNT:])
    again = attached(token_string=[WORD, "qpr"], weights=[str(path), str(other)])
    assert torch.equal(again.rows["te"], half.flatten(0, 1).float())
    del tensors["MID"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"less\.safetensors: holds IN.*; an embedding for IN.*MID.* is needed"):
        attached(weights=str(tmp_path / "less.safetensors"))
