"""FLUX.1 dev and schnell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.errors import UserError
from library.families.base import Denoiser, Family, Loader, Targets, TextEncoding, Writer
from library.families.flux.controlnet import FluxControl
from library.families.flux.loading import (
    SCALING_FACTOR,
    SHIFT_FACTOR,
    encoder_file_options,
    load_model,
    load_text_encoders,
)
from library.families.flux.options import TRAITS, FluxOptions, resolution_shift
from library.families.flux.prediction import (
    POOLED,
    T5_MASK,
    T5_OUT,
    TXT_IDS,
    asked_guidance,
    attention_mask,
    model_inputs,
    pack_latents,
    unpack_latents,
    unrounded_timesteps,
)
from library.families.flux.saving import save_model
from library.families.flux.targets import text_targets, transformer_targets
from library.families.flux.variants import FLAGS, TOKENIZERS, model_facts, variant
from library.families.shared.clip_tokenizer import find_clip_tokenizer
from library.families.shared.modulation import modulation
from library.families.shared.roles import VaeLatents
from library.families.shared.t5 import encode_t5
from library.runtime.logs import LOGGER
from library.text.chunking import tokenize
from library.text.t5_tokenizer import t5_tokenizer, tokenize_t5
from library.types import LoraTarget, Models, TextCond

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.objectives.objective import Objective
    from library.options.base import Options
    from library.types import Batch, Residuals, TextLayout

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
PATCH = 4  # latents in a token
T5_LENGTHS = {"dev": 512, "schnell": 256}
# Options that are written into the metadata of networks as ss_*.
METADATA_OPTIONS = (
    "model_type", "apply_t5_attn_mask", "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "guidance_scale",
    "timestep_sampling", "sigmoid_scale", "model_prediction_type", "discrete_flow_shift",
)  # fmt: skip


class FluxFamily(Family):
    traits = TRAITS

    def __init__(self, opts: Options):
        denoiser = FluxDenoiser(opts)
        super().__init__(
            opts,
            loader=FluxLoader(opts),
            latents=VaeLatents(SCALING_FACTOR, SHIFT_FACTOR, cached_scaled=True),
            text=FluxText(opts),
            denoiser=denoiser,
            targets=FluxTargets(opts),
            writer=FluxWriter(opts),
            control=FluxControl(opts, denoiser),
            modulation=modulation,
        )


class FluxLoader(Loader):
    def load(self, *, texts_only: bool = False) -> Models:
        """Loads the model. With `texts_only` the denoiser is a `meta_model`, or None if no model is named."""
        model, options = self.opts.model, self.opts.family
        name, mapped = model.pretrained_model_name_or_path, not model.disable_mmap_load_safetensors
        files = encoder_file_options(options)
        if texts_only:
            parts = load_text_encoders(name, files, mapped=mapped)
        else:
            parts = load_model(name, files, options.ae, mapped=mapped)
            if parts.source.variant == "schnell" and options.guidance_scale != FluxOptions.guidance_scale:
                LOGGER.warning("--guidance_scale: has no effect on schnell (no guidance embedding)")
        source, cache = parts.source, model.tokenizer_cache_dir
        folder = None if source is None else source.folder
        tokenizers = {
            "te1": find_clip_tokenizer(CLIP_TOKENIZER, model=folder, subfolder=TOKENIZERS["te1"], cache_dir=cache),
            "te3": t5_tokenizer(folder, TOKENIZERS["te3"], cache),
        }
        return Models(parts.denoiser, parts.text_encoders, tokenizers, parts.vae, source)


class FluxText(TextEncoding):
    def encode(
        self, models: Models, captions: list[str], *, emphasis: bool | None = None, cached: TextCond | None = None
    ) -> TextCond:
        """CLIP-L's pooled vector (B, P), T5's states (B, L, W), their positions (B, L, 3), and their mask (B, L).

        Raises: UserError: a text encoder is not there.
        """
        missing = [part for part in FLAGS if part not in models.text_encoders]
        if missing and cached is None:
            raise UserError(*(f"--{FLAGS[part]}: needed, as texts cannot be encoded without it" for part in missing))
        tensors = {} if cached is None else dict(cached.tensors)
        if "te1" not in missing:
            clip = models.text_encoders["te1"]
            ids = tokenize(models.tokenizers["te1"], captions)[:, 0]
            tensors[POOLED] = clip(ids.to(clip.device, non_blocking=True)).pooler_output
        if "te3" not in missing:
            ids, mask = tokenize_t5(models.tokenizers["te3"], captions, self._t5_length(models))
            states = encode_t5(models.text_encoders["te3"], ids, mask if self.opts.family.apply_t5_attn_mask else None)
            tensors |= {T5_OUT: states, TXT_IDS: states.new_zeros((*ids.shape, 3))}
            tensors[T5_MASK] = mask.to(states.device, non_blocking=True)
        return TextCond(tensors)

    def layout(self, models: Models | None = None) -> TextLayout:
        """The layout of cache files. The variant decides the length of captions that no option limits."""
        from library.types import TextLayout

        length = self.opts.family.t5xxl_max_token_length
        if length is None and models is not None and models.source is not None:
            length = T5_LENGTHS[models.source.variant]
        return TextLayout(
            suffix="_flux_te.npz",
            keys=(POOLED, T5_OUT, TXT_IDS, T5_MASK),
            flags={"apply_t5_attn_mask": self.opts.family.apply_t5_attn_mask},
            shapes={TXT_IDS: (length, 3), T5_MASK: (length,)} if length else {},
        )

    def _t5_length(self, models: Models) -> int:
        """Tokens of every caption: --t5xxl_max_token_length, or the variant's own."""
        return self.opts.family.t5xxl_max_token_length or T5_LENGTHS[_variant(models)]


