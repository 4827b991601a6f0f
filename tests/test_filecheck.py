"""Every `filecheck/**/*.dlir` is a test: a RUN line, IR text, and CHECK lines for what must come out.

lit runs all selected files at once; each file is reported as one test here, with what its commands wrote.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "filecheck"
NAMES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.dlir"))
LIT = "from lit.main import main; main()"

Results = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """lit's verdict and output for each file that is among the selected tests."""
    names = [item.callspec.params["name"] for item in request.session.items
             if isinstance(item, pytest.Function) and item.function is test_filecheck]
    output = tmp_path_factory.mktemp("lit")
    report = output / "report.json"
    done = subprocess.run(
        [sys.executable, "-c", LIT, "-q", f"-j{min(4, os.cpu_count() or 1)}", "-o", str(report),
         "-Doutput=" + str(output), *(str(FOLDER / name) for name in names)],
        capture_output=True, text=True, timeout=1200, check=False)
    assert report.exists(), f"lit did not run:\n{done.stdout}{done.stderr}"
    tests = json.loads(report.read_text(encoding="utf-8"))["tests"]
    return {test["name"].removeprefix("dlbc :: "): test for test in tests}


@pytest.mark.parametrize("name", NAMES)
def test_filecheck(name: str, results: Results) -> None:
    """The file's RUN lines succeed."""
    result = results[name]
    if result["code"] != "PASS":
        pytest.fail(f"tests/filecheck/{name}: {result['code']}\n{result['output']}", pytrace=False)
