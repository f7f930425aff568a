"""Networks of other modules. References: lycoris' published formulas merged into the weights, and lycoris itself."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.errors import UserError
from library.types import LoraTarget, Models
from networks.files import read
from networks.third_party import LayerNames, ThirdPartyBuilder

pytest.importorskip("lycoris")

ALGOS = {
    "locon": {"algo": "locon", "conv_dim": "2", "conv_alpha": "1"},
    "tucker": {"algo": "locon", "use_tucker": "True"},
    "dora": {"algo": "locon", "dora_wd": "True"},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr", "factor": "4"},
    "full": {"algo": "full"},
}


@pytest.fixture(scope="module")
def lycoris():
    return ThirdPartyBuilder(importlib.import_module("lycoris.kohya"))


def make(module, targets, models, *, args=None, dim=2, alpha=1.0, dropout=None, seed=11):
    return module.create(targets, models, dim=dim, alpha=alpha, dropout=dropout, args=args or {}, seed=seed)


def trained(network, seed=1):
    """Gives every parameter a value, so that outputs change."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.05)
    return network


def write(network, path):
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in network.file_state().items()}, path)
    return path


def change(weight, tensors):
    """The weight that one layer of a file stands for, from the formulas of the file format."""
    shape, t = weight.shape, tensors
    if "diff" in t:
        return weight + t["diff"]
    if "hada_w1_a" in t:
        rank = t["hada_w1_b"].shape[0]
        delta = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    elif "lokr_w1" in t:
        rank = t["lokr_w2_b"].shape[0] if "lokr_w2_b" in t else None
        small = t["lokr_w2"] if rank is None else t["lokr_w2_a"] @ t["lokr_w2_b"]
        first = t["lokr_w1"]
        small = small.reshape(shape[0] // first.shape[0], shape[1] // first.shape[1], *shape[2:])
        delta = torch.kron(first.reshape(*first.shape, *[1] * (small.dim() - 2)), small)
        if rank is None:
            return weight + delta.reshape(shape)
    elif "lora_mid.weight" in t:
        rank = t["lora_down.weight"].shape[0]
        up, down = t["lora_up.weight"].flatten(1), t["lora_down.weight"].flatten(1)
        delta = torch.einsum("or,rshw,si->oihw", up, t["lora_mid.weight"], down)
    else:
        rank = t["lora_down.weight"].shape[0]
        delta = t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1)
    merged = weight + delta.reshape(shape) * (t["alpha"] / rank)
    if "dora_scale" in t:
        norm = merged.flatten(1).norm(dim=1).reshape(t["dora_scale"].shape)
        merged = merged * t["dora_scale"] / norm
    return merged


def merge(models, file):
    """Puts a file's changes into the weights of a model that has no network."""
    live = {}
    for prefix, part in (("lora_unet_", models.denoiser), ("lora_te_text_model_", models.text_encoders["te"])):
        live.update({prefix + path.replace(".", "_"): module for path, module in part.named_modules()})
    for layer, tensors in file.entries.items():
        module = live[layer]
        module.weight.data = change(module.weight.data, tensors)
        if "diff_b" in tensors:
            module.bias.data = module.bias.data + tensors["diff_b"]


@pytest.mark.rows("R301", "R302")
@pytest.mark.parametrize("algo", ALGOS)
def test_the_live_network_is_what_its_file_says(lycoris, models, targets, outputs, tmp_path, algo):
    bare, other = outputs(models), copy.deepcopy(models)
    network = make(lycoris, targets, models, args=ALGOS[algo])
    for started, plain in zip(outputs(models), bare, strict=True):
        torch.testing.assert_close(started, plain, rtol=0, atol=1e-5)  # DoRA divides by a norm it multiplies with
    trained(network).eval()
    file = read(write(network, tmp_path / "a.safetensors"))
    assert len(file.entries) == len(network.layers()) == sum(network.counts().values())
    merge(other, file)
    for ours, merged, plain in zip(outputs(models), outputs(other), bare, strict=True):
        assert (ours - merged).abs().max() < 1e-5  # float32, tens of layers
        assert (ours - plain).abs().max() > 1e-4


