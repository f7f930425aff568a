"""The options of flux_minimal_inference.py. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from library.families.shared.minimal import MinimalOptions, renamed
from library.options.base import Options, opt

if TYPE_CHECKING:
    from library.types import FamilyTraits

_DTYPES = {
    **dict.fromkeys(("bfloat16", "bf16"), "bf16"),
    **dict.fromkeys(("float16", "fp16", "half"), "fp16"),
    **dict.fromkeys(("float32", "fp32", "float"), "no"),
}
_FP8 = ("fp8", "fp8_e4m3", "fp8_e4m3fn", "float8", "float8_e4m3fn")
_PARTS = ("flux_dtype", "clip_l_dtype", "t5xxl_dtype", "ae_dtype")


@dataclass(frozen=True, kw_only=True)
class FluxMinimalOptions(MinimalOptions):
    negative_prompt: str | None = opt(None, "what the image does not show; needs --cfg_scale above 1")
    model_type: Literal["flux", "chroma"] = opt("flux", "type of model; chroma is refused")
    clip_l: str | None = opt(None, "file of the text encoder CLIP-L", exists="file")
    t5xxl: str | None = opt(None, "file of the text encoder T5-XXL", exists="file")
    ae: str | None = opt(None, "file of the autoencoder", exists="file")
    apply_t5_attn_mask: bool = opt(False, "mask the padding tokens of T5 in attention")
    dtype: str = opt("bfloat16", "dtype of the computation: bf16, fp16 or fp32")
    flux_dtype: str | None = opt(None, "fp8 keeps the transformer's weights in 8 bits; --dtype if not given")
    clip_l_dtype: str | None = opt(None, "fp8 keeps both text encoders' weights in 8 bits; --dtype if not given")
    t5xxl_dtype: str | None = opt(None, "the same as --clip_l_dtype")
    ae_dtype: str | None = opt(None, "fp32 decodes in float32; --dtype if not given")
    seed: int | None = opt(None, "seed of the image; another one each time if not given", at_least=0)
    steps: int | None = opt(None, "denoising steps; 20 if not given, schnell needs 4", at_least=1, at_most=1000)
    guidance: float = opt(3.5, "guidance value fed to FLUX.1 dev")
    cfg_scale: float = opt(1.0, "guidance scale by the negative prompt; 1 makes no use of it and is twice as fast")
    offload: bool = opt(False, "keep what does not compute at present in CPU memory")
    merge_lora_weights: bool = opt(False, "merge the networks into the model: faster, their strengths stay as they are")
    width: int = opt(1360, "width in pixels", at_least=64)
    height: int = opt(768, "height in pixels", at_least=64)

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        yield from super().check(opts, traits)
        if self.model_type == "chroma":
            yield "--model_type: chroma is not supported; leave it out and give a FLUX.1 model"
        if self.dtype not in _DTYPES:
            yield f"--dtype: must be bf16, fp16 or fp32, got {self.dtype!r}"
        for name in _PARTS:
            value = getattr(self, name)
            known = (*_DTYPES, *(() if name == "ae_dtype" else _FP8))
            if value is not None and value not in known:
                yield f"--{name}: is no dtype that is known here: {value!r}"

    def warnings(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        for name in _PARTS:
            value = getattr(self, name)
            if value in _DTYPES and _DTYPES[value] != _DTYPES[self.dtype] and not self._widens(name):
                yield f"--{name}: {value} has no effect; the dtype is that of --dtype, {self.dtype}"
        if (self.clip_l_dtype in _FP8 or self.t5xxl_dtype in _FP8) and self.flux_dtype not in _FP8:
            yield "--t5xxl_dtype: fp8 keeps the transformer's weights in 8 bits, too"
        if self.negative_prompt and self.cfg_scale == 1:
            yield "--negative_prompt: has no effect without --cfg_scale above 1"

    def _widens(self, name: str) -> bool:
        """Whether the option asks for an autoencoder in float32."""
        return name == "ae_dtype" and _DTYPES.get(self.ae_dtype or "") == "no"

    def generating(self) -> dict[str, Any]:
        names = ("clip_l", "t5xxl", "ae", "apply_t5_attn_mask", "seed", "steps")
        ours = renamed(vars(self), W="width", H="height", scale="cfg_scale", guidance_scale="guidance")
        precision = _DTYPES[self.dtype]
        ours |= {"fp16": precision == "fp16", "bf16": precision == "bf16", "no_half_vae": self._widens("ae_dtype")}
        return {**super().generating(), **{name: getattr(self, name) for name in names}, **ours}

    def training(self) -> Mapping[str, Any]:
        texts = self.clip_l_dtype in _FP8 or self.t5xxl_dtype in _FP8
        return {"offload": self.offload, "fp8_base": texts, "fp8_base_unet": self.flux_dtype in _FP8 and not texts}
