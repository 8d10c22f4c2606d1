"""Measures one GPU within a short lease: what must be right first, then rates, stages and the kernels of a step.

Each result is written as soon as it is there. The same command measures what is missing: after an interruption, or if
the time did not suffice. Results of another commit, card or version of PyTorch are measured anew.

Reads   nothing; draws generated faces
Writes  benchmarks/results/gpu_<card>.json and .md
Run     python -m benchmarks.gpu --minutes 7
        python -m benchmarks.gpu --device cpu --minutes 0.5    a small form, to try the command without a GPU
"""

import argparse
import contextlib
import functools
import gc
import hashlib
import io
import itertools
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from backbones import build_backbone
from benchmarks import correctness, networks, stages
from benchmarks.kernels import profiled
from benchmarks.measuring import RESULTS, compiling, made_by, write
from benchmarks.steps import Step, plain_adaptor
from benchmarks.together import trained_together
from config.config import Config
from config.registry import LOSSES
from eval.verification import pair_distances, views
from utils.data.synthetic import generate
from utils.environment import device_of, versions
from utils.errors import InputError
from utils.process import guarded, setup
from utils.stages import rates
from utils.training.precision import compiled, mixed_precision

Part = tuple[str, str, Callable[[], Any]]
"""Section, name and function of a measurement; the function returns what JSON can hold."""

PUBLISHED = "training, published way with PyTorch's defaults"
NOTED = ("The captured step", "compile:")
"""Lines that begin so say that a step was not taken as its name says: they are kept beside the results."""

DEFAULT, EXTRACTION, ADAPTOR = "training, this code by default", "inference by default", "SL adaptor's step"


@dataclass(frozen=True)
class Size:
    """Holds what is measured: on a GPU as in the paper, on a CPU in a small form."""

    network: str = "iresnet34"
    run_network: str = "iresnet_tiny"  # of the runs that are compared with float64 on the CPU, where it takes time
    run_batch: int = 32
    batches: tuple[int, int] = (128, 512)
    infer_batch: int = 256
    classes: int = networks.CLASSES
    verified: int = 12_000  # images of one verification set
    streamed: int = 100_000
    identities: int = 32  # of each group of generated faces
    seconds: float = 3.0  # of each measured rate
    compiles: bool = True
    together: tuple[tuple[str, int], ...] = (("iresnet34", 2), ("iresnet_tiny", 8))  # networks and numbers of runs


SMALL = Size("iresnet_tiny", "iresnet_tiny", 8, (8, 16), 8, 20, 20, 40, 2, 0.0, False, (("iresnet_tiny", 2),))


