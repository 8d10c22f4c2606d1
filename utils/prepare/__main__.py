"""Prepares data for the stages.

Run     python -m utils.prepare <align|rfw|pairs|rec|inspect> --help
"""

import argparse
import importlib

from utils.data.images import prepare_process

COMMANDS = {
    "align": "align photographs or loose crops to faces of 112 x 112",
    "rfw": "convert RFW's lists of pairs and aligned faces to <ethnicity>_test.bin",
    "pairs": "convert a list of pairs and a folder of faces to .bin, or back",
    "rec": "convert a folder of faces to train.rec, or back",
    "inspect": "report what a data folder holds, what it should hold, and what it shares with the pairs",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m utils.prepare", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"utils.prepare.{name}")
        command = commands.add_parser(
            name, help=text, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    given = parser.parse_args(argv)
    # Imported late: spawned processes import this module too, and utils.process imports PyTorch.
    from utils.process import guarded

    prepare_process()
    guarded(lambda: given.run(given))


if __name__ == "__main__":
    main()
