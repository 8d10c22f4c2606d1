"""Run folders: weights in the published format, the checkpoint a run continues from, and what decided the run.

best_backbone.pth  best_header.pth   state dicts of the best epoch
last_backbone.pth  last_header.pth   state dicts of the last finished epoch
checkpoint.pth                       everything the run needs to go on: weights, optimizer, position, log
previous_checkpoint.pth              the one before, for when the newest is damaged
config.json                          settings, data, versions, and when the run was started and continued
identities.txt                       the identity of each class, in order
log.jsonl                            one line of metrics per epoch

The .pth files are plain PyTorch files whose zip comment is a SHA-256, checked whenever they are read.
"""

import contextlib
import errno
import functools
import json
import os
import pickle
import platform
import re
import subprocess
from collections import OrderedDict
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from config.config import Config
from config.published import ADA_MARGINS, scaled_milestones
from utils.distributed import on_first
from utils.errors import Damaged, InputError
from utils.files import check_seal, replaced, seal, sha256, sha256_of, write_json, write_text
from utils.world import is_first, world_size

CHECKPOINTS = ("checkpoint.pth", "previous_checkpoint.pth")
IDENTITIES = "identities"
"""Where a header's state dict says which identity each of its classes is: no parameter, whoever loads it skips it."""
OURS = re.compile(r"((best|last)_(backbone|header)|(previous_)?checkpoint)\.pth")
"""The names of files that we write, and seal; files of other names come from elsewhere."""


def save(path: Path, value: Any, previous: Path | None = None) -> str:
    """Writes and seals a file, and gives its SHA-256; the one that it replaces is kept as `previous`, if given."""
    with replaced(path, previous) as partial:
        try:
            # Given a path, PyTorch would not say why it cannot write, and would put the path into the file.
            with open(partial, "wb") as file:
                torch.save(value, file)
        except RuntimeError as error:  # PyTorch closes its archive after a write has failed, which fails in turn
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        return seal(partial)


def load(path: Path) -> Any:
    """Reads tensors and plain values to the CPU; refuses whatever else a file holds, so that none can run code.

    Raises InputError where the file is not there or holds anything else, Damaged where it is one of ours and not as it
    was written.
    """
    return load_with_digest(path)[0]


