"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.families.base import Family, Loader, Targets, TextEncoding, Writer
from library.families.sd.loading import SCALING_FACTOR, load_model
from library.families.sd.options import TRAITS
from library.families.sd.saving import save_model
from library.families.sd.targets import text_places, text_targets, unet_targets
from library.families.sd.tokenizer import sd_tokenizer
from library.families.sd.variants import ORIGINAL_CODE, model_facts
from library.families.shared.clip import encode_clip
from library.families.shared.deep_shrink import shrinking
from library.families.shared.inpainting import fit_for_inpainting
from library.families.shared.roles import UnetDenoiser, VaeLatents
from library.families.shared.unet import takes_inpainting, text_layers
from library.families.shared.unet_controlnet import UnetControl
from library.text.chunking import tokenize
from library.text.emphasis import tokenize_weighted, weighted
from library.types import LoraTarget, Models, TextCond

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.options.base import Options
    from library.types import Batch

CONTEXT = "context"  # the only conditioning: hidden states (B, n * 75 + 2, width)


class SdFamily(Family):
    traits = TRAITS

    def __init__(self, opts: Options):
        denoiser = SdDenoiser(opts)
        super().__init__(
            opts,
            loader=SdLoader(opts),
            latents=VaeLatents(SCALING_FACTOR),
            text=SdText(opts),
            denoiser=denoiser,
            targets=SdTargets(opts),
            writer=SdWriter(opts),
            control=UnetControl(opts, denoiser, original_names=True),
            text_places=text_places,
            text_layers=text_layers,
            shrinking=shrinking,
        )


class SdLoader(Loader):
    def load(self, *, texts_only: bool = False) -> Models:
        """Loads the whole model, whatever `texts_only` says: no tool encodes only texts of this family."""
        model = self.opts.model
        parts = load_model(
            model.pretrained_model_name_or_path,
            self.opts.family.v2,
            model.vae,
            inpainting=takes_inpainting(self.opts),
        )
        own = None if parts.source.is_file else parts.source.name
        tokenizer = sd_tokenizer(parts.source.v2, own, model.tokenizer_cache_dir)
        return Models(
            parts.denoiser,
            {"te": parts.text_encoder},
            {"te": tokenizer},
            parts.vae,
            parts.source,
            inpaints=fit_for_inpainting(parts.denoiser, self.opts),
        )


class SdText(TextEncoding):
    def encode(
        self, models: Models, captions: list[str], *, emphasis: bool | None = None, cached: TextCond | None = None
    ) -> TextCond:
        """The text encoder's states under "context", (B, n * 75 + 2, width); shorter without token padding."""
        family, tokenizer, text_encoder = self.opts.family, models.tokenizers["te"], models.text_encoders["te"]
        if family.weighted_captions if emphasis is None else emphasis:
            ids, weights = tokenize_weighted(tokenizer, captions, family.max_token_length)
            states = encode_clip(text_encoder, ids, family.clip_skip)
            return TextCond({CONTEXT: weighted(states, weights, self.opts.texts.emb_normalize_mode)})
        ids = tokenize(tokenizer, captions, family.max_token_length, pad=not self.opts.method.no_token_padding)
        return TextCond({CONTEXT: encode_clip(text_encoder, ids, family.clip_skip)})


class SdDenoiser(UnetDenoiser):
    def inputs(self, noisy: Tensor, cond: TextCond, batch: Batch | None) -> dict[str, Any]:
        return {"encoder_hidden_states": cond.tensors[CONTEXT]}


class SdTargets(Targets):
    def lora(self, models: Models) -> list[LoraTarget]:
        text = text_targets(models.text_encoders["te"]) if "te" in models.text_encoders else []
        return text + unet_targets(models.denoiser)


class SdWriter(Writer):
    def save(
        self, models: Models, path: Path, *, save_as: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        v_prediction = self.opts.family.v_parameterization
        if "modelspec.implementation" in metadata:  # a whole model has the names that its authors' code gives
            metadata = {**metadata, "modelspec.implementation": ORIGINAL_CODE}
        save_model(models, path, save_as=save_as, dtype=dtype, metadata=metadata, v_prediction=v_prediction)

    def metadata(self, models: Models) -> dict[str, Any]:
        return model_facts(models.source.v2, self.opts.family.v_parameterization, inpaints=models.inpaints)
