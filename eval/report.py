"""A self-contained HTML page: the answer in three sentences, all tables and pictures, and the definitions.

The page needs no network and, except for sorting, no JavaScript. It follows the browser's light or dark scheme, fits
phones, and prints on A4.
"""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from config.config import Config
from eval.definitions import DEFINITIONS, Definition, anchor, anchors
from eval.pictures import Picture
from utils.environment import versions
from utils.tables import Table

FOLDER = Path(__file__).parent
PLACES = ("data", "pairs", "leave_out", "checkpoint", "teacher", "scores")
"""Settings with paths, of which the page shows the names only: it may be sent to others."""


def page(
    answer: Sequence[str],
    tables: Mapping[str, Table],
    pictures: Sequence[Picture],
    cfg: Config,
    sets: Sequence[str],
    notes: Sequence[str] = (),
    terms: Mapping[str, Definition] = DEFINITIONS,
) -> str:
    """Returns the page.

    `sets` are the names of the verification sets, whose columns hold accuracies; `notes` hold for the whole page;
    `terms` define the columns of all tables.
    """
    used = {id_ for table in tables.values() for id_ in anchors(table.header, sets, terms).values()}
    defined = {term: one for term, one in terms.items() if anchor(term) in used | _ids_in(answer, terms)}
    contents = _contents(tables, pictures, sets, terms)
    contents["Definitions"] = _definitions(defined)
    links = "".join(f'<li><a href="#{_id(title)}">{html.escape(title)}</a></li>' for title in contents)
    body = "\n".join(f'<section id="{_id(title)}"{_kind(text)}>\n{text}</section>' for title, text in contents.items())
    title = html.escape(f"Evaluation of {Path(cfg.scores or cfg.checkpoint or cfg.output).resolve().name}")
    style, script = ((FOLDER / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<header>\n<h1>{title}</h1>\n"
        f'{_answer(answer, notes, defined)}</header>\n<nav aria-label="Contents"><ul>{links}</ul></nav>\n'
        f"<main>\n{body}\n</main>\n{_footer(cfg)}<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _answer(answer: Sequence[str], notes: Sequence[str], terms: Mapping[str, Definition]) -> str:
    sentences = "".join(f"<p>{_linked(sentence, terms)}</p>\n" for sentence in answer)
    remarks = "".join(f"<p>{html.escape(note)}</p>\n" for note in notes)
    return f'<div class="answer">\n{sentences}</div>\n{remarks}'


def _ids_in(answer: Sequence[str], terms: Mapping[str, Definition]) -> set[str]:
    return {anchor(term) for term in terms for sentence in answer if re.search(rf"\b{re.escape(term)}\b", sentence)}


def _linked(sentence: str, terms: Mapping[str, Definition]) -> str:
    """Returns the sentence as HTML in which each term links to its definition."""
    if not terms:
        return html.escape(sentence)
    longest_first = sorted((html.escape(term) for term in terms), key=len, reverse=True)
    pattern = rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b"
    return re.sub(pattern, lambda m: f'<a href="#{anchor(html.unescape(m[0]))}">{m[0]}</a>', html.escape(sentence))


def _contents(
    tables: Mapping[str, Table], pictures: Sequence[Picture], sets: Sequence[str], terms: Mapping[str, Definition]
) -> dict[str, str]:
    """Returns the sections by title: tables of the console, pictures, other tables, sections of several pictures."""
    printed, others = (
        {t.title: t.html(anchors(t.header, sets, terms)) for t in tables.values() if t.is_printed is p}
        for p in (True, False)
    )
    sections: dict[str, list[Picture]] = {}
    for picture in pictures:
        sections.setdefault(picture.section, []).append(picture)
    single, several = (
        {s: _section(s, own) for s, own in sections.items() if (len(own) == 1) is p} for p in (True, False)
    )
    return {**printed, **single, **others, **several}


def _section(title: str, pictures: Sequence[Picture]) -> str:
    figures = "".join(_figure(one, has_caption=len(pictures) > 1) for one in pictures)
    return f"<h2>{html.escape(title)}</h2>\n{figures}"


def _figure(picture: Picture, has_caption: bool) -> str:
    image = base64.b64encode(picture.path.read_bytes()).decode()
    caption = f"<figcaption>{html.escape(picture.title)}</figcaption>" if has_caption else ""
    return (
        f'<figure>{caption}<div class="wide"><img alt="{html.escape(picture.alt)}" '
        f'src="data:image/png;base64,{image}"></div>'
        f"<details><summary>The picture in words</summary><p>{html.escape(picture.alt)}</p></details></figure>\n"
    )


def _definitions(terms: Mapping[str, Definition]) -> str:
    entries = []
    for term, one in terms.items():
        more = (f"Fair: {one.fair}." if one.fair else "", f"Source: {one.source}." if one.source else "")
        text = " ".join(html.escape(part) for part in (one.text, *more) if part)
        entries.append(f'<dt id="{anchor(term)}">{html.escape(term)}</dt><dd>{text}</dd>\n')
    return f"<h2>Definitions</h2>\n<dl>\n{''.join(entries)}</dl>\n"


def _footer(cfg: Config) -> str:
    made = ", ".join(f"{name} {value}" for name, value in versions(cfg).items())
    return f"<footer><p>Made with {html.escape(made)}; settings: {html.escape(_settings(cfg))}.</p></footer>\n"


def _settings(cfg: Config) -> str:
    """Returns the settings that are not defaults, with file names instead of paths."""
    parts, changed = [], iter(cfg.changed)
    for option, value in zip(changed, changed, strict=True):
        name = option.removeprefix("--")
        if name in PLACES:
            value = ",".join(Path(path).name for path in value.split(","))
        if name not in ("output", "cache"):
            parts.append(f"{option} {value}")
    return " ".join(parts) or "defaults"


def _kind(section: str) -> str:
    return ' class="table"' if "<table>" in section else ""


def _id(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())
