"""Runs all stages of the paper's tables for one teachers' network, in order or in parallel on several devices.

With iresnet34 these are the models of Tables 1 to 3, with iresnet50 those of Tables 4 to 6, and in both cases a
standalone network, trained on all identities, that the paper does not have. Finished stages are skipped, interrupted
ones are resumed.

Reads   <data>, <pairs>
Writes  the outputs of the stages, below <output> and <cache>; <output>/reproduce.json; with --devices <output>/logs/
Run     python reproduce.py [--plan] [--rate 4000] [--devices 0,1,2,3] [--network iresnet50] [any other setting]
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from config.config import Config
from utils.data.pairs import read_bin
from utils.errors import InputError
from utils.process import guarded, this_command
from utils.stages.disk import items, require_room, rooms
from utils.stages.paper import FIXED, paper
from utils.stages.plan import describe
from utils.stages.rates import measured_rates, rates_from
from utils.stages.runner import Record, Runner
from utils.stages.work import RFW_IMAGES, Counts, counted, papers_counts, seconds, share_done, work_of_all
from utils.storage.locks import locked


def main(argv: list[str] | None = None) -> None:
    given, cfg = settings(argv)
    slots = len(given.devices) or 1
    require_devices(given.devices, cfg)
    stages, (counts, assumed) = paper(cfg), counts_of(cfg, may_assume=given.plan)
    work = work_of_all(stages, counts)
    output = Path(cfg.output)
    record = Record(output / "reproduce.json", sources_of(cfg, counts))
    by_name = {stage.name: stage for stage in stages}
    finished = {one.name for one in stages if record.holds(one, [by_name[name] for name in one.needs])}
    left = [stage for stage in stages if stage.name not in finished]
    needed = items(left, cfg, counts, slots)
    found = rooms(needed, cfg)
    if given.plan:
        if not given.rate:
            print("Measuring how fast this machine is, about a minute for each network.", flush=True)
        rates = rates_from(given.rate, cfg) if given.rate else measured_rates(cfg, counts.identities["All"])
        print(describe(stages, work, rates, finished, needed, found, slots))
        print("".join(assumed), end="")
        require_room(found)
        return

    require_room(found)
    weights = {name: seconds(own, rates_from(1.0, cfg)) for name, own in work.items()}
    logs = output / "logs" / cfg.network if given.devices else None
    with locked(output / "reproduce.json"):
        runner = Runner(stages, given.devices or ("",), record, logs, weights, share_done)
        if not runner.run():
            print(f"All others are finished. Fix the cause, then continue with: {this_command()}")
            sys.exit(1)
    print(f"All stages are finished: {output}/evaluation/report.html")


def settings(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """Parses the command line into reproduce.py's own options and the settings of all stages.

    On invalid options prints one sentence and exits with status 2.
    """
    parser = argparse.ArgumentParser(prog="reproduce.py", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help="print the stages, their time and disk space; run nothing")
    parser.add_argument("--rate", type=float, default=0.0, help="with --plan: training rate of the teachers, images/s")
    parser.add_argument("--devices", default="", help="GPUs that run stages in parallel: 0,1,2,3")
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        parser.print_help()
    given, rest = parser.parse_known_args(argv)
    names = [token.split("=")[0].removeprefix("--") for token in rest if token.startswith("--")]
    if fixed := [name for name in names if name in FIXED]:
        parser.exit(2, f"reproduce.py: {fixed[0]} cannot be given, since each stage has its own.\n")
    if given.rate < 0 or (given.rate and not given.plan):
        parser.exit(2, "reproduce.py: rate must be a number above 0, and belongs to --plan.\n")
    given.devices = tuple(name.strip() for name in given.devices.split(",") if name.strip())
    if len(set(given.devices)) < len(given.devices):
        parser.exit(2, f"reproduce.py: devices {','.join(given.devices)} must be different.\n")
    return given, Config.from_args(rest)


def require_devices(devices: tuple[str, ...], cfg: Config) -> None:
    """Raises InputError for a GPU that does not exist, since its stages would run on the CPU.

    On a CPU the names of devices are arbitrary: each stands for one stage at a time.
    """
    if cfg.device == "cpu" or not torch.cuda.is_available():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    if missing := [name for name in devices if name not in visible.split(",")]:
        raise InputError(f"devices names {missing[0]}, which is none of the GPUs here: choose from {visible}.")


def counts_of(cfg: Config, may_assume: bool) -> tuple[Counts, list[str]]:
    """Counts images and identities; returns the counts, and a line for each assumption.

    With `may_assume`, as for a plan, missing data is replaced by the numbers of the paper; otherwise raises InputError.
    """
    missing = [path for path in cfg.pairs_files.values() if not path.is_file()]
    assumed = []
    if missing and not may_assume:
        raise InputError(f"Missing: {', '.join(map(str, missing))}. Set pairs to the folder of these files.")
    if missing:
        assumed = [f"{cfg.pairs} lacks {missing[0].name}: sets that are not there count as {RFW_IMAGES:,} images.\n"]
    pairs = {name: RFW_IMAGES if p in missing else len({*read_bin(p)[0]}) for name, p in cfg.pairs_files.items()}
    papers = papers_counts(cfg, pairs)
    if may_assume and papers and not Path(cfg.data).is_dir():
        number = papers.images["All"]
        return papers, [f"{cfg.data} is not there: counted with the paper's {number:,} images.\n", *assumed]
    return counted(cfg, pairs), assumed


def sources_of(cfg: Config, counts: Counts) -> dict:
    """Returns the state of the input data of all stages: digest of the index, size and time of verification sets."""
    stamps = {}
    for name, path in cfg.pairs_files.items():
        stat = path.stat() if path.is_file() else None
        stamps[name] = [stat.st_size, stat.st_mtime_ns] if stat else []
    return {"data": counts.digest, "pairs": stamps}


if __name__ == "__main__":
    guarded(main)
