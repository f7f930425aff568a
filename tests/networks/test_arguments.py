"""Arguments of networks.lora. Expected numbers are written out from the formulas of the presets."""

from __future__ import annotations

import math

import pytest

from library.errors import UserError
from library.types import BlockLayout, LoraTarget
from networks.lora import MODULE
from networks.selection import TargetLayer


def parse(args, layout=None):
    return MODULE.parse(args, layout=layout)


def select(args, layout=None):
    return parse(args, layout).selection


def check(args, ranks_from_file=False):
    return MODULE.check(args, dim=4, ranks_from_file=ranks_from_file)


def weights(**args):
    return list(select({key: str(value) for key, value in args.items()}).block_weights)


ONES = [1.0] * 12


def test_lists_are_padded_with_one_and_an_empty_entry_is_zero():
    assert weights(down_lr_weight="0.1,,0.3") == [0.1, 0.0, 0.3, *[1.0] * 9, 1.0, *ONES]
    assert weights(mid_lr_weight="0.5") == [*ONES, 0.5, *ONES]
    assert weights(up_lr_weight="1," * 11 + "2") == [*ONES, 1.0, *[1.0] * 11, 2.0]


@pytest.mark.parametrize(
    ("preset", "value"),
    [
        ("sine", lambda i: math.sin(math.pi / 2 * i / 11)),
        ("cosine", lambda i: math.sin(math.pi / 2 * (11 - i) / 11)),
        ("linear", lambda i: i / 11),
        ("reverse_linear", lambda i: (11 - i) / 11),
        ("zeros", lambda i: 0.0),
        ("sine+.25", lambda i: math.sin(math.pi / 2 * i / 11) + 0.25),
        ("zeros+0.5", lambda i: 0.5),
    ],
)
def test_presets(preset, value):
    expected = [value(i) for i in range(12)]
    assert weights(down_lr_weight=preset)[:12] == pytest.approx(expected)
    assert weights(up_lr_weight=preset)[13:] == pytest.approx(expected)


def test_threshold_makes_small_weights_zero():
    got = weights(down_lr_weight="linear", block_lr_zero_threshold=0.5)
    assert got[:12] == [0.0] * 6 + [pytest.approx(i / 11) for i in range(6, 12)]


def test_layout_with_fixed_ends():
    layout = BlockLayout(9, 3, 9, edge=1)
    parsed = select({"down_lr_weight": "zeros", "mid_lr_weight": "0.1,0.2,0.3"}, layout)
    assert parsed.block_weights == (1.0, *[0.0] * 9, 0.1, 0.2, 0.3, *[1.0] * 9, 1.0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"algo": "loha"}, "algo=loha: networks.lora trains no such network; --network_module networks.lycoris does"),
        ({"dora_wd": "True"}, "dora_wd=True: networks.lora trains no such network"),
        ({"conv_dim": "4.5"}, "conv_dim=4.5: is not a whole number"),
        ({"conv_dim": "-1"}, "conv_dim=-1: must be at least 0"),
        ({"conv_dim": "32769"}, "conv_dim=32769: must be at least 0, at most 32768"),
        ({"conv_dim": "9" * 30}, "must be at least 0, at most 32768"),
        ({"conv_dim": "9" * 5000}, "is not a whole number"),
        ({"block_dims": ",".join(["4", "32769"] + ["4"] * 23)}, "has an entry above 32768"),
        ({"conv_block_dims": ",".join(["9" * 30] * 25)}, "has an entry above 32768"),
        ({"network_reg_dims": "attn1=32769"}, "must be at most 32768"),
        ({"conv_alpha": "-1"}, "conv_alpha=-1: must be at least 0"),
        ({"conv_alpha": "nan"}, "conv_alpha=nan: must be at least 0"),
        ({"conv_alpha": "9" * 400}, "must be at least 0"),
        ({"block_alphas": ",".join(["inf"] * 25)}, "has an entry that is no finite number"),
        ({"rank_dropout": "1"}, "rank_dropout=1: must be at least 0, below 1"),
        ({"loraplus_lr_ratio": "-1"}, "loraplus_lr_ratio=-1: must be at least 0"),
        (
            {"down_lr_weight": "sinus"},
            "down_lr_weight=sinus: is neither a comma-separated list nor one of sine",
        ),
        ({"down_lr_weight": "0.5"}, "down_lr_weight=0.5: is neither"),
        ({"up_lr_weight": ",".join("1" * 13)}, "has 13 entries, there are 12 such blocks"),
        ({"mid_lr_weight": "1,1"}, "has 2 entries, there are 1 such blocks"),
        ({"up_lr_weight": "1,x"}, "holds something that is not a number"),
        ({"up_lr_weight": "sine+x"}, "holds something that is not a number"),
        ({"block_dims": "1,2,3"}, "block_dims=1,2,3: has 3 entries, this model has 25 blocks"),
        ({"block_dims": ",".join(["4"] * 26)}, "has 26 entries"),
        ({"block_dims": ",".join(["4", "-1"] + ["4"] * 23)}, "has an entry below 0"),
        ({"conv_block_alphas": "a,b"}, "is not a comma-separated list of numbers"),
        ({"network_reg_dims": "attn1"}, "network_reg_dims=attn1: is not regex=value"),
        ({"network_reg_dims": "attn1=4.5"}, "'4.5' is not a whole number"),
        ({"network_reg_dims": "attn1=-1"}, "must be at least 0"),
        ({"network_reg_lrs": "attn1=fast"}, "'fast' is not a number"),
        ({"network_reg_lrs": "attn(=1"}, "'attn(' is no regular expression"),
    ],
)
def test_errors_say_what_is_wrong(args, message):
    with pytest.raises(UserError) as caught:
        parse(args)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