class Bench:
    """The measurements of one device, in `work`, a folder for temporary files."""

    def __init__(self, device: torch.device, size: Size, work: Path):
        self.device, self.size, self.work = device, size, work
        rates.SECONDS = size.seconds

    def parts(self) -> Iterator[Part]:
        """Yields all measurements, the most important ones first."""
        yield from self._correctness()
        yield from self._rates()
        for network, count in self.size.together:
            yield "rates", f"{count} runs of {network} together", functools.partial(self._together, network, count)
        yield from self._stages()
        yield from self._kernels()

    def _cfg(self, **settings) -> Config:
        given = {"device": self.device.type, "network": self.size.network, "infer_batch_size": self.size.infer_batch}
        return Config(**{"batch_size": self.size.batches[0], **given, **settings})

    # Correctness ------------------------------------------------------------------------------------------------------

    def _correctness(self) -> Iterator[Part]:
        run = self.device, self.size.run_batch
        tiny = correctness.config(*run, network=self.size.run_network, num_epoch=1, num_epoch_fc=1)
        for kind, precision in (("SL", "fp32"), ("teacher", "fp32"), ("teacher", "tf32"), ("teacher", "bf16")):
            cfg, name = replace(tiny, precision=precision), f"one epoch of {kind} in {precision}"
            yield "correctness", name, functools.partial(self._run_error, kind, cfg)
        whole = correctness.config(*run, network=self.size.network, num_epoch=2, num_epoch_fc=2)
        for kind, precision in (("SL", "tf32"), ("teacher", "tf32"), ("teacher", "bf16")):
            cfg, name = replace(whole, precision=precision), f"a stopped run of {kind} in {precision}"
            yield "correctness", name, functools.partial(self._resumed, kind, cfg)
        for precision in networks.PRECISIONS:
            function = functools.partial(correctness.network_errors, self.size.network, precision, self.device)
            yield "correctness", f"{self.size.network} in {precision}", function
        for name in (*LOSSES, "AdaArcDistill", "AdaCosDistill"):
            yield "correctness", f"header {name}", functools.partial(correctness.header_errors, name, self.device)

    def _run_error(self, kind: str, cfg: Config) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            return {"change of the weights": correctness.run_error(kind, cfg, Path(folder))}

    def _resumed(self, kind: str, cfg: Config) -> str:
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            equal = correctness.is_resumed_to_the_bit(kind, cfg, Path(folder))
        return "ends with the same bits as a whole one" if equal else "DIFFERS from a whole one"

    # Rates ------------------------------------------------------------------------------------------------------------

    def _rates(self) -> Iterator[Part]:
        small, large = self.size.batches
        yield "rates", PUBLISHED, functools.partial(self._published, small)
        yield "rates", DEFAULT, functools.partial(self._training, small)
        yield "rates", "training, bf16", functools.partial(self._training, small, precision="bf16")
        eager = functools.partial(self._training, small, precision="bf16", capture=False)
        yield "rates", "training, bf16, not captured", eager
        if self.size.compiles:
            own = {"precision": "bf16", "compile": True}
            yield "rates", "training, bf16, compiled", functools.partial(self._training, small, **own)
        yield "rates", EXTRACTION, functools.partial(self._inference, "tf32")
        yield "rates", "inference, bf16", functools.partial(self._inference, "bf16")
        yield "rates", ADAPTOR, self._adaptor
        yield "rates", f"training, bf16, batch {large}", functools.partial(self._training, large, precision="bf16")
        if self.size.compiles:
            function = functools.partial(self._training, large, **own)
            yield "rates", f"training, bf16, compiled, batch {large}", function
        yield "rates", "training, fp32", functools.partial(self._training, small, precision="fp32")
        for precision in networks.PRECISIONS:
            yield (
                "rates",
                f"matrix peak, {precision}, FLOP/s",
                functools.partial(networks.matrix_peak, precision, self.device),
            )
        yield (
            "rates",
            "memory, bytes/s read and written by a copy",
            functools.partial(networks.memory_bandwidth, self.device),
        )
        yield "rates", "verification of four sets, s", self._verification
        yield "rates", "SL adaptor's step, published way", self._published_adaptor
        yield "rates", f"{PUBLISHED}, bf16 autocast", functools.partial(self._published, small, "bf16")
        yield "rates", f"{PUBLISHED}, batch {large}", functools.partial(self._published, large)
        yield "rates", f"training by default, batch {large}", functools.partial(self._training, large)
        for precision in ("tf32", "bf16"):
            yield "rates", f"bare network, {precision}", functools.partial(self._bare, small, precision)
            if self.device.type == "cuda":
                name = f"bare network, {precision}, one CUDA graph"
                yield "rates", name, functools.partial(self._bare, small, precision, is_captured=True)
        yield "rates", "inference, fp32", functools.partial(self._inference, "fp32")
        streamed = functools.partial(self._training, small, streamed=self.size.streamed, precision="bf16")
        yield "rates", f"training, bf16, {self.size.streamed:,} images streamed", streamed

    def _training(self, batch: int, streamed: int = 0, **settings) -> float:
        cfg = self._cfg(batch_size=batch, **settings)
        setup(cfg)
        with compiling(cfg.compile, cfg.network):
            return rates.teacher_rate(cfg.network, cfg, self.size.classes, streamed)

    def _step(self, batch: int) -> Step:
        return Step("teacher step", self.size.network, batch, classes=self.size.classes, device=self.device)

    def _published(self, batch: int, precision: str = "tf32") -> float:
        with pytorch_defaults():
            return self._step(batch).plain(precision)

    def _published_adaptor(self) -> float:
        with pytorch_defaults():
            return plain_adaptor(self._cfg())

    def _bare(self, batch: int, precision: str, is_captured: bool = False) -> float:
        setup(self._cfg())
        return self._step(batch).bare(precision=precision, is_captured=is_captured)

    def _inference(self, precision: str) -> float:
        cfg = self._cfg(infer_precision=precision)
        setup(cfg, trains=False)
        return rates.inference_rate(cfg.network, cfg)

    def _adaptor(self) -> float:
        setup(self._cfg())
        return rates.adaptor_rate(self._cfg(), self.size.classes)

    def _verification(self) -> float:
        cfg, count = self._cfg(), self.size.verified
        setup(cfg, trains=False)
        network = build_backbone(cfg.network)
        images = np.random.default_rng(0).integers(0, 256, (count, 112, 112, 3), np.uint8)
        for sets in (1, 4):  # the first one is a warm-up
            started = time.perf_counter()
            for _ in range(sets):
                pair_distances(views(network, images, cfg, "verify"), np.arange(count))
        return time.perf_counter() - started

    def _together(self, network: str, count: int) -> str:
        cfg = replace(self._faces[1], network=network)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            return trained_together(count, cfg, Path(folder))

    # Stages and kernels -----------------------------------------------------------------------------------------------

    def _stages(self) -> Iterator[Part]:
        rows: dict[str, Callable[[], stages.Row]] = {
            "image reader": lambda: stages.measure_reader(*self._faces),
            "adaptor input": lambda: stages.measure_adaptor_input(self._folder("embeddings")),
            "extraction": lambda: stages.measure_extraction(self._faces[1], self._folder("extraction")),
            "verification": lambda: stages.measure_verification(*self._faces),
            "ten folds": stages.measure_ten_fold,
        }
        for name, function in rows.items():
            yield "stages", name, lambda function=function: vars(function())

    @functools.cached_property
    def _faces(self) -> tuple[Path, Config]:
        """Draws generated faces; returns their folder and the settings that read them."""
        faces = self.work / "faces"
        generate(faces, Config().ethnicities, identities=self.size.identities, images=16, pairs=100, seed=0)
        paths = {"data": f"{faces}/train", "pairs": f"{faces}/pairs", "cache": f"{self.work}/cache"}
        cfg = self._cfg(**paths)
        setup(cfg, trains=False)
        return faces, cfg

    def _folder(self, name: str) -> Path:
        folder = self.work / name
        folder.mkdir()
        return folder

    def _kernels(self) -> Iterator[Part]:
        forms = itertools.product(("bf16", "tf32"), (False, True) if self.size.compiles else (False,))
        for precision, is_compiled in forms:
            name = f"{precision}{', compiled' * is_compiled}"
            yield "kernels", name, functools.partial(self._profile, precision, is_compiled)

    def _profile(self, precision: str, is_compiled: bool) -> dict[str, list]:
        """Profiles the forward and backward pass of the network alone."""
        cfg, size = self._cfg(), self.size.batches[0]
        setup(cfg)
        network: nn.Module = build_backbone(cfg.network).to(self.device).to(memory_format=torch.channels_last)
        image = torch.randn(size, 3, 112, 112, device=self.device).to(memory_format=torch.channels_last)
        grad = torch.randn(size, 512, device=self.device)

        def step() -> None:
            network.zero_grad()
            network(image).backward(grad)

        compilation = compiled(network) if is_compiled else contextlib.nullcontext()
        with mixed_precision(network, precision, self.device), compilation:
            return profiled(step, self.device)


