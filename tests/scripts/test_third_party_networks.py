"""lycoris.kohya through train_network.py: it trains and resumes, and lycoris itself reads what was saved."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from library import cli
from library.methods.network import NetworkMethod
from tests.scripts.starting import ROOT

pytest.importorskip("lycoris")

MODEL = "examples/tiny_model/tiny-sd.safetensors"  # in random weights rounding grows beyond what is compared here
COMMON = {"pretrained_model_name_or_path": MODEL, "learning_rate": 1e-2, "scale_weight_norms": 0.5}
RUNS = {
    "loha": {"network_args": ["algo=loha", "preset=attn-mlp", "module_dropout=0.2"], **COMMON},
    "lokr": {"network_args": ["algo=lokr", "preset=attn-mlp", "factor=8", "rank_dropout=0.2"], **COMMON},
}


def weights_hash(folder):
    with safe_open(folder / "lora.safetensors", "pt") as file:
        return file.metadata()["sshs_model_hash"]


@pytest.fixture(scope="module", params=RUNS)
def whole(request, run_script, train_arguments, tmp_path_factory):
    """(options, output folder) of a run that never stopped."""
    out, options = tmp_path_factory.mktemp(request.param), RUNS[request.param]
    stated = {"max_train_steps": 3, "save_every_n_steps": 2, "save_state": True}
    done = run_script(*train_arguments(out, network_module="lycoris.kohya", **stated, **options))
    assert done.returncode == 0, done.stderr[-3000:]
    return options, out


class WithLevel(nn.Module):
    """A text encoder as transformers 4 shows it, whose names files have."""

    def __init__(self, encoder):
        super().__init__()
        self.text_model = encoder


def prediction(family, models):
    rng = torch.Generator().manual_seed(5)
    noisy = torch.randn(2, 4, 8, 8, generator=rng)
    with torch.no_grad():
        text = family.text.encode(models, ["a sks flower", "a flower"])
        return family.denoiser.predict(models, noisy, torch.tensor([10, 600]), text)


@pytest.mark.rows("R301", "R302")
def test_lycoris_reads_the_file_as_the_trained_network(whole):
    from lycoris.kohya import create_network_from_weights

    options, out = whole
    arguments = [f"--pretrained_model_name_or_path={MODEL}", "--network_module=lycoris.kohya", "--network_dim=4"]
    family, models = cli.load_family("sd", [*arguments, "--network_args", *options["network_args"]])
    bare = prediction(family, models)
    method = NetworkMethod(family.opts.replaced(learning_rate=1e-3))
    method.attach(family, models)
    method.trainable().load_state_dict(load_file(out / "lora-state" / "model.safetensors"))
    method.trainable().eval()
    ours = prediction(family, models)

    _, fresh = cli.load_family("sd", arguments)
    encoder = WithLevel(fresh.text_encoders["te"])
    file = str(out / "lora.safetensors")
    theirs, weights = create_network_from_weights(1.0, file, None, encoder, fresh.denoiser)
    theirs.apply_to(encoder, fresh.denoiser, True, True)
    theirs.eval()
    assert len(theirs.loras) == len({name.partition(".")[0] for name in weights}) == len(method.trainable().layers())
    assert (prediction(family, fresh) - ours).abs().max() < 1e-5  # float32
    assert (ours - bare).abs().max() > 1e-3


def test_metadata(whole):
    options, out = whole
    with safe_open(out / "lora.safetensors", "pt") as file:
        told = file.metadata()
    assert told["ss_network_module"] == "lycoris.kohya"
    assert json.loads(told["ss_network_args"]) == dict(entry.split("=") for entry in options["network_args"])
    assert told["ss_network_dim"] == "4"


def test_resuming_changes_nothing(whole, run_script, train_arguments, tmp_path):
    options, out = whole
    state = {"max_train_steps": 3, "resume": out / "lora-step00000002-state"}
    done = run_script(*train_arguments(tmp_path, network_module="lycoris.kohya", **state, **options))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 step in" in done.stderr
    assert weights_hash(tmp_path) == weights_hash(out)


def test_a_module_in_the_current_folder(run_script, train_arguments, tmp_path):
    """The script lies elsewhere; a broken module is one line."""
    (tmp_path / "own_network.py").write_text("def create_network(*args, **kwargs):\n    raise OSError('no luck')\n")
    absolute = {"train_data_dir": ROOT / "examples/concept"}
    script, *arguments = train_arguments(tmp_path, network_module="own_network", **absolute)
    done = run_script(ROOT / script, *arguments, folder=tmp_path)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "error: --network_module: own_network: create_network failed: OSError: no luck" in done.stderr
    assert "Traceback" not in done.stderr
