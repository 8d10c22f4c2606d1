"""Measures training steps of every network on a GPU: images/s, share of the measured matmul peak, hours for the paper.

Each step is that of `utils.training.engine.fit` as the scripts call it, with reader and header of 27,997 classes, on
noise in device memory (see `utils.stages.rates`). Results measured before on the same machine with the same packages
are kept, so that the command can be interrupted and resumed.

Reads   nothing
Writes  benchmarks/results/networks_<cuda or cpu>.json and .md
Run     python -m benchmarks.networks [iresnet34 ...] [--batch 128] [--precision bf16] [--results folder]
"""

import argparse
import functools
import gc
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones import build_backbone
from benchmarks.measuring import RESULTS, compiling, made_by, rates, write
from config.config import Config
from config.registry import NETWORKS
from utils.environment import device_of, versions
from utils.process import setup
from utils.stages.rates import adaptor_rate, inference_rate, teacher_rate

PUBLISHED = ("iresnet18", "iresnet34", "iresnet50", "iresnet100", "mobilefacenet")
CLASSES, IMAGES = 27_997, 1_248_932  # identities and images of the paper's training set
TEACHER_EPOCHS, EPOCHS_AFTER = 52, 26  # epochs of a teacher; of an adaptor or student
ADAPTORS, STUDENTS = 3, 6  # trained for one column of the paper's table
BATCHES, PRECISIONS = (128, 512), ("fp32", "tf32", "bf16")
FORM = ("network", "batch", "precision", "compiled")


@dataclass(frozen=True)
class Measured:
    """Holds the measurement of a network's training step."""

    network: str
    batch: int
    precision: str
    compiled: bool
    rate: float  # images per second; 0 if it does not fit into device memory
    operations: float  # FLOP/s
    gigabytes: float  # peak device memory


def measure(network: str, batch: int, precision: str, compiled: bool) -> Measured:
    """Measures the training step. Raises RuntimeError if compilation is requested but does not happen."""
    cfg = _config(batch_size=batch, precision=precision, compile=compiled)
    setup(cfg)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        with compiling(compiled, network):
            rate = teacher_rate(network, cfg, CLASSES)
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return Measured(network, batch, precision, compiled, 0.0, 0.0, 0.0)
    gigabytes = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    return Measured(network, batch, precision, compiled, rate, rate * _operations(network), gigabytes)


def measure_others() -> dict[str, float]:
    """Measures the SL adaptor's training in rows/s, and the extraction by iresnet34, in tf32, in images/s."""
    cfg = _config()
    setup(cfg)
    return {"adaptor": adaptor_rate(cfg, CLASSES), "extraction": inference_rate("iresnet34", cfg)}


def matrix_peak(precision: str, device: torch.device) -> float:
    """Returns FLOP/s of a large matrix product in this precision."""
    size = 8192 if device.type == "cuda" else 1024
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        return rates(2 * size**3, lambda: one @ other)[0]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def memory_bandwidth(device: torch.device) -> float:
    """Returns the bytes per second that a copy of a large tensor reads and writes."""
    source = torch.zeros(1 << (28 if device.type == "cuda" else 20), device=device)
    target = torch.empty_like(source)
    return rates(2 * source.nbytes, lambda: target.copy_(source))[0]


def hours(step: float, extraction: float, adaptor: float) -> float:
    """Projects the hours for one column of the paper's table from three rates per second.

    The rates are images of a training `step`, images of `extraction` and rows of an `adaptor` step. Each of the four
    teachers trains on a quarter of the images, and then extracts all of them.
    """
    trained = TEACHER_EPOCHS + STUDENTS * EPOCHS_AFTER
    return IMAGES * (trained / step + 4 / extraction + ADAPTORS * EPOCHS_AFTER / adaptor) / 3600


def _config(**settings) -> Config:
    return Config(cudnn_benchmark=True, **settings)


@functools.cache
def _operations(network: str) -> float:
    """Returns FLOP of a forward and backward pass of one image through network and header."""
    backbone = build_backbone(network)
    with FlopCounterMode(display=False) as counter:
        backbone(torch.randn(2, 3, 112, 112)).sum().backward()
    return counter.get_total_flops() / 2 + 3 * 2 * 512 * CLASSES  # the header's three products


