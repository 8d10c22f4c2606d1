"""The stages and settings of the demo, and the numbers of the report over seeds."""

from pathlib import Path

import demo
from benchmarks.demo_seeds import GROUPS, report
from config.config import Config

ROOT = Path(__file__).parents[2]


def test_every_stage_has_a_script_and_the_settings_of_the_demo():
    stages = demo.stages(Path("demo-7"), seed=7)
    scripts = [stage.script for stage in stages]
    assert scripts[:3] == ["baseline_data_split.py", "train.py", "extract_all.py"]
    assert scripts[-1] == "-m eval.evaluation"
    for stage in stages:
        assert stage.script.startswith("-m ") or (ROOT / stage.script).exists()
        cfg = stage.cfg
        assert cfg.network == cfg.student_network == "iresnet_tiny"
        assert (cfg.seed, cfg.output, cfg.batch_size, cfg.lr, cfg.num_epoch_fc) == (7, "demo-7/output", 32, 0.3, 20)
        assert cfg.num_epoch == (14 if stage.script.startswith("KD_") else 12)
    assert [stage.name for stage in stages if stage.cfg.flip_targets] == [
        "extract_all.py --flip_targets",
        "fc_EArc.py --flip_targets",
    ]
    assert [stage.name for stage in stages if stage.cfg.has_dropout] == ["dual_layer_EAF-Fusion.py --has_dropout"]
    assert [stage.needs for stage in stages] == [(), *((stage.name,) for stage in stages[:-1])]
    assert tuple(demo.GROUPS) == Config().ethnicities


def test_the_report_over_seeds_has_means_deviations_and_differences():
    def table(gain):
        teachers = {("teacher", group): [50.0] * 4 for group in GROUPS}
        for i, group in enumerate(GROUPS):
            teachers["teacher", group][i] = 70.0
        students = {"EAF-KD": [60 + gain, 60, 60, 60], "a-KD": [60.0] * 4, "AdaArcDistill": [60, 60, 60, 62 - gain]}
        return {**teachers, **{(method, "SL x"): values for method, values in students.items()}}

    text = report([table(0), table(2), table(4)])
    equal = " | ".join(["50.00 ± 0.00"] * 3)  # the STD has ddof 1: 10, where ddof 0 gives 8.66
    assert f"| teacher | African | 70.00 ± 0.00 | {equal} | 55.00 ± 0.00 | 10.00 ± 0.00 | 1.67 ± 0.00 |" in text
    assert "| EAF-KD | SL x | 62.00 ± 2.00 | 60.00 ± 0.00 | 60.00 ± 0.00 | 60.00 ± 0.00 | 60.50 ± 0.50 |" in text
    assert "| 0 | +20.00 | +5.00 | +10.00 | +0.50 |" in text
    assert "| 2 | +20.00 | +6.00 | +8.00 | -0.50 |" in text
    assert "0 or more on average: +0.00 ± 0.50." in text
