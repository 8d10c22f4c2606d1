"""Run folders: weights in the published format, the checkpoint that a run is resumed from, settings and provenance.

best_backbone.pth  best_header.pth   state dicts of the best epoch
last_backbone.pth  last_header.pth   state dicts of the last finished epoch
checkpoint.pth                       all that is needed to resume: weights, optimizer, position, log
previous_checkpoint.pth              the one before, used if the newest is corrupted
config.json                          settings, data, versions, and where the run was started and resumed
identities.txt                       the identity of each class, in order
log.jsonl                            one line of metrics per epoch

The .pth files are plain PyTorch files with a SHA-256 as their zip comment, which is checked whenever they are read.
"""

import json
import os
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from config.config import Config
from config.published import scaled_milestones
from config.registry import ADA_LOSSES
from utils.data.index import difference
from utils.distributed.collectives import on_first
from utils.distributed.world import is_first, total_batch, world_size
from utils.environment import computed_in, device_of, versions
from utils.errors import Damaged, InputError
from utils.storage.files import write_json, write_text
from utils.storage.seals import check_seal
from utils.storage.tensors import load, save
from utils.weights import IDENTITIES

CHECKPOINTS = ("checkpoint.pth", "previous_checkpoint.pth")


def problem_with(path: Path, digest: str) -> str:
    """Returns what is wrong with a .pth file that should have this SHA-256; "" if nothing is."""
    if not path.exists():
        return f"{path} is missing"
    with open(path, "rb") as file:
        reason, found = check_seal(file)
    if reason:
        return f"{path} is damaged ({reason})"
    return "" if found == digest else f"{path} is of another epoch"


class Run:
    """A run folder, which belongs to the settings and data of its first checkpoint.

    All ranks call its methods; only rank 0 reads and writes files.
    """

    def __init__(self, folder: Path, cfg: Config, kind: str, sources: dict, identities: tuple[str, ...]):
        """Raises InputError if the folder holds a run of another kind, or of other settings or data."""
        self.folder, self.cfg, self.identities = folder, cfg, identities
        self.decided_by: dict[str, Any] = {"kind": kind, "settings": _decisive(cfg, kind), "sources": sources}
        self.sessions: list[dict] = []  # position and versions at each start of the run
        self._is_described = False
        self._state: dict | None = None
        self._damage = ""
        self._extension: dict[str, list] = {}  # settings by which this session has more epochs: before, now
        self.has_checkpoint = on_first(self._read)

    def _read(self) -> bool:
        """Reads the newest checkpoint, if there is one, and keeps it for `load`: it is too large to be read twice."""
        self._state, self._damage = _newest(self.folder)
        if self._state is None:
            return False
        stored = _completed(self._state["decided_by"], self.decided_by, type(self.cfg)())
        before, now = (side["settings"]["precision"] for side in (stored, self.decided_by))
        if computed_in(before, device_of(self.cfg)) == computed_in(now, device_of(self.cfg)):
            stored["settings"]["precision"] = now  # on a CPU, fp32 and tf32 are the same numbers
        epochs_begun = self._state["epoch"] + (self._state["step"] > 0)
        stored, self._extension = _extended(stored, self.decided_by, epochs_begun)
        if different := _differences(stored, self.decided_by):
            text = "; ".join(different)
            if "identities changed" in different and (names := self._read_identities()):
                text = text.replace("identities changed", f"identities changed, {difference(names, self.identities)}")
            if {self._state["sessions"][-1]["versions"].get("processes", "1"), str(world_size())} != {"1"}:
                text = text.replace("batch_size was", "batch_size of all processes was")
            raise InputError(
                f"{self.folder} holds a run with other settings or data ({text}): {self._of_same_steps(stored)}"
                "set them as they were, set another output, or move the folder away to train anew."
            )
        return True

    def _of_same_steps(self, stored: dict) -> str:
        """Returns advice on how to take the stored run's steps in smaller batches; "" if that is impossible."""
        before, now = stored["settings"]["batch_size"], total_batch(self.cfg)
        accumulate, left = divmod(before * self.cfg.accumulate, now)
        if before <= now or left:
            return ""
        return f"accumulate {accumulate} with batch_size {self.cfg.batch_size} makes the same steps; else "

    def _read_identities(self) -> list[str]:
        """Returns the identities that the run was started with, [] if they were not written."""
        path = self.folder / "identities.txt"
        if not path.exists():
            return []
        return path.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n").split("\n")

    def load(self) -> dict | None:
        """Returns the newest intact checkpoint; None if the run has none, and on ranks other than 0.

        Prints one line if a newer checkpoint is corrupted, and one if versions or the device have changed since the run
        was interrupted, which can change the last bits of the numbers.
        """
        state, self._state = self._state, None
        if state is None:
            return None
        if self._damage:
            checkpoint, previous = (self.folder / name for name in CHECKPOINTS)
            print(f"{self._damage}: going on from {previous.name}, the one before it.")
            if checkpoint.exists():  # the next save would keep it as the previous one
                os.replace(checkpoint, self.folder / f"damaged_{checkpoint.name}")
            os.replace(previous, checkpoint)
        self.sessions = state["sessions"]
        # Of versions of this code that did not record them:
        earlier = {"processes": "1", "accumulate": "1", "infer_precision": "fp32"}
        before, now = {**earlier, **self.sessions[-1]["versions"]}, versions(self.cfg)
        if changed := [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]:
            print(f"{self.folder} goes on under other conditions, last bits may differ: {'; '.join(changed)}.")
        if self._extension:
            said = ", ".join(f"{name} was {before}, now {now}" for name, (before, now) in self._extension.items())
            print(f"{self.folder} is continued with more epochs: {said}.")
        return state

    def begin(self, epoch: int, step: int) -> None:
        """Records that the run is started or resumed here, after so many finished epochs and steps of the next.

        A session with more epochs than the one before records what was changed.
        """
        session = {"epochs done": epoch, "steps done": step, "versions": versions(self.cfg)}
        self.sessions.append(session | ({"changed": self._extension} if self._extension else {}))

    def save(self, state: dict) -> None:
        """Writes a checkpoint and keeps the one before it; with the first, also config.json and identities.txt."""
        self.has_checkpoint = True
        if not is_first():
            return
        if not self._is_described:  # only now does the run exist
            write_text(self.folder / "identities.txt", "".join(f"{name}\n" for name in self.identities))
            about = {**self.decided_by, "all settings": asdict(self.cfg), "sessions": self.sessions}
            write_json(self.folder / "config.json", about)
            self._is_described = True
        checkpoint, previous = (self.folder / name for name in CHECKPOINTS)
        save(checkpoint, {**state, "decided_by": self.decided_by, "sessions": self.sessions}, previous)

    def save_weights(self, which: str, backbone: dict, header: dict) -> dict[str, str]:
        """Writes the state dicts of the backbone and, if it is not empty, of the header.

        Returns the SHA-256 of the files by name; {} on ranks other than 0.
        """
        if not is_first():
            return {}
        states = {f"{which}_backbone.pth": backbone}
        if header:
            states[f"{which}_header.pth"] = _named(header, self.identities)
        return {name: save(self.folder / name, state) for name, state in states.items()}

    def write_log(self, entries: list[dict]) -> None:
        """Writes the whole log, so that an epoch that is repeated after a crash appears once."""
        if is_first():
            write_text(self.folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))