class FluxDenoiser(Denoiser):
    def predict(
        self,
        models: Models,
        noisy: Tensor,
        timesteps: Tensor,
        cond: TextCond,
        batch: Batch | None = None,
        residuals: Residuals | None = None,
    ) -> Tensor:
        """The velocity, see `Denoiser.predict`. `batch.guidance`, where it is given, replaces --guidance_scale.

        Residuals, (B, h/2 * w/2, width) each, are one for every block with two streams, and behind them perhaps one
        for every block with one stream.
        """
        import torch

        denoiser = models.denoiser
        height, width = noisy.shape[-2:]
        inputs = model_inputs(denoiser, noisy, timesteps, cond, asked_guidance(self.opts.family, batch))
        if self.control_channels(models):
            assert batch is not None, "checked before drawing"
            assert batch.control_latents is not None, "checked before drawing"
            control = pack_latents(batch.control_latents).to(noisy.dtype)
            inputs["hidden_states"] = torch.cat([inputs["hidden_states"], control], dim=-1)
        attention = {}
        if self.opts.family.apply_t5_attn_mask:
            attention["attention_mask"] = attention_mask(cond.tensors[T5_MASK], inputs["hidden_states"].shape[1])
        if residuals is not None:
            double = len(denoiser.transformer_blocks)
            inputs["controlnet_block_samples"] = residuals[:double]
            inputs["controlnet_single_block_samples"] = residuals[double:] or None
        with unrounded_timesteps(denoiser, timesteps.to(noisy.device), inputs["guidance"]):
            output = denoiser(**inputs, joint_attention_kwargs=attention).sample
        return unpack_latents(output, height, width)

    def control_channels(self, models: Models) -> int:
        return models.denoiser.x_embedder.in_features // PATCH - TRAITS.latent_channels

    def objective(self) -> Objective:
        from library.objectives.flow import FlowObjective, FlowSettings

        options = self.opts.family
        settings = FlowSettings(
            sampling=options.timestep_sampling,
            shift=options.discrete_flow_shift,
            shift_of=resolution_shift,
            sigmoid_scale=options.sigmoid_scale,
            weighting_scheme=options.weighting_scheme,
            logit_mean=options.logit_mean,
            logit_std=options.logit_std,
            mode_scale=options.mode_scale,
            prediction=options.model_prediction_type,
            target="velocity",
        )
        return FlowObjective(settings, self.opts.noise, self.opts.loss)

    def prediction_type(self) -> Literal["epsilon", "v_prediction", "flow"]:
        return "flow"

    def blocks(self, models: Models) -> list[nn.Module]:
        """The blocks with two streams, then those with one."""
        return [*models.denoiser.transformer_blocks, *models.denoiser.single_transformer_blocks]


class FluxTargets(Targets):
    def lora(self, models: Models) -> list[LoraTarget]:
        return text_targets(models.text_encoders) + transformer_targets(models.denoiser)


class FluxWriter(Writer):
    def save(
        self, models: Models, path: Path, *, save_as: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        save_model(models, path, save_as=save_as, dtype=dtype, metadata=metadata)

    def metadata(self, models: Models) -> dict[str, Any]:
        of_training = {f"ss_{name}": getattr(self.opts.family, name) for name in METADATA_OPTIONS}
        return {**model_facts(_variant(models)), **of_training}


def _variant(models: Models) -> str:
    return variant(models.denoiser.config.guidance_embeds)
