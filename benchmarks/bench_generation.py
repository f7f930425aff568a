"""Drawing a file of prompts: gen_img.py's engine against diffusers' own pipeline, in one process, with the same model.

    python benchmarks/bench_generation.py
    python benchmarks/bench_generation.py --width 128 --side 128 --steps 10
    python benchmarks/bench_generation.py --images 200

Both draw on the same weights, DDIM, guided, to PNG files, in turns, so that a machine's mood falls on both: one prompt
alone, four images of one prompt in a batch, and a file of 20 prompts, 15 of which are different, that all share one
negative prompt. There the pipeline is called once for each prompt, as its users do, and ours fills batches of four. The
figure that counts is the ratio. With `--width` a larger U-Net of random weights takes the bundled one's place. With
`--images` that many are drawn, and the process' memory is printed along the way (Linux).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from library.generation.networks import Networks
from library.generation.requests import Requests, base_prompt
from library.generation.script import ALL_FAMILIES, Start, Studio
from library.options import parsing
from library.preparation.common.summary import Outcome
from library.runtime import logs

MODEL = ROOT / "examples" / "tiny_model" / "tiny-sd.safetensors"
NEGATIVE = "blue triangle"
COLOURS, SHAPES = ("red", "green", "blue", "yellow", "white"), ("square", "circle", "triangle")
TEXTS = [f"a {colour} {shape}" for shape in SHAPES for colour in COLOURS]
FILE = [*TEXTS, *TEXTS[:5]]


class Ours:
    """The loaded model of gen_img.py, and what turns prompt lines into files."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, batch_size: int):
        from library.generation.model_options import family_spec, training_options

        flags = [f"--ckpt={MODEL}", f"--outdir={folder}", f"--steps={arguments.steps}", f"--batch_size={batch_size}"]
        flags += [
            f"--W={arguments.side}",
            f"--H={arguments.side}",
            "--sampler=ddim",
            "--scale=7",
            "--prompt=",
            "--seed=1",
        ]
        opts = parsing.parse_options(ALL_FAMILIES, flags)
        spec, kind = family_spec(opts.checkpoint, None)
        outcome = Outcome()
        self.studio = Studio.of(opts, spec, training_options(opts, spec, kind), outcome, Start())
        self.requests = Requests(opts, spec.traits, base_prompt(opts, spec.traits), outcome.fail)

    def draw(self, texts: Sequence[str]) -> None:
        lines = [(f"prompt {number}", f"{text} --n {NEGATIVE}") for number, text in enumerate(texts)]
        self.studio.model.use_networks(Networks())  # with which the texts of the round before are forgotten
        self.studio.make(self.requests.of(lines))


class Theirs:
    """diffusers' pipeline around the same modules."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, ours: Ours):
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        models = ours.studio.model.models
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            set_alpha_to_one=False,
            steps_offset=1,
            clip_sample=False,
        )
        self.pipe = StableDiffusionPipeline(
            vae=models.vae,
            text_encoder=models.text_encoders["te"],
            tokenizer=models.tokenizers["te"],
            unet=models.denoiser,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.folder, self.arguments, self.drawn = folder, arguments, 0

    def draw(self, text: str, images: int) -> None:
        side = self.arguments.side
        made = self.pipe(
            text,
            negative_prompt=NEGATIVE,
            width=side,
            height=side,
            num_inference_steps=self.arguments.steps,
            guidance_scale=7.0,
            num_images_per_prompt=images,
            generator=[torch.Generator().manual_seed(seed) for seed in range(images)],
        ).images
        for image in made:
            self.drawn += 1
            image.save(self.folder / f"theirs_{self.drawn}.png")


def widen(ours: Ours, width: int) -> None:
    """A U-Net of random weights, with so many channels at the top, in place of the loaded one."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    channels = (width, 2 * width, 4 * width, 4 * width)
    unet = UNet2DConditionModel(block_out_channels=channels, cross_attention_dim=64, layers_per_block=2)
    ours.studio.model.models.denoiser = unet.eval().requires_grad_(False)


def in_turns(first: Callable[[], None], second: Callable[[], None], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each, round by round, after one round that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for call, seconds in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                seconds.append(time.perf_counter() - start)
    return times


def resident() -> float:
    """MiB of memory that the process holds now."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def throughput(folder: Path, arguments: argparse.Namespace) -> None:
    single, four = Ours(folder, arguments, 1), Ours(folder, arguments, 4)
    if arguments.width:
        widen(single, arguments.width)
        four.studio.model.models.denoiser = single.studio.model.models.denoiser
    theirs = Theirs(folder, arguments, single)
    cases: dict[str, tuple[int, Callable[[], None], Callable[[], None]]] = {
        "one prompt": (1, lambda: single.draw(TEXTS[:1]), lambda: theirs.draw(TEXTS[0], 1)),
        "four images of one prompt": (4, lambda: four.draw(TEXTS[:1] * 4), lambda: theirs.draw(TEXTS[0], 4)),
        "20 prompts": (20, lambda: four.draw(FILE), lambda: [theirs.draw(text, 1) for text in FILE] and None),
    }
    print(f"{'':28}{'ours':>12}{'pipeline':>12}   images/s of ours over the pipeline's")
    for name, (images, our_call, their_call) in cases.items():
        mine, others = in_turns(our_call, their_call, arguments.rounds)
        ratios = [b / a for a, b in zip(mine, others, strict=True)]
        seconds = [images / statistics.median(times) for times in (mine, others)]
        print(
            f"{name:28}{seconds[0]:>10.2f}/s{seconds[1]:>10.2f}/s   "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def memory(folder: Path, arguments: argparse.Namespace) -> None:
    ours = Ours(folder, arguments, 4)
    texts = [FILE[number % len(FILE)] for number in range(20)]
    for drawn in range(20, arguments.images + 1, 20):
        ours.draw(texts)
        print(f"after {drawn:4} images: {resident():8.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=0, help="of a random U-Net at its top; 0: the bundled one")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="that are counted")
    parser.add_argument("--images", type=int, default=0, help="watch the memory over so many images")
    arguments = parser.parse_args()
    logs.quiet_third_parties()
    with tempfile.TemporaryDirectory() as folder:
        (memory if arguments.images else throughput)(Path(folder), arguments)


if __name__ == "__main__":
    main()
