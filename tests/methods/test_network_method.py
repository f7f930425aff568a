"""The network method on a toy model, with the real options."""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from library.errors import UserError
from library.methods.network import NetworkMethod
from library.methods.network_spec import check_options
from library.options.memory import MemoryOptions
from library.options.network import NetworkOptions
from library.options.optimizer import OptimizerOptions
from library.options.saving import SavingOptions
from library.options.training import TrainingOptions
from library.runtime.logs import LOGGER
from library.types import LoraTarget, Models
from tests.builders.options import options_with


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn, self.conv = nn.Linear(width, width), nn.Conv2d(width, width, 3, padding=1)


TARGETS = [
    LoraTarget("lora_te_attn", "te", ("attn",)),
    LoraTarget("lora_unet_attn", "denoiser", ("attn",), block=1),
    LoraTarget("lora_unet_conv", "denoiser", ("conv",), conv_only=True, block=2),
]
TRAITS = SimpleNamespace(text_encoders=("te",), block_layout=None)
FAMILY = SimpleNamespace(traits=TRAITS, targets=SimpleNamespace(lora=lambda models: TARGETS))


def toy_models():
    torch.manual_seed(0)
    return Models(Block(6), {"te": Block(5)}, {}, Block(3))


def options_for(**given):
    given = {"network_module": "networks.lora", "learning_rate": 1e-3, "seed": 5, **given}
    groups = [NetworkOptions, MemoryOptions, OptimizerOptions, SavingOptions, TrainingOptions]
    return options_with(*groups, **given)


def method_for(**given):
    return NetworkMethod(options_for(**given))


def attached(models=None, **given):
    method = method_for(**given)
    method.attach(FAMILY, models or toy_models())
    return method


def rates(method):
    return {group["name"]: group["lr"] for group in method.parameter_groups()}


def saved(method, path, dtype=None, metadata=None):
    method.save(path, dtype, metadata)
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture
def messages():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    LOGGER.addHandler(handler)
    before, LOGGER.level = LOGGER.level, logging.INFO
    yield lambda level: [r.getMessage() for r in records if r.levelno == level]
    LOGGER.removeHandler(handler)
    LOGGER.level = before


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"textencoder": 1e-3, "unet": 1e-3}),
        ({"unet_lr": 1e-4}, {"textencoder": 1e-3, "unet": 1e-4}),
        ({"text_encoder_lr": [5e-5]}, {"textencoder": 5e-5, "unet": 1e-3}),
        ({"text_encoder_lr": []}, {"textencoder": 1e-3, "unet": 1e-3}),
        ({"text_encoder_lr": [0.0]}, {"unet": 1e-3}),
        ({"learning_rate": 0.0, "text_encoder_lr": [5e-5]}, {"textencoder": 5e-5}),
        ({"network_train_unet_only": True}, {"unet": 1e-3}),
        ({"network_train_text_encoder_only": True}, {"textencoder": 1e-3}),
        (
            {"network_args": ["loraplus_unet_lr_ratio=16"]},
            {"textencoder": 1e-3, "unet": 1e-3, "unet plus": pytest.approx(16e-3)},
        ),
        (
            {"network_args": ["down_lr_weight=1,0.5,0.25", "conv_dim=2"]},
            {"textencoder": 1e-3, "unet block 1": 5e-4, "unet block 2": 2.5e-4},
        ),
        (
            {"network_args": ["network_reg_lrs=unet_a=3e-4,te=2e-4", "loraplus_unet_lr_ratio=2", "conv_dim=2"]},
            {
                "textencoder reg 2": 2e-4,
                "unet reg 1": 3e-4,
                "unet reg 1 plus": 6e-4,
                "unet": 1e-3,
                "unet plus": 2e-3,
            },
        ),
    ],
)
def test_rates(given, expected, tmp_path):
    models = toy_models()
    method = attached(models, **given)
    assert rates(method) == expected
    text = any(name.startswith("textencoder") for name in expected)
    assert bool(method.trained_text_encoders()) == text
    trained = [p for group in method.parameter_groups() for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in method.trainable().parameters()}
    assert all(p.requires_grad for p in trained)
    for part in (models.denoiser, models.vae, *models.text_encoders.values()):
        assert not any(p.requires_grad for p in part.parameters())
    # Only what is trained is in the file.
    keys = {key.partition(".")[0] for key in saved(method, tmp_path / "a.safetensors")[0]}
    assert ("lora_te_attn" in keys) == text
    assert ("lora_unet_attn" in keys) == any(name.startswith("unet") for name in expected)