def _named(header: dict, identities: tuple[str, ...]) -> OrderedDict:
    """Returns a header's state dict with the identity of each class in its metadata."""
    state, about = OrderedDict(header), OrderedDict(getattr(header, "_metadata", {}))
    about[""] = {**about.get("", {}), IDENTITIES: [*identities]}
    state._metadata = about  # type: ignore[attr-defined]  # where PyTorch keeps the versions of modules
    return state


def decided_by(folder: Path) -> dict | None:
    """Returns the kind, settings and sources that decided the run in a folder; None if it holds no checkpoint.

    Raises InputError if all its checkpoints are corrupted.
    """
    state, _ = _newest(folder)
    return state and state["decided_by"]


def _newest(folder: Path) -> tuple[dict | None, str]:
    """Returns the newest intact checkpoint, None if there is none, and what is wrong with a newer one, or "".

    Raises InputError if all are corrupted. Other errors of reading pass through, since the next attempt may succeed.
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


def _decisive(cfg: Config, kind: str) -> dict[str, Any]:
    """Returns the settings that decide what training `kind` computes, with lists for tuples as in config.json."""
    # The number of ranks may change, the global batch may not.
    settings = {**cfg.decisive(kind), "batch_size": total_batch(cfg)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def _completed(stored: dict, now: dict, defaults: Config) -> dict:
    """Completes what decided a stored run by the settings that did not exist when it began, with their defaults.

    Runs from before `kind` was stored hold only some of the settings, and other values for None.
    """
    settings = stored.get("settings", {})
    if "kind" in stored:
        return {**stored, "settings": _decisive(defaults, stored["kind"]) | settings}
    chosen = {name: settings.get(name, value) for name, value in now["settings"].items()}
    for name, epochs in (("milestones", "num_epoch"), ("milestones_fc", "num_epoch_fc")):
        if settings.get(name) == []:
            chosen[name] = list(scaled_milestones(settings[epochs]))
    if settings.get("ada_m") == -1:
        chosen["ada_m"] = ADA_LOSSES[chosen["ada_loss"]].m
    return {**stored, "kind": now["kind"], "settings": chosen}


def _extended(stored: dict, now: dict, epochs_begun: int) -> tuple[dict, dict[str, list]]:
    """Adopts a larger number of epochs in what decided a stored run, if no epoch that it has begun changes by that.

    That is so if all milestones up to the epochs begun are equal. Returns what decided the run, and the settings that
    were changed, each as [before, now].
    """
    before, after = stored["settings"], now["settings"]
    for epochs, drops in (("num_epoch", "milestones"), ("num_epoch_fc", "milestones_fc")):
        if epochs in after and epochs in before and after[epochs] > before[epochs]:
            old, new = ([m for m in settings[drops] if m <= epochs_begun] for settings in (before, after))
            if old == new:
                changed = {name: [before[name], after[name]] for name in (epochs, drops) if before[name] != after[name]}
                adopted = before | {name: values[1] for name, values in changed.items()}
                return {**stored, "settings": adopted}, changed
    return stored, {}


def _differences(stored: dict, now: dict) -> list[str]:
    """Lists in words how kind, settings and sources differ from those of a stored run."""
    found = [] if stored["kind"] == now["kind"] else [f"it trains {stored['kind']}, not {now['kind']}"]
    for part in ("settings", "sources"):
        before, after = stored.get(part, {}), now[part]
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                change = f" was {before.get(name)!r}, now {after.get(name)!r}" if part == "settings" else " changed"
                found.append(name + change)
    return found
