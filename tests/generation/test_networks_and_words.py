"""Networks and Textual Inversion embeddings while images are generated.

References: weights that are changed by LoRA's formula, and a token embedding with rows added by hand, both in
transformers' and diffusers' own models.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.families.sd.adapter import SdFamily
from library.generation.model import Model
from library.generation.networks import attach_rest, check_files, merge_first
from library.generation.words import add_words, read_words
from library.inference.generate import sample_latents
from library.inference.prompts import SamplePrompt
from library.options.inference import NetworksOptions
from tests.builders import sd_options, tiny_sd
from tests.networks.builders import lora

CPU = torch.device("cpu")
PROMPT = SamplePrompt("a red house", "", 64, 64, 7, 2, 3.0, "ddim")
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def models():
    return tiny_sd()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two LoRAs of all layers of denoiser and text encoder, with an alpha that is not the rank."""
    folder, models = tmp_path_factory.mktemp("networks"), tiny_sd()
    targets = SdFamily(sd_options("")).targets.lora(models)
    for seed in (1, 2):
        network = lora.create(targets, models, dim=2, alpha=3.0, args={}, seed=seed)
        torch.manual_seed(seed)
        for name, value in network.named_parameters():
            if "lora_up" in name:
                value.data = 0.05 * torch.randn_like(value)
        save_file({k: v.detach().contiguous() for k, v in network.file_state().items()}, folder / f"{seed}.safetensors")
    return [str(folder / f"{seed}.safetensors") for seed in (1, 2)]


def model_with(models, **options) -> tuple[Model, NetworksOptions]:
    group, family = NetworksOptions(**options), SdFamily(sd_options(""))
    found = check_files(group)
    merge_first(group, found, family, models)
    networks = attach_rest(group, found, family, models, CPU)
    return Model(family, models, sd_options(""), CPU, torch.float32, networks), group


def latents(model: Model, group: NetworksOptions, prompt: SamplePrompt = PROMPT) -> torch.Tensor:
    model.networks.use(prompt.multipliers, group.multipliers())
    texts = model.conditioning([prompt.prompt, prompt.negative_prompt])
    return sample_latents(model.family, model.without_texts, [prompt], CPU, cached=texts, denoise=model.denoise)