# Report ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help=f"some of {', '.join(NETWORKS)}")
    parser.add_argument("--batch", type=int, action="append", help="some batch sizes instead of all")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="some precisions instead of all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that is written to")
    given = parser.parse_args()
    if unknown := [name for name in given.networks if name not in NETWORKS]:
        parser.error(f"there is no network {unknown[0]}: name some of {', '.join(NETWORKS)}.")
    measure_all(given.networks or PUBLISHED, given.batch, given.precision, given.results)


def measure_all(
    networks: Sequence[str],
    batches: Sequence[int] | None = None,
    precisions: Sequence[str] | None = None,
    results: Path = RESULTS,
) -> None:
    """Measures all combinations that are missing in the results; on a CPU with a batch of 8, to try the command."""
    cfg = _config()
    on_gpu = device_of(cfg).type == "cuda"
    batches = batches or (BATCHES if on_gpu else (8,))
    precisions = precisions or (PRECISIONS if on_gpu else ("fp32",))
    found = {name: value for name, value in versions(cfg).items() if name not in ("commit", "compile")}
    path = results / f"networks_{'cuda' if on_gpu else 'cpu'}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("versions") != found:
        kept = {"versions": found, "peaks": {}, "others": {}, "steps": []}
    for precision in precisions:
        if precision not in kept["peaks"]:
            kept["peaks"][precision] = matrix_peak(precision, device_of(cfg))
    if "iresnet34" in networks and not kept["others"]:
        kept["others"] = measure_others()
        write(path, kept, report(kept))
    done = {tuple(one[name] for name in FORM) for one in kept["steps"]}
    for form in itertools.product(networks, batches, precisions, (False, True)):
        if form in done:
            continue
        try:
            kept["steps"].append(asdict(measure(*form)))
        except RuntimeError as error:
            print(f"{form}: {error}", flush=True)
            continue
        print(_line(kept["steps"][-1], kept["peaks"]), flush=True)
        write(path, kept, report(kept))


def report(kept: dict) -> str:
    """Formats the measurements as a Markdown page."""
    steps = sorted(kept["steps"], key=lambda one: ([*NETWORKS].index(one["network"]), one["batch"]))
    peaks = ", ".join(f"{name} {peak / 1e12:,.1f} TFLOP/s" for name, peak in kept["peaks"].items())
    lines = [
        "# Training steps of the networks",
        "",
        made_by("benchmarks.networks", kept["versions"]),
        f"Measured matrix peaks: {peaks}. Head of {CLASSES:,} classes, images on the device.",
        "",
        *HEADER,
        *(_line(one, kept["peaks"]) for one in steps),
    ]
    if others := kept["others"]:
        minutes = EPOCHS_AFTER * IMAGES / others["adaptor"] / 60
        lines += [
            "",
            f"SL adaptor's step: {others['adaptor']:,.0f} rows/s, {minutes:.1f} minutes for {EPOCHS_AFTER} epochs.",
            f"Extraction by iresnet34 in tf32: {others['extraction']:,.0f} images/s.",
            "",
            f"Projected from these for the paper's iresnet34 column, {IMAGES:,} images: 4 teachers of {TEACHER_EPOCHS}",
            f"epochs, extraction, {ADAPTORS} adaptors and {STUDENTS} students of {EPOCHS_AFTER}; without verification.",
            "",
            "| batch | precision | compiled | hours |",
            "|--:|---|---|--:|",
        ]
        for one in steps:
            if one["network"] == "iresnet34" and one["rate"]:
                projected = hours(one["rate"], others["extraction"], others["adaptor"])
                lines += [f"| {one['batch']} | {one['precision']} | {_yes(one['compiled'])} | {projected:.1f} |"]
    return "\n".join(lines) + "\n"


HEADER = (
    "| network | batch | precision | compiled | images/s | share of the peak | GB |",
    "|---|--:|---|---|--:|--:|--:|",
)


def _line(one: dict, peaks: dict[str, float]) -> str:
    share = one["operations"] / peaks[one["precision"]]
    numbers = f"{one['rate']:,.1f} | {share:.1%} | {one['gigabytes']:.1f}" if one["rate"] else "does not fit | |"
    return f"| {one['network']} | {one['batch']} | {one['precision']} | {_yes(one['compiled'])} | {numbers} |"


def _yes(compiled: bool) -> str:
    return "yes" if compiled else "no"


if __name__ == "__main__":
    main()
