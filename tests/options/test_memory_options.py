"""What of precision, compiling and stepping goes together, and what is said where it does not."""

from __future__ import annotations

from importlib import metadata

import pytest

from library.errors import UserError
from library.options.parsing import parse_options
from library.options.validation import problems, warnings
from library.registry import FAMILIES, groups_for

BF16 = "--mixed_precision=bf16 --full_bf16"
SELECTIVE = "--gradient_checkpointing --selective_checkpointing=3"
REFUSED = [
    ("--stochastic_rounding", "--stochastic_rounding: needs --full_bf16"),
    (f"{BF16} --stochastic_rounding --optimizer_type=RAdamScheduleFree", "--stochastic_rounding: RAdamScheduleFree av"),
    ("--cpu_offload_checkpointing", "--cpu_offload_checkpointing: needs --gradient_checkpointing"),
    ("--selective_checkpointing=3", "--selective_checkpointing: needs --gradient_checkpointing"),
    (f"{SELECTIVE} --torch_compile", "--selective_checkpointing: cannot be used with --torch_compile, as the compiler"),
    (f"{SELECTIVE} --cpu_offload_checkpointing", "--selective_checkpointing: cannot be used with --cpu_offload_checkp"),
    ("--quantize_base=nf4 --fp8_base", "--quantize_base: nf4 cannot be used with --fp8_base, which means fp8"),
    ("--quantize_base=int8 --fp8_base_unet", "--quantize_base: int8 cannot be used with --fp8_base_unet, which"),
    ("--fused_backward_pass --optimizer_type=Prodigy", "--fused_backward_pass: Prodigy cannot step weights one by one"),
    ("--fused_backward_pass --gradient_accumulation_steps=2", "--fused_backward_pass: cannot be used with --gradient_"),
    ("--fused_backward_pass --mixed_precision=fp16", "--fused_backward_pass: cannot be used with --mixed_precision"),
]
ADVISED = [
    ("--fused_backward_pass", ["--max_grad_norm: not applied with --fused_backward_pass"]),
    ("--fused_backward_pass --max_grad_norm=0", []),
    ("--dynamo_backend=eager", ["--dynamo_backend: has no effect without --torch_compile"]),
    ("--dynamo_backend=eager --torch_compile", []),
    ("--dynamo_backend=no --compile", []),  # GUIs write the first into every file
    ("--torch_compile --dynamo_backend=no", ["--torch_compile: has no effect with --dynamo_backend no"]),
    ("--compile --compile_backend=no", ["--compile: has no effect with --compile_backend no"]),
    ("--compile_mode=max-autotune", ["--compile_mode: has no effect without --torch_compile or --compile"]),
    ("--compile_fullgraph --compile_dynamic=auto --compile_cache_size_limit=9 --compile", []),
    ("--compile --compile_backend=eager --compile_mode=max-autotune", ["--compile_mode: has no effect with the back"]),
    (f"{BF16} --stochastic_rounding", []),
    ("--fp8_base --fp8_base_unet", []),
    ("--quantize_base=nf4", []),
    ("--quantize_base=fp8 --fp8_base", []),
    ("--cpu_offload_checkpointing --gradient_checkpointing", []),
    (f"{SELECTIVE} --quantize_base=nf4", []),
    ("--selective_checkpointing=0", []),
]


@pytest.mark.rows("R183")
@pytest.mark.parametrize(("flags", "beginning"), REFUSED)
def test_what_cannot_work_is_refused(valid, traits, flags, beginning):
    assert [line[: len(beginning)] for line in problems(valid(*flags.split()), traits)] == [beginning]


@pytest.mark.parametrize(("flags", "beginnings"), ADVISED)
def test_what_works_is_let_be(valid, traits, flags, beginnings):
    opts = valid(*flags.split())
    assert problems(opts, traits) == []
    lines = warnings(opts, traits)
    assert len(lines) == len(beginnings)
    assert all(line.startswith(beginning) for line, beginning in zip(lines, beginnings, strict=True))


@pytest.mark.rows("R433")
def test_checkpoints_of_sd3_are_kept_in_cpu_memory_for_networks_only():
    flags = ["--gradient_checkpointing", "--cpu_offload_checkpointing"]
    assert parse_options(groups_for("sd3", "network"), flags).memory.cpu_offload_checkpointing
    with pytest.raises(UserError, match="--cpu_offload_checkpointing"):
        parse_options(groups_for("sd3", "finetune"), flags)


@pytest.mark.parametrize("method", ["finetune", "dreambooth"])
def test_whole_models_are_not_trained_in_8_bits(traits, method):
    lines = problems(parse_options(groups_for("sd", method), ["--fp8_base"]), traits)
    assert any(line.startswith("--fp8_base: only weights that are not trained") for line in lines)


@pytest.mark.parametrize("method", ["finetune", "dreambooth"])
def test_whole_models_have_no_base_to_quantise(method):
    with pytest.raises(UserError, match="--quantize_base"):
        parse_options(groups_for("sd", method), ["--quantize_base=nf4"])


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize(
    ("found", "said"),
    [(None, "which is not installed"), ("0.48.2", "0.49 or newer, 0.48.2 is installed"), ("0.49.0.dev0", None)],
)
def test_quantising_needs_bitsandbytes(valid, traits, monkeypatch, form, found, said):
    def version(package):
        assert package == "bitsandbytes"
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(metadata, "version", version)
    lines = problems(valid(f"--quantize_base={form}"), traits)
    assert [said in line and line.startswith(f"--quantize_base: {form} needs") for line in lines] == [True] * bool(said)
    assert problems(valid("--quantize_base=fp8"), traits) == []


@pytest.mark.rows("R508")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ancestors_names_of_compiling(family):
    """That has them for one family of its own, beside --torch_compile; here they are for all."""
    opts = parse_options(groups_for(family, "network"), ["--compile", "--compile_backend=aot_eager"])
    assert (opts.memory.compiles, opts.memory.backend) == (True, "aot_eager")
    opts = parse_options(groups_for(family, "network"), ["--torch_compile", "--compile_backend=aot_eager"])
    assert (opts.memory.compiles, opts.memory.backend) == (True, "inductor")
    assert not parse_options(groups_for(family, "finetune"), ["--compile_backend=eager"]).memory.compiles


@pytest.mark.rows("R508")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_do_not_go_with_block_swap(mode):
    flags = ["--compile", f"--compile_mode={mode}", "--blocks_to_swap=2"]
    lines = problems(parse_options(groups_for("flux", "network"), flags), FAMILIES["flux"].traits)
    assert any(f"--blocks_to_swap: cannot be used with --compile_mode {mode}, whose weights" in line for line in lines)
    flags[1] = "--compile_mode=max-autotune-no-cudagraphs"
    lines = problems(parse_options(groups_for("flux", "network"), flags), FAMILIES["flux"].traits)
    assert not any("--blocks_to_swap" in line for line in lines)
