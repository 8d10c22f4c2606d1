"""Runs all stages of the paper's tables for one teachers' network, in order or in parallel on several devices.

These are the models of Tables 1 to 3 (iresnet34) or 4 to 6 (iresnet50), and a standalone network, trained on all
identities, that the paper does not have. Finished stages are skipped, interrupted ones are resumed.

Reads   <data>, <pairs>
Writes  the outputs of the stages, below <output> and <cache>; <output>/reproduce.json; with --devices <output>/logs/;
        with --seeds the outputs of each seed below <output>/seed<k>, and <output>/seeds/, the tables over all seeds
Run     python reproduce.py [--plan] [--rate 4000] [--devices 0,1,2,3] [--seeds 0,1,2] [any other setting]
"""

import argparse
import math
import os
import sys
from pathlib import Path

import torch

from config.config import Config
from eval.seeds import write_tables
from utils.errors import InputError
from utils.process import guarded, this_command
from utils.stages.disk import items, require_room, rooms
from utils.stages.paper import FIXED, of_seeds, paper
from utils.stages.plan import describe
from utils.stages.rates import measured_rates, rates_from
from utils.stages.runner import Record, Runner, stamps
from utils.stages.work import counts_of, seconds, share_done, work_of_all
from utils.storage.locks import locked


def main(argv: list[str] | None = None) -> None:
    given, cfg = settings(argv)
    slots = len(given.devices) or 1
    require_devices(given.devices, cfg)
    stages = of_seeds(cfg, given.seeds) if given.seeds else paper(cfg)
    counts, assumed = counts_of(cfg, may_assume=given.plan)
    work = work_of_all(stages, counts)
    output = Path(cfg.output)
    record = Record(output / "reproduce.json", {"data": counts.digest, "pairs": stamps([*cfg.pairs_files.values()])})
    by_name = {stage.name: stage for stage in stages}
    finished = {one.name for one in stages if record.holds(one, [by_name[name] for name in one.needs])}
    left = [stage for stage in stages if stage.name not in finished]
    needed = items(left, cfg, counts, slots)
    found = rooms(needed, cfg)
    if given.plan:
        if not given.rate:
            print("Measuring how fast this machine is: about a minute.", flush=True)
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
            print(f"Fix the cause, then continue with: {this_command()}")
            sys.exit(1)
    evaluated = [stage.cfg.evaluation_dir for stage in stages if stage.kind == "evaluation"]
    if given.seeds:
        write_tables(evaluated, output / "seeds")
    print(f"All stages are finished: {', '.join(f'{folder}/report.html' for folder in evaluated)}")


def settings(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """Parses the command line into reproduce.py's own options and the settings of all stages.

    On invalid options prints one sentence and exits with status 2.
    """
    parser = argparse.ArgumentParser(prog="reproduce.py", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help="print the stages, their time and disk space; run nothing")
    parser.add_argument("--rate", type=_rate, help="with --plan: training rate of the teachers, images/s")
    parser.add_argument("--devices", default="", help="GPUs that run stages in parallel: 0,1,2,3")
    parser.add_argument("--seeds", default="", help="run all stages for each of these seeds: 0,1,2")
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        parser.print_help()
    given, rest = parser.parse_known_args(argv)
    names = [token.split("=")[0].removeprefix("--") for token in rest if token.startswith("--")]
    if fixed := [name for name in names if name in FIXED]:
        parser.exit(2, f"reproduce.py: {fixed[0]} cannot be given: reproduce.py runs all stages.\n")
    if given.rate is not None and not (given.plan and 0 < given.rate < math.inf):
        parser.exit(2, "reproduce.py: rate must be a number above 0, and belongs to --plan.\n")
    given.devices = tuple(name.strip() for name in given.devices.split(",") if name.strip())
    if len(set(given.devices)) < len(given.devices):
        parser.exit(2, f"reproduce.py: devices {','.join(given.devices)} must be different.\n")
    seeds = [name.strip() for name in given.seeds.split(",") if name.strip()]
    if seeds and (len({*seeds}) < max(len(seeds), 2) or not all(map(str.isdecimal, seeds)) or "seed" in names):
        parser.exit(2, f"reproduce.py: seeds {given.seeds} must be two or more different numbers, without seed.\n")
    given.seeds = tuple(map(int, seeds))
    return given, Config.from_args(rest)


def _rate(text: str) -> float:
    """The number, or NaN, which `settings` refuses."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def require_devices(devices: tuple[str, ...], cfg: Config) -> None:
    """Raises InputError for a GPU that does not exist, since its stages would run on the CPU.

    On a CPU the names of devices are arbitrary: each stands for one stage at a time.
    """
    if cfg.device == "cpu" or not torch.cuda.is_available():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    if missing := [name for name in devices if name not in visible.split(",")]:
        raise InputError(f"devices names {missing[0]}, which is none of the GPUs here: choose from {visible}.")


if __name__ == "__main__":
    guarded(main)