@contextlib.contextmanager
def pytorch_defaults() -> Iterator[None]:
    """Sets cuDNN as PyTorch does by default, which `setup` changes: its algorithms need not be deterministic."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic = cudnn.benchmark = False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


# Report ---------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="no measurement starts after this time [%(default)s]"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a small form [%(default)s]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that is written to [%(default)s]")
    given = parser.parse_args(argv)
    guarded(lambda: measure_all(given.device, given.minutes, given.results))


def measure_all(device: str, minutes: float, results: Path) -> None:
    """Measures what is missing in the results until the time is over. Raises InputError if there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch finds no CUDA device here: use --device cpu to try the command in a small form.")
    cfg = Config(device=device)
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    path = results / f"gpu_{re.sub(r'[^A-Za-z0-9]+', '_', card)}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    now = versions(cfg) | {"code": _code()}
    if {**kept.get("versions", {}), "commit": ""} != {**now, "commit": ""}:  # committing results changes the commit
        kept = {"versions": now, "correctness": {}, "rates": {}, "stages": {}, "kernels": {}, "notes": {}}
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as work:
        parts = Bench(device_of(cfg), Size() if device == "cuda" else SMALL, Path(work)).parts()
        states = [(str(kept[section].get(name, "missing"))[:7], (section, name, run)) for section, name, run in parts]
        missing = [part for wanted in ("missing", "failed:") for state, part in states if state == wanted]
        for number, (section, name, function) in enumerate(missing):
            if time.monotonic() > end:
                print(f"The time is over, {len(missing) - number} measurements are missing: run the command again.")
                break
            kept[section][name], said = _attempt(function)
            notes = [line for line in said.splitlines() if line.startswith(NOTED)]
            if notes:
                kept["notes"][f"{section}, {name}"] = notes
            write(path, kept, page(kept))
            result = kept[section][name]
            if section in ("stages", "kernels") and not isinstance(result, str):
                result = "measured"
            print(f"{section}: {name}: {result}", *notes, sep="\n  ", flush=True)
            if device == "cuda" and str(kept[section][name]).startswith("failed"):
                print("A failure may spoil later measurements in this process: run the command again for the others.")
                break
    print(f"Written to {path} and {path.with_suffix('.md').name}.")


