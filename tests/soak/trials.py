"""Reliability trials: kills, stops, failing writes, corrupted and malicious files.

The test suite runs short forms of them, `make soak` the long forms. Each trial returns how many of its cases passed,
and the message that the user gets in each kind of case.
"""

import contextlib
import copyreg
import io
import multiprocessing
import os
import pickle
import random as shuffling
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from config.config import Config
from tests.conftest import encode, noise
from tests.runs import Linear, difference, torchrun, train, write_embeddings, write_targets
from utils.data.embeddings import read_embeddings
from utils.data.faces import Faces
from utils.data.pairs import load_bin
from utils.data.store import ImageStore
from utils.errors import InputError
from utils.process import Interrupted, setup
from utils.storage import arrays
from utils.storage.files import sha256
from utils.storage.seals import seal
from utils.storage.tensors import load, save
from utils.training.checkpoint import Run
from utils.training.engine import fit
from utils.weights import load_weights

ROOT = Path(__file__).parents[2]


@dataclass
class Result:
    """Counts the cases of a trial; keeps the failures and one message for each kind of case."""

    passed: int = 0
    of: int = 0
    messages: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, failure: str, kind: str, message: str) -> None:
        """Adds one case: why it failed ("" if it passed), its kind, and the message that the user got."""
        self.of += 1
        self.passed += not failure
        self.failures += [failure] if failure else []
        if message:
            self.messages.setdefault(kind, message.strip())


# Scripts in separate processes ----------------------------------------------------------------------------------------


def arguments(faces: Path, output: Path, *more: str) -> list[str]:
    paths = [
        "--data",
        f"{faces}/train",
        "--pairs",
        f"{faces}/pairs",
        "--output",
        str(output),
        "--ethnicities",
        "African,Asian",
    ]
    small = "--network iresnet_tiny --embedding_size 32 --batch_size 4 --s 16 --m 0.2 --num_epoch 3 --num_threads 1"
    return [*paths, "--cache", f"{faces.parent}/cache", *small.split(), "--device", "cpu", *more]


