"""The benchmarks, on small networks and few images; the measured rates are not asserted."""

import json
import re
import subprocess
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor.parallel import loss_parallel

from benchmarks import (
    distillation,
    evaluation,
    gpu,
    kernels,
    measuring,
    networks,
    records,
    sharding,
    stages,
    steps,
    together,
)
from config.config import Config
from utils.data.recordio import write_records
from utils.losses import AdaDistill
from utils.stages import rates


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(rates, "SECONDS", 0.0)


@pytest.fixture
def small(monkeypatch, tmp_path):
    plain = networks._config
    monkeypatch.setattr(networks, "_config", lambda **settings: plain(**settings, device="cpu"))
    monkeypatch.setattr(networks, "CLASSES", 20)
    monkeypatch.setattr(networks, "matrix_peak", lambda *_: 1e12)
    networks._operations.cache_clear()
    yield tmp_path
    networks._operations.cache_clear()


def test_operations_equal_the_formula_of_a_linear_layer(small, monkeypatch):
    """Two operations for each multiplication, three times: forward, and backward to the input and to the weights."""
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 112 * 112, 512))
    monkeypatch.setattr(networks, "build_backbone", {"plain": plain}.get)
    # The image needs no gradient.
    assert networks._operations("plain") == 2 * 2 * 3 * 112 * 112 * 512 + 3 * 2 * 512 * 20


def test_hours_count_the_papers_epochs():
    million = 1_248_932 / 3600
    assert networks.hours(1.0, 1e12, 1e12) == pytest.approx(208 * million)
    assert networks.hours(1e12, 1.0, 1e12) == pytest.approx(4 * million)
    assert networks.hours(1e12, 1e12, 1.0) == pytest.approx(78 * million)


def test_a_network_is_measured(small):
    plain = networks.measure("iresnet_tiny", 4, "fp32", False)
    assert plain.rate > 0
    assert plain.operations == plain.rate * networks._operations("iresnet_tiny")


def test_results_are_written_and_not_measured_again(small, monkeypatch, capsys):
    measured = []

    def measure(network, batch, precision, compiled):
        measured.append((network, compiled))
        if network == "mobilefacenet" and compiled:
            raise RuntimeError("mobilefacenet was not compiled.")
        fits = network != "iresnet100"
        return networks.Measured(network, batch, precision, compiled, 10_000.0 * fits, 5e11 * fits, 3.0 * fits)

    monkeypatch.setattr(networks, "measure", measure)
    monkeypatch.setattr(networks, "measure_others", lambda: {"adaptor": 1e6, "extraction": 20_000.0})
    networks.measure_all(["iresnet34", "mobilefacenet"], results=small)
    assert "was not compiled" in capsys.readouterr().out
    networks.measure_all(["iresnet34", "iresnet100"], results=small)
    tried = ("iresnet34", "mobilefacenet", "iresnet100")
    assert measured == [
        (name, compiled) for name in tried for compiled in (False, True)
    ]  # none of them is measured twice
    page = next(small.glob("*.md")).read_text()
    assert page.count("| iresnet34 | 8 | fp32 | no | 10,000.0 | 50.0% | 3.0 |") == 1
    assert page.count(f"| 8 | fp32 | yes | {networks.hours(10_000.0, 20_000.0, 1e6):.1f} |") == 1
    assert page.count("| iresnet100 | 8 | fp32 | yes | does not fit | | |") == 1
    assert page.count("| mobilefacenet |") == 1
    monkeypatch.setattr("sys.argv", ["networks", "resnet34"])
    with pytest.raises(SystemExit):
        networks.main()
    assert "there is no network resnet34: name some of iresnet18," in capsys.readouterr().err


def test_distillation_is_measured_with_stored_embeddings_and_with_a_teacher_on_every_batch(tmp_path, monkeypatch):
    plain, repeats = AdaDistill.update, []

    def update(self, *inputs):
        repeats.append(inputs[3])
        plain(self, *inputs)

    monkeypatch.setattr(AdaDistill, "update", update)
    found = distillation.measure(8, 4, tmp_path, teacher="iresnet_tiny", classes=20)
    step, once = found["student's step, teacher read"], found["both views embedded once"]
    assert found["ours, 26 epochs"] == pytest.approx(26 / (26 / step + 1 / once))
    assert found["teacher on every batch"] > 0
    assert repeats and None not in repeats  # None: a GPU is waited for in the step, which cannot be captured then
    assert "Over 26 epochs ours is 3.0 times as fast; 75% of the student's step alone." in distillation.report(
        {"teacher on every batch": 2.0, "student's step, teacher read": 8.0, "ours, 26 epochs": 6.0}, ""
    )