@pytest.mark.rows("R299")
@pytest.mark.parametrize("rank", range(1, 65))
def test_every_rank_and_alpha_up_to_it(rank, tmp_path):
    """The file holds them, and the layer acts with alpha / rank. The least, a middling and the largest alpha."""
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(rank))
    for alpha in {1, (1 + rank) / 2, rank}:
        models = toy_models()
        bare = models.denoiser.attn(x)
        method = attached(models, network_dim=rank, network_alpha=alpha)
        for parameter in method.trainable().parameters():
            parameter.data.normal_(0, 0.3)
        tensors, _ = saved(method, tmp_path / "a.safetensors")
        down, up = (tensors[f"lora_unet_attn.lora_{side}.weight"] for side in ("down", "up"))
        assert (down.shape, up.shape) == ((rank, 6), (6, rank))
        assert tensors["lora_unet_attn.alpha"] == alpha
        # float32 sums of up to 64 numbers
        torch.testing.assert_close(
            models.denoiser.attn(x) - bare, alpha / rank * x @ down.T @ up.T, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    "given",
    [
        {"learning_rate": 0.0},
        {"network_train_unet_only": True, "unet_lr": 0.0},
        {"unet_lr": 0.0, "text_encoder_lr": [0.0]},
    ],
)
def test_nothing_to_train_is_an_error(given):
    with pytest.raises(UserError, match=r"nothing would be trained with the learning rates .*U-Net"):
        attached(**given)


def test_arguments_that_leave_nothing_to_train_are_an_error():
    with pytest.raises(UserError, match="these arguments leave no layer to train"):
        attached(network_train_unet_only=True, network_args=["down_lr_weight=zeros"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network_module": "networks.lora_of_nobody"}, "there is no module named 'networks.lora_of_nobody'"),
        ({"network_module": "no_such_package.kohya"}, "there is no module named 'no_such_package.kohya'"),
        ({"network_module": None}, "--network_module"),
        ({"network_module": "networks.build"}, "networks.build is no kind of network"),
        ({"network_module": "lycoris.koyha"}, "no module named 'lycoris.koyha'; did you mean 'lycoris.kohya'?"),
        ({"network_args": ["conv_dim"]}, "'conv_dim' is not name=value"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_read(given, message):
    with pytest.raises(UserError) as caught:
        method_for(**given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network_args": ["conv_dim"]}, "'conv_dim' is not name=value"),
        ({"network_module": "networks.lorra"}, "there is no module named 'networks.lorra'"),
        ({"network_args": ["conv_dim=32769"]}, "conv_dim=32769: must be at least 0, at most 32768"),
        (
            {"network_module": "lycoris.kohya", "network_args": ["conv_dim=32769"]},
            "--network_args: conv_dim=32769: must be at most 32768",
        ),
        ({"network_module": "lycoris.kohya", "network_args": ["conv_dim=" + "9" * 5000]}, "must be at most 32768"),
        (
            {
                "network_module": "networks.lora_flux",
                "network_args": ["ggpo_sigma=0.03", "ggpo_beta=0.01"],
                "fused_backward_pass": True,
            },
            "ggpo_sigma looks at the gradients after the backward pass",
        ),
    ],
)
def test_wrong_options_are_known_without_torch(given, message):
    (problem,) = check_options(options_for(**given))
    assert message in problem


@pytest.mark.parametrize("text", ["32768", "0", "-1", "", "a word of its own"])
def test_other_peoples_modules_judge_their_ranks_themselves(text):
    assert check_options(options_for(network_module="lycoris.kohya", network_args=[f"conv_dim={text}"])) == []


def test_training_changes_the_output_through_the_network_only():
    models = toy_models()
    method = attached(models, network_args=["conv_dim=2"])
    before = {name: value.clone() for name, value in models.denoiser.state_dict().items()}
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=1.0)
    x = torch.randn(4, 6)
    first = models.denoiser.attn(x)
    loss = models.denoiser.attn(x).square().mean() + models.denoiser.conv(torch.randn(1, 6, 5, 5)).square().mean()
    loss.backward()
    optimizer.step()
    assert not torch.equal(models.denoiser.attn(x), first)
    assert all(torch.equal(value, before[name]) for name, value in models.denoiser.state_dict().items())


@pytest.mark.parametrize(("limit", "expected"), [(0.5, 0.5), (None, None)])
def test_after_step_limits_norms(limit, expected):
    method = attached(scale_weight_norms=limit)
    layer = method.trainable().lora_unet_attn
    nn.init.normal_(layer.lora_up.weight, std=10)

    def norm():
        return torch.linalg.norm(layer.scale * layer.lora_up.weight @ layer.lora_down.weight).item()

    before = norm()
    method.after_step()
    assert norm() == pytest.approx(expected or before, rel=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_every_saved_tensor_has_the_asked_dtype(tmp_path, dtype):
    tensors, metadata = saved(attached(), tmp_path / "a.safetensors", dtype)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype or torch.float32}
    assert sum(name.endswith(".alpha") for name in tensors) == 2
    assert metadata is None


def test_saved_metadata_has_hashes_of_the_cast_tensors(tmp_path):
    from tests.builders.hashes import tensor_hash

    method = attached()
    method.save(tmp_path / "a.safetensors", torch.float16, {"ss_steps": "1"})
    _, metadata = saved(method, tmp_path / "b.safetensors", torch.float16, {"ss_steps": "1"})
    assert metadata["sshs_model_hash"] == tensor_hash(tmp_path / "a.safetensors")
    assert (metadata["ss_steps"], metadata["sshs_legacy_hash"]) == ("1", "e3b0c442")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("kind", ["ckpt", "pt"])
def test_pickle_containers_hold_the_flat_table(tmp_path, kind):
    method = attached(save_model_as=kind)
    assert method.file_suffix() == f".{kind}"
    method.save(tmp_path / f"a.{kind}", torch.float16, {"ss_steps": "1"})
    loaded = torch.load(tmp_path / f"a.{kind}", weights_only=True)
    state = method.trainable().state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, state[name].half()) for name, value in loaded.items())
    again = attached(network_weights=str(tmp_path / f"a.{kind}"), dim_from_weights=True)
    assert again.trainable().state_dict().keys() == state.keys()