def start(script: str, given: list[str], log: Path, prepare: Callable | None = None):
    """Starts a script or module in a forked process, in which PyTorch is already imported: an import takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.soak.trials", "eval.evaluation", "utils.training.extract", "utils.losses"])
    process = context.Process(target=_script, args=(script, given, log, prepare))
    process.start()
    return process


def finish(script: str, given: list[str], log: Path, prepare: Callable | None = None) -> int:
    process = start(script, given, log, prepare)
    process.join()
    return process.exitcode


def _script(script: str, given: list[str], log: Path, prepare: Callable | None) -> None:
    """Runs a script or module in the started process, with its output in `log`."""
    os.chdir(ROOT)
    sys.argv = [script, *given]
    with open(log, "a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        if prepare:
            prepare()
        if script.endswith(".py"):
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__")


@dataclass
class KillInSave:
    """Kills its own process within a save, at the `count`-th call of one of the steps of a save."""

    step: str  # write | fsync | replace | link
    count: int
    share: float  # of the file's bytes that are written before the kill

    def __call__(self) -> None:
        module, name = (torch, "save") if self.step == "write" else (os, self.step)
        plain, calls = getattr(module, name), []

        def kill_at_count(*given, **options):
            calls.append(1)
            if len(calls) < self.count:
                return plain(*given, **options)
            if self.step == "write":
                plain(*given, **options)
                given[1].truncate(int(self.share * given[1].tell()))
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        setattr(module, name, kill_at_count)


FEWEST_CALLS = {"write": 24, "fsync": 48, "replace": 40, "link": 16}
"""Minimum number of calls of each step in the run of `kills_in_training`."""


def kills_in_training(faces: Path, work: Path, at_random: int, in_save: int, seed: int = 0) -> Result:
    """Kills train.py by SIGKILL at seeded instants, each in a separate run, and resumes it with the same command."""
    random, result, one = np.random.default_rng(seed), Result(), ("--ethnicity", "Asian", "--checkpoint_minutes", "0")
    reference = arguments(faces, work / "reference", *one)
    folder = Config.from_args(reference).teacher_dir("Asian")
    for _ in range(2):  # the second run, whose duration is used, finds its images in the cache
        shutil.rmtree(work / "reference", ignore_errors=True)
        started = time.monotonic()
        assert finish("train.py", reference, work / "log") == 0, (work / "log").read_text()
        duration = time.monotonic() - started

    plans: list = [None] * at_random
    for k in range(in_save):
        step = list(FEWEST_CALLS)[k % len(FEWEST_CALLS)]
        plans.append(KillInSave(step, int(random.integers(1, FEWEST_CALLS[step])), float(random.uniform(0, 1))))
    for k, plan in enumerate(plans):
        output, log = work / f"run{k}", work / f"log{k}"
        given = arguments(faces, output, *one)
        began = False
        while not began:  # repeat if the kill came before the run began or after its end
            shutil.rmtree(output, ignore_errors=True)
            log.write_text("")
            process, instant = start("train.py", given, log, plan), float(random.uniform(0, duration))
            if plan is None:
                time.sleep(instant)
                process.kill()
            process.join()
            began = process.exitcode == -signal.SIGKILL and "Teacher Asian" in log.read_text()
        status = finish("train.py", given, log)
        text = log.read_text()
        failure = difference(folder, Config.from_args(given).teacher_dir("Asian")) if status == 0 else text[-500:]
        said = re.search(r".*: continuing in epoch .*", text)
        kind = "SIGKILL in the middle of a save" if plan else "SIGKILL at any time"
        result.add(failure and f"{plan or instant}: {failure}", kind, said[0] if said else "")
        shutil.rmtree(output, ignore_errors=True)
    return result


def kills_of_processes(faces: Path, work: Path, runs: int, kills: int, seed: int = 0) -> Result:
    """Runs train.py on two processes under torchrun, which restarts both after each kill of one of them."""
    random, result = np.random.default_rng(seed), Result()
    own = ("--ethnicity", "Asian", "--checkpoint_minutes", "0", "--global_batch", "--header_sharding")
    outputs = [work / f"run{k}" for k in range(runs + 1)]
    folders = [Config.from_args(arguments(faces, output, *own)).teacher_dir("Asian") for output in outputs]
    for k, (output, folder) in enumerate(zip(outputs, folders, strict=True)):
        deaths = [(int(random.integers(2)), int(random.integers(1, 6))) for _ in range(kills if k else 0)]
        plan = ",".join(f"{rank}:{step}" for rank, step in deaths)
        given = arguments(faces, output, *own)
        status, text = torchrun(2, "tests.worlds", "kills", plan, *given, options=("--max-restarts", str(kills)))
        if k == 0:
            assert status == 0, text
            continue
        failure = difference(folders[0], folder) if status == 0 else text[-500:]
        told = re.findall(r".*another process of this run has ended.*", text)
        failure = failure or ("" if len(told) == kills else f"{len(told)} of {kills} kills were reported")
        result.add(failure and f"{plan}: {failure}", "SIGKILL of one of two processes", told[0] if told else "")
    return result


def kill_while_waiting(faces: Path, work: Path) -> Result:
    """train.py on two processes. One is killed while the other handles no signal, as if it waited for a GPU."""
    result, own = Result(), ("--ethnicity", "Asian", "--checkpoint_minutes", "0", "--global_batch")
    given = arguments(faces, work / "run", *own)
    status, text = torchrun(2, "tests.worlds", "waits", "300", *given)
    told = re.search(r"rank +: 1 .*\n +exitcode +: -9 ", text)
    epoch = torch.load(Config.from_args(given).teacher_dir("Asian") / "checkpoint.pth", weights_only=True)["epoch"]
    result.add("" if status == 1 and told and epoch == 0 else text[-500:], "", "")
    return result


def small_blocks() -> None:
    """Uses small blocks, records each one immediately, and saves the index even if the files are recent."""
    import utils.data.index
    import utils.data.store
    import utils.training.extract

    arrays.NOTED_EVERY, utils.training.extract.BLOCK, utils.data.store.BLOCK = 0.0, 8, 8
    utils.data.index.SETTLED = 0.0


def kills_of_other_stages(faces: Path, work: Path, instants: int, seed: int = 0) -> Result:
    """Kills extraction, which decodes the images first, and evaluation once each at seeded instants, and resumes them.

    All files that they write must equal those of uninterrupted stages byte for byte. Lock files are ignored: the file
    may remain after its process has ended, the lock itself does not.
    """
    random, result, durations = np.random.default_rng(seed), Result(), {}
    base, data = work / "base", work / "data"
    shutil.copytree(faces, data)
    given = [*arguments(data, base / "output", "--num_epoch", "1"), "--cache", str(base / "cache")]
    for script in ("train.py", "extract_all.py"):  # outputs of an image that is then replaced
        assert finish(script, given, work / "log") == 0, (work / "log").read_text()
    image = next((data / "train").rglob("*.jpg"))
    image.write_bytes(encode(noise(3)))

    def stages(name: str, kill: bool) -> tuple[str, dict[str, str]]:
        """Runs both scripts; returns the error output ("" if none) and the digest of each file."""
        output, cache, log = work / name / "output", work / name / "cache", work / name / "log"
        shutil.copytree(base, work / name)
        given = [*arguments(data, output, "--infer_batch_size", "8"), "--cache", str(cache)]
        for script in ("extract_all.py", "eval.evaluation"):
            if kill:
                process = start(script, given, log, small_blocks)
                time.sleep(random.uniform(0, durations[script]))
                process.kill()
                process.join()
            started = time.monotonic()
            if finish(script, given, log, small_blocks):
                return log.read_text()[-500:], {}
            durations.setdefault(script, time.monotonic() - started)
        files = [path for path in (work / name).rglob("*") if path.is_file() and path != log and path.suffix != ".lock"]
        return "", {str(path.relative_to(work / name)): sha256(path) for path in files}

    failure, wanted = stages("whole", kill=False)
    assert not failure, failure
    for k in range(instants):
        failure, found = stages(f"stages{k}", kill=True)
        other = [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
        failure = failure or (f"{other} differ" if other else "")
        said = re.search(r"Decoding \d+ of \d+ images of .*", (work / f"stages{k}" / "log").read_text())
        result.add(failure, "SIGKILL while images are decoded", said[0] if said else "")
        shutil.rmtree(work / f"stages{k}")
    return result


def terminations(faces: Path, work: Path, count: int) -> Result:
    """Sends SIGTERM or SIGINT to train.py, which would run for hours: it must save and end within seconds."""
    result = Result()
    for k in range(count):
        number, log = (signal.SIGTERM, signal.SIGINT)[k % 2], work / f"terminated{k}"
        given = arguments(faces, work / f"hours{k}", "--ethnicity", "Asian", "--num_epoch", "10000")
        process = start("train.py", given, log)
        while not (log.exists() and "epoch 2/" in log.read_text()):
            assert process.is_alive(), log.read_text()
            time.sleep(0.05)
        os.kill(process.pid, number)
        process.join(10)
        said = re.search(r"train.py: stopped .*; continue with: python train.py .*", log.read_text())
        failure = "" if said and process.exitcode == 128 + number else f"{process.exitcode}: {log.read_text()[-500:]}"
        process.kill()
        result.add(failure, "Ctrl-C or SIGTERM", said[0] if said else "")
    return result


@dataclass
class Gauge:
    """Writes memory, number of threads and number of open files of its process to a file after every epoch."""

    path: Path

    def __call__(self) -> None:
        from utils.training.state import Progress

        plain = Progress.finish_epoch

        def measured(*given):
            line = plain(*given)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            threads, files = (len(os.listdir(f"/proc/self/{what}")) for what in ("task", "fd"))
            with open(self.path, "a") as file:
                print(pages * resource.getpagesize(), threads, files, file=file)
            return line

        Progress.finish_epoch = measured


def endurance(faces: Path, work: Path, epochs: int) -> np.ndarray:
    """Returns (epochs, 3): bytes of resident memory, threads and open files of train.py after each epoch."""
    given = arguments(faces, work / "endurance", "--ethnicity", "Asian", "--num_epoch", str(epochs))
    log = work / "endurance-log"
    assert finish("train.py", given, log, Gauge(work / "gauge")) == 0, log.read_text()
    return np.loadtxt(work / "gauge", dtype=np.int64)


# Within one process ---------------------------------------------------------------------------------------------------


def stops(cfg: Config, steps: int) -> Result:
    """Trains a run of `steps` steps, five an epoch, once for each step: SIGTERM stops it there, then it is resumed."""
    result, epochs = Result(), steps // 5
    train(cfg, epochs=epochs)
    for step in range(1, steps + 1):
        stopped, message = replace(cfg, output=f"{cfg.output}-{step}"), ""

        def stop(call: int, step: int = step) -> None:
            if call == step:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            train(stopped, epochs=epochs, before_step=stop)
        except Interrupted as interrupted:
            message = str(interrupted)
        train(stopped, epochs=epochs)
        failure = difference(cfg.teacher_dir("T"), stopped.teacher_dir("T")) or ("" if message else "was not stopped")
        result.add(failure and f"step {step}: {failure}", "", "")
        shutil.rmtree(stopped.output)
    return result


class PowerLoss(Exception):
    pass


def lose_power(call: int) -> None:
    if call == 4:
        raise PowerLoss


def failing_writes(cfg: Config, sizes: int, seed: int = 0) -> Result:
    """Limits the size of files to a seeded number once a run has a checkpoint, as if the disk were full."""
    result, random = Result(), np.random.default_rng(seed)
    train(cfg)
    largest = (cfg.teacher_dir("T") / "checkpoint.pth").stat().st_size
    for k, size in enumerate(random.integers(0, largest, sizes).tolist()):
        full, message = replace(cfg, output=f"{cfg.output}-full{k}"), ""
        folder = full.teacher_dir("T")
        with contextlib.suppress(PowerLoss):
            train(replace(full, checkpoint_minutes=0.0), before_step=lose_power)
        before = sha256(folder / "checkpoint.pth")
        try:
            with largest_file(size):
                train(full)
        except InputError as error:
            message = str(error)
        failure = "" if sha256(folder / "checkpoint.pth") == before else "the checkpoint is gone"
        if not re.search(r"\.(pth|json|jsonl|txt) could not be written \(File too large\)\.$", message):
            failure = failure or f"unclear: {message!r}"
        train(full)
        failure = failure or difference(cfg.teacher_dir("T"), folder)
        result.add(failure and f"{size} bytes: {failure}", "Disk full", message)
        shutil.rmtree(full.output)
    return result


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@mock.patch("utils.data.index.SETTLED", 0.0)
def damage(cfg: Config, truncations: int, flips: int, seed: int = 0) -> Result:
    """Truncates checkpoints, weights, arrays and their sidecars, or flips one bit in them, at seeded places.

    The file must be refused with its name. The image cache is decoded again instead, and the previous checkpoint is
    used instead of a damaged one.
    """
    result, random = Result(), np.random.default_rng(seed)
    with contextlib.suppress(PowerLoss):
        train(replace(cfg, checkpoint_minutes=0.0), before_step=lose_power)
    train(cfg)
    faces, folder = Faces(cfg), cfg.teacher_dir("T")
    store, form = faces.store, ((20, 16), np.float32)
    embeddings = cfg.teacher_embeddings("T")
    made_from = {"images": store.digest, "flipped": False}
    arrays.write(embeddings, random.normal(size=(20, 16)).astype(np.float32), made_from, block_rows=8)

    def checkpoint() -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            state = Run(folder, replace(cfg, num_epoch=3), "teacher", faces.sources, faces.identities).load()
        good = (state["epoch"], state["step"]) == (2, 0) and not (folder / "previous_checkpoint.pth").exists()
        (folder / "damaged_checkpoint.pth").unlink()
        shutil.copy(kept / "previous_checkpoint.pth", folder)
        return said.getvalue() if good else ""

    def weights() -> str:
        return refusal(lambda: load_weights(Linear(), folder / "best_backbone.pth"))

    def array() -> str:
        return refusal(
            lambda: read_embeddings(embeddings, form[0], store.digest, False, "fp32", "python extract_all.py")
        )

    def images() -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            again = ImageStore(cfg)
        return said.getvalue() if np.array_equal(again.images, pixels) and again.digest == store.digest else ""

    pixels, kept = np.array(store.images), folder.parent / "kept"
    shutil.copytree(folder, kept)
    cases = {
        "Damaged checkpoint": (folder / "checkpoint.pth", checkpoint),
        "Damaged weights": (folder / "best_backbone.pth", weights),
        "Damaged embeddings": (embeddings, array),
        "Damaged sidecar of embeddings": (arrays.sidecar(embeddings), array),
        "Damaged image cache": (cfg.cache_dir / "images.npy", images),
        "Damaged sidecar of the image cache": (cfg.cache_dir / "images.json", images),
        "Damaged index of the data folder": (cfg.cache_dir / "index.npz", images),
    }
    assert not weights() and not array() and not images()  # nothing is refused while the files are intact
    for k in range(truncations + flips):
        kind = list(cases)[k % len(cases)]
        path, attempt = cases[kind]
        whole = path.read_bytes()
        place, bit = int(random.integers(len(whole))), int(random.integers(8))
        if k < truncations:
            path.write_bytes(whole[:place])
        else:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        said = attempt()
        failure = "" if path.name in said else f"not detected: {said!r}"
        result.add(failure and f"{kind}, byte {place} of {len(whole)}: {failure}", kind, said)
        path.write_bytes(whole)
    shutil.rmtree(kept)
    return result


def refusal(attempt: Callable) -> str:
    try:
        attempt()
    except InputError as error:
        return str(error)
    return ""


def refusals(cfg: Config) -> Result:
    """Tries runs that would give wrong numbers, or share a folder: each is refused before the first step."""
    result = Result()

    def tried(kind: str, sentence: str, attempt: Callable) -> None:
        said = refusal(attempt)
        result.add("" if re.search(sentence, said) else f"{kind}: {said!r}", kind, said)

    scores = iter([60.0, 70.0, 65.0])
    train(cfg, validate=lambda: ({}, next(scores)))
    folder = cfg.teacher_dir("T")
    tried("Other settings", "holds a run with other settings .*lr was 0.1", lambda: train(replace(cfg, lr=0.2)))
    image = next(Path(cfg.data).rglob("*.jpg"))
    content = image.read_bytes()
    image.write_bytes(encode(noise(77)))
    tried("Other images", r"\(images changed\)", lambda: train(cfg))
    image.write_bytes(content)
    with another_process_holding(folder) as process:
        tried("A second process", f"in use by process {process} on", lambda: train(cfg))
    for name in cfg.teachers:
        write_embeddings(cfg, name)
    inputs = Faces(cfg, inputs=cfg.teachers)
    write_targets(cfg, {name: inputs.origins[cfg.teacher_embeddings(name)] for name in cfg.teachers})
    write_embeddings(cfg, "A", images="of another index")
    tried("Embeddings of another index", "was made for other images", lambda: Faces(cfg, inputs=cfg.teachers))
    save(cfg.teacher_dir("B") / "best_backbone.pth", {"trained": torch.zeros(1)})
    tried("Targets of other teachers", "was made by other weights than", lambda: Faces(cfg, target=True))
    save(cfg.adaptor_dir("SL") / "best_backbone.pth", {"trained": torch.zeros(1)})
    tried("Targets of another adaptor", "was made by other weights than .*SL", lambda: Faces(cfg, target=True))

    def diverge() -> None:
        setup(cfg)
        network = Linear()
        losses = {"n": 0}

        def bad(image):
            losses["n"] += 1
            return {"margin": network(image).square().mean() * (float("nan") if losses["n"] == 8 else 1)}

        fit(bad, Faces(cfg), cfg.teacher_dir("N"), cfg, network, kind="teacher")

    tried("Loss not finite", "The loss 'margin' is nan in epoch 2, step 3, which was not taken", diverge)
    (folder / "best_backbone.pth").write_bytes(b"")
    tried("Damaged best weights", "set weights to last, or move", lambda: train(cfg))
    for path in folder.glob("*checkpoint.pth"):
        path.write_bytes(path.read_bytes()[:-100])
    tried("No valid checkpoint", "no older one is good", lambda: train(cfg))
    return result


@contextlib.contextmanager
def another_process_holding(path: Path) -> Iterator[int]:
    """Context in which another process holds a lock on the path; gives its process id."""
    code = "from pathlib import Path; from utils.storage.locks import locked\n"
    code += f"with locked(Path({str(path)!r})): print(1); input()"
    command = [sys.executable, "-uc", code]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


# Malicious files ------------------------------------------------------------------------------------------------------


def gadgets(marker: Path) -> dict[str, bytes]:
    """Returns pickle opcodes by name. Executing them creates the file `marker`, or would access arbitrary memory."""

    def text(value: object) -> bytes:
        encoded = str(value).encode()
        return b"X" + len(encoded).to_bytes(4, "little") + encoded

    def of(value) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]

    class Reduced:
        def __init__(self, *reduced):
            self.reduced = reduced

        def __reduce__(self):
            return self.reduced[0], self.reduced[1:]

    shell, code, path = text(f"touch {marker}"), text(f"open({str(marker)!r}, 'w')"), text(marker)
    call = b"(" + shell + b"tR"
    imported = b"cbuiltins\n__import__\n(" + text("os") + b"tR"
    return {
        "os.system": b"cos\nsystem\n" + call,
        "posix.system": b"cposix\nsystem\n" + call,
        "builtins.eval": b"cbuiltins\neval\n(" + code + b"tR",
        "builtins.exec": b"cbuiltins\nexec\n(" + code + b"tR",
        "the Python 2 name of eval": b"c__builtin__\neval\n(" + code + b"tR",
        "subprocess.Popen": b"csubprocess\nPopen\n(](" + text("touch") + path + b"etR",
        "io.open": b"cio\nopen\n(" + path + text("w") + b"tR",
        "__reduce__": of(Reduced(Path.touch, marker)),
        "nested in tuples, lists and a dictionary": b"(](}" + text("key") + b"cos\nsystem\n" + call + b"set",
        "stored in the memo and read back": b"](cos\nsystem\nq\x07h\x07" + call + b"e",
        "STACK_GLOBAL": b"\x8c\x02os\x8c\x06system\x93" + call,
        "INST": b"(" + shell + b"ios\nsystem\n",
        "OBJ": b"(cos\nsystem\n" + shell + b"o",
        "EXT1": b"\x82\xf0" + call,
        "getattr of an imported module": b"cbuiltins\ngetattr\n(" + imported + text("system") + b"tR" + call,
        "functools.partial": b"cfunctools\npartial\n(cos\nsystem\n" + shell + b"tR)R",
        "numpy.memmap": b"cnumpy\nmemmap\n(" + path + text("uint8") + text("w+") + b"K\x00(K\x04ttR",
        "array of objects": of(np.array([Reduced(Path.touch, marker)], dtype=object)),
        "array of pointers": of(Reduced(np.ndarray, (4,), np.dtype("O"), b"A" * 32)),
    }


UNKNOWN_TO_PYTORCH = ("STACK_GLOBAL", "INST", "EXT1")
"""Gadgets that PyTorch's reader refuses because of their opcode, without naming what they would call."""


