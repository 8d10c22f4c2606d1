"""Stage 1 (baseline only): divides the identities of each ethnicity into one quarter per baseline teacher.

Reads   <data>/<ethnicity>/<identity>/
Writes  <output>/baseline/split/<ethnicity>.json, lists of identities (images are not opened or copied)
Run     python baseline_data_split.py [--ethnicity African]
"""

from dataclasses import replace
from pathlib import Path

from config.config import Config
from utils.data.index import Index, scan
from utils.data.sources import index_of
from utils.data.split import write_split
from utils.process import announce, run


def listed(cfg: Config) -> Index:
    index = scan(Path(cfg.data), cfg.selected_ethnicities, nested=cfg.nested_images)
    for note in index.notes(Path(cfg.data)):
        print(note)
    return index


def main(cfg: Config) -> None:
    cfg = replace(cfg, is_teacher_baseline=True)
    index = index_of(cfg, listed)
    for ethnicity in cfg.selected_ethnicities:
        identities = index.identities_of(ethnicity)
        split = write_split(cfg, ethnicity, identities)
        sizes = ", ".join(f"{quarter} {len(names):,}" for quarter, names in split.items())
        print(f"{ethnicity}: {len(identities):,} identities: {sizes}")
    announce(cfg, cfg.split_dir, "train.py")


if __name__ == "__main__":
    run(main, alone=True)
