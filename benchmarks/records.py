"""Measures the index of a large train.rec: seconds to build it and to read it from the cache, and its memory.

The records are small, 40 bytes each, in insightface's layout with 20 images per identity. In a real file the first
bytes of every record are read, and with read-ahead about the whole file; the time that its disk takes for this is not
measured here. Each step runs in its own process.

Reads   nothing
Writes  benchmarks/results/records_cpu.json and .md
Run     python -m benchmarks.records [--images 2000000] [--results folder]
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.measuring import RESULTS, in_own_process, made_by, memory, write
from config.config import Config
from utils.data.index import find_images
from utils.data.recordio import INDEX, MAGIC, RECORDS, read_index
from utils.environment import versions

IMAGES, EACH = 2_000_000, 20
WEBFACE42M = 42_474_557  # images
RECORD = np.dtype(
    [
        *(("magic", "<u4"), ("length", "<u4"), ("flag", "<u4"), ("label", "<f4"), ("id", "<u8"), ("id2", "<u8")),
        ("content", "<f4", 2),
    ]
)
"""A record with 8 bytes of content, which are two labels or an image."""


def make(images: int, folder: Path) -> None:
    """Writes train.rec and train.idx with `images` images. Apart from magic and length, a record has 32 bytes."""
    identities = -(-images // EACH)
    records = np.zeros(1 + images + identities, RECORD)
    records["magic"], records["length"], records["id"] = MAGIC, 32, np.arange(len(records))
    records["label"][1 : images + 1] = np.arange(images) // EACH
    records["flag"][images + 1 :] = records["flag"][0] = 2
    records["content"][0] = images + 1, len(records)
    bounds = np.append(np.arange(identities) * EACH, images) + 1
    records["content"][images + 1 :] = np.stack((bounds[:-1], bounds[1:]), 1)
    records.tofile(folder / RECORDS)
    with open(folder / INDEX, "w", newline="\n") as file:
        for key in range(len(records)):
            file.write(f"{key}\t{key * RECORD.itemsize}\n")


def measure(images: int) -> list[dict]:
    """Measures each step: seconds, bytes held by its result, and peak bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(images, folder)
        return [
            {"step": step, **in_own_process(_measured, function, folder, images)}
            for step, function in (
                ("the records found (`utils.data.recordio.read_index`)", _found),
                ("the index made and kept", _indexed),
                ("the index read back", _indexed),
            )
        ]


def _found(folder: Path, images: int) -> object:
    records = read_index(folder)
    assert len(records.keys) == records.keys[-1] == images
    return records


def _indexed(folder: Path, images: int) -> object:
    index = find_images(Config(data=str(folder), cache=str(folder / "cache"), ethnicities=(), device="cpu"))
    assert len(index.paths) == images
    return index


def _measured(function: Callable, *arguments) -> dict:
    """Calls a function; returns seconds, private bytes held by its result, and by how many bytes the peak rose."""
    before, private = memory("VmRSS"), memory("RssAnon")
    started = time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - started
    gc.collect()
    held = memory("RssAnon") - private
    del result
    return {"seconds": seconds, "held": held, "most": memory("VmHWM") - before}


def report(kept: dict) -> str:
    """Formats the measurements as a Markdown page."""
    images = kept["images"]
    lines = [
        "# The index of a large train.rec",
        "",
        made_by("benchmarks.records", kept["versions"]),
        f"{images:,} images in records of {RECORD.itemsize} bytes, each step in a process of its own. The last two",
        f"columns are scaled, not measured: bytes an image times the {WEBFACE42M:,} images of WebFace42M.",
        "",
        "| step | s | held, bytes an image | at most, bytes an image | held, GB, 42M | at most, GB, 42M |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in kept["steps"]:
        held, most = (row[name] / images for name in ("held", "most"))
        scaled = " | ".join(f"{each * WEBFACE42M / 1e9:.1f}" for each in (held, most))
        lines.append(f"| {row['step']} | {row['seconds']:.2f} | {held:.0f} | {most:.0f} | {scaled} |")
    lines += ["", f"At most: the mapped train.rec, {RECORD.itemsize} bytes a record here, is in it."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES, help="how many records hold an image")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that is written to")
    given = parser.parse_args()
    kept = {"versions": versions(Config(device="cpu")), "images": given.images, "steps": measure(given.images)}
    write(given.results / "records_cpu.json", kept, report(kept))
    print(json.dumps(kept["steps"], indent=2))


if __name__ == "__main__":
    main()