def load_with_digest(path: Path) -> tuple[Any, str]:
    """Like `load`; also the SHA-256 of the file that was read, even if another takes its place in the meantime."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    with file:
        if OURS.fullmatch(path.name):
            reason, digest = check_seal(file)
            if reason:
                raise Damaged(f"{path} is damaged ({reason})")
        else:
            digest = sha256_of(file)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True), digest
        except MemoryError:
            raise
        except Exception as error:
            # EINVAL is no failed read: in a short archive PyTorch looks for the end before the file begins.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            # torch.load has no exception of its own: what it raises depends on what is wrong where. Its own words on
            # what is not allowed advise to allow it.
            asked = re.search(r"GLOBAL ([\w.]+)", str(error))
            refused = f"it asks for {asked[1]}" if asked else "it holds more than tensors and plain values"
            reason = refused if isinstance(error, pickle.UnpicklingError) else str(error).strip().split("\n")[0]
            reason = "it ends too early" if isinstance(error, OSError | EOFError) else reason
            raise InputError(f"{path} is damaged or no checkpoint ({reason.rstrip('.')}): replace it.") from error


def find_weights(folder: Path, which: str) -> Path | None:
    """The backbone's state dict in a run folder: the released `<step>backbone.pth`, else our own `which` (best, last).

    None where there is none. Raises InputError where it cannot be known which file is meant.
    """
    own = [folder / f"{kind}_backbone.pth" for kind in ("best", "last")]
    released = sorted(set(folder.glob("*backbone.pth")).difference(own))
    if released and len(found := released + [path for path in own if path.exists()]) > 1:
        raise InputError(f"{folder} holds {', '.join(path.name for path in found)}: keep the one that is to be used.")
    mine = folder / f"{which}_backbone.pth"
    return released[0] if released else mine if mine.exists() else None


def need_weights(folders: list[Path], which: str) -> list[Path]:
    """Like `find_weights` for several run folders; raises InputError that names all where there is none."""
    found = [find_weights(folder, which) for folder in folders]
    missing = [str(folder) for folder, path in zip(folders, found, strict=True) if path is None]
    if missing:
        raise InputError(
            f"No {which}_backbone.pth in {', '.join(missing)}: train it first, or put a released *backbone.pth there."
        )
    return found


def load_centres(weights: Path) -> tuple[torch.Tensor, tuple[str, ...], str]:
    """Class centres (D, C) of the header that was trained with a backbone's `weights`.

    Also the identities of its classes, empty where it does not say (released ones do not), and the file's SHA-256.
    Raises InputError where there is no such header.
    """
    path = weights.with_name(weights.name.replace("backbone", "header"))
    try:
        state, digest = load_with_digest(path)
    except Damaged as error:
        raise InputError(f"{error}: start its training again, which writes it anew if it can.") from error
    kernel = state.get("kernel") if isinstance(state, dict) else None
    is_dense = isinstance(kernel, torch.Tensor) and kernel.layout == torch.strided and kernel.is_floating_point()
    if not is_dense or kernel.ndim != 2:
        raise InputError(f"{path} is no header: expected its centres, kernel (dimensions, classes).")
    about = getattr(state, "_metadata", {})
    about = about.get("") if isinstance(about, dict) else None
    identities = about.get(IDENTITIES, ()) if isinstance(about, dict) else ()
    return kernel, tuple(identities), digest


def wrong_with(path: Path, digest: str) -> str:
    """What is wrong with one of our files that should have this digest, or nothing."""
    if not path.exists():
        return f"{path} is missing"
    with open(path, "rb") as file:
        reason, found = check_seal(file)
    if reason:
        return f"{path} is damaged ({reason})"
    return "" if found == digest else f"{path} is of another epoch"


def weights_with_digest(folder: Path, digest: str) -> Path | None:
    """The backbone in a run folder whose SHA-256 is `digest`, be it the best, the last or a released one."""
    return next((path for path in sorted(folder.glob("*backbone.pth")) if sha256(path) == digest), None)


class Run:
    """One run folder: belongs to the settings and data that its first checkpoint was made with.

    Of several processes, all of which call its methods, rank 0 reads and writes it.
    """

    def __init__(self, folder: Path, cfg: Config, kind: str, sources: dict, identities: tuple[str, ...]):
        """Raises InputError where the folder holds a run of another kind, or of other settings or data."""
        self.folder, self.cfg, self.identities = folder, cfg, identities
        self.decided_by = {"kind": kind, "settings": _plain(cfg.decisive(kind)), "sources": sources}
        self.sessions: list[dict] = []  # where each process that worked on the run began, and its versions
        self._is_described = False
        self._state, self._damage = None, ""
        self.has_checkpoint = on_first(self._read)

    def _read(self) -> bool:
        """Whether there is a checkpoint, which is read once: it is as large as the networks and the optimizer."""
        self._state, self._damage = _newest(self.folder)
        if self._state is None:
            return False
        stored = _completed(self._state["decided_by"], self.decided_by, type(self.cfg)())
        if different := _differences(stored, self.decided_by):
            text = "; ".join(different)
            if {self._state["sessions"][-1]["versions"].get("processes", "1"), str(world_size())} != {"1"}:
                text = text.replace("batch_size was", "batch_size of all processes was")
            raise InputError(
                f"{self.folder} holds a run with other settings or data ({text}): "
                "set them as they were, set another output, or move the folder away to train anew."
            )
        return True

    def load(self) -> dict | None:
        """Hands over the state of the newest good checkpoint, or None where the run has none, and on other ranks.

        Says what is damaged, and what is other than when the run was left: it decides the last bits of the numbers.
        """
        state, self._state = self._state, None
        if state is None:
            return None
        if self._damage:
            checkpoint, previous = (self.folder / name for name in CHECKPOINTS)
            print(f"{self._damage}: going on from {previous.name}, the one before it.")
            if checkpoint.exists():  # or the next save would keep it as the previous
                os.replace(checkpoint, self.folder / f"damaged_{checkpoint.name}")
            os.replace(previous, checkpoint)
        self.sessions = state["sessions"]
        before, now = {"processes": "1", **self.sessions[-1]["versions"]}, versions(self.cfg)
        if changed := [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]:
            print(f"{self.folder} goes on under other conditions, last bits may differ: {'; '.join(changed)}.")
        return state

    def begin(self, epoch: int, step: int) -> None:
        """Notes that this process goes on with the run after so many epochs and steps."""
        self.sessions.append({"epochs done": epoch, "steps done": step, "versions": versions(self.cfg)})

    def save(self, state: dict) -> None:
        self.has_checkpoint = True
        if not is_first():
            return
        if not self._is_described:  # not before there is something to be described
            write_text(self.folder / "identities.txt", "".join(f"{name}\n" for name in self.identities))
            about = {**self.decided_by, "all settings": asdict(self.cfg), "sessions": self.sessions}
            write_json(self.folder / "config.json", about)
            self._is_described = True
        checkpoint, previous = (self.folder / name for name in CHECKPOINTS)
        save(checkpoint, {**state, "decided_by": self.decided_by, "sessions": self.sessions}, previous)

    def save_weights(self, which: str, backbone: dict, header: dict) -> dict[str, str]:
        """Writes the state dicts, that of a header if it is not empty; gives the digests of the files by name."""
        if not is_first():
            return {}
        states = {f"{which}_backbone.pth": backbone}
        if header:
            states[f"{which}_header.pth"] = _named(header, self.identities)
        return {name: save(self.folder / name, state) for name, state in states.items()}

    def write_log(self, entries: list[dict]) -> None:
        """Written as a whole: an epoch that is repeated after a crash does not appear twice."""
        if is_first():
            write_text(self.folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))


def _named(header: dict, identities: tuple[str, ...]) -> OrderedDict:
    """A header's state dict that says which identity each class is."""
    state, about = OrderedDict(header), OrderedDict(getattr(header, "_metadata", {}))
    about[""] = {**about.get("", {}), IDENTITIES: [*identities]}
    state._metadata = about
    return state