def test_metadata():
    found = attached(network_dim=8, network_alpha=4.0, network_args=["conv_dim=2"], text_encoder_lr=[5e-5]).metadata()
    assert json.loads(found.pop("ss_network_args")) == {"conv_dim": "2"}
    assert found == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": 4.0,
        "ss_network_dropout": None,
        "ss_scale_weight_norms": None,
        "ss_unet_lr": None,
        "ss_text_encoder_lr": 5e-5,
        "ss_training_comment": None,
        "modelspec.suffix": "/lora",
    }
    plain = method_for().metadata()
    assert plain["ss_network_dim"] == "4"
    assert "ss_network_args" not in plain


# ---- weights of earlier trainings


@pytest.fixture
def earlier(tmp_path):
    """A trained file: rank 3 with convolutions of rank 2."""
    method = attached(network_dim=3, network_args=["conv_dim=2"])
    for layer in method.trainable().layers().values():
        nn.init.normal_(layer.lora_up.weight)
    method.save(tmp_path / "earlier.safetensors", None, None)
    return str(tmp_path / "earlier.safetensors"), method.trainable().state_dict()


def test_network_weights_continue(earlier, messages):
    path, state = earlier
    method = attached(network_weights=path, network_dim=3, network_args=["conv_dim=2"])
    assert all(torch.equal(value, state[name]) for name, value in method.trainable().state_dict().items())
    assert messages(logging.WARNING) == []

    attached(network_weights=path, network_dim=3, network_train_unet_only=True)
    (line,) = messages(logging.WARNING)
    assert "1 layers loaded; 0 layers of the network" in line
    assert "2 layers of the file are not used" in line


def test_dim_from_weights(earlier):
    path, state = earlier
    method = attached(network_weights=path, dim_from_weights=True)
    assert method.trainable().state_dict().keys() == state.keys()
    assert method.metadata()["ss_network_dim"] == "Dynamic"
    assert all(torch.equal(value, state[name]) for name, value in method.trainable().state_dict().items())
    with pytest.raises(UserError, match="rank is 3"):
        attached(network_weights=path)


def test_a_frozen_part_of_earlier_weights_keeps_acting_and_is_saved_again(earlier, tmp_path):
    path, state = earlier
    method = attached(network_weights=path, dim_from_weights=True, text_encoder_lr=[0.0])
    assert rates(method) == {"unet": 1e-3}
    assert not method.trained_text_encoders()
    frozen = method.trainable().lora_te_attn
    assert not any(p.requires_grad for p in frozen.parameters())
    tensors, _ = saved(method, tmp_path / "again.safetensors")
    assert torch.equal(tensors["lora_te_attn.lora_up.weight"], state["lora_te_attn.lora_up.weight"])


