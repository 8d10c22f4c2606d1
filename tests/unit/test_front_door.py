"""README, its figures and the pages of docs: names, links and numbers agree with the repository."""

import re
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import pytest

from tests.runs import GROUPS, ROOT

FIGURES = ROOT / "docs" / "figures"
DRAWN_WITH = "3.11"  # the version of matplotlib that the committed figures were drawn with
RESULTS = (ROOT / "benchmarks" / "results" / "demo_seeds.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


@pytest.fixture(scope="module")
def draw():
    return runpy.run_path(str(FIGURES / "draw.py"))


def test_the_committed_figures_equal_those_of_the_script(draw, tmp_path):
    draw["main"](tmp_path)
    drawn = {path.name: path for path in tmp_path.iterdir()}
    assert drawn.keys() == {path.name for path in FIGURES.glob("*.svg")}
    for name, path in drawn.items():
        if matplotlib.__version__.startswith(f"{DRAWN_WITH}."):
            assert path.read_text() == (FIGURES / name).read_text(), "draw them again: python docs/figures/draw.py"
        else:
            assert _elements(path) == _elements(FIGURES / name)


def _elements(path: Path) -> list[str]:
    """Returns the ids of matplotlib's elements (patch_3, text_7), without those of clip paths and glyphs."""
    ids = [element.get("id", "") for element in ElementTree.parse(path).iter()]
    return [name for name in ids if re.fullmatch(r"[a-zA-Z0-9]+_\d+", name)]


def test_the_demo_figure_shows_every_row_of_the_results(draw):
    rows = dict(draw["demo_rows"](RESULTS))
    assert len(rows) == 10
    assert rows["teacher African"] == [87.11, 53.11, 55.89, 55.00]
    assert rows["EAF-KD from SL"] == [75.22, 70.11, 71.67, 73.22]
    assert draw["GROUPS"] == GROUPS


def test_readme_has_the_numbers_of_the_committed_demo():
    found = re.findall(r"\| [\w-]+ \| [\w ]+ (\| [\d.]+ ± .+ \|)", RESULTS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(found) == 10
    assert all(row in readme for row in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_names_only_settings_that_exist(page):
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    assert hooks["unknown_options"](page.read_text(encoding="utf-8")) == []
    assert hooks["unknown_options"]("`python train.py --has_drop_out`") == ["has_drop_out"]


def test_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_to_a_file_is_valid(page):
    text = re.sub(r"```.*?```|^    .*?$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)|(?:src|srcset)=\"([^\":]+)\"", text)
    missing = [link for pair in links for link in pair if link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("name", ["paper_map.md", "deviations.md", "extending.md"])
def test_a_page_names_only_code_that_exists(name):
    named = re.findall(
        r"`((?:backbones|config|eval|utils)/[\w/]+\.\w+)`(?: `([\w.]+)`)?", (ROOT / "docs" / name).read_text()
    )
    for path, symbol in named:
        assert (ROOT / path).exists(), path
        assert symbol.split(".")[-1] in (ROOT / path).read_text(encoding="utf-8"), (path, symbol)