def hostile_files(work: Path) -> Result:
    """Reads each gadget from a .bin, a checkpoint of ours, a released one, and one in PyTorch's legacy format."""
    result, marker = Result(), work / "executed"
    picture = pickle.dumps(encode(noise(0)), protocol=3)[2:-1]
    copyreg.add_extension("os", "system", 0xF0)
    try:
        for name, opcodes in gadgets(marker).items():
            pairs = b"\x80\x02((l" + opcodes + b"a" + picture + b"a(l\x88at."
            state = b"\x80\x02}X\x06\0\0\0weight" + opcodes + b"s."
            for file, content, read in (
                ("x.bin", pairs, load_bin),
                ("best_backbone.pth", state, load),
                ("1000backbone.pth", state, load),
                ("2000backbone.pth", None, load),
            ):
                path = work / file
                if file.endswith(".bin") or content is None:
                    path.write_bytes(content or state)
                else:
                    _write_archive(path, content, sealed=file.startswith("best"))
                said = refusal(lambda path=path, read=read: read(path))
                names_it = re.search(r"it asks for|an array of type 'O8'", said) or name in UNKNOWN_TO_PYTORCH
                failure = "executed" if marker.exists() else "" if said and names_it else f"not refused: {said!r}"
                marker.unlink(missing_ok=True)
                kind = "Code in a .bin" if file.endswith(".bin") else "Code in a checkpoint"
                result.add(failure and f"{name} in {file}: {failure}", kind, said)
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    return result