def test_another_models_weights_are_refused(tmp_path):
    from safetensors.torch import save_file

    key, path = "lora_unet_double_blocks_0_img_attn_qkv", tmp_path / "flux.safetensors"
    save_file({f"{key}.lora_down.weight": torch.zeros(4, 8), f"{key}.lora_up.weight": torch.zeros(24, 4)}, path)
    for given in ({}, {"dim_from_weights": True}):
        with pytest.raises(UserError, match=r"flux\.safetensors: none of its 1 layers fits"):
            attached(network_weights=str(path), **given)


def test_base_weights_are_merged_with_their_strengths(earlier):
    path, state = earlier
    bare, models = toy_models(), toy_models()
    attached(models, base_weights=[path, path], base_weights_multiplier=[0.5])
    down, up = (state[f"lora_unet_attn.lora_{side}.weight"] for side in ("down", "up"))
    expected = bare.denoiser.attn.weight + 1.5 * (up @ down) / 3  # alpha 1, rank 3; strengths 0.5 and 1
    torch.testing.assert_close(models.denoiser.attn.weight, expected, rtol=1e-5, atol=1e-5)


def test_base_weights_of_another_format_are_refused_before_a_model_is_read(tmp_path):
    bundle, lora = tmp_path / "bundle.safetensors", tmp_path / "lora.safetensors"
    from safetensors.torch import save_file

    save_file({"bundle_emb.word.clip_l": torch.zeros(4, 4)}, bundle)
    save_file({f"unet.attn.to_q.lora_{side}.weight": torch.zeros(4, 4) for side in ("A", "B")}, lora)
    (problem,) = check_options(options_for(base_weights=[str(lora), str(bundle)]))
    assert problem.startswith(f"{bundle}: holds no layer of a network. Its names are those of embeddings without any")


@pytest.mark.rows("R319")
@pytest.mark.parametrize(
    ("given", "said"),
    [({}, True), ({"network_alpha": 1}, True), ({"network_alpha": 1e-3}, False), ({"network_alpha": 0}, True)],
)
@pytest.mark.parametrize("module", ["networks.oft", "networks.oft_flux"])
def test_the_default_alpha_is_no_constraint(given, said, module, caplog):
    assert check_options(options_for(network_module=module, **given)) == []
    lines = [record.getMessage() for record in caplog.records]
    assert bool(lines) == said
    assert all(line.startswith(f"--network_alpha: in {module} it limits how far weights are rotated") for line in lines)


def test_a_network_module_may_be_declared_anywhere(tmp_path, monkeypatch):
    (tmp_path / "my_network.py").write_text(
        "from networks.registry import LORA\n"
        "from networks.selections.unet import UnetSelection\n"
        "from networks.spec import NetworkModule\n"
        "MODULE = NetworkModule(name=__name__, type=LORA, selection=UnetSelection)\n"
    )
    (tmp_path / "no_network.py").write_text("def create(*args, **given): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    method = attached(network_module="my_network", network_dim=3)
    assert method.trainable().ranks() == {3}
    with pytest.raises(UserError, match="no_network is no kind of network, it has no create_network"):
        method_for(network_module="no_network")


# ---- networks of other modules


class Attention(nn.Module):
    """A class that lycoris looks for."""

    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, width)


class Transformer2DModel(Attention):
    pass


class CLIPMLP(Attention):
    pass


class Nested(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def lycoris_models():
    torch.manual_seed(0)
    return Models(Nested(Transformer2DModel(6)), {"te": Nested(CLIPMLP(5))}, {}, Block(3))


NESTED = [
    LoraTarget("lora_te_text_model_inner_proj", "te", ("inner.proj",)),
    LoraTarget("lora_unet_inner_proj", "denoiser", ("inner.proj",)),
]
NESTED_FAMILY = SimpleNamespace(traits=TRAITS, targets=SimpleNamespace(lora=lambda models: NESTED))


def with_lycoris(models=None, algo="loha", **given):
    method = method_for(network_module="lycoris.kohya", network_args=[f"algo={algo}"], network_dim=2, **given)
    method.attach(NESTED_FAMILY, models or lycoris_models())
    return method


@pytest.mark.rows("R302")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"textencoder": 1e-3, "unet": 1e-3}),
        ({"unet_lr": 1e-4, "text_encoder_lr": [5e-5]}, {"textencoder": 5e-5, "unet": 1e-4}),
        ({"text_encoder_lr": [0.0]}, {"unet": 1e-3}),
        ({"network_train_text_encoder_only": True}, {"textencoder": 1e-3}),
    ],
)
def test_a_third_party_network_has_our_rates(given, expected, tmp_path):
    models = lycoris_models()
    method = with_lycoris(models, **given)
    assert rates(method) == expected
    assert bool(method.trained_text_encoders()) == ("textencoder" in expected)
    trained = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert trained == {id(p) for p in method.trainable().parameters()}
    tensors, _ = saved(method, tmp_path / "a.safetensors", torch.float16)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    names = {"textencoder": "lora_te_text_model_inner_proj", "unet": "lora_unet_inner_proj"}
    assert {key.partition(".")[0] for key in tensors} == {names[part] for part in expected}


