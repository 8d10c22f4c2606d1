"""Tables in each output format, with every kind of cell."""

import csv

import pytest

from utils.tables import Estimate, Rate, Table

TABLE = Table(
    "Rates & more",
    ("Setting", "Model", "A_1", "Interval", "FMR", "Sure", "SER"),
    [
        ("specialized", "first", 93.456, Estimate(1.0, -0.5, 2.25), Rate(30, 3000), True, 1.5),
        ("specialized", "second <b>", 100.0, None, Rate(1, 3000), False, None),
        ("baseline", "third 50%", 7.0, Estimate(0.0, 0.0, 0.0), None, True, float("inf")),
    ],
    2,
    ("Nothing is 100% sure.",),
)


def test_markdown_columns_are_aligned():
    assert TABLE.markdown().splitlines() == [
        "## Rates & more",
        "",
        "| Setting     | Model      |    A_1 |           Interval |     FMR | Sure |  SER |",
        "|-------------|------------|-------:|-------------------:|--------:|-----:|-----:|",
        "| specialized | first      |  93.46 | 1.00 [-0.50, 2.25] |  0.0100 |  yes | 1.50 |",
        "| specialized | second <b> | 100.00 |                  - | < 0.001 |   no |    - |",
        "| baseline    | third 50%  |   7.00 |  0.00 [0.00, 0.00] |       - |  yes |  inf |",
        "",
        "Nothing is 100% sure.",
    ]


def test_csv_has_all_digits():
    first, second, third = csv.DictReader(TABLE.csv().splitlines())
    assert first["A_1"] == "93.456"
    assert [first[f"Interval{part}"] for part in ("", " low", " high")] == ["1.0", "-0.5", "2.25"]
    assert (first["FMR errors"], first["FMR of"], first["Sure"]) == ("30", "3000", "True")
    assert [second[f"Interval{part}"] for part in ("", " low", " high")] == ["", "", ""]
    assert (third["FMR errors"], third["SER"]) == ("", "inf")


def test_latex_is_for_booktabs_and_escaped():
    lines = TABLE.latex().splitlines()
    assert lines[:4] == [
        r"\begin{table}",
        r"\caption{Rates \& more. Nothing is 100\% sure.}",
        r"\begin{tabular}{llrrrrr}",
        r"\toprule",
    ]
    assert lines[4] == r"Setting & Model & A\_1 & Interval & FMR & Sure & SER \\"
    assert [line.split(" & ")[0] for line in lines[5:]] == [
        r"\midrule",
        "specialized",
        "specialized",
        r"\midrule",
        "baseline",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    assert lines[7].endswith(r"& - & $<$ 0.001 & no & - \\")
    assert r"third 50\%" in lines[9]


def test_json_has_all_values_as_plain_types():
    first, second, third = TABLE.as_dict()["rows"]
    assert first["Interval"] == {"value": 1.0, "low": -0.5, "high": 2.25}
    assert (first["FMR"], first["A_1"]) == ({"errors": 30, "of": 3000}, 93.456)
    assert (second["SER"], third["SER"], third["FMR"]) == (None, None, None)


def test_html_is_escaped():
    page = TABLE.html()
    assert "<h2>Rates &amp; more</h2>" in page
    assert "<caption>Rates &amp; more</caption>" in page
    cells = '<th scope="row">second &lt;b&gt;</th><td class="number" data-value="100.0">100.00</td>'
    assert f'<td>specialized</td>{cells}<td class="number">-</td>' in page
    assert page.count("<tr>") == 4
    assert page.count('scope="col"') == len(TABLE.header)


def test_html_links_defined_columns_and_carries_all_digits():
    page = TABLE.html({"SER": "definition-ser"})
    assert '<th scope="col" class="number"><a href="#definition-ser">SER</a></th>' in page
    assert page.count("<a ") == 1
    values = [line.split('"')[0] for line in page.split('data-value="')[1:]]
    # A row at a time; an estimate by its value, a rate as a share; nothing for unknown numbers.
    assert values == ["93.456", "1.0", "0.01", "1.0", "1.5", "100.0", str(1 / 3000), "0.0", "7.0", "0.0", "1.0", "inf"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        Table("short", ("A", "B"), [("only",)], 1).markdown()