class WithLevel(nn.Module):
    """A text encoder as transformers 4 shows it."""

    def __init__(self, encoder):
        super().__init__()
        self.text_model = encoder

    def forward(self, *args):
        return self.text_model(*args)


@pytest.mark.rows("R301", "R302")
@pytest.mark.parametrize("algo", ALGOS)
def test_lycoris_reads_the_file_under_public_names(lycoris, models, targets, outputs, tmp_path, algo):
    from lycoris.kohya import create_network_from_weights

    fresh = copy.deepcopy(models)
    network = trained(make(lycoris, targets, models, args=ALGOS[algo])).eval()
    path = write(network, tmp_path / "a.safetensors")
    encoder = WithLevel(fresh.text_encoders["te"])
    theirs, weights = create_network_from_weights(1.0, str(path), None, encoder, fresh.denoiser)
    theirs.apply_to(encoder, fresh.denoiser, True, True)
    assert len(theirs.loras) == len({name.partition(".")[0] for name in weights})
    theirs.eval()
    for ours, loaded in zip(outputs(models), outputs(fresh), strict=True):
        assert (ours - loaded).abs().max() < 1e-5  # float32, tens of layers


@pytest.mark.parametrize("algo", ALGOS)
def test_our_own_reading_gives_the_same_network(lycoris, models, targets, outputs, tmp_path, algo):
    second, third = copy.deepcopy(models), copy.deepcopy(models)
    network = trained(make(lycoris, targets, models, args=ALGOS[algo])).eval()
    file = read(write(network, tmp_path / "a.safetensors"))
    count = len(network.layers())

    again = make(lycoris, targets, second, args=ALGOS[algo], seed=12)
    assert lycoris.load(again, file) == (count, 0, 0)
    built = lycoris.from_weights(targets, third, file, dropout=None, args={})
    assert len(built.layers()) == count
    for one, loaded in ((again, second), (built, third)):
        assert one.eval().file_state().keys() == network.file_state().keys()
        for ours, theirs in zip(outputs(models), outputs(loaded), strict=True):
            assert (ours - theirs).abs().max() < 1e-5  # algo=full adds and subtracts the model's weights


@pytest.mark.parametrize("algo", ALGOS)
def test_the_state_is_exact(lycoris, models, targets, outputs, algo):
    other = copy.deepcopy(models)
    network = trained(make(lycoris, targets, models, args=ALGOS[algo])).eval()
    if algo != "full":
        network.limit_norms(0.05)
    state = network.state_dict()
    assert all(not name.startswith("lora_te_encoder") for name in state)
    again = make(lycoris, targets, other, args=ALGOS[algo], seed=12).eval()
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(outputs(models), outputs(other), strict=True))
    assert all(torch.equal(value, network.file_state()[name]) for name, value in again.file_state().items())


def test_the_seed_chooses_the_weights_and_the_global_stream_stays(lycoris, models, targets):
    others = [copy.deepcopy(models) for _ in range(2)]
    before = torch.random.get_rng_state()
    first = make(lycoris, targets, models, args=ALGOS["loha"], seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    same = make(lycoris, targets, others[0], args=ALGOS["loha"], seed=3).state_dict()
    different = make(lycoris, targets, others[1], args=ALGOS["loha"], seed=4).state_dict()
    assert all(torch.equal(value, first[name]) for name, value in same.items())
    assert any(not torch.equal(value, first[name]) for name, value in different.items())


def test_rates_parts_and_lora_plus(lycoris, models, targets):
    network = make(lycoris, targets, models, args={"algo": "locon", "loraplus_unet_lr_ratio": "4"})
    assert network.parts() == ["te", "denoiser"]
    groups = {group["name"]: group for group in network.parameter_groups({"te": 1e-3, "denoiser": 1e-4})}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "textencoder": 1e-3,
        "unet": 1e-4,
        "unet plus": pytest.approx(4e-4),
    }
    assert sum(len(group["params"]) for group in groups.values()) == len(list(network.parameters()))
    (only,) = network.parameter_groups({"te": 1e-3, "denoiser": 0.0})
    assert only["name"] == "textencoder"
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == len(groups["unet"]["params"]) + len(groups["unet plus"]["params"])