def test_the_largest_ranks_are_taken():
    parsed = select({"conv_dim": "32768", "block_dims": ",".join(["32768"] * 25), "network_reg_dims": "a=32768"})
    assert (parsed.conv_dim, parsed.block_dims, parsed.own_dim("a")) == (32768, (32768,) * 25, 32768)


def test_all_problems_at_once():
    with pytest.raises(UserError) as caught:
        parse({"conv_dim": "x", "dropout": "2", "up_lr_weight": "?"})
    assert len(caught.value.problems) == 3


def test_zero_and_nothing_switch_off():
    parsed = parse({"conv_dim": "0", "loraplus_lr_ratio": "0", "loraplus_unet_lr_ratio": "", "rank_dropout": ""})
    assert parsed == parse({})
    assert parse({"loraplus_lr_ratio": "4", "loraplus_unet_lr_ratio": "0"}).plus.denoiser is None
    assert parse({"algo": "lora", "dora_wd": "False", "train_norm": "0"}) == parse({})


def test_arguments_that_the_module_does_not_know_are_ignored_aloud():
    lines = check({"conv_dims": "4", "preset": "full", "dora_wd": "False"})
    assert lines == [
        "--network_args: conv_dims is ignored: networks.lora knows no such argument; did you mean 'conv_dim'?",
        "--network_args: preset is ignored: networks.lora knows no such argument",
    ]


def test_what_has_no_effect_is_said():
    assert check({"conv_alpha": "1", "dropout": "0.1"}) == [
        "--network_args: conv_alpha has no effect without conv_dim or conv_block_dims"
    ]
    assert check({"conv_alpha": "1", "conv_dim": "4"}) == []
    assert len(check({"conv_alpha": "1", "conv_dim": "4"}, ranks_from_file=True)) == 2


def choose(args, *, key="lora_unet_x", block=5, kernel=False, conv_only=False):
    target = LoraTarget(key, "denoiser", ("x",), conv_only=conv_only, block=block)
    chosen = select(args).choose(TargetLayer(target, kernel), 4, 1.0)
    return chosen and (chosen.rank, chosen.alpha)


def test_ranks_by_block():
    dims, convs = ",".join(str(i) for i in range(25)), ",".join(str(2 * i) for i in range(25))
    assert choose({}) == (4, 1.0)
    assert choose({}, kernel=True, conv_only=True) is None
    assert choose({}, conv_only=True) is None
    assert choose({"conv_dim": "2"}, kernel=True, conv_only=True) == (2, 1.0)
    assert choose({"conv_dim": "2"}, conv_only=True) == (4, 1.0)
    assert choose({"block_dims": dims}) == (5, 1.0)
    assert choose({"block_dims": dims}, block=0) is None
    assert choose({"block_dims": dims}, block=None) == (4, 1.0)
    assert choose({"block_dims": dims, "conv_dim": "2"}, kernel=True, conv_only=True) == (2, 1.0)
    assert choose({"conv_block_dims": convs, "conv_block_alphas": dims}, kernel=True, conv_only=True) == (10, 5.0)
    assert choose({"conv_block_dims": convs}, conv_only=True) == (4, 1.0)
    assert choose({"down_lr_weight": "zeros"}) is None
    assert choose({"up_lr_weight": "zeros"}) == (4, 1.0)


def test_ranks_by_regular_expression():
    """The first pattern found in the key counts, before what blocks say; 0 leaves the layer out."""
    args = {"network_reg_dims": "attn1_to_[qk]=8, attn1=0,_ff_=2", "block_dims": ",".join(["3"] * 25)}

    def chosen(key, **more):
        return choose(args, key=key, block=1, **more)

    assert chosen("lora_unet_attn1_to_q") == (8, 1.0)
    assert chosen("lora_unet_attn1_to_v") is None
    assert chosen("lora_unet_ff_net_0") == (2, 1.0)
    assert chosen("lora_unet_attn2_to_q") == (3, 1.0)
    assert chosen("lora_unet_ff_conv", conv_only=True, kernel=True) is None  # convolutions still want conv_dim


def test_rates_by_regular_expression():
    given = {"network_reg_lrs": "attn1=1e-5,attn=2e-5,ff=0", "up_lr_weight": "zeros"}
    assert [select(given).own_lr(f"lora_unet_{name}") for name in ("attn1_to_q", "attn2_to_q", "proj_in")] == [
        (1, 1e-5),
        (2, 2e-5),
        None,
    ]
    assert choose(given, key="lora_unet_attn1", block=13) == (4, 1.0)
    assert choose(given, key="lora_unet_ff", block=13) is None
    assert choose(given, key="lora_unet_proj_in", block=13) is None
