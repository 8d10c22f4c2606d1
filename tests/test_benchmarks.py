"""The commands that measure networks, on networks and numbers that are small; what they measure is not asserted."""

import pytest
import torch

from benchmarks import distillation, networks


@pytest.fixture
def small(monkeypatch, tmp_path):
    plain = networks._config
    monkeypatch.setattr(networks, "_config", lambda **settings: plain(**settings, device="cpu"))
    monkeypatch.setattr(networks, "CLASSES", 20)
    monkeypatch.setattr(networks, "matrix_peak", lambda _: 1e12)
    networks._operations.cache_clear()
    yield tmp_path
    networks._operations.cache_clear()


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


def test_networks_and_adaptor_are_measured(small):
    plain = networks.measure("iresnet_tiny", 4, "fp32", False, 16)
    assert plain.rate > 0
    assert plain.operations == plain.rate * networks._operations("iresnet_tiny")
    assert networks.measure_adaptor(4) > 0
    assert networks.measure_extraction("iresnet_tiny", 8) > 0


def test_what_was_measured_is_written_and_kept(small, monkeypatch, capsys):
    measured = []

    def measure(network, batch, precision, compiled, seen):
        measured.append((network, compiled))
        if network == "mobilefacenet" and compiled:
            raise RuntimeError("mobilefacenet was not compiled.")
        fits = network != "iresnet100"
        return networks.Measured(network, batch, precision, compiled, 10_000.0 * fits, 5e11 * fits, 3.0 * fits)

    monkeypatch.setattr(networks, "measure", measure)
    monkeypatch.setattr(networks, "measure_adaptor", lambda _: 1e6)
    monkeypatch.setattr(networks, "measure_extraction", lambda *_: 20_000.0)
    networks.measure_all(["iresnet34", "mobilefacenet"], results=small)
    assert "was not compiled" in capsys.readouterr().out
    networks.measure_all(["iresnet34", "iresnet100"], results=small)
    tried = ("iresnet34", "mobilefacenet", "iresnet100")
    assert measured == [(name, compiled) for name in tried for compiled in (False, True)]  # none of them twice
    page = next(small.glob("*.md")).read_text()
    assert page.count("| iresnet34 | 8 | fp32 | no | 10,000.0 | 50.0% | 3.0 |") == 1
    assert page.count(f"| 8 | fp32 | yes | {networks.hours(10_000.0, 20_000.0, 1e6):.1f} |") == 1
    assert page.count("| iresnet100 | 8 | fp32 | yes | does not fit | | |") == 1
    assert page.count("| mobilefacenet |") == 1
    monkeypatch.setattr("sys.argv", ["networks", "resnet34"])
    with pytest.raises(SystemExit):
        networks.main()
    assert "there is no network resnet34: name some of iresnet18," in capsys.readouterr().err


def test_a_read_teacher_and_one_on_every_batch_are_measured(tmp_path):
    found = distillation.measure(8, 4, tmp_path, teacher="iresnet_tiny", classes=20)
    step, once = found["student's step, teacher read"], found["both views embedded once"]
    assert found["ours, 26 epochs"] == pytest.approx(26 / (26 / step + 1 / once))
    assert found["teacher on every batch"] > 0
    assert "Over 26 epochs ours is 3.0 times as fast; 75% of the student's step alone." in distillation.report(
        {"teacher on every batch": 2.0, "student's step, teacher read": 8.0, "ours, 26 epochs": 6.0}, ""
    )
