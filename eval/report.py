"""A self-contained HTML page with all tables and pictures."""

import base64
import html
from pathlib import Path

from config.config import Config
from utils.environment import versions
from utils.tables import Table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; color: #222; }
h1 { margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 0.25em 0.7em; text-align: left; border-bottom: 1px solid #eee; white-space: nowrap; }
th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
tbody tr:hover { background: #f4f7fa; } img { max-width: 100%; } p, footer { color: #555; max-width: 60em; }
nav a { margin-right: 1.2em; } figure { margin: 1em 0; }
"""


def page(tables: dict[str, Table], pictures: dict[str, Path], cfg: Config) -> str:
    """Returns an HTML page in which `pictures`, PNG files by title, are embedded."""
    contents = {**{table.title: _table(table) for table in tables.values()}, **_figures(pictures)}
    links = "".join(f'<a href="#{_anchor(title)}">{html.escape(title)}</a> ' for title in contents)
    body = "\n".join(f'<section id="{_anchor(title)}">\n{text}</section>' for title, text in contents.items())
    made = ", ".join(f"{name} {value}" for name, value in versions(cfg).items())
    settings = " ".join(cfg.changed) or "defaults"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Evaluation of {html.escape(cfg.output)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Evaluation of {html.escape(cfg.output)}</h1>\n<nav>{links}</nav>\n{body}\n"
        f"<footer><p>Made with {html.escape(made)}; settings: {html.escape(settings)}.</p></footer>\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    return f'<div class="wide">{table.html()}</div>\n'


def _figures(pictures: dict[str, Path]) -> dict[str, str]:
    found = {}
    for title, path in pictures.items():
        image = base64.b64encode(path.read_bytes()).decode()
        text = html.escape(title)
        found[title] = f'<h2>{text}</h2>\n<figure><img alt="{text}" src="data:image/png;base64,{image}"></figure>\n'
    return found


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())
