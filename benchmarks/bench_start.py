"""What a run does before training: its imports, cold and warm start on many images, a metadata file of a million keys.

    python benchmarks/bench_start.py
    python benchmarks/bench_start.py --images 10000 --keys 0 --folder /tmp/images
    python benchmarks/bench_start.py --images 0 --keys 0 --against ../other-checkout

Every start is a process of its own. "Cold" means that nothing is known of the files; the operating system has them in
memory, as after a download. "Warm" is the second start, which finds in the index what the first has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Nothing heavy up here: the index starts worker processes, and these import this module.

_ROUNDS = 5  # starts of the script; the least CPU time is the one that other work disturbed least

# Runs a script until its model is loaded; prints the CPU seconds that it took to the points on the way.
_TO_THE_MODEL = """
import json, logging, os, resource, runpy, sys

def mark(name):
    used = resource.getrusage(resource.RUSAGE_SELF)
    marks.setdefault(name, used.ru_utime + used.ru_stime)

def on_event(event, arguments):
    if event != "import":
        return
    if arguments[0] == "torch":
        mark("options checked")
    elif arguments[0].startswith("library.families.") and arguments[0].endswith(".loading"):
        mark("loading the model")

def on_message(record):
    if str(record.msg).startswith("loaded "):
        mark("model loaded")
        print(json.dumps(marks), flush=True)
        os._exit(0)
    return True

marks = {}
sys.addaudithook(on_event)
logging.getLogger("trainscripts").addFilter(on_message)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

_WHOSE = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def start(folder: Path, index: Path) -> dict[str, float]:
    """Seconds and memory of one start, in this process."""
    began = time.perf_counter()
    from library import registry
    from library.data.config.blueprint import build_specs
    from library.data.sample.dataset import build_training_data
    from library.families.sd.options import TRAITS
    from library.options import parsing

    arguments = [f"--train_data_dir={folder}", f"--data_index_dir={index}", "--resolution=512", "--enable_bucket"]
    opts = parsing.parse_options(registry.groups_for("sd", "network"), arguments)
    imported, cpu = time.perf_counter(), _cpu_seconds()
    data = build_training_data(build_specs(opts, TRAITS), opts, TRAITS, seed=1)
    built, cpu = time.perf_counter(), _cpu_seconds() - cpu
    data.report()
    reported = time.perf_counter()
    return {
        "images": len(data.records),
        "imports": imported - began,
        "start": built - imported,
        "report": reported - built,
        "cpu": cpu,
        "mib": _peak_mib(),
    }


def metadata(folder: Path) -> dict[str, float]:
    """Seconds and memory for reading a metadata file and finding its images, in this process."""
    from library.data.scan import metadata_files
    from library.data.scan.index import FileIndex

    began = time.perf_counter()
    entries = metadata_files.read_metadata(folder / "meta.json")
    read = time.perf_counter()
    names = frozenset(json.loads((folder / "names.json").read_bytes()))
    index = FileIndex(None)

    def listing(path: Path) -> dict[str, tuple[int, int]] | frozenset[str]:
        return names if path == folder / "images" else index.listing(path)

    listed = time.perf_counter()
    found, problems = metadata_files.resolve(
        entries, folder / "images", listing, file=folder / "meta.json", separator=", ", wildcard=False
    )
    resolved = time.perf_counter()
    assert len(found) == len(entries), problems
    return {"keys": len(found), "read": read - began, "resolve": resolved - listed, "mib": _peak_mib()}


def write_metadata(folder: Path, keys: int) -> None:
    """A metadata file, and the names of the images in place of a million files."""
    (folder / "images").mkdir(exist_ok=True)
    names = [f"image {number:07d}.jpg" for number in range(keys)]
    entries = {
        name.removesuffix(".jpg"): {"caption": f"a photo, number {number}", "tags": "tree, hill, cloud"}
        for number, name in enumerate(names)
    }
    (folder / "meta.json").write_text(json.dumps(entries))
    (folder / "names.json").write_text(json.dumps(names))


def _cpu_seconds() -> float:
    """Of this process and of the workers that have ended."""
    return sum(times.ru_utime + times.ru_stime for times in map(resource.getrusage, _WHOSE))


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def in_fresh_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def show_starts(folder: Path, images: int) -> None:
    from images import write_images

    write_images(folder / "1_x", images, lambda number: (64 + number % 9 * 4, 64))
    with tempfile.TemporaryDirectory() as index:
        for name in ("cold", "warm", "warm again"):
            seen = in_fresh_process("start", str(folder), index)
            speed = seen["images"] / seen["start"]
            print(
                f"{name} start, {seen['images']} images: {seen['start']:.2f} s, "
                f"{speed:.0f} images/s, {seen['cpu']:.1f} s of CPU; report {seen['report']:.2f} s, "
                f"imports {seen['imports']:.2f} s, peak {seen['mib']:.0f} MiB"
            )


def show_script(checkouts: list[Path]) -> None:
    """The start of train_network.py with the bundled model, of each checkout in turn."""
    sys.path.insert(0, str(ROOT))
    from quickstart import MODEL

    line = ["train_network.py", f"--pretrained_model_name_or_path={MODEL}", "--train_data_dir=examples/concept"]
    line += ["--resolution=64", "--min_bucket_reso=64", "--enable_bucket", "--network_module=networks.lora"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for work use CPU time too
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    seen: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-c", _TO_THE_MODEL, *line, f"--output_dir={output}", "--console_log_level=INFO"]
        for _ in range(_ROUNDS + 1):
            for checkout, rounds in seen.items():
                done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, check=False)
                if done.returncode:
                    raise SystemExit(done.returncode)
                rounds.append(json.loads(done.stdout.splitlines()[-1]))
    for checkout, rounds in seen.items():
        points = ", ".join(f"{name} {min(one[name] for one in rounds[1:]):.2f} s" for name in rounds[0])
        print(f"CPU time of {checkout}/train_network.py from the shell: {points}")


def show_metadata(keys: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_metadata(Path(folder), keys)
        seen = in_fresh_process("metadata", folder)
    print(
        f"metadata file, {seen['keys']} keys: read {seen['read']:.1f} s, find the images {seen['resolve']:.1f} s, "
        f"peak {seen['mib']:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--keys", type=int, default=1_000_000, help="of the metadata file")
    parser.add_argument("--folder", type=Path, help="keep the images here, for the next time")
    parser.add_argument("--against", type=Path, help="another checkout, whose script is timed in turn with ours")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, *places = args.child
        seen = {"start": start, "metadata": metadata}[what](*map(Path, places))
        print(json.dumps(seen))
        return
    show_script([ROOT, *([args.against.resolve()] if args.against else [])])
    with tempfile.TemporaryDirectory() as temporary:
        if args.images:
            show_starts(args.folder or Path(temporary), args.images)
    if args.keys:
        show_metadata(args.keys)


if __name__ == "__main__":
    main()
