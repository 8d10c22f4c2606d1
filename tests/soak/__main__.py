"""Runs the long reliability trials, for some minutes, and writes docs/reliability.md.

Run     python -m tests.soak   (or: make soak)
"""

import datetime
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from config.config import Config
from tests.conftest import small_config
from tests.soak import reproduction, trials
from utils.data.synthetic import generate
from utils.environment import versions
from utils.storage.files import write_text

REPORT = Path("docs/reliability.md")
EPOCHS = 20

HEAD = """# Reliability

Made by `make soak` on {date}, commit {commit}, {processor} ({threads} threads), Python {python}, PyTorch {torch}. The
trials are in [tests/soak/trials.py](../tests/soak/trials.py); the test suite runs them with fewer
kills. Instants, sizes and places are random, with a fixed seed. "Equal" means to the last bit: weights, optimizer,
position and log.

| trial | requirement | passed | seconds |
|---|---|--:|--:|
"""


def main() -> None:
    lines, messages, failures = [], {}, []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        faces = work / "faces"
        generate(faces, ("African", "Asian"), identities=4, images=6, pairs=20, seed=5)
        for k, (what, must_hold, trial) in enumerate(_trials(faces)):
            folder = work / str(k)
            folder.mkdir()
            started = time.monotonic()
            result = trial(folder)
            line = f"| {what} | {must_hold} | {result.passed}/{result.of} | {time.monotonic() - started:.0f} |"
            print(line, *result.failures, sep="\n", flush=True)
            lines.append(line)
            failures += result.failures
            messages |= {
                kind: _shortened(text, folder) for kind, text in result.messages.items() if kind not in messages
            }
        memory, threads, files = trials.endurance(faces, work, EPOCHS).T

    growth = (memory[2:].max() - memory[1]) / memory[1]
    steady = len(set(threads[1:])) == 1 and len(set(files)) == 1
    what = f"{EPOCHS} epochs of `train.py`: {memory[1] / 1e6:.0f} MB, {threads[-1]} threads, {files[-1]} open files"
    lines.append(
        f"| {what} | memory grows by less than 1 % after epoch 2; no file or thread stays open | {growth:.2%} | |"
    )
    if growth >= 0.01 or not steady:
        failures.append(f"memory grew by {growth:.2%}; threads {threads.tolist()}, open files {files.tolist()}")
    print(lines[-1])
    _write(lines, messages, failures)
    sys.exit(bool(failures))


def _trials(faces: Path) -> list[tuple[str, str, Callable[[Path], trials.Result]]]:
    def small(trial: Callable, **counts: int) -> Callable[[Path], trials.Result]:
        return lambda folder: trial(small_config(folder), **counts)

    def kills(**counts: int) -> Callable[[Path], trials.Result]:
        return partial(trials.kills_in_training, faces, **counts)

    ends_equal = "resumed by the same command, the run ends equal"
    return [
        ("SIGKILL of `train.py` at 34 random instants", ends_equal, kills(at_random=34, in_save=0)),
        ("SIGKILL of `train.py` at 16 instants inside a save", ends_equal, kills(at_random=0, in_save=16)),
        (
            "SIGKILL of extraction (which decodes the images first) and of evaluation",
            "all files equal byte for byte",
            partial(trials.kills_of_other_stages, faces, instants=20),
        ),
        (
            "SIGKILL of either of two processes, six times in a run that torchrun starts again; four such runs",
            "they end equal to an uninterrupted run",
            partial(trials.kills_of_processes, faces, runs=4, kills=6),
        ),
        (
            "SIGKILL of one of two processes while the other waits as for a GPU, and handles no signal",
            "torchrun ends it within a minute, and says who died; the checkpoint is whole",
            partial(trials.kill_while_waiting, faces),
        ),
        (
            "SIGTERM, then SIGKILL, of `reproduce.py`: all 31 stages in two slots, 6,000 pairs a group",
            "it ends with a row for every model and all tables; started once more, it skips everything",
            partial(reproduction.kills, at={signal.SIGTERM: 6, signal.SIGKILL: 17}, pairs=6000),
        ),
        ("SIGTERM in each of 30 steps", ends_equal, small(trials.stops, steps=30)),
        (
            "SIGTERM and SIGINT to `train.py`",
            "it saves and ends within ten seconds, and prints the command that resumes it",
            partial(trials.terminations, faces, count=6),
        ),
        (
            "a write fails at 20 sizes of the file",
            f"the old checkpoint is intact, the message says why; {ends_equal}",
            small(trials.failing_writes, sizes=20),
        ),
        (
            "64 truncations and 200 bit flips of checkpoints, weights, embeddings, image cache and their sidecars",
            "detected, and the file named; the previous checkpoint is used, or the file is made again",
            small(trials.damage, truncations=64, flips=200),
        ),
        (
            f"{len(trials.gadgets(Path()))} pickle gadgets, each in a `.bin` and in three kinds of checkpoint",
            "refused, none executed",
            trials.hostile_files,
        ),
        ("0, 1 and 4 workers; directories listed in three other orders", "equal runs and labels", small(trials.orders)),
        ("nine mistakes that would give wrong numbers", "refused before the first step", small(trials.refusals)),
    ]


def _shortened(text: str, folder: Path) -> str:
    """Removes the temporary folders and the settings of this run from a message."""
    text = text.replace(f"{folder}/", "").replace(f"{trials.ROOT}/", "")
    command, settings, _ = text.partition(" --data ")
    return f"{command} ..." if settings else command


def _write(lines: list[str], messages: dict[str, str], failures: list[str]) -> None:
    found = versions(Config())
    date = datetime.date.today().isoformat()
    found["commit"] = found["commit"][:12]
    head = HEAD.format(date=date, processor=found.pop("device"), **found)
    sections = "".join(f"**{kind}**\n\n    {text.splitlines()[0]}\n\n" for kind, text in messages.items())
    parts = [head + "\n".join(lines)]
    if failures:
        parts.append("Failures:\n\n" + "\n".join(f"- {failure}" for failure in failures))
    text = "\n\n".join([*parts, "## Messages", sections])
    write_text(REPORT, text.rstrip() + "\n")
    print(f"Written to {REPORT}.")


if __name__ == "__main__":
    main()