def test_a_part_without_targets_is_left_alone(lycoris, models, targets, outputs):
    bare = outputs(models)
    network = make(lycoris, [t for t in targets if t.part == "denoiser"], models, args=ALGOS["loha"])
    trained(network)
    assert network.parts() == ["denoiser"] == list(network.counts())
    unet, text = outputs(models)
    assert torch.equal(text, bare[1])
    assert not torch.allclose(unet, bare[0], atol=1e-4)


def test_dropouts_act_in_training_only(lycoris, models, targets, outputs):
    network = trained(make(lycoris, targets, models, args={"algo": "locon", "module_dropout": "0.5"}))
    network.train()
    assert not torch.equal(outputs(models)[0], outputs(models)[0])
    network.eval()
    assert torch.equal(outputs(models)[0], outputs(models)[0])
    dropped = make(lycoris, targets, models, args={"algo": "locon"}, dropout=0.25)
    assert {layer.dropout.p for layer in dropped.layers().values()} == {0.25}


def test_multiplier_and_norm_limit(lycoris, models, targets, outputs):
    bare = outputs(models)
    network = trained(make(lycoris, targets, models, args=ALGOS["loha"])).eval()
    network.set_multiplier(0.0)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(outputs(models), bare, strict=True))
    network.set_multiplier(1.0)
    network.limit_norms(0.01)
    entries: dict[str, dict] = {}
    for name, tensor in network.file_state().items():
        layer, _, rest = name.partition(".")
        entries.setdefault(layer, {})[rest] = tensor.detach()
    for t in entries.values():
        delta = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * t["alpha"] / 2
        assert delta.norm() <= 0.01 * (1 + 1e-4)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"args": {"algo": "lokr"}}, "holds hada_w1_a, hada_w1_b"),
        ({"args": {"algo": "loha"}, "dim": 3}, r"shape \(16, 2\) does not fit \(16, 3\)"),
        ({"args": {"algo": "loha"}, "alpha": 2.0}, "alpha is 1, the network's 2"),
    ],
)
def test_files_of_other_arguments_are_refused(lycoris, models, targets, tmp_path, made, message):
    other = copy.deepcopy(models)
    file = read(write(make(lycoris, targets, models, args=ALGOS["loha"]), tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match=message):
        lycoris.load(make(lycoris, targets, other, **made), file)


def test_files_of_other_models_are_refused(lycoris, models, targets, tmp_path):
    key, path = "lora_unet_double_blocks_0_img_attn_qkv", tmp_path / "other.safetensors"
    save_file({f"{key}.lora_down.weight": torch.zeros(4, 8), f"{key}.lora_up.weight": torch.zeros(24, 4)}, path)
    with pytest.raises(UserError, match=r"other\.safetensors: none of its 1 layers fits"):
        lycoris.from_weights(targets, copy.deepcopy(models), read(path), dropout=None, args={})
    with pytest.raises(UserError, match=r"other\.safetensors: none of its 1 layers fits"):
        lycoris.load(make(lycoris, targets, models), read(path))
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="holds weight, so it is no file of a network"):
        read(path)