def by_formula(models, path: str, strength: float) -> None:
    """W + strength * alpha / rank * up down, layer by layer."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    parts = {"lora_unet_": models.denoiser, "lora_te_": models.text_encoders["te"]}
    for prefix, part in parts.items():
        names = {name.removeprefix("text_model.").replace(".", "_"): module for name, module in part.named_modules()}
        for key in {key.partition(".")[0] for key in tensors if key.startswith(prefix)}:
            module = names[key.removeprefix(prefix).removeprefix("text_model_")]
            down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
            change = (up.flatten(1) @ down.flatten(1)) * (tensors[f"{key}.alpha"] / len(down))
            module.weight.data += strength * change.reshape(module.weight.shape)


@pytest.mark.parametrize(
    "how",
    [{}, {"network_merge": True}, {"network_merge_n_models": 1}, {"network_pre_calc": True}],
    ids=["attached", "merged", "one merged", "calculated before"],
)
def test_two_networks_act_as_their_formula_says(models, files, how):
    reference = copy.deepcopy(models)
    for path, strength in zip(files, (0.7, -0.4), strict=True):
        by_formula(reference, path, strength)
    model, group = model_with(models, network_weights=files, network_mul=[0.7, -0.4], **how)
    found = latents(model, group)
    plain, none = model_with(reference)
    assert (found - latents(plain, none)).abs().max() < 1e-3  # latents of order 1 to 10, sums in another order
    assert (found - latents(*model_with(tiny_sd()))).abs().max() > 0.05


@pytest.mark.parametrize("how", [{}, {"network_pre_calc": True}, {"network_merge_n_models": 1}])
def test_a_prompt_gives_networks_their_strengths(models, files, how):
    model, group = model_with(models, network_weights=files, **how)
    first = latents(model, group, replace(PROMPT, multipliers=(1.0, 0.0)))
    assert model.networks.called() == [("1", 1.0), ("2", 0.0)]
    second = latents(model, group, replace(PROMPT, multipliers=(0.5,)))
    assert model.networks.strengths == ((1.0, 0.5) if "network_merge_n_models" in how else (0.5, 0.5))
    again = latents(model, group, replace(PROMPT, multipliers=(1.0, 0.0)))
    assert torch.equal(first, again)
    assert (first - second).abs().max() > 0.01
    reference = tiny_sd()
    by_formula(reference, files[0], 1.0)
    assert (first - latents(*model_with(reference))).abs().max() < 1e-3


def test_detached_networks_leave_the_model_as_it_was(models, files):
    before = copy.deepcopy(models.denoiser.state_dict())
    for how in ({}, {"network_pre_calc": True}):
        model, group = model_with(models, network_weights=files, **how)
        latents(model, group)
        model.networks.detach()
    assert all(torch.equal(value, before[name]) for name, value in models.denoiser.state_dict().items())
    assert not any(module._forward_hooks for module in models.denoiser.modules())


@pytest.mark.rows("R470")
@pytest.mark.parametrize("module", [None, ["networks.lora"]])
def test_names_of_diffusers_and_other_types_are_read(models, tmp_path, module):
    torch.manual_seed(0)
    shape = models.denoiser.get_submodule(LAYER).weight.shape
    down, up = torch.randn(2, shape[1]), torch.randn(shape[0], 2)
    save_file({f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}, tmp_path / "peft.safetensors")
    whole = f"lora_unet_{LAYER.replace('.', '_')}.diff"
    save_file({whole: up @ down}, tmp_path / "full.safetensors")
    reference = copy.deepcopy(models)
    reference.denoiser.get_submodule(LAYER).weight.data += up @ down
    expected = latents(*model_with(reference))
    for name in ("peft", "full"):
        model, group = model_with(
            models, network_weights=[str(tmp_path / f"{name}.safetensors")], network_module=module
        )
        assert (latents(model, group) - expected).abs().max() < 1e-3
        model.networks.detach()


def test_what_is_no_network_is_said(tmp_path):
    save_file({"emb_params": torch.zeros(1, 64)}, tmp_path / "word.safetensors")
    with pytest.raises(UserError) as error:
        check_files(NetworksOptions(network_weights=["gone.safetensors", str(tmp_path / "word.safetensors")]))
    assert len(error.value.problems) == 2
    assert all(problem.startswith("--network_weights: ") for problem in error.value.problems)
    assert "a Textual Inversion embedding" in error.value.problems[1]


# --- words ------------------------------------------------------------------------------------------------------------


def test_words_have_their_vectors(models, tmp_path):
    """Two words in one text: their tokens get the ids behind the vocabulary, whose rows are the files'."""
    torch.manual_seed(0)
    one, two = torch.randn(2, 64), torch.randn(1, 64)
    save_file({"emb_params": one}, tmp_path / "zwx.safetensors")
    torch.save({"string_to_param": {"*": two}}, tmp_path / "qyv.pt")
    reference = copy.deepcopy(models.text_encoders["te"])
    rows = torch.cat([reference.get_input_embeddings().weight, one, two])
    reference.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows))
    size = len(rows) - 3
    tokenizer = models.tokenizers["te"]
    a, cat, b = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("a", "cat", "b"))
    content = [tokenizer.bos_token_id, a, size, size + 1, cat, size + 2, b]
    ids = torch.tensor([content + [tokenizer.eos_token_id] * (77 - len(content))])
    add_words(models, SdFamily.traits, read_words([str(tmp_path / "zwx.safetensors"), str(tmp_path / "qyv.pt")]))
    found = SdFamily(sd_options("")).text.encode(models, ["a zwx cat QYV b"], emphasis=True).tensors["context"]
    with torch.no_grad():
        torch.testing.assert_close(found, reference(ids).last_hidden_state, rtol=0, atol=1e-5)


def test_words_that_cannot_be_are_said(models, tmp_path):
    (tmp_path / "more").mkdir()
    save_file({"emb_params": torch.zeros(1, 64)}, tmp_path / "cat.safetensors")
    save_file({"emb_params": torch.zeros(1, 32)}, tmp_path / "zwx.safetensors")
    save_file({"emb_params": torch.zeros(1, 64)}, tmp_path / "more" / "zwx.safetensors")
    for name, message in (("cat", "'cat' is a token of the text encoder already"), ("zwx", "have the width 32")):
        with pytest.raises(UserError, match=message):
            add_words(models, SdFamily.traits, read_words([str(tmp_path / f"{name}.safetensors")]))
    with pytest.raises(UserError, match="have one name"):
        read_words([str(tmp_path / "zwx.safetensors"), str(tmp_path / "more" / "zwx.safetensors")])
    with pytest.raises(UserError, match="--textual_inversion_embeddings"):
        read_words([str(tmp_path / "gone.pt")])