def _write_archive(path: Path, content: bytes, sealed: bool) -> None:
    """Writes an archive as torch.save does, with `content` as its pickle."""
    plain = io.BytesIO()
    torch.save({"weight": torch.zeros(1)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, content if entry.filename.endswith("data.pkl") else source.read(entry))
    if sealed:
        seal(path)


# Order ----------------------------------------------------------------------------------------------------------------


def orders(cfg: Config) -> Result:
    """Compares runs with 0, 1 and 4 loader workers, and with shuffled folder listings, with the default."""
    result = Result()
    train(cfg)
    for workers in (0, 1, 4):
        other = replace(cfg, num_workers=workers, output=f"{cfg.output}-{workers}-workers")
        train(other)
        result.add(difference(cfg.teacher_dir("T"), other.teacher_dir("T")), "", "")
    labels = Faces(cfg).columns["label"].arrays[0]
    for seed in range(3):
        other = replace(cfg, output=f"{cfg.output}-listed{seed}", cache=f"{cfg.cache}-listed{seed}")
        with _shuffled_listing(seed):
            train(other)
            failure = "" if np.array_equal(Faces(other).columns["label"].arrays[0], labels) else "other labels"
        result.add(failure or difference(cfg.teacher_dir("T"), other.teacher_dir("T")), "", "")
    return result


@contextlib.contextmanager
def _shuffled_listing(seed: int) -> Iterator[None]:
    plain, random = os.scandir, shuffling.Random(seed)

    @contextlib.contextmanager
    def shuffled(path):
        with plain(path) as entries:
            listed = list(entries)
        random.shuffle(listed)
        yield iter(listed)

    os.scandir = shuffled
    try:
        yield
    finally:
        os.scandir = plain
