"""The order of the packages: a module imports from its own package and from lower layers."""

import ast
from pathlib import Path

from tests.runs import ROOT

LAYERS = """
    config
    backbones
    utils.errors utils.tables utils.memory utils.threads
    utils.storage
    utils.distributed
    utils.environment
    utils.process utils.weights
    utils.data
    utils.losses
    utils.training
    utils.prepare utils.stages
    eval
    scripts
"""
ORDER = {package: height for height, line in enumerate(LAYERS.split("\n")) for package in line.split()}
FILES = [path for name in ("config", "backbones", "utils", "eval") for path in ROOT.glob(f"{name}/**/*.py")]
SCRIPTS = [*ROOT.glob("*.py")]
LONGEST = 60  # lines of a function, and of a script
LONGER = {
    "demo.py": 80,  # the list of its stages
    "reproduce.py": 120,  # a command line of its own, and the plan
    "export.py": 300,  # an application of its own: nothing else uses its functions
}


def package_of(module: str) -> str:
    """The longest name in LAYERS that a module, or a name in one, lies in; "" where it is none of ours."""
    if (ROOT / f"{module.split('.')[0]}.py").exists():
        return "scripts"
    return max((name for name in ORDER if f"{module}.".startswith(f"{name}.")), key=len, default="")


def package_of_file(path: Path) -> str:
    return package_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


def imported(path: Path) -> set[str]:
    """What a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports by a relative name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_run_down():
    """What a module imports lies in its own package or in a lower layer, so that packages import in no circle."""
    wrong = []
    for path in [*FILES, *SCRIPTS]:
        own = package_of_file(path)
        for name in imported(path):
            other = package_of(name)
            if other and other != own and ORDER[other] >= ORDER[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if other == own == "scripts":
                wrong.append(f"{path.name} imports {name}: scripts import packages")
    assert wrong == []


def test_every_module_has_its_layer():
    without = [
        str(path.relative_to(ROOT)) for path in FILES if path.name != "__init__.py" and not package_of_file(path)
    ]
    assert without == []


def test_functions_and_scripts_can_be_seen_whole():
    long = [path.name for path in SCRIPTS if len(path.read_text().splitlines()) > LONGER.get(path.name, LONGEST)]
    for path in [*FILES, *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST:
                long.append(f"{path.relative_to(ROOT)} {node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert long == []
