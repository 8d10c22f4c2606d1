"""The stages on a GPU against the same stages on the CPU. All other tests of stages are about the CPU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from config.config import Config
from tests.runs import arguments, run_script, torchrun
from tests.unit.utils.distributed.test_distributed import apart, weights
from utils.data.faces import Faces
from utils.storage.arrays import about

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FP32 = ("--precision", "fp32", "--infer_precision", "fp32")
TOLERANCE = 5e-2
"""Of weights after 16 steps with clipped gradients, which amplify rounding; relative to the largest of each tensor."""


@pytest.fixture(scope="module")
def on_gpu(faces, trained, tmp_path_factory) -> tuple[Config, list[str]]:
    """Settings and command line of teachers, embeddings, an adaptor and a student, trained on a GPU in fp32."""
    given = [*arguments(faces, tmp_path_factory.mktemp("gpu")), "--device", "cuda", *FP32]
    for script in ("train.py", "extract_all.py", "fc_EArc.py", "KD_alone.py"):
        run_script(script, given)
    return Config.from_args(given), given


@pytest.mark.parametrize("run", ["teachers/Asian", "teachers/Indian", "adaptors/SL", "students/iresnet_tiny/SL-a-KD"])
def test_a_gpu_trains_what_the_cpu_does(trained, on_gpu, run):
    one, two = (cfg.network_dir / run for cfg in (trained[0], on_gpu[0]))
    assert apart(weights(one, "last_backbone"), weights(two, "last_backbone")) < TOLERANCE
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, two)]
    for here, there in zip(*logs, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-2)


def test_both_devices_embed_alike_and_the_provenance_names_the_precision(on_gpu):
    """Embeds by the weights of the GPU on the CPU, then on the GPU in tf32, then reads what was made."""
    cfg, given = on_gpu
    path = cfg.teacher_embeddings("Asian")
    exact = np.load(path)
    assert "precision" not in about(path)["made from"]
    asian = [*given, "--ethnicity", "Asian"]
    path.unlink()
    run_script("extract_all.py", [*asian, "--device", "cpu"])
    assert np.abs(np.load(path) - exact).max() < 1e-4
    path.unlink()
    run_script("extract_all.py", [*asian, "--infer_precision", "tf32"])
    has_tf32 = torch.cuda.get_device_capability() >= (8, 0)
    assert about(path)["made from"].get("precision") == ("tf32" if has_tf32 else None)
    assert np.abs(np.load(path) - exact).max() < 1e-2
    run_script("extract_all.py", asian)
    assert np.array_equal(np.load(path), exact)


def test_a_label_out_of_range_is_refused_before_the_device_sees_it(on_gpu, monkeypatch, capsys):
    plain = Faces.__init__

    def poisoned(self, *given, **options):
        plain(self, *given, **options)
        self.columns["label"].arrays[0][:] = 10**6

    monkeypatch.setattr(Faces, "__init__", poisoned)
    run_script("KD_CEL.py", on_gpu[1], expect=2)
    assert "The labels are 1000000 to 1000000, but the header has 16 classes" in capsys.readouterr().err
    torch.zeros(1, device="cuda").add_(1).item()  # the context still works


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_processes_with_nccl_train_what_one_does(on_gpu, faces, tmp_path):
    divided = ("--global_batch", "--sync_bn", "--header_sharding", "--ethnicity", "Asian")
    status, said = torchrun(2, "train.py", *arguments(faces, tmp_path), "--device", "cuda", *FP32, *divided)
    assert status == 0, said
    run = Path("specialized/iresnet_tiny/teachers/Asian")
    one, two = (Path(output) / run for output in (on_gpu[0].output, tmp_path))
    for which in ("last_backbone", "last_header"):
        assert apart(weights(one, which), weights(two, which)) < TOLERANCE
