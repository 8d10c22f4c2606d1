"""The command line: a setting for each field of the config, explained by the comment beside it."""

import argparse
import dataclasses
import difflib
import inspect
import re
import typing

from utils.errors import InputError


def parse(cls: type, argv: list[str] | None):
    """An instance of the dataclass `cls`, its defaults changed by `--name value`.

    Prints one sentence and leaves with status 2 where a name is unknown or a value impossible.
    """
    parser = _Parser(allow_abbrev=False)
    group, comments = parser, _comments(cls)
    for field in dataclasses.fields(cls):
        section, text = comments.get(field.name, ("", ""))
        if section:
            group = parser.add_argument_group(section)
        is_list = isinstance(field.default, tuple)
        shown = ",".join(map(str, field.default)) if is_list else field.default
        switch = {"nargs": "?", "const": True} if isinstance(field.default, bool) else {}
        group.add_argument(
            f"--{field.name}",
            type=_reader(field),
            default=field.default,
            metavar="a,b,..." if is_list else _kind(field).__name__,
            help=f"{text} [{shown}]".replace("%", "%%"),
            **switch,
        )
    try:
        return cls(**vars(parser.parse_args(argv)))
    except InputError as error:
        parser.error(str(error))


def _comments(cls: type) -> dict[str, tuple[str, str]]:
    """Per field the title of the section that it opens, if it opens one, and its comment: the text of `--help`."""
    section, found = "", {}
    for line in inspect.getsource(cls).splitlines():
        if title := re.fullmatch(r"    # ([\w ]+)", line):
            section = title[1]
        elif field := re.fullmatch(r"    (\w+): .+?  # (.+)", line):
            found[field[1]] = (section, field[2])
            section = ""
    return found


def _reader(field: dataclasses.Field):
    """The function that turns the text after `--name` into the value of a field."""
    kind = _kind(field)

    def read(text: str):
        if kind is bool:
            if text.lower() not in ("true", "false"):
                raise ValueError
            return text.lower() == "true"
        if kind is tuple:
            items = [item.strip() for item in text.split(",") if item.strip()]
            return tuple(map(typing.get_args(field.type)[0], items))
        return kind(text)

    read.__name__ = "list" if kind is tuple else kind.__name__
    return read


def _kind(field: dataclasses.Field) -> type:
    """The type of a setting's value; one whose default is None is text."""
    return str if field.default is None else type(field.default)


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
        from utils.distributed import speaks  # PyTorch, which who reads settings without a fault need not have imported

        self.exit(2, f"{self.prog}: {message}\n" if speaks() else None)
