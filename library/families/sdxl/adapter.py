"""SDXL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.families.base import Family, Loader, Targets, TextEncoding, Writer
from library.families.sdxl.lllite import LlliteControl
from library.families.sdxl.loading import SCALING_FACTOR, load_model, load_text_encoders
from library.families.sdxl.options import TRAITS
from library.families.sdxl.saving import save_model
from library.families.sdxl.targets import block_index, text_targets, unet_targets
from library.families.sdxl.tokenizers import sdxl_tokenizers
from library.families.sdxl.variants import model_facts
from library.families.shared.clip import PENULTIMATE, encode_at_layer, project_first_eos
from library.families.shared.deep_shrink import shrinking
from library.families.shared.inpainting import fit_for_inpainting
from library.families.shared.roles import UnetDenoiser, VaeLatents
from library.families.shared.unet import map_of_config, takes_inpainting, text_layers
from library.families.shared.unet_controlnet import UnetControl
from library.text.chunking import tokenize
from library.text.emphasis import tokenize_weighted, weighted
from library.types import LoraTarget, Models, TextCond, TextLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.options.base import Options
    from library.types import Batch

# The conditioning: states of both text encoders, (B, n * 75 + 2, width), and the pooled text, (B, projection).
STATES = {"te1": "hidden_state1", "te2": "hidden_state2"}
POOLED = "pool2"
# They did not turn the projection of single files the other way round, so that the pooled text is another.
FOREIGN_POOLED = f"it was made by another trainer, and those often compute {POOLED} wrongly"


class SdxlFamily(Family):
    traits = TRAITS

    def __init__(self, opts: Options):
        denoiser = SdxlDenoiser(opts)
        super().__init__(
            opts,
            loader=SdxlLoader(opts),
            latents=VaeLatents(SCALING_FACTOR),
            text=SdxlText(opts),
            denoiser=denoiser,
            targets=SdxlTargets(opts),
            writer=SdxlWriter(opts),
            control=UnetControl(opts, denoiser, original_names=False),
            lllite=LlliteControl(opts, denoiser),
            text_layers=text_layers,
            shrinking=shrinking,
        )


class SdxlLoader(Loader):
    def load(self, *, texts_only: bool = False) -> Models:
        model = self.opts.model
        name, mapped = model.pretrained_model_name_or_path, not model.disable_mmap_load_safetensors
        if texts_only:
            parts = load_text_encoders(name, mapped=mapped)
        else:
            parts = load_model(name, model.vae, mapped=mapped, inpainting=takes_inpainting(self.opts))
        tokenizers = sdxl_tokenizers(None if Path(name).is_file() else name, model.tokenizer_cache_dir)
        inpaints = fit_for_inpainting(parts.denoiser, self.opts)
        return Models(parts.denoiser, parts.text_encoders, tokenizers, parts.vae, parts.source, inpaints=inpaints)


class SdxlText(TextEncoding):
    def encode(
        self, models: Models, captions: list[str], *, emphasis: bool | None = None, cached: TextCond | None = None
    ) -> TextCond:
        """Both text encoders' states and the pooled text of the second, by the names that cache files have."""
        family = self.opts.family
        weigh = family.weighted_captions if emphasis is None else emphasis
        tensors: dict[str, Tensor] = {}
        for name, key in STATES.items():
            tokenizer, text_encoder = models.tokenizers[name], models.text_encoders[name]
            if weigh:
                ids, weights = tokenize_weighted(tokenizer, captions, family.max_token_length)
            else:
                ids, weights = tokenize(tokenizer, captions, family.max_token_length), None
            states, first_chunk = encode_at_layer(text_encoder, ids, self.opts.texts.clip_skip or PENULTIMATE)
            tensors[key] = states if weights is None else weighted(states, weights, self.opts.texts.emb_normalize_mode)
        # The last of them is the second text encoder; emphasis does not reach the pooled text.
        tensors[POOLED] = project_first_eos(text_encoder, ids[:, 0], first_chunk, tokenizer.eos_token_id)
        return TextCond(tensors)

    def with_pooled(self, cond: TextCond, pooled: Tensor) -> TextCond:
        expected, found = cond.tensors[POOLED].shape[-1], pooled.shape[-1]
        if found != expected:
            raise UserError(
                f"the vision model gives {found} numbers for an image; {expected} are needed, as CLIP-G gives"
            )
        return TextCond({**cond.tensors, POOLED: pooled})

    def layout(self, models: Models | None = None) -> TextLayout:
        names = ("max_token_length", "weighted_captions")
        settings = {name: getattr(self.opts.family, name) for name in names}
        keys = (*STATES.values(), POOLED)
        return TextLayout("_te_outputs.npz", keys, settings=settings, reject_foreign=FOREIGN_POOLED)


class SdxlDenoiser(UnetDenoiser):
    def inputs(self, noisy: Tensor, cond: TextCond, batch: Batch | None) -> dict[str, Any]:
        """See `UnetDenoiser.inputs`. Without a batch, sizes are those of uncropped images."""
        import torch

        # Original height and width, top and left of the crop, height and width of the bucket; (B, 6).
        if batch is None:
            height, width = (side * TRAITS.latent_stride for side in noisy.shape[-2:])
            time_ids = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(noisy), -1)
        else:
            sizes = (batch.original_sizes.flip(-1), batch.crop_top_lefts, batch.target_sizes.flip(-1))
            time_ids = torch.cat(sizes, dim=-1)
        states = torch.cat([cond.tensors[key] for key in STATES.values()], dim=-1)
        added = {"text_embeds": cond.tensors[POOLED], "time_ids": time_ids.to(noisy.device, torch.float32)}
        return {"encoder_hidden_states": states, "added_cond_kwargs": added}

    def block_number(self, models: Models, name: str) -> int:
        key = map_of_config(models.denoiser.config, prefix="").by_model(name).file
        if key.startswith("out."):
            return TRAITS.block_layout.total - 1
        return block_index(key) or 0  # the embeddings are the first


class SdxlTargets(Targets):
    def lora(self, models: Models) -> list[LoraTarget]:
        text = [target for name, encoder in models.text_encoders.items() for target in text_targets(encoder, name)]
        return text + unet_targets(models.denoiser)


class SdxlWriter(Writer):
    def save(
        self, models: Models, path: Path, *, save_as: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        save_model(
            models,
            path,
            save_as=save_as,
            dtype=dtype,
            metadata=metadata,
            v_prediction=self.opts.family.v_parameterization,
            zero_terminal_snr=self.opts.noise.zero_terminal_snr,
        )

    def metadata(self, models: Models) -> dict[str, Any]:
        return model_facts(self.opts.family.v_parameterization, inpaints=models.inpaints)
