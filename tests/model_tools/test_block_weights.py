"""Which weight a layer has: lists of numbers by slot, names with ranges, and what cannot be meant."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.model_tools.block_weights import LISTS, parse, parse_all

# Layers of each slot, as network files of either kind of U-Net name them.
SLOTS = {
    0: ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_31_mlp_fc1"),
    1: ("lora_unet_conv_in", "lora_unet_input_blocks_0_0"),
    2: ("lora_unet_down_blocks_0_attentions_0_proj_in", "lora_unet_input_blocks_1_0_in_layers_2"),
    3: ("lora_unet_down_blocks_0_resnets_1_conv1", "oft_unet_input_blocks_2_0_in_layers_2"),
    4: ("lora_unet_down_blocks_0_downsamplers_0_conv", "lora_unet_input_blocks_3_0_op"),
    5: ("lora_unet_down_blocks_1_attentions_0_proj_out", "lora_unet_input_blocks_4_1_proj_in"),
    12: ("lora_unet_down_blocks_3_resnets_1_conv2",),
    13: ("lora_unet_mid_block_attentions_0_proj_in", "lora_unet_middle_block_1_proj_in"),
    14: ("lora_unet_up_blocks_0_resnets_0_conv1", "lora_unet_output_blocks_0_1_proj_in"),
    16: ("lora_unet_up_blocks_0_upsamplers_0_conv", "lora_unet_output_blocks_2_2_conv"),
    22: ("lora_unet_up_blocks_2_attentions_2_proj_in", "lora_unet_output_blocks_8_0_in_layers_2"),
    25: ("lora_unet_up_blocks_3_attentions_2_proj_in",),
}


@pytest.mark.parametrize("length", LISTS)
def test_a_list_weighs_the_layers_of_its_slots(length):
    numbers = [0.01 * (slot + 1) for slot in LISTS[length]]
    weights = parse(str(numbers))
    for slot, layers in SLOTS.items():
        wanted = 0.01 * (slot + 1) if slot in LISTS[length] else 1.0
        assert [weights.factor(layer) for layer in layers] == [wanted] * len(layers), slot


def test_the_lists_name_the_published_slots():
    names = ["BASE", *(f"IN{n:02}" for n in range(12)), "MID", *(f"OUT{n:02}" for n in range(12))]
    named = {length: " ".join(names[slot] for slot in slots) for length, slots in LISTS.items()}
    assert named[12] == "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"
    assert named[17].split()[:8] == ["BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"]
    assert named[17].split()[8:] == [f"OUT{n:02}" for n in range(3, 12)]
    assert named[20].split()[10:12] == ["MID", "OUT00"]
    assert named[26].split() == names


@pytest.mark.parametrize(
    ("layer", "wanted"),
    [
        ("lora_unet_double_blocks_3_img_attn_qkv", 0.5),
        ("lora_unet_double_blocks_9_txt_mlp_0", 0.5),
        ("lora_unet_double_blocks_10_img_attn_qkv", 0.25),
        ("oft_unet_single_blocks_3_linear1", 0.75),
        ("lora_unet_single_blocks_30_linear1", -1.0),
        ("lora_te1_text_model_encoder_layers_3_mlp_fc1", 0.0),
        ("lora_te3_encoder_block_3_layer_0_SelfAttention_q", -1.0),
    ],
)
def test_names_weigh_the_blocks_that_they_begin(layer, wanted):
    weights = parse("double_blocks.0-9=0.5, unet.double_blocks=0.25, single_blocks.3=0.75, te1=0, *=-1")
    assert weights.factor(layer) == wanted


def test_without_a_star_the_rest_has_its_full_weight():
    assert parse("joint_blocks.0-5.x_block=0").factor("lora_unet_joint_blocks_0_context_block_attn_qkv") == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "this is no list"),
        ("[1, 2]", "2 numbers; give 12, 17, 20 or 26 numbers"),
        ("[" + "1," * 11 + "true]", "not all of it are numbers"),
        ("[" + "1," * 11 + "NaN]", "not all of it are numbers"),
        ("double_blocks", "double_blocks is no name=number"),
        ("double_blocks=much", "double_blocks=much is no name=number"),
        ("a=1,,b=2", "an empty part is no name=number"),
        ("double_blocks.3-=1", "cannot be read at '3-'"),
        ("=1", "=1 is no name=number"),
    ],
)
def test_what_cannot_be_read_says_what_can(text, message):
    with pytest.raises(UserError, match="--lbws") as error:
        parse(text)
    assert message in str(error.value)


def test_one_for_each_network():
    assert parse_all(None, 2) == [None, None]
    with pytest.raises(UserError, match="1 given for 2 networks"):
        parse_all(["te=0"], 2)


def test_weights_that_fit_no_layer_are_a_mistake():
    layers = ["lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_1_img_attn_qkv"]
    with pytest.raises(UserError, match="numbers alone are for the blocks of U-Nets"):
        parse(str([1.0] * 17)).check(layers)
    with pytest.raises(UserError, match=r"no layer of the network is in single_blocks"):
        parse("double_blocks=0,single_blocks=1").check(layers)
    parse("double_blocks.0-1=0,*=1").check(layers)
    parse(str([1.0] * 17)).check(["lora_te_text_model_encoder_layers_0_mlp_fc1"])