def decided_by(folder: Path) -> dict | None:
    """The settings and sources that decided the run of a folder, or None where it holds no checkpoint.

    Raises InputError where no checkpoint of it is good.
    """
    state, _ = _newest(folder)
    return state and state["decided_by"]


def _newest(folder: Path) -> tuple[dict | None, str]:
    """The newest checkpoint that is good, None where there is none, and what is wrong with a newer one.

    Raises InputError where one cannot be read for another reason than damage: the next attempt may succeed.
    """
    damage = ""
    for path in (folder / name for name in CHECKPOINTS):
        if path.exists():
            try:
                state = load(path)
                if isinstance(state, dict) and "decided_by" in state:
                    return state, damage
                damage = damage or f"{path} is no checkpoint of a run"
            except Damaged as error:
                damage = damage or str(error)
    if damage:
        raise InputError(f"{damage}, and no older one is good: move {folder} away to train anew.")
    return None, ""


def versions(cfg: Config) -> dict[str, str]:
    """What the last bits of a run's numbers depend on beside its settings and data."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": metadata.version("torchvision"),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "device": torch.cuda.get_device_name() if device_of(cfg).type == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "processes": str(world_size()),
        "compile": str(cfg.compile),
        "cudnn_benchmark": str(cfg.cudnn_benchmark),
        "commit": _commit(),
    }


def numerics(cfg: Config) -> dict[str, str]:
    """Of `versions`, what decides the last bits of a network's output."""
    found = versions(cfg)
    return {name: found[name] for name in ("torch", "device", "threads", "cudnn_benchmark")}


def device_of(cfg: Config) -> torch.device:
    return torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")


@functools.cache
def _commit() -> str:
    """The git commit of this code, with -dirty where files differ from it."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here_only = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}  # not a repository that holds this folder
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, env=here_only).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as config.json shows them: tuples become lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def _completed(stored: dict, now: dict, defaults: Config) -> dict:
    """What decided a run, completed by the settings that did not exist when the run began.

    A setting that is missing from the run takes its default. Runs from before `kind` was kept hold a choice of the
    settings only, and other spellings of None.
    """
    settings = stored.get("settings", {})
    if "kind" in stored:
        return {**stored, "settings": _plain(defaults.decisive(stored["kind"])) | settings}
    chosen = {name: settings.get(name, value) for name, value in now["settings"].items()}
    for name, epochs in (("milestones", "num_epoch"), ("milestones_fc", "num_epoch_fc")):
        if settings.get(name) == []:
            chosen[name] = list(scaled_milestones(settings[epochs]))
    if settings.get("ada_m") == -1:
        chosen["ada_m"] = ADA_MARGINS[chosen["ada_loss"]]
    return {**stored, "kind": now["kind"], "settings": chosen}


def _differences(stored: dict, now: dict) -> list[str]:
    found = [] if stored["kind"] == now["kind"] else [f"it trains {stored['kind']}, not {now['kind']}"]
    for part in ("settings", "sources"):
        before, after = stored.get(part, {}), now[part]
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                change = f" was {before.get(name)!r}, now {after.get(name)!r}" if part == "settings" else " changed"
                found.append(name + change)
    return found
