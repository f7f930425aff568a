"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.errors import UserError
from library.families.base import Denoiser, Family, Loader, Targets, TextEncoding, Writer
from library.families.sd3 import text
from library.families.sd3.controlnet import Sd3Control
from library.families.sd3.loading import (
    SCALING_FACTOR,
    SHIFT_FACTOR,
    encoder_file_options,
    load_model,
    load_text_encoders,
)
from library.families.sd3.options import TRAITS
from library.families.sd3.saving import encoder_path, save_model
from library.families.sd3.targets import mmdit_targets
from library.families.sd3.tokenizers import load_tokenizers
from library.families.sd3.variants import ORIGINAL_CODE, missing_encoder, model_facts
from library.families.shared.modulation import modulation
from library.families.shared.roles import VaeLatents
from library.families.shared.t5 import encode_t5, t5_targets
from library.families.shared.targets import clip_targets
from library.families.shared.vae import NO_VAE
from library.runtime.logs import LOGGER
from library.text.chunking import tokenize
from library.text.t5_tokenizer import tokenize_t5
from library.types import LoraTarget, Models, TextCond

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.objectives.objective import Objective
    from library.options.base import Options
    from library.types import Batch, Residuals, TextLayout


class Sd3Family(Family):
    traits = TRAITS

    def __init__(self, opts: Options):
        denoiser = Sd3Denoiser(opts)
        super().__init__(
            opts,
            loader=Sd3Loader(opts),
            latents=VaeLatents(SCALING_FACTOR, SHIFT_FACTOR),
            text=Sd3Text(opts),
            denoiser=denoiser,
            targets=Sd3Targets(opts),
            writer=Sd3Writer(opts),
            control=Sd3Control(opts, denoiser),
            modulation=modulation,
        )


class Sd3Loader(Loader):
    def load(self, *, texts_only: bool = False) -> Models:
        """Loads the model. With `texts_only` the denoiser is a `meta_model`, or None if no model is named."""
        model, options = self.opts.model, self.opts.family
        name, mapped = model.pretrained_model_name_or_path, not model.disable_mmap_load_safetensors
        files = encoder_file_options(options)
        if texts_only:
            parts = load_text_encoders(name, files, mapped=mapped)
        else:
            parts = load_model(name, files, model.vae, mapped=mapped)
            if parts.vae is None:
                raise UserError(f"{name}: {NO_VAE}")
        folder = None if parts.source is None else parts.source.folder
        tokenizers = load_tokenizers(parts.text_encoders, folder, model.tokenizer_cache_dir)
        models = Models(parts.denoiser, parts.text_encoders, tokenizers, parts.vae, parts.source)
        if not texts_only:
            models.longest_side = self._longest_side(parts.denoiser)
            if options.pos_emb_random_crop_rate or options.enable_scaled_pos_embed:
                self._place_positions(parts.denoiser, parts.source.variant)
        return models

    def _longest_side(self, denoiser: nn.Module) -> int | None:
        """The longest side of images, in pixels, that the position table covers; None with scaled positions."""
        table = denoiser.pos_embed
        most = table.pos_embed_max_size * table.patch_size * TRAITS.latent_stride
        return None if self.opts.family.enable_scaled_pos_embed else most

    def _place_positions(self, denoiser: nn.Module, variant: str) -> None:
        from library.families.sd3.positions import place_positions

        options = self.opts.family
        if variant != "5-medium":
            LOGGER.warning(
                "--pos_emb_random_crop_rate and --enable_scaled_pos_embed are meant for Stable Diffusion 3.5 medium"
            )
        place_positions(
            denoiser, random_crop_rate=options.pos_emb_random_crop_rate, scaled=options.enable_scaled_pos_embed
        )


