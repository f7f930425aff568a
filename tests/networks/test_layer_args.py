"""Arguments of the types of layers, read from --network_args. LyCORIS' names and defaults."""

from __future__ import annotations

import pytest

from networks.arguments import Reader
from networks.layer_args import (
    DyLoraArgs,
    KohyaOftArgs,
    LohaArgs,
    LokrArgs,
    LoraArgs,
    LyLoconArgs,
    LyLokrArgs,
    OftArgs,
    PerturbedLoraArgs,
    SplitLoraArgs,
    WholeArgs,
)

DROPOUTS = {"dropout": 0.1, "rank_dropout": 0.2, "module_dropout": 1.0}
OF_CHANGES = {**DROPOUTS, "rank_dropout_scale": True, "use_scalar": True, "rs_lora": True, "dora_wd": True}
OF_CHANGES |= {"wd_on_output": False, "use_tucker": True}
OF_LOKR = {"factor": 4, "decompose_both": True, "full_matrix": True, "unbalanced_factorization": True}
EVERY = [
    (LoraArgs, DROPOUTS),
    (SplitLoraArgs, {**DROPOUTS, "split_qkv": True}),
    (PerturbedLoraArgs, {**DROPOUTS, "split_qkv": True, "ggpo_sigma": 0.5, "ggpo_beta": 0.25}),
    (DyLoraArgs, {"unit": 4}),
    (LohaArgs, {"use_tucker": True, "rank_dropout": 0.2, "module_dropout": 1.0}),
    (LokrArgs, {"use_tucker": True, "rank_dropout": 0.2, "module_dropout": 1.0, "factor": 8}),
    (LyLoconArgs, OF_CHANGES),
    (LyLokrArgs, {**OF_CHANGES, **OF_LOKR}),
    (WholeArgs, {"rank_dropout": 0.2, "rank_dropout_scale": True, "module_dropout": 1.0, "train_on_input": True}),
    (OftArgs, {"constraint": 0.5, "rescaled": True, "module_dropout": 1.0}),
    (KohyaOftArgs, {}),
]


def read(kind, args):
    reader = Reader({name: str(value) for name, value in args.items()}, kind.NAMES, module="networks.x")
    return kind.read(reader), reader.problems


@pytest.mark.parametrize(("kind", "args"), EVERY)
def test_every_argument_arrives(kind, args):
    assert set(args) == set(kind.NAMES)
    assert read(kind, args) == (kind(**args), [])


@pytest.mark.parametrize("kind", [kind for kind, _ in EVERY])
def test_without_arguments_all_is_off(kind):
    assert read(kind, {}) == read(kind, dict.fromkeys(kind.NAMES, "")) == (kind(), [])
    on = {"wd_on_output": True, "factor": -1, "unit": 1}
    assert all(getattr(kind(), name) == on.get(name, False) or getattr(kind(), name) is None for name in kind.NAMES)


@pytest.mark.parametrize(
    ("kind", "args", "said"),
    [
        *((LoraArgs, {name: 1.5}, "at most 1") for name in ("dropout", "module_dropout")),
        *((LyLoconArgs, {name: 1.5}, "at most 1") for name in ("dropout", "module_dropout")),
        *((kind, {"rank_dropout": 1}, "below 1") for kind in (LoraArgs, LohaArgs, WholeArgs)),
        *((kind, {"module_dropout": -0.1}, "at least 0") for kind in (LoraArgs, LohaArgs, OftArgs)),
        (LoraArgs, {"rank_dropout": -0.1}, "at least 0"),
        (PerturbedLoraArgs, {"ggpo_sigma": -1, "ggpo_beta": 1}, "at least 0"),
        (OftArgs, {"module_dropout": 1.5}, "at most 1"),
        (OftArgs, {"constraint": -1}, "at least 0"),
        (DyLoraArgs, {"unit": 0}, "at least 1"),
        (LokrArgs, {"factor": -2}, "at least -1"),
        (PerturbedLoraArgs, {"ggpo_beta": 1}, "needs the other one too"),
        (PerturbedLoraArgs, {"ggpo_sigma": 1}, "needs the other one too"),
    ],
)
def test_values_out_of_range_are_refused(kind, args, said):
    _, problems = read(kind, args)
    assert len(problems) == 1
    assert f"{next(iter(args))}=" in problems[0]
    assert said in problems[0]


def test_only_perturbed_layers_read_gradients():
    assert PerturbedLoraArgs(ggpo_sigma=0.1, ggpo_beta=0.1).reads_gradients() == "ggpo_sigma"
    assert PerturbedLoraArgs().reads_gradients() is None
    assert LoraArgs().reads_gradients() is None


def test_constraints_and_blocks_of_both_kinds_of_oft():
    assert OftArgs(constraint=0.25).alpha_of(7.0) == 0.25
    assert (KohyaOftArgs().alpha_of(None), KohyaOftArgs().alpha_of(0.5)) == (1e-3, 0.5)
    assert (OftArgs().cut(24, 4), KohyaOftArgs().cut(24, 4)) == ((6, 4), (4, 6))  # 4: size of a block, number of blocks
    assert (OftArgs().rank_of(6, 4), KohyaOftArgs().rank_of(4, 6)) == (4, 4)
    assert OftArgs(constraint=1.0).of_file({"rescale"}) == OftArgs(constraint=1.0, rescaled=True)
    assert not OftArgs(rescaled=True).of_file({"oft_blocks"}).rescaled
