"""Tiny captioning models with random weights, in the layouts of real ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPImageProcessorPil,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PLAIN = """
    a picture of cat dog red blue green on under table with the big small sits runs and sky house tree girl boy hair
    hat two three , . old new white black says word
"""
WORDS = [*_SPECIAL, *_PLAIN.split()]


def write_vocabulary(folder: Path) -> Path:
    """BERT's vocab.txt, of 40 words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder


def tiny_blip(seed: int = 1) -> BlipForConditionalGeneration:
    """BLIP of width 64 for images of 32 px, with the numbers of the original: norms, one head per 64."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    text = {
        **shape,
        "vocab_size": len(WORDS) + 2,
        "num_hidden_layers": 3,
        "max_position_embeddings": 48,
        "bos_token_id": len(WORDS),
        "sep_token_id": 3,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {**shape, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _alive(BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)))
    _wordy(model.text_decoder.cls.predictions.bias)
    return model


def write_blip_folder(model: BlipForConditionalGeneration, folder: Path) -> Path:
    """A folder in transformers' layout."""
    tokenizer = BertTokenizer.from_pretrained(write_vocabulary(folder))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def original_blip(model: BlipForConditionalGeneration) -> dict[str, Tensor]:
    """A model's weights as Salesforce's captioning files have them, written out from that layout's own names."""
    sd = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    old = {
        "visual_encoder.cls_token": sd["vision_model.embeddings.class_embedding"],
        "visual_encoder.pos_embed": sd["vision_model.embeddings.position_embedding"],
        "visual_encoder.patch_embed.proj.weight": sd["vision_model.embeddings.patch_embedding.weight"],
        "visual_encoder.patch_embed.proj.bias": sd["vision_model.embeddings.patch_embedding.bias"],
        "visual_encoder.norm.weight": sd["vision_model.post_layernorm.weight"],
        "visual_encoder.norm.bias": sd["vision_model.post_layernorm.bias"],
        "text_decoder.bert.embeddings.position_ids": torch.arange(48)[None],
    }
    for i in range(model.config.vision_config.num_hidden_layers):
        for kind in ("weight", "bias"):
            block, layer = f"visual_encoder.blocks.{i}", f"vision_model.encoder.layers.{i}"
            old[f"{block}.norm1.{kind}"] = sd[f"{layer}.layer_norm1.{kind}"]
            old[f"{block}.attn.qkv.{kind}"] = sd[f"{layer}.self_attn.qkv.{kind}"]
            old[f"{block}.attn.proj.{kind}"] = sd[f"{layer}.self_attn.projection.{kind}"]
            old[f"{block}.norm2.{kind}"] = sd[f"{layer}.layer_norm2.{kind}"]
            old[f"{block}.mlp.fc1.{kind}"] = sd[f"{layer}.mlp.fc1.{kind}"]
            old[f"{block}.mlp.fc2.{kind}"] = sd[f"{layer}.mlp.fc2.{kind}"]
    names = ["bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"]
    names += ["bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"]
    for i in range(model.config.text_config.num_hidden_layers):
        parts = ["intermediate.dense", "output.dense", "output.LayerNorm"]
        for attention in ("attention", "crossattention"):
            parts += [f"{attention}.self.{name}" for name in ("query", "key", "value")]
            parts += [f"{attention}.output.{name}" for name in ("dense", "LayerNorm")]
        names += [f"bert.encoder.layer.{i}.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    names += ["cls.predictions.bias", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"]
    names += [f"cls.predictions.transform.{part}" for part in ("dense.weight", "dense.bias")]
    names += [f"cls.predictions.transform.LayerNorm.{kind}" for kind in ("weight", "bias")]
    return old | {f"text_decoder.{name}": sd[f"text_decoder.{name}"] for name in names}


def write_original_blip(model: BlipForConditionalGeneration, path: Path) -> Path:
    """An original .pth with BERT's vocabulary beside it."""
    write_vocabulary(path.parent)
    torch.save({"model": original_blip(model), "epoch": 4}, path)
    return path


def write_git_folder(folder: Path, seed: int = 0) -> Path:
    """GIT of width 64 for images of 32 px, in transformers' layout."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = GitConfig(
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        **shape,
        vocab_size=len(WORDS),
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _alive(GitForCausalLM(config))
    _wordy(model.output.bias)
    model.save_pretrained(folder)
    tokenizer = BertTokenizer.from_pretrained(write_vocabulary(folder))
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    GitProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def write_qwen_folder(folder: Path, seed: int = 0) -> Path:
    """Qwen2-VL of width 32, in the hub's layout: asked through a chat, with as many tokens as an image's size asks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    asked = ["user", "assistant", "Describe", "this", "in", "one", "sentence"]
    words = [
        "<unk>",
        "<|endoftext|>",
        *marks,
        *asked,
        *WORDS[5:],
    ]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=marks,
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %} <|vision_start|><|image_pad|><|vision_end|> {% else %}"
        "{{ part['text'] }} {% endif %}"
        "{% endfor %}<|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=4 * 28**2, max_pixels=16 * 28**2).save_pretrained(folder)
    settings = folder / "preprocessor_config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({**content, "processor_class": "Qwen2VLProcessor"}), encoding="utf-8")
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in marks}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": 1,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _alive(Qwen2VLForConditionalGeneration(config))
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = 1
    model.save_pretrained(folder)
    return folder


def _wordy(bias: Tensor) -> None:
    """Makes marks that are no words, and not the end of a caption either, next to impossible."""
    bias.data[[i for i in range(len(bias)) if (i < len(_SPECIAL) and i != 3) or i >= len(WORDS)]] = -30.0


def _alive(model: nn.Module) -> nn.Module:
    """With weights so large that images make a difference, and nothing all zero, so that mixed-up names show."""
    for parameter in model.parameters():
        parameter.data += (0.15 if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter)
    return model.requires_grad_(False).eval()