class Sd3Text(TextEncoding):
    def encode(
        self, models: Models, captions: list[str], *, emphasis: bool | None = None, cached: TextCond | None = None
    ) -> TextCond:
        """The tensors of `text.KEYS`; without T5, 77 rows of zeros stand for its output.

        Raises: UserError: a CLIP text encoder is not there.
        """
        missing = [part for part in ("te1", "te2") if part not in models.text_encoders]
        if missing and cached is None:
            raise UserError(*(missing_encoder(part) for part in missing))
        options = self.opts.family
        states, pooled, masks = [], [], []
        for number, part in enumerate(("te1", "te2")):
            if part in missing:
                found, mask = text.cached_clip(cached, number, models.source.clip_l or text.published_clip_l(cached))
                states.append(found[0])
                pooled.append(found[1])
                masks.append(mask)
                continue
            tokenizer = models.tokenizers[part]
            ids = tokenize(tokenizer, captions)[:, 0]
            mask = text.token_mask(ids, tokenizer.eos_token_id)
            found = text.encode_projected_clip(
                models.text_encoders[part], ids, mask if options.apply_lg_attn_mask else None
            )
            states.append(found[0])
            pooled.append(found[1])
            masks.append(mask)
        if cached is not None and "te3" not in models.text_encoders:
            t5 = (cached.tensors[text.T5_OUT], cached.tensors[text.T5_MASK])
        else:
            t5 = self._encode_t5(models, captions, states[0])
        return text.conditioning(states, pooled, masks, *t5)

    def _encode_t5(self, models: Models, captions: list[str], like: Tensor) -> tuple[Tensor, Tensor]:
        """T5's states (B, L, width) and the mask of its tokens (B, L)."""
        import torch

        encoder, options = models.text_encoders.get("te3"), self.opts.family
        if encoder is None:
            shape = (len(captions), text.CLIP_LENGTH, models.denoiser.config.joint_attention_dim)
            return like.new_zeros(shape), torch.zeros(shape[:2], dtype=torch.long)
        ids, mask = tokenize_t5(models.tokenizers["te3"], captions, options.t5xxl_max_token_length)
        return encode_t5(encoder, ids, mask if options.apply_t5_attn_mask else None), mask

    def layout(self, models: Models | None = None) -> TextLayout:
        from library.types import TextLayout

        options = self.opts.family
        return TextLayout(
            text.CACHE_SUFFIX,
            text.KEYS,
            flags={
                "apply_lg_attn_mask": options.apply_lg_attn_mask,
                "apply_t5_attn_mask": options.apply_t5_attn_mask,
            },
            shapes={text.L_MASK: (text.CLIP_LENGTH,), text.G_MASK: (text.CLIP_LENGTH,)},
            settings={"t5xxl_max_token_length": options.t5xxl_max_token_length},
        )


class Sd3Denoiser(Denoiser):
    def predict(
        self,
        models: Models,
        noisy: Tensor,
        timesteps: Tensor,
        cond: TextCond,
        batch: Batch | None = None,
        residuals: Residuals | None = None,
    ) -> Tensor:
        """Predicts the velocity. In train mode with gradients, encoders' outputs may be dropped.

        Residuals, (B, h/2 * w/2, width) each, are distributed evenly over the blocks but the last.
        """
        import torch

        options, denoiser = self.opts.family, models.denoiser
        if denoiser.training and torch.is_grad_enabled():  # here, so that cached outputs are dropped like others
            rates = (options.clip_l_dropout_rate, options.clip_g_dropout_rate, options.t5_dropout_rate)
            cond = text.drop_encoders(cond, rates, models.source.clip_l or text.published_clip_l(cond))
        context, pooled = text.context_of(cond, denoiser.config.joint_attention_dim, noisy.dtype)
        return denoiser(
            noisy,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=timesteps,
            block_controlnet_hidden_states=residuals,
        ).sample

    def objective(self) -> Objective:
        from library.objectives.flow import FlowObjective, FlowSettings

        options = self.opts.family
        settings = FlowSettings(
            sampling="discrete",
            shift=options.training_shift,
            weighting_scheme=options.weighting_scheme,
            logit_mean=options.logit_mean,
            logit_std=options.logit_std,
            mode_scale=options.mode_scale,
            prediction="sigma_scaled",
            target="clean",
        )
        return FlowObjective(settings, self.opts.noise, self.opts.loss)

    def prediction_type(self) -> Literal["epsilon", "v_prediction", "flow"]:
        return "flow"

    def blocks(self, models: Models) -> list[nn.Module]:
        return list(models.denoiser.transformer_blocks)


class Sd3Targets(Targets):
    def lora(self, models: Models) -> list[LoraTarget]:
        targets: list[LoraTarget] = []
        for part, encoder in models.text_encoders.items():
            targets += t5_targets(encoder) if part == "te3" else clip_targets(encoder, part)
        return targets + mmdit_targets(models.denoiser)


class Sd3Writer(Writer):
    def save(
        self, models: Models, path: Path, *, save_as: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        if "modelspec.implementation" in metadata:  # a whole model has the names that its authors' code gives
            metadata = {**metadata, "modelspec.implementation": ORIGINAL_CODE}
        save_model(models, path, save_as=save_as, dtype=dtype, metadata=metadata, separate=self._separate(models))

    def extra_files(self, models: Models, path: Path) -> list[Path]:
        return [encoder_path(path, part) for part in self._separate(models)]

    def _separate(self, models: Models) -> list[str]:
        """Text encoders with files of their own: those asked for, and trained ones without another place."""
        options = self.opts.family
        asked = {"te1": options.save_clip, "te2": options.save_clip, "te3": options.save_t5xxl}
        return [
            part
            for part, encoder in models.text_encoders.items()
            if asked[part] or (part not in models.source.parts and any(p.requires_grad for p in encoder.parameters()))
        ]

    def metadata(self, models: Models) -> dict[str, Any]:
        options = self.opts.family
        return {
            **model_facts(models.source.variant),
            "ss_apply_lg_attn_mask": options.apply_lg_attn_mask,
            "ss_apply_t5_attn_mask": options.apply_t5_attn_mask,
            "ss_weighting_scheme": options.weighting_scheme,
            "ss_logit_mean": options.logit_mean,
            "ss_logit_std": options.logit_std,
            "ss_mode_scale": options.mode_scale,
        }
