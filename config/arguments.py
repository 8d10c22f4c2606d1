"""The command line: a setting for each field of the config, explained by the comment beside it.

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
    """An instance of the dataclass `cls`, its defaults changed by `--name value`.

    Prints a line that names the settings which the script does not read. Raises InputError where a name is unknown or a
    value impossible.
    """
    parser, script = _Parser(allow_abbrev=False), called(sys.argv[0])
    group, comments = parser, _comments(cls)
    for field in dataclasses.fields(cls):
        section, text = comments.get(field.name, ("", ""))
        if section:
            group = parser.add_argument_group(section)
        kind, _, _ = kind_of(field)
        switch = {"nargs": "?", "const": True} if kind is bool else {}
        is_read = reads(script, field.name)
        elsewhere = "" if is_read else f" (not read by {script}, but by {listed(READ_BY[field.name])})"
        group.add_argument(
            f"--{field.name}",
            type=_reader(field),
            default=argparse.SUPPRESS,  # what was given shall be told from what was not
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
    """The type of a field's values, of the items of a tuple, and whether None is allowed, from its annotation."""
    options = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    origin = typing.get_origin(options[0])
    return origin or options[0], typing.get_args(options[0])[0] if origin else None, len(options) > 1


def as_text(value: object) -> str:
    """A value as it is given on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def table(cls: type) -> str:
    """A Markdown table of all settings: name, default, meaning, and the scripts that read it."""
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
    """Per field the title of the section that it opens, if it opens one, and the text of `--help`.

    The text is the field's comment, in which the name of a table of config/registry.py stands for the names in it.
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
    """The function that turns the text after `--name` into the value of a field."""
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


class _Parser(argparse.ArgumentParser):
    def parse_args(self, argv=None):
        settings, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            if not name.startswith("--"):
                self.error(f"{name!r} is not understood: settings are given as --name value.")
            close = difflib.get_close_matches(name, self._option_string_actions, 1)
            advice = f"did you mean {close[0]}?" if close else "--help lists all settings."
            self.error(f"unknown setting {name}: {advice}")
        return settings

    def error(self, message: str):
        raise InputError(message)  # of several processes one says so, which is no business of a parser's


PAGE = """# Configuration

Each setting is a line of [config/config.py](../config/config.py), whose default you edit, and an option of every
script: `--name value`, lists `--name a,b`, switches `--name` or `--name False`. **None means automatic**, as the
comment says. For epochs, milestones and margins it stands for the published value of what is trained; each run prints
these values and keeps them in its `config.json`.

A script may be given settings that it does not read, so that one line of settings serves all stages. It names them when
it starts. When a run is resumed, every setting that its script reads must be as it was, but for those that change no
number (`CHANGES_NO_NUMBER` in [config/readers.py](../config/readers.py)).

"""

if __name__ == "__main__":
    from config.config import Config

    print(PAGE + table(Config), end="")
