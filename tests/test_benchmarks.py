"""The commands that measure networks, on networks and numbers that are small; what they measure is not asserted."""

import pytest
import torch

from benchmarks import networks


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(networks, "CLASSES", 20)
    monkeypatch.setattr(networks, "RESULTS", tmp_path)
    monkeypatch.setattr(networks, "matrix_peak", lambda _: 1e12)
    return tmp_path


def test_operations_are_those_of_the_products(small, monkeypatch):
    """Two for each multiplication, three times: forwards, and backwards to the input and to the weights."""
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 112 * 112, 512))
    monkeypatch.setattr(networks, "build_backbone", {"plain": plain}.get)
    # The image needs no gradient.
    assert networks._operations("plain") == 2 * 2 * 3 * 112 * 112 * 512 + 3 * 2 * 512 * 20


def test_hours_are_those_of_the_papers_epochs():
    million = 1_248_932 / 3600
    assert networks.hours(1.0, 1e12, 1e12) == pytest.approx(208 * million)
    assert networks.hours(1e12, 1.0, 1e12) == pytest.approx(4 * million)
    assert networks.hours(1e12, 1e12, 1.0) == pytest.approx(78 * million)


def test_what_was_measured_is_written_and_kept(small, monkeypatch, capsys):
    measured = []

    def measure(network, batch, precision, compiled, peak, seen):
        measured.append(network)
        return networks.Measured(network, batch, precision, compiled, 10_000.0, 0.5, 3.0)

    plain = networks.measure("iresnet_tiny", 4, "fp32", False, 1e9, 16)
    assert plain.rate > 0
    assert plain.share == pytest.approx(plain.rate * networks._operations("iresnet_tiny") / 1e9)
    assert networks.measure_adaptor(4) > 0
    assert networks.measure_extraction("iresnet_tiny", 8) > 0
    monkeypatch.setattr(networks, "measure", measure)
    monkeypatch.setattr(networks, "measure_adaptor", lambda _: 1e6)
    monkeypatch.setattr(networks, "measure_extraction", lambda *_: 20_000.0)
    for names in (["iresnet34", "mobilefacenet"], ["iresnet34"]):
        networks.measure_all(names)
    page = next(small.glob("*.md")).read_text()
    lines = len(page.splitlines())
    assert "| iresnet34 | 8 | fp32 | no | 10,000.0 | 50.0% | 3.0 |" in page
    assert f"| 8 | fp32 | yes | {networks.hours(10_000.0, 20_000.0, 1e6):.1f} |" in page
    assert page.count("| mobilefacenet |") == 2
    networks.measure_all(["mobilefacenet"])  # those of iresnet34 are kept
    assert len(next(small.glob("*.md")).read_text().splitlines()) == lines
    monkeypatch.setattr("sys.argv", ["networks", "resnet34"])
    with pytest.raises(SystemExit):
        networks.main()
    assert "there is no network resnet34: name some of iresnet18," in capsys.readouterr().err