def test_third_party_metadata():
    found = with_lycoris(network_alpha=2.0).metadata()
    assert (found["ss_network_module"], found["ss_network_dim"]) == ("lycoris.kohya", "2")
    assert json.loads(found["ss_network_args"]) == {"algo": "loha"}


def test_third_party_weights_continue(tmp_path, messages):
    first = with_lycoris()
    for parameter in first.trainable().parameters():
        nn.init.normal_(parameter)
    first.save(tmp_path / "a.safetensors", None, None)
    state, path = first.trainable().state_dict(), str(tmp_path / "a.safetensors")
    for given in ({"dim_from_weights": True}, {}):
        again = with_lycoris(network_weights=path, **given).trainable().state_dict()
        assert all(torch.equal(value, state[name]) for name, value in again.items())
    assert messages(logging.WARNING) == []
    with_lycoris(network_weights=path, network_train_unet_only=True)
    (line,) = messages(logging.WARNING)
    assert "1 layers loaded; 0 layers of the network" in line
    assert "1 layers of the file are not used" in line
    frozen = with_lycoris(network_weights=path, text_encoder_lr=[0.0])
    assert rates(frozen) == {"unet": 1e-3}
    assert {name.partition(".")[0] for name in frozen.trainable().file_state()} == {t.key for t in NESTED}
    with pytest.raises(UserError, match="holds hada_w1_a"):
        with_lycoris(algo="lokr", network_weights=path)


def test_a_third_party_network_keeps_its_norm_and_strength():
    models = lycoris_models()
    method = with_lycoris(models, scale_weight_norms=0.5)
    x = torch.randn(3, 6)
    bare = models.denoiser.inner.proj(x)
    for parameter in method.trainable().parameters():
        nn.init.normal_(parameter)
    method.set_strength(0.0)
    torch.testing.assert_close(models.denoiser.inner.proj(x), bare)
    method.after_step()
    layer = models.denoiser.inner.proj
    with torch.no_grad():
        change = (layer(torch.eye(6)) - layer.bias).T - layer.weight
    assert torch.linalg.norm(change) == pytest.approx(0.5, rel=1e-4)


OWN = """
from torch import nn
import torch

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(6))
    def apply_to(self, text_encoder, unet, train_text_encoder, train_unet):
        forward = unet.attn.forward
        unet.attn.forward = lambda x: forward(x) + self.shift
    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, learning_rate):
        return [{"params": self.parameters(), "lr": unet_lr}], ["unet"]

def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, **kwargs):
    return Network()
"""


def test_a_module_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "network_in_a_folder.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "broken_network_in_a_folder.py").write_text("1 / 0", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    given = {"network_module": "network_in_a_folder", "network_train_unet_only": True}
    assert check_options(options_for(**given)) == []
    assert rates(attached(**given)) == {"unet": 1e-3}
    with pytest.raises(UserError, match="--scale_weight_norms: network_in_a_folder does not offer it"):
        attached(**given, scale_weight_norms=1.0)
    with pytest.raises(UserError, match="broken_network_in_a_folder cannot be imported: ZeroDivisionError"):
        attached(network_module="broken_network_in_a_folder")


# ---- files that fit in part


@pytest.mark.parametrize("how", ["network_weights", "base_weights"])
def test_a_file_whose_denoiser_fits_nothing_is_refused(tmp_path, how):
    method = attached()
    tensors = method.trainable().file_state()
    lost = {name.replace("lora_unet_", "lora_unet_other_"): value for name, value in tensors.items()}
    torch.save(lost, tmp_path / "a.pt")
    count = len({name.partition(".")[0] for name in lost if name.startswith("lora_unet")})
    given = {how: str(tmp_path / "a.pt") if how == "network_weights" else [str(tmp_path / "a.pt")]}
    with pytest.raises(UserError, match=rf"a\.pt: its {count} layers lora_unet_\* \(the denoiser\) find no place"):
        attached(**given)


def test_a_part_that_has_a_place_but_is_not_trained_is_a_warning(tmp_path, messages):
    method = attached()
    torch.save(method.trainable().file_state(), tmp_path / "a.pt")
    attached(network_weights=str(tmp_path / "a.pt"), network_train_unet_only=True)
    assert any("1 layers of the file are not used" in line for line in messages(logging.WARNING))