def test_a_step_is_measured_in_every_way(tmp_path):
    step = steps.Step("EAF-KD", "iresnet_tiny", 2, has_target=True)
    cfg = Config(device="cpu", output=str(tmp_path))
    assert min(step.plain(), step.ours(cfg), step.bare()) > 0


def test_one_command_measures_all_and_continues(tmp_path, monkeypatch, capsys):
    """In the small form, since a test cannot see the rates of a GPU: no part fails, and none is measured twice."""
    for module in (steps, stages):  # where there is a GPU it is the default, which the small form does not use
        monkeypatch.setattr(module, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(measuring, "REPEATS", 1)
    for name in ("measure_reader", "measure_adaptor_input"):  # they take half of the time
        monkeypatch.setattr(stages, name, lambda *_: stages.Row("x", "images", 1.0, 2.0))
    gpu.measure_all("cpu", 0, tmp_path)
    parts = int(re.search(r"(\d+) measurements are missing: run the command again", capsys.readouterr().out)[1])
    gpu.measure_all("cpu", 60, tmp_path)
    said = capsys.readouterr().out
    assert "failed" not in said and "DIFFERS" not in said
    kept = json.loads((tmp_path / "gpu_cpu.json").read_text())
    assert sum(len(kept[section]) for section in ("correctness", "rates", "stages", "kernels")) == parts
    assert kept["notes"] == {}
    assert kept["rates"]["2 runs of iresnet_tiny together"].startswith("2 of 2 ended well, at ")
    page = (tmp_path / "gpu_cpu.md").read_text()
    assert all(f"| {name} |" in page for section in ("correctness", "rates") for name in kept[section])
    errors = {name: result for name, result in kept["correctness"].items() if isinstance(result, dict)}
    assert all(max(errors[name].values()) < 1e-4 for name in errors if name.startswith(("header", "one epoch of SL")))
    assert max(errors["iresnet_tiny in fp32"].values()) < 1e-4 < max(errors["iresnet_tiny in bf16"].values()) < 0.2
    assert errors["one epoch of teacher in fp32"]["change of the weights"] < 0.05
    monkeypatch.setattr(gpu, "_attempt", lambda _: pytest.fail("measured again"))
    gpu.measure_all("cpu", 60, tmp_path)


def test_a_run_beside_others_ends_with_a_sentence_or_has_failed(capsys):
    def ended(status: int, said: str) -> str:
        return together.ending(subprocess.CompletedProcess([], status, "", said))

    sentence = "train.py: CUDA out of memory: lower batch_size, infer_batch_size or device_cache_gb"
    assert ended(2, f"UserWarning: x\n{sentence}\n") == sentence
    assert capsys.readouterr().err == ""
    assert ended(1, f"Traceback (most recent call last):\n{sentence}") == f"FAILED with status 1: {sentence}"
    assert "Traceback" in capsys.readouterr().err
    assert ended(-9, "") == "FAILED with status -9: "


def test_without_a_gpu_the_command_ends_with_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main(["--results", str(tmp_path)])
    assert end.value.code == 2
    assert "PyTorch finds no CUDA device here: use --device cpu" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_kernels_are_summed_by_kind():
    for name, kind in (
        ("void at::native::batch_norm_collect_statistics_channels_last_kernel", "normalisation"),
        ("void at::native::prelu_kernel", "PReLU"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix product"),
        ("triton_poi_fused_add_native_batch_norm_backward_3", "compiled"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "addition"),
    ):
        assert kernels.kind_of(name) == kind


def losses_of_ways(rank: int, ranks: int, folder: Path) -> None:
    """Saves, for each kind of header with the same kernel, the loss of the whole batch and the gradient of a rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    random, found = torch.Generator().manual_seed(0), {}
    whole, batch = (torch.randn(*shape, generator=random) for shape in ((sharding.WIDTH, 20), (6, sharding.WIDTH)))
    label = torch.randint(20, (6,), generator=random).chunk(ranks)[rank]
    for way in sharding.WAYS:
        kernel, loss = sharding.built(way, 20)
        own = slice(0, 20) if way == "dense" else slice(10 * rank, 10 * rank + 10)
        with torch.no_grad():
            kernel[:, : own.stop - own.start] = whole[:, own]  # the sharded kernel has one more column
        embeddings = batch.chunk(ranks)[rank].clone().requires_grad_()
        with loss_parallel() if way == "loss_parallel" else nullcontext():
            mean = loss(embeddings, label)
            mean.backward()
        mean = mean.detach() if way != "loss_parallel" else mean.to_local().detach()
        if way == "dense":
            dist.all_reduce(mean)
            mean /= ranks
        found[way] = (mean, embeddings.grad)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_the_compared_headers_give_equal_loss_and_gradients(tmp_path):
    mp.set_forkserver_preload([__name__])
    mp.start_processes(losses_of_ways, (2, tmp_path), 2, start_method="forkserver")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for way in sharding.WAYS:
            assert torch.allclose(found[way][0], found["dense"][0])
            assert torch.allclose(found[way][1], found["dense"][1], atol=1e-6)


def test_the_compared_headers_are_written_as_a_table(tmp_path, monkeypatch):
    seconds = {"sharded": 0.2, "dense": 0.3, "loss_parallel": None}

    def measure(way, *form):
        row = {"way": way, **dict(zip(("classes", "ranks", "batch"), form, strict=True)), "computed": 2e9}
        return {**row, "seconds": seconds[way], "measured": seconds[way] and 1e9}

    monkeypatch.setattr(sharding, "measure", measure)
    sharding.measure_all([28_000], [2], 128, tmp_path)
    page = (tmp_path / "sharding_cpu.md").read_text()
    assert "| 28,000 | 2 | 128 | sharded | 0.200 | 1.00 | 1.00 | 2.00 |" in page
    assert "| 28,000 | 2 | 128 | dense | 0.300 | 1.50 | 1.00 | 2.00 |" in page
    assert "| 28,000 | 2 | 128 | loss_parallel | does not fit | | | 2.00 |" in page
    assert len(json.loads((tmp_path / "sharding_cpu.json").read_text())["rows"]) == 3


def test_the_memory_of_headers_that_do_not_fit_is_computed():
    kernel = 4 * 512 * 10**9
    for way, copies in (("sharded", 3), ("dense", 4)):
        row = sharding.measure(way, 2 * 10**9 if way == "sharded" else 10**9, 2, 1)
        assert row["seconds"] is row["measured"] is None
        assert copies * kernel < row["computed"] < 1.02 * copies * kernel


def test_generated_records_equal_those_of_write_records(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "EACH", 2)
    for name in ("ours", "plain"):
        (tmp_path / name).mkdir()
    records.make(5, tmp_path / "ours")
    write_records(tmp_path / "plain", [(bytes(8), k // 2, -1) for k in range(5)], 3)
    for name in ("train.rec", "train.idx"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert len(records._found(tmp_path / "ours", 5).keys) == 5
    assert len(records._indexed(tmp_path / "ours", 5).paths) == 5
    row = {"step": "x", "seconds": 1.0, "held": 500, "most": 1000}
    page = records.report({"versions": {}, "images": 5, "steps": [row]})
    assert "| x | 1.00 | 100 | 200 | 4.2 | 8.5 |" in page


def test_each_step_of_an_evaluation_is_timed(monkeypatch):
    monkeypatch.setattr(evaluation, "EPOCHS", 2)
    times = evaluation.measure(2, identified=False)
    assert list(times) == [*(step for step, *_ in evaluation.STEPS), evaluation.REST]
    assert all(wall > 0 for wall, _ in times.values())  # a step that is never called would be 0
    text = evaluation.page(times, times, "Made by a test.", 0.0)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == len(times) + 2
    assert lines[-1].startswith("| all |")


def test_the_time_of_a_step_is_not_part_of_the_one_around_it(monkeypatch):
    moments = iter([0, 1, 4, 6])
    monkeypatch.setattr(evaluation, "_now", lambda: np.full(2, float(next(moments))))
    clock = evaluation.Clock()
    inner = clock.timed("inner", lambda: None)
    clock.timed("outer", inner)()
    assert clock.times == {"inner": (3, 3), "outer": (3, 3)}
