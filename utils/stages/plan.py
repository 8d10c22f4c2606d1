"""Describes the plan of all stages as text: inputs, outputs, amount of work, time and disk space."""

from collections.abc import Set
from pathlib import Path

from utils.data.store import printed_bytes
from utils.stages.disk import Item, Room
from utils.stages.paper import Stage
from utils.stages.rates import ADAPT, INFER, TRAIN, Rates
from utils.stages.work import Work, epochs, makespan, seconds

UNITS = {TRAIN: "images", INFER: "images", ADAPT: "rows"}


def describe(
    stages: list[Stage],
    work: dict[str, Work],
    rates: Rates,
    finished: Set[str],
    items: list[Item],
    rooms: list[Room],
    slots: int,
) -> str:
    """Returns the commands in order, then rates, time and disk space of the stages that are not `finished`.

    `slots` is the number of stages that run at the same time, each on its own device.
    """
    lines = []
    for number, stage in enumerate(stages, 1):
        time = "finished" if stage.name in finished else _duration(seconds(work[stage.name], rates))
        lines += [
            f"{number:2} {stage.name}  {time}",
            f"   $ {stage.command}",
            f"   reads   {_shown(stage.reads)}",
            f"   writes  {_shown(stage.writes)}",
        ]
        if amounts := _amounts(work[stage.name]):
            trains = any(kind in (TRAIN, ADAPT) for kind, _ in work[stage.name])
            lines.append(f"   sees    {amounts}{f' ({epochs(stage)} epochs)' if trains else ''}")
    left = [stage for stage in stages if stage.name not in finished]
    times = {stage.name: seconds(work[stage.name], rates) for stage in left}
    total = sum((work[stage.name] for stage in left), Work())
    devices = "one device" if slots == 1 else f"{slots} devices ({_duration(sum(times.values()))} of one device)"
    return "\n".join(
        [
            *lines,
            "",
            f"Rates  {'; '.join(_rate(*kind, rate) for kind, rate in rates.items())}",
            f"Sees   {_amounts(total)}",
            f"Time   {_duration(makespan(times, left, slots))} on {devices}",
            *(f"Disk   {printed_bytes(item.needed):>9} in {item.setting}: {item.what}" for item in items),
            *(f"       {room}" for room in rooms),
        ]
    )


def _amounts(work: Work) -> str:
    amounts = [
        f"{count:,} {UNITS[kind]} in {kind}{_network_suffix(network)}" for (kind, network), count in work.items()
    ]
    return "; ".join(amounts)


def _rate(kind: str, network: str, rate: float) -> str:
    return f"{kind}{_network_suffix(network)} {rate:,.1f} {UNITS[kind]}/s"


def _network_suffix(network: str) -> str:
    return network and f" of {network}"


def _duration(time: float) -> str:
    return f"{time / 3600:,.1f} h" if time >= 360 else f"{time / 60:,.1f} min"


def _shown(paths: tuple[Path, ...]) -> str:
    """Returns the paths as text, with those of one folder as folder/{a,b}."""
    folders: dict[Path, list[str]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path.name)
    return ", ".join(
        f"{folder}/{names[0]}" if len(names) == 1 else f"{folder}/{{{','.join(names)}}}"
        for folder, names in folders.items()
    )
