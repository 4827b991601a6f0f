"""Imports point one way, and importing dlbc is light and silent."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "onnx", "triton", "matplotlib")
LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
IMPORT_ALL_OF_IR = (
    "import importlib, pkgutil, dlbc.ir\n"
    "for module in pkgutil.walk_packages(dlbc.ir.__path__, 'dlbc.ir.'): importlib.import_module(module.name)"
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter in the repository root."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "runtime")])
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True, timeout=300, check=False)


def test_import_directions() -> None:
    """The contracts of [tool.importlinter] in pyproject.toml hold."""
    done = python(LINT_IMPORTS)
    if done.returncode != 0:
        verdict = done.stdout[max(0, done.stdout.find("Contracts\n")):]  # without the banner
        pytest.fail(f"a wrong import (see [tool.importlinter] in pyproject.toml):\n{verdict}{done.stderr}",
                    pytrace=False)


@pytest.mark.parametrize("code", ["import dlbc", "import dlbc_runtime", IMPORT_ALL_OF_IR],
                         ids=["dlbc", "dlbc_runtime", "dlbc.ir and all in it"])
def test_importing_is_light_and_silent(code: str) -> None:
    """Nothing heavy is imported before it is needed, and nothing is printed."""
    done = python(f"{code}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout + done.stderr == "[]\n"


def test_only_frontends_import_torch_export() -> None:
    """import-linter sees torch only as a whole, so this reads the source."""
    sources = [*(ROOT / "dlbc").rglob("*.py"), *(ROOT / "runtime").rglob("*.py")]
    found = [f"{path.relative_to(ROOT)}:{line}" for path in sorted(sources)
             if ROOT / "dlbc" / "frontends" not in path.parents
             for line in uses_of_torch_export(path.read_text(encoding="utf-8"))]
    assert found == [], "only dlbc.frontends may use torch.export; ask it for what is needed here"


def uses_of_torch_export(source: str) -> list[int]:
    """Lines of `source` that import torch.export or reach it as an attribute of torch."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                paths = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                paths = [f"{module}.{alias.name}" for alias in names]
            case ast.Attribute(value=ast.Name(id=base), attr=attr):
                paths = [f"{base}.{attr}"]
            case _:
                continue
        if any(f"{path}.".startswith(("torch.export.", "torch._export.")) for path in paths):
            lines.append(node.lineno)
    return lines
