"""The structure of the code: imports go to lower layers only; functions and scripts are short."""

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
    "reproduce.py": 120,  # a separate command line, and the plan
    "export.py": 300,  # a separate application: nothing else uses its functions
}


def package_of(module: str) -> str:
    """Returns the longest name in LAYERS that contains a module or a name in one; "" for other libraries."""
    if (ROOT / f"{module.split('.')[0]}.py").exists():
        return "scripts"
    return max((name for name in ORDER if f"{module}.".startswith(f"{name}.")), key=len, default="")


def package_of_file(path: Path) -> str:
    return package_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


def imported(path: Path) -> set[str]:
    """Returns the names that a file imports, including imports in functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports by a relative name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_go_to_lower_layers():
    """A module imports from its own package and from lower layers only, so that no circular imports are possible."""
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


def test_every_module_has_a_layer():
    without = [
        str(path.relative_to(ROOT)) for path in FILES if path.name != "__init__.py" and not package_of_file(path)
    ]
    assert without == []


def test_functions_and_scripts_are_short():
    long = [path.name for path in SCRIPTS if len(path.read_text().splitlines()) > LONGER.get(path.name, LONGEST)]
    for path in [*FILES, *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST:
                long.append(f"{path.relative_to(ROOT)} {node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert long == []
