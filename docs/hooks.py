"""What `mkdocs build` does to each page: links out of docs/ become paths, and every setting must be one that exists."""

import logging
import re
from pathlib import Path

WARNING = logging.getLogger("mkdocs.hooks").warning  # with strict a warning fails the build
ROOT = Path(__file__).parents[1]
# Options of torchrun, pip, git, ruff and mkdocs, and what stands for the name of any setting.
OTHERS = {
    "name",
    "git",
    "unidiff-zero",
    "max-restarts",
    "shutdown-timeout",
    "standalone",
    "nproc_per_node",
    "nnodes",
    "rdzv_backend",
    "rdzv_endpoint",
    "help",
    "format",
    "check",
    "strict",
}


def on_page_markdown(markdown: str, page, **_) -> str:
    """Warns of a link to no file and of an option that no script has."""
    where = page.file.src_uri
    if unknown := unknown_options(markdown):
        WARNING(f"{where}: no script has the option --{', --'.join(unknown)}.")

    def as_path(link: re.Match) -> str:
        path = (ROOT / "docs" / where).parent / link[2].split("#")[0]
        if not path.exists():
            WARNING(f"{where}: the link to {link[2]} leads to no file.")
        text, name = link[1].strip("`"), path.resolve().relative_to(ROOT).as_posix()
        return f"`{name}`" if text in (name, path.name) or name.endswith(text) else f"{text} (`{name}`)"

    return re.sub(r"\[([^\]]+)\]\(((?:\.\./)+[^)\s]+)\)", as_path, markdown)


def unknown_options(markdown: str) -> list[str]:
    """The options `--name` on a page that neither config/config.py nor a script of this repository has."""
    source = (ROOT / "config" / "config.py").read_text(encoding="utf-8")
    known = OTHERS | set(re.findall(r"^    (\w+): .+  # ", source, re.MULTILINE))
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("eval/*.py"),
        *ROOT.glob("utils/**/*.py"),
        *ROOT.glob("benchmarks/*.py"),
    ]:
        known |= set(re.findall(r"\"--([\w-]+)\"", path.read_text(encoding="utf-8")))
    return sorted(set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", markdown)) - known)
