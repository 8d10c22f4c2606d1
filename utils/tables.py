"""Renders tables as aligned Markdown, CSV with all digits, LaTeX with booktabs, and HTML."""

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from types import MappingProxyType

LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {c: f"${c}$" for c in "<>|"}
)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; `low` and `high` are NaN if the interval is unknown."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True if the whole interval is above zero, or below it."""
        return self.low > 0 or self.high < 0


RULE_OF_THREE = 3
"""With no error on n pairs, the rate is below 3 / n with 95 % confidence (Hanley and Lippman-Hand, JAMA 1983)."""


@dataclass(frozen=True)
class Rate:
    """Error rate: the number of wrong decisions `errors` on `of` pairs."""

    errors: int
    of: int

    @property
    def value(self) -> float:
        """The rate, in [0, 1]."""
        return self.errors / self.of

    @property
    def resolved(self) -> bool:
        """True with at least three errors: the rate is then at least 3 / of, and distinguishable from zero."""
        return self.errors >= RULE_OF_THREE

    def text(self) -> str:
        """Returns three digits of the rate, or, if it is not resolved, "< " and its bound 3 / of, rounded up."""
        if self.resolved:
            return f"{self.value:#.3g}"
        if self.of < RULE_OF_THREE:
            return "unknown"
        return f"< {float(Context(prec=2, rounding=ROUND_CEILING).divide(RULE_OF_THREE, self.of)):.2g}"


Cell = str | float | bool | None | Estimate | Rate
"""None stands for a value that is unknown or undefined."""


@dataclass(frozen=True)
class Table:
    """A table; the first `names` columns hold names, the others values."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    names: int
    notes: tuple[str, ...] = ()
    digits: int = 2  # decimals of a number in Markdown, LaTeX and HTML
    is_printed: bool = True  # on the console, in addition to the files

    def forms(self) -> dict[str, str]:
        """Returns the table as text by the ending of its file."""
        return {"md": self.markdown(), "csv": self.csv(), "tex": self.latex()}

    def markdown(self) -> str:
        """Returns Markdown with aligned columns, readable in a terminal."""
        rows = self._shown()
        widths = [max(map(len, column)) for column in zip(self.header, *rows, strict=True)]

        def line(cells: tuple[str, ...]) -> str:
            left = [cell.ljust(width) for cell, width in zip(cells[: self.names], widths, strict=False)]
            right = [cell.rjust(width) for cell, width in zip(cells[self.names :], widths[self.names :], strict=True)]
            return f"| {' | '.join(left + right)} |"

        rule = ["-" * (width + 2) if k < self.names else "-" * (width + 1) + ":" for k, width in enumerate(widths)]
        text = [f"## {self.title}", "", line(self.header), f"|{'|'.join(rule)}|", *map(line, rows)]
        for note in self.notes:
            text += ["", note]
        return "\n".join(text) + "\n"

    def csv(self) -> str:
        """Returns CSV with all digits. An estimate has three columns (value, low, high), a rate two (errors, of)."""
        header, rows = [], [[] for _ in self.rows]
        for name, column in zip(self.header, zip(*self.rows, strict=True), strict=True):
            kind = next((type(cell) for cell in column if isinstance(cell, Estimate | Rate)), None)
            parts = {Estimate: ("", "low", "high"), Rate: ("errors", "of")}.get(kind, ("",))
            header += [f"{name} {part}".strip() for part in parts]
            for row, cell in zip(rows, column, strict=True):
                row += [""] * len(parts) if cell is None else vars(cell).values() if kind else [cell]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        return text.getvalue()

    def as_dict(self) -> dict:
        """Returns notes and rows for JSON, with all digits; None, NaN and infinite values become null."""
        rows = [dict(zip(self.header, map(_plain, row), strict=True)) for row in self.rows]
        return {"notes": [*self.notes], "rows": rows}

    def latex(self) -> str:
        """Returns a LaTeX `table` for the package booktabs, with a rule wherever names before the last one change."""
        lines = [
            r"\begin{table}",
            rf"\caption{{{' '.join((self.title + '.', *self.notes)).translate(LATEX)}}}",
            rf"\begin{{tabular}}{{{'l' * self.names + 'r' * (len(self.header) - self.names)}}}",
            r"\toprule",
            " & ".join(cell.translate(LATEX) for cell in self.header) + r" \\",
        ]
        before = None
        for row in self._shown():
            if row[: self.names - 1] != before:
                lines.append(r"\midrule")
                before = row[: self.names - 1]
            lines.append(" & ".join(cell.translate(LATEX) for cell in row) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"

    def html(self, definitions: Mapping[str, str] = MappingProxyType({})) -> str:
        """Returns an HTML heading and `table`, and its notes.

        A column that is a key of `definitions` links to the element with this id. Numbers carry all digits in
        `data-value`, by which a script can sort.
        """

        def head(k: int, name: str) -> str:
            text = html.escape(name)
            if name in definitions:
                text = f'<a href="#{html.escape(definitions[name])}">{text}</a>'
            return f'<th scope="col"{self._class(k)}>{text}</th>'

        def line(row: tuple[Cell, ...]) -> str:
            cells = []
            for k, cell in enumerate(row):
                number = _number(cell)
                tag = 'th scope="row"' if k == self.names - 1 else "td"
                value = "" if number is None else f' data-value="{number!r}"'
                cells.append(f"<{tag}{self._class(k)}{value}>{html.escape(self._text(cell))}</{tag[:2]}>")
            return f"<tr>{''.join(cells)}</tr>"

        title = html.escape(self.title)
        heads = "".join(head(k, name) for k, name in enumerate(self.header))
        body = "\n".join(map(line, self.rows))
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (
            f'<h2>{title}</h2>\n<div class="wide" role="region" tabindex="0" aria-label="{title}"><table>\n'
            f"<caption>{title}</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n"
            f"{notes}\n"
        )

    def _class(self, column: int) -> str:
        return "" if column < self.names else ' class="number"'

    def _shown(self) -> list[tuple[str, ...]]:
        return [tuple(self._text(cell) for cell in row) for row in self.rows]

    def _text(self, cell: Cell) -> str:
        match cell:
            case None:
                return "-"
            case bool():
                return "yes" if cell else "no"
            case float():
                return f"{cell:z.{self.digits}f}"  # never -0.00
            case Estimate() if math.isnan(cell.low):
                return self._text(cell.value)
            case Estimate():
                return f"{self._text(cell.value)} [{self._text(cell.low)}, {self._text(cell.high)}]"
            case Rate():
                return cell.text()
        return cell


def _plain(cell: Cell) -> str | float | bool | dict | None:
    if isinstance(cell, Estimate | Rate):
        return {name: _plain(value) for name, value in vars(cell).items()}
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _number(cell: Cell) -> float | None:
    """Returns the number by which a cell is sorted; None for text, and for what is unknown or undefined."""
    value = cell.value if isinstance(cell, Estimate | Rate) else cell
    return float(value) if isinstance(value, bool | int | float) and not math.isnan(value) else None
