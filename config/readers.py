"""Which script reads which setting: the source of `--help`, of docs/configuration.md and of the check at resume."""

from pathlib import Path

from config.registry import ADAPTORS, METHODS

SPLIT, TRAIN, EXTRACT = "baseline_data_split.py", "train.py", "extract_all.py"
SL, DUAL = "fc_EArc.py", "dual_layer_EAF-Fusion.py"
A_KD, EAF_KD, ADA = "KD_alone.py", "KD_CEL.py", "KD_AdaDistill.py"
EVALUATION, IJB = "eval.evaluation", "eval.ijb"
SCRIPTS = (SPLIT, TRAIN, EXTRACT, SL, DUAL, A_KD, EAF_KD, ADA, EVALUATION, IJB)

_ADAPTORS, _STUDENTS = (SL, DUAL), (A_KD, EAF_KD, ADA)
_TRAINING = (TRAIN, *_ADAPTORS, *_STUDENTS)
_STAGES = (TRAIN, EXTRACT, *_ADAPTORS, *_STUDENTS)
_TABLE = (
    ("data", SCRIPTS[:-1]),
    ("pairs pairs_sets evaluation_groups", (TRAIN, *_STUDENTS, EVALUATION)),
    ("cache", (*_STAGES, EVALUATION)),
    ("nested_images", (SPLIT, *_STAGES)),
    ("ethnicities is_teacher_baseline", (SPLIT, *_STAGES, EVALUATION)),  # the split sets the second itself
    ("leave_out skip_bad_images data_share share_of", _STAGES),
    ("data_flip", (TRAIN, *_STUDENTS)),
    ("same_names_are_one", (SPLIT, *_STAGES)),
    ("ethnicity", (SPLIT, TRAIN, EXTRACT, *_STUDENTS)),
    ("is_standalone", (*_STAGES, EVALUATION)),
    ("is_dual_layer", (*_STUDENTS, EVALUATION)),
    ("has_dropout", (DUAL, *_STUDENTS)),
    ("network embedding_size device cudnn_benchmark num_threads num_workers", SCRIPTS[1:]),
    ("infer_batch_size infer_precision", SCRIPTS[1:]),
    ("weights", SCRIPTS[1:-1]),
    ("student_network", (A_KD, EAF_KD)),
    ("middle_layer_size", (DUAL, EVALUATION)),
    ("loss", (TRAIN,)),
    ("init_from freeze", (TRAIN, *_STUDENTS)),
    ("init_header", (TRAIN, EAF_KD)),
    ("s", (TRAIN, *_ADAPTORS, EAF_KD, ADA)),
    ("m", (TRAIN, *_ADAPTORS, EAF_KD)),
    ("std", (TRAIN, EAF_KD)),
    ("header_sharding", (TRAIN, *_ADAPTORS, EAF_KD, ADA)),
    ("std_fc num_epoch_fc milestones_fc lr_fc", _ADAPTORS),
    ("loss_lambda", (A_KD, EAF_KD)),
    ("flip_targets", (EXTRACT, *_ADAPTORS, *_STUDENTS)),
    ("ada_source", _STUDENTS),
    ("ada_student_network ada_loss ada_weighted ada_m", (ADA,)),
    ("num_epoch milestones lr warmup_epochs", (TRAIN, *_STUDENTS)),
    ("batch_size accumulate global_batch sync_bn momentum weight_decay max_grad_norm", _TRAINING),
    ("precision compile device_cache_gb checkpoint_minutes tensorboard", _TRAINING),
    ("seed", (SPLIT, *_TRAINING)),
    ("capture", _TRAINING),
    ("checkpoint published_adaptor_input report", (EVALUATION,)),
    ("reference_group threshold scores score_forms corrections", (EVALUATION,)),
    ("teacher", (EXTRACT, EVALUATION)),
    ("onnx_channels onnx_mean onnx_std", (EXTRACT, EVALUATION, IJB)),
    ("row", (EVALUATION, IJB)),
)
READ_BY = {name: scripts for names, scripts in _TABLE for name in names.split()}
"""The scripts that read each setting. A setting that is not listed is read by all."""

CHANGES_NO_NUMBER = {
    # Data and weights are compared by their digests instead of their paths.
    *("data", "pairs", "pairs_sets", "evaluation_groups", "init_from", "output", "cache"),
    *("leave_out", "skip_bad_images", "nested_images", "weights"),
    # They select the run folder.
    *("ethnicities", "ethnicity", "is_teacher_baseline", "is_standalone", "is_dual_layer", "has_dropout", "ada_source"),
    # They change rounding at most, and a change is printed. The total batch size is compared instead of global_batch.
    *("global_batch", "header_sharding", "device", "compile", "cudnn_benchmark", "num_threads", "infer_batch_size"),
    *("infer_precision", "capture", "device_cache_gb", "num_workers", "checkpoint_minutes", "tensorboard"),
    # The images of a step are compared instead. The statistics of batch normalisation are those of the images that pass
    # the network together, which the number of processes changes as well.
    "accumulate",
}
"""Settings that may differ when a run is resumed. All others that its script reads must be equal."""


def script_that_trains(kind: str) -> str:
    """Returns the script that trains `kind`: "teacher", an adaptor or a method; "" for an unknown kind."""
    return ({"teacher": TRAIN} | ADAPTORS | METHODS).get(kind, "")


def reads(script: str, setting: str) -> bool:
    """Returns True if a script reads a setting.

    A script of METHODS that is not in SCRIPTS reads what KD_CEL.py reads, any other unknown script all settings.
    """
    if script not in SCRIPTS and script in METHODS.values():
        script = EAF_KD
    return script not in SCRIPTS or script in READ_BY.get(setting, SCRIPTS)


def called(path: str) -> str:
    """Returns the name in SCRIPTS of the script started as `path` (sys.argv[0])."""
    name = Path(path).name
    return {"evaluation.py": EVALUATION, "ijb.py": IJB}.get(name, name)


def unread(script: str, settings: list[str]) -> str:
    """Returns a sentence that names the `settings` that a script does not read and the scripts that do; "" if none."""
    names_by_readers: dict[str, list[str]] = {}
    for name in settings:
        if not reads(script, name):
            readers = READ_BY[name]
            who = f"{listed(readers)} {'reads' if len(readers) == 1 else 'read'}"
            names_by_readers.setdefault(who if len(readers) <= 3 else "other scripts read", []).append(name)
    parts = [f"{listed(names)}, which {who}" for who, names in names_by_readers.items()]
    return f"not read by {script}: {'; '.join(parts)}." if parts else ""


def listed(names: list[str] | tuple[str, ...]) -> str:
    """Joins names for a sentence: a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