def _code() -> str:
    """Returns the SHA-256 of the code that is measured, which committing the results does not change."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for folder in ("backbones", "benchmarks", "config", "eval", "utils"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """Returns the result of a measurement, or why there is none, and what it has printed."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            result = function()
    except torch.OutOfMemoryError:
        result = "does not fit"
    except Exception as error:
        result = f"failed: {(str(error) or type(error).__name__).splitlines()[0]}"
    finally:
        gc.collect()
        with contextlib.suppress(RuntimeError):  # an error of the device is raised again by every later call
            torch.cuda.empty_cache()
    return result, said.getvalue()


def page(kept: dict) -> str:
    """Formats the measurements as a Markdown page."""
    found = kept["rates"]
    published = found.get(PUBLISHED)
    lines = ["# One GPU", "", made_by("benchmarks.gpu", kept["versions"]), "", "## Correctness", ""]
    lines += [
        "Errors relative to float64 on the CPU. Runs are those of `fit`, whose steps are captured on one GPU.",
        "",
        "| what | result |",
        "|---|---|",
    ]
    lines += [f"| {name} | {_listed(result)} |" for name, result in kept["correctness"].items()]
    for name, notes in kept["notes"].items():
        lines += ["", f"{name}: {' '.join(notes)}"]
    lines += ["", "## Rates", "", "Images (rows of the adaptor) per second, unless another unit is given.", ""]
    lines += ["| what | | published way = 1 |", "|---|--:|--:|"]
    for name, rate in found.items():
        is_training = name.startswith("training") and not isinstance(rate, str) and isinstance(published, float)
        lines.append(f"| {name} | {_number(rate)} | {f'{rate / published:.2f}' if is_training else ''} |")
    if all(isinstance(found.get(name), float) for name in (DEFAULT, EXTRACTION, ADAPTOR)):
        projected = networks.hours(*(found[name] for name in (DEFAULT, EXTRACTION, ADAPTOR)))
        minutes = networks.EPOCHS_AFTER * networks.IMAGES / found[ADAPTOR] / 60
        lines += ["", f"Projected by default: {projected:.1f} hours for the paper's column without verification,"]
        lines += [f"{minutes:.1f} minutes for the {networks.EPOCHS_AFTER} epochs of SL."]
    lines += ["", "## Stages", "", *stages.HEADER]
    for name, row in kept["stages"].items():
        lines.append(f"| {name} | {row} |" if isinstance(row, str) else stages.line(stages.Row(**row)))
    for name, result in kept["kernels"].items():
        lines += ["", f"## Kernels of a forward and backward pass, {name}", ""]
        lines += [result] if isinstance(result, str) else [*_table(result["kinds"]), "", *_table(result["kernels"])]
    return "\n".join(lines) + "\n"


def _table(rows: list[list]) -> list[str]:
    lines = ["| | ms a step | launches a step |", "|---|--:|--:|"]
    return lines + [f"| {name.replace('|', ' ')} | {time:.2f} | {launches:,.0f} |" for name, time, launches in rows]


def _listed(result: dict[str, float] | str) -> str:
    return result if isinstance(result, str) else ", ".join(f"{name} {error:.1e}" for name, error in result.items())


def _number(rate: float | str) -> str:
    return rate if isinstance(rate, str) else f"{rate:.3g}" if rate > 1e9 else f"{rate:,.1f}"


if __name__ == "__main__":
    main()
