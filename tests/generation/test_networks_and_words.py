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
from library.families.sdxl.adapter import SdxlFamily
from library.generation.model import Model
from library.generation.networks import Networks, attach_rest, check_files, merge_first
from library.generation.words import add_words, add_words_by_place, read_words
from library.inference.generate import sample_latents
from library.inference.prompts import SamplePrompt
from library.methods.xti import read_by_place
from library.options.inference import NetworksOptions
from tests.builders import sd_options, tiny_sd
from tests.builders.hypernetworks import with_hypernetwork
from tests.builders.mixed_networks import attached_networks, file_of
from tests.builders.options import options_for
from tests.builders.sdxl import tiny_sdxl
from tests.methods.test_embedding_method import batch_of
from tests.methods.test_xti_method import attached, shaken
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


def by_formula(models, path: str, strength: float, factor=lambda key: 1.0) -> None:
    """W + strength * factor * alpha / rank * up down, layer by layer. Args: factor: of a layer's name in the file."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    parts = {"lora_unet_": models.denoiser, "lora_te_": models.text_encoders["te"]}
    for prefix, part in parts.items():
        names = {name.removeprefix("text_model.").replace(".", "_"): module for name, module in part.named_modules()}
        for key in {key.partition(".")[0] for key in tensors if key.startswith(prefix)}:
            module = names[key.removeprefix(prefix).removeprefix("text_model_")]
            down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
            change = (up.flatten(1) @ down.flatten(1)) * (tensors[f"{key}.alpha"] / len(down))
            module.weight.data += strength * factor(key) * change.reshape(module.weight.shape)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"network_merge": True},
        {"network_merge_n_models": 1},
        {"network_pre_calc": True},
        {"network_merge_n_models": 1, "network_pre_calc": True},
    ],
    ids=["attached", "merged", "one merged", "calculated before", "one of each"],
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


@pytest.mark.parametrize("how", [{}, {"network_merge": True}, {"network_pre_calc": True}])
def test_blocks_have_weights(models, files, how):
    """Of the first network the text encoder none, the middle half; of the second all."""
    reference = copy.deepcopy(models)
    by_formula(
        reference,
        files[0],
        0.7,
        lambda key: 0.0 if key.startswith("lora_te_") else 0.5 if key.startswith("lora_unet_mid_block") else 1.0,
    )
    by_formula(reference, files[1], -0.4)
    given = {"network_args": ["lbw=te=0,mid_block=0.5;rank_dropout=0"]}
    model, group = model_with(models, network_weights=files, network_mul=[0.7, -0.4], **given, **how)
    assert (latents(model, group) - latents(*model_with(reference))).abs().max() < 1e-3
    plain, same = model_with(tiny_sd(), network_weights=files, network_mul=[0.7, -0.4], **how)
    assert (latents(plain, same) - latents(*model_with(reference))).abs().max() > 0.01


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("lbw=[1,2]", "--network_args: lbw [1,2]: 2 numbers; give 12, 17, 20 or 26 numbers"),
        (
            "lbw=double_blocks.3=1",
            "--network_args: lbw double_blocks.3=1: no layer of the network is in double_blocks.3",
        ),
    ],
)
def test_weights_of_blocks_that_are_not_there(models, files, text, line):
    with pytest.raises(UserError) as error:
        model_with(models, network_weights=files[:1], network_args=[text])
    assert line in error.value.problems[0]


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


@pytest.mark.parametrize("how", [{}, {"network_merge": True}, {"network_pre_calc": True}])
def test_every_type_of_layer_acts_as_the_network_that_was_saved(tmp_path, how):
    """One file with layers of all types."""
    trained = tiny_sd()
    made = attached_networks("sd", SdFamily(sd_options("")).targets.lora(trained), trained)
    for network in made:
        network.eval().set_multiplier(0.5)
    expected = latents(*model_with(trained))
    save_file({name: value.contiguous() for name, value in file_of(made).items()}, tmp_path / "all.safetensors")
    given = {"network_weights": [str(tmp_path / "all.safetensors")], "network_mul": [0.5]}
    found = latents(*model_with(tiny_sd(), **given, **how))
    bare = latents(*model_with(tiny_sd()))
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert (found - bare).abs().max() > 0.1 * expected.abs().max()


def test_a_hypernetwork_acts_as_its_file_says(models, tmp_path):
    torch.manual_seed(0)
    content = {
        64: [
            {
                "linear.0.weight": 0.1 * torch.randn(128, 64),
                "linear.0.bias": 0.1 * torch.randn(128),
                "linear.1.weight": 0.1 * torch.randn(64, 128),
                "linear.1.bias": 0.1 * torch.randn(64),
            }
            for _ in range(2)
        ],
        "activation_func": "linear",
        "activate_output": False,
    }
    torch.save(content, tmp_path / "hyper.pt")
    given = {"network_weights": [str(tmp_path / "hyper.pt")], "network_mul": [0.7]}
    model, group = model_with(models, **given)
    found = latents(model, group)
    reference = replace(tiny_sd(), denoiser=with_hypernetwork(tiny_sd().denoiser, content, 0.7))
    assert (found - latents(*model_with(reference))).abs().max() < 1e-3
    bare = latents(*model_with(tiny_sd()))
    assert (found - bare).abs().max() > 0.01
    model.use_networks(Networks())
    assert (latents(model, NetworksOptions()) - bare).abs().max() < 1e-5
    for how in ({"network_merge": True}, {"network_pre_calc": True}):
        with pytest.raises(UserError, match=r"hyper\.pt: a hypernetwork changes no weights, so it cannot be merged"):
            model_with(tiny_sd(), **given, **how)


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


# --- words for each layer ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A word as train_textual_inversion_XTI.py trains it, and its file."""
    run = attached()
    shaken(run)
    path = tmp_path_factory.mktemp("xti") / "zwx.safetensors"
    run.method.save(path, None, None)
    return run, path


