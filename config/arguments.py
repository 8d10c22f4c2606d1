"""The command line: one option per field of the config, with the comment beside the field as its help text.

Run     python -m config.arguments > docs/configuration.md   (the page of all settings)
"""

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
import types
import typing

from config import registry
from config.errors import InputError
from config.readers import READ_BY, SCRIPTS, called, listed, reads, unread


def parse(cls: type, argv: list[str] | None):
    """Returns an instance of the dataclass `cls` with its defaults changed by `--name value`.

    Prints a line that names the given settings that the script does not read. Raises InputError for an unknown name or
    an impossible value.
    """
    parser, script = _Parser(allow_abbrev=False), called(sys.argv[0])
    comments = _comments(cls)
    group: argparse.ArgumentParser | argparse._ArgumentGroup = parser
    for field in dataclasses.fields(cls):
        section, text = comments.get(field.name, ("", ""))
        if section:
            group = parser.add_argument_group(section)
        kind, _, _ = kind_of(field)
        switch: dict[str, typing.Any] = {"nargs": "?", "const": True} if kind is bool else {}
        is_read = reads(script, field.name)
        elsewhere = "" if is_read else f" (not read by {script}, but by {listed(READ_BY[field.name])})"
        group.add_argument(
            f"--{field.name}",
            type=_reader(field),
            default=argparse.SUPPRESS,  # settings that were given must be distinguishable from defaults
            metavar="a,b,..." if kind is tuple else kind.__name__,
            help=f"{text} [{as_text(field.default)}]{elsewhere}".replace("%", "%%"),
            **switch,
        )
    given = vars(parser.parse_args(argv))
    settings = cls(**given)
    if line := unread(script, [*given]):
        print(line)
    return settings


def kind_of(field: dataclasses.Field) -> tuple[type, type | None, bool]:
    """Returns the type of a field, the type of its items if it is a tuple, and whether it may be None."""
    options = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    origin = typing.get_origin(options[0])
    return origin or options[0], typing.get_args(options[0])[0] if origin else None, len(options) > 1


def as_text(value: object) -> str:
    """Returns a value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def table(cls: type) -> str:
    """Returns a Markdown table of all settings: name, default, meaning, and the scripts that read it."""
    lines, comments = [], _comments(cls)
    for field in dataclasses.fields(cls):
        section, text = comments[field.name]
        if section:
            lines += [f"\n## {section}\n", "| setting | default | meaning | read by |", "|---|---|---|---|"]
        readers = READ_BY.get(field.name, SCRIPTS)
        others = [script for script in SCRIPTS if script not in readers]
        few = others if len(others) < len(readers) else readers
        read_by = "all" + " but " * bool(others) if few is others else ""
        read_by += ", ".join(f"`{script}`" for script in few)
        default = f"`{as_text(field.default)}`" if field.default != "" else "empty"
        lines.append(f"| `{field.name}` | {default} | {text.replace('|', '&#124;').replace('<', '&lt;')} | {read_by} |")
    return "\n".join(lines).lstrip() + "\n"


def _comments(cls: type) -> dict[str, tuple[str, str]]:
    """Returns for each field the title of the section that starts with it, or "", and its help text.

    The help text is the comment beside the field, with the name of a table of config/registry.py replaced by its keys.
    """
    section, found = "", {}
    for line in inspect.getsource(cls).splitlines():
        if title := re.fullmatch(r"    # ([\w ]+)", line):
            section = title[1]
        elif field := re.fullmatch(r"    (\w+): .+?  # (.+)", line):
            found[field[1]] = (section, re.sub(r"NETWORKS|(ADA_)?LOSSES", _listed, field[2]))
            section = ""
    return found


def _listed(table: re.Match) -> str:
    return ", ".join(getattr(registry, table[0]))


def _reader(field: dataclasses.Field):
    """Returns a function that parses the text after `--name` into the value of a field."""
    kind, item, is_optional = kind_of(field)

    def read(text: str):
        if is_optional and text == "None":
            return None
        if kind is bool:
            if text.lower() not in ("true", "false"):
                raise ValueError
            return text.lower() == "true"
        if kind is tuple:
            return tuple(item(part.strip()) for part in text.split(",") if part.strip())
        return kind(text)

    read.__name__ = "list" if kind is tuple else kind.__name__
    return read


_INIT, _ACCUMULATE = "init_from names the weights to start from", "accumulate is the number of batches in a step"
OTHER_NAMES = {
    **dict.fromkeys(("pretrained", "finetune", "init_weights"), _INIT),
    **dict.fromkeys(("gradient_acc", "gradient_accumulation", "accumulation_steps", "accum_iter"), _ACCUMULATE),
    **dict.fromkeys(("resume", "resume_from"), "the same command resumes a stopped run; " + _INIT),
}
"""What to set instead of settings that other projects have, by their names."""


class _Parser(argparse.ArgumentParser):
    def parse_args(self, argv=None):
        settings, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            if not name.startswith("--"):
                self.error(f"{name!r} is not understood: settings are given as --name value.")
            if name.lstrip("-") in OTHER_NAMES:
                self.error(f"unknown setting {name}: {OTHER_NAMES[name.lstrip('-')]}.")
            close = difflib.get_close_matches(name, self._option_string_actions, 1)
            advice = f"did you mean {close[0]}?" if close else "--help lists all settings."
            self.error(f"unknown setting {name}: {advice}")
        return settings

    def error(self, message: str):
        raise InputError(message)  # utils.process prints it once, on one rank


PAGE = """# Configuration

Every setting is a line of [config/config.py](../config/config.py). Edit its default there, or give it to any script on
the command line: `--name value`, lists `--name a,b`, switches `--name` or `--name False`.

**None means automatic**, as the meaning says. For epochs, milestones and margins, None stands for the published value.
Every run prints the values in use and writes them to its `config.json`.

You can give all scripts the same settings: a script names those that it does not read, and ignores them. To resume a
run, give the settings that it was started with. Only the settings in `CHANGES_NO_NUMBER`
([config/readers.py](../config/readers.py)) may differ.

"""

if __name__ == "__main__":
    from config.config import Config

    print(PAGE + table(Config), end="")
