"""Prepares data for the stages: a word says what is to be done.

Run     python -m utils.prepare <align|rfw|pairs|rec|inspect> --help
"""

import argparse
import importlib

from utils.data.images import prepare_process

COMMANDS = {
    "align": "photographs or loose crops to aligned faces of 112 x 112",
    "rfw": "RFW's lists of pairs and aligned faces to <ethnicity>_test.bin",
    "pairs": "any list of pairs and folder of faces to .bin, and back",
    "rec": "a folder of faces to train.rec, and back",
    "inspect": "what a data folder holds, what it should hold, and what of it is in the pairs too",
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
    # Not at the top, which every process that is started reads: PyTorch comes with it.
    from utils.process import guarded

    prepare_process()
    guarded(lambda: given.run(given))


if __name__ == "__main__":
    main()