def test_a_partly_fitting_file_is_counted(lycoris, models, targets, tmp_path):
    other = copy.deepcopy(models)
    network = trained(make(lycoris, targets, models, args=ALGOS["full"]))
    file = read(write(network, tmp_path / "a.safetensors"))
    gone = next(iter(file.entries))
    file.entries["lora_unet_elsewhere"] = file.entries.pop(gone)
    again = make(lycoris, targets, other, args=ALGOS["full"])
    count = len(network.layers())
    assert lycoris.load(again, file) == (count - 1, 1, 1)
    assert not again.file_state()[f"{gone}.diff"].any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"algo": "nonsense"}, "lycoris.kohya: create_network failed: KeyError: 'nonsense'"),
        ({"conv_dim": "x"}, "lycoris.kohya: create_network failed: ValueError: invalid literal"),
        ({"preset": "none.toml"}, "lycoris.kohya: create_network failed: AssertionError: it says no more"),
    ],
)
def test_what_goes_wrong_inside_is_one_line(lycoris, models, targets, args, message):
    with pytest.raises(UserError) as caught:
        make(lycoris, targets, models, args=args)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- names


def test_names_of_several_text_encoders():
    targets = [
        LoraTarget("lora_te1_text_model_layers_0_q", "te1", ("layers.0.q",)),
        LoraTarget("lora_te3_block_0_q", "te3", ("block.0.q",)),
        LoraTarget("lora_unet_input_blocks_1_1_proj", "denoiser", ("down.0.proj",)),
        LoraTarget("lora_unet_fused", "denoiser", ("a.q", "a.k")),
    ]
    names = LayerNames(targets, ["te1", "te3"])
    for live, public in {
        "lora_te1_layers_0_q": "lora_te1_text_model_layers_0_q",
        "lora_te1_norm": "lora_te1_text_model_norm",
        "lora_te2_block_0_q": "lora_te3_block_0_q",
        "lora_unet_down_0_proj": "lora_unet_input_blocks_1_1_proj",
        "lora_unet_conv_in": "lora_unet_conv_in",
    }.items():
        assert names.public(live) == public
        assert names.live(public) == names.live(live) == live
    assert [names.part(f"lora_{kind}_a") for kind in ("te1", "te2", "unet")] == ["te1", "te3", "denoiser"]


# ---- a module of the user's own

OWN = """
import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(original.out_features))
        self.original = [original]

    def apply_to(self):
        forward = self.original[0].forward
        self.original[0].forward = lambda x: forward(x) + self.bias


class Network(nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.epochs = self.steps = 0
        for name, module in unet.named_modules():
            if isinstance(module, nn.Linear):
                self.add_module("lora_unet_" + name.replace(".", "_"), Layer(module))

    def apply_to(self, text_encoder, unet, train_text_encoder, train_unet):
        for layer in self.children():
            layer.apply_to()

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
        return [{"params": self.parameters(), "lr": unet_lr}]

    def on_epoch_start(self, text_encoder, unet):
        self.epochs += 1

    def on_step_start(self, text_encoder, unet):
        self.steps += 1


def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet):
    return Network(unet)
"""


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(3, 4)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "module_of_a_user.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield ThirdPartyBuilder(importlib.import_module("module_of_a_user"))
    sys.modules.pop("module_of_a_user")


def test_the_least_that_a_module_must_have(own_module):
    models = Models(Attention(), {}, {}, None)
    targets = [LoraTarget("lora_unet_input_q", "denoiser", ("to_q",))]
    network = make(own_module, targets, models, dropout=0.5)
    (group,) = network.parameter_groups({"denoiser": 1e-3})
    assert (group["lr"], group["name"], len(group["params"])) == (1e-3, "group 1", 1)
    assert not network.can_limit_norms()
    network.start_epoch()
    network.start_step()
    assert (network.network.epochs, network.network.steps) == (1, 1)
    x = torch.randn(2, 3)
    before = models.denoiser.to_q(x)
    group["params"][0].data.fill_(0.5)
    torch.testing.assert_close(models.denoiser.to_q(x), before + 0.5)
    assert list(network.file_state()) == ["lora_unet_input_q.bias"]
    with pytest.raises(UserError, match="one strength only"):
        network.set_multiplier(0.5)
    with pytest.raises(UserError, match="has no create_network_from_weights"):
        own_module.from_weights(targets, models, None, dropout=None, args={})
    with pytest.raises(UserError, match=r"create_network failed: TypeError: .*algo"):
        make(own_module, targets, models, args={"algo": "loha"})