def generating(options, *words) -> tuple[Model, dict[str, list[str]]]:
    """A model with words, as gen_img.py has it, and the places of its layers."""
    family = SdFamily(options)
    models = family.loader.load()
    places = add_words_by_place(family, models, read_words(*words))
    return Model(family, models, options, CPU, torch.float32, Networks()), places


def test_a_word_for_each_layer_is_drawn_as_training_samples_it(trained, tmp_path):
    """The same numbers in the same order; a plain word beside it changes nothing but itself."""
    run, path = trained
    prompt = replace(PROMPT, prompt=f"a photo of {path.stem}", negative_prompt="ugly")
    expected = sample_latents(run.family, run.models, [prompt], CPU, denoise=run.method.denoise(run.family, run.models))
    found = latents(generating(run.method.opts, [], [str(path)])[0], NetworksOptions(), prompt)
    assert (found - expected).abs().max() < 1e-5
    save_file({"emb_params": torch.randn(2, 64)}, tmp_path / "qyv.safetensors")
    both, _ = generating(run.method.opts, [str(tmp_path / "qyv.safetensors")], [str(path)])
    assert (latents(both, NetworksOptions(), prompt) - expected).abs().max() < 1e-5
    other = latents(both, NetworksOptions(), replace(prompt, prompt=f"qyv {path.stem}"))
    assert (other - expected).abs().max() > 0.01


@torch.no_grad()
def test_a_control_net_reads_the_word_for_its_layers(trained):
    run, path = trained
    model, layers = generating(run.method.opts, [], [str(path)])
    net = model.family.control.build(model.models).eval()
    read_by_place(net, layers)
    seen: list[torch.Tensor] = []
    for places in layers.values():
        for place in places:
            if place.startswith(("down", "mid")):
                layer = net.get_submodule(place)
                layer.to_k.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    texts = model.conditioning([path.stem])[path.stem]
    batch = replace(batch_of(model.family, [path.stem]), control=torch.zeros(1, 3, 64, 64))
    noisy = torch.zeros(1, 4, 8, 8)
    model.family.control.residuals(model.models, net, noisy, torch.tensor([5]), texts, batch)
    assert seen
    assert all(any(torch.equal(one, own) for own in texts.tensors["context"].unbind(1)) for one in seen)


def test_words_for_each_layer_that_do_not_fit_are_said(trained, tmp_path):
    run, path = trained
    save_file({"emb_params": torch.zeros(1, 64)}, tmp_path / "qyv.safetensors")
    with pytest.raises(UserError, match=r"--XTI_embeddings: .*qyv\.safetensors: holds emb_params; an embedding for IN"):
        generating(run.method.opts, [], [str(tmp_path / "qyv.safetensors")])
    with pytest.raises(UserError, match="--XTI_embeddings: there are no such embeddings for SDXL"):
        add_words_by_place(SdxlFamily(options_for("sdxl", "network")), tiny_sdxl(), read_words([], [str(path)]))
    with pytest.raises(UserError, match="have one name"):
        read_words([str(path)], [str(path)])
