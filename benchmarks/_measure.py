"""How every benchmark measures: interleaved runs in one process, medians of ratios, memory in fresh processes."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict[str, object]:
    """The facts a figure needs to be read: processor, threads, versions."""
    info = Path("/proc/cpuinfo")
    cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
               "") if info.exists() else ""
    return {"cpu": cpu or platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__}


def interleaved(cases: Mapping[str, Callable[[], object]], *, runs: int, warmup: int = 3,
                repeats: Mapping[str, int] | None = None) -> dict[str, list[float]]:
    """Seconds of each case, one run of each in turn, `runs` times, after `warmup` turns.

    `repeats`: how often a case runs in its turn, of which the median counts: short ones beside one that takes seconds,
    after which caches are cold and threads asleep.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + runs):
        for name, case in cases.items():
            found = []
            for _ in range((repeats or {}).get(name, 1)):
                started = time.perf_counter()
                case()
                found.append(time.perf_counter() - started)
            if turn >= warmup:
                seconds[name].append(statistics.median(found))
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Median, min and max over turns of each case's time by the baseline's in the same turn."""
    found = {}
    for name, own in seconds.items():
        each = [a / b for a, b in zip(own, seconds[baseline], strict=True)]
        found[name] = {"median": statistics.median(each), "min": min(each), "max": max(each),
                       "milliseconds": 1000 * statistics.median(own)}
    return found


def input_gradient(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The baseline: plain forward, and the gradient of the largest output with respect to the input."""
    x = x.detach().requires_grad_(True)
    output = run(x)
    output.max(dim=-1).values.sum().backward()
    assert x.grad is not None
    return x.grad


def peak_memory(script: str, *arguments: str, seconds: float | None = None) -> float:
    """Peak resident memory, MiB, that `script --measure-memory arguments` adds, run in a fresh process.

    It gets `seconds`; `subprocess.TimeoutExpired` says that they were not enough.

    Arrays that are freed go back to the system at once. By default glibc keeps some of them, by how they happen to lie:
    peaks of the same run then differ by a third, and say more of the allocator than of what runs.
    """
    out = subprocess.run([sys.executable, script, "--measure-memory", *arguments], check=True, capture_output=True,
                         text=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, timeout=seconds).stdout
    return float(out.strip().splitlines()[-1])


def added_memory(case: Callable[[], object]) -> float:
    """Peak resident memory, MiB, that running a case twice adds to what the process held before.

    What the allocator keeps of earlier work (compiling, loading) is given back to the system first: otherwise the
    case would run in it and seem to need nothing.
    """
    case()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    _reset_peak()
    before = _resident()
    case()
    case()
    return _peak() - before


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def _resident() -> float:
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM") if Path("/proc/self/status").exists() else resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss / 1024


def kept(name: str) -> dict[str, Any]:
    """What benchmarks/results/<name>.json holds; no rows where there is no such file."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
    return found


def write_section(page: Path, begin: str, end: str, text: str) -> None:
    """Put a text between two markers of a page. ValueError where the page lacks one."""
    page.write_text(section(page.read_text(encoding="utf-8"), begin, end, text), encoding="utf-8")


def section(page: str, begin: str, end: str, text: str) -> str:
    """A page with a text between two markers. ValueError where it lacks one."""
    before, found, rest = page.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"the page lacks `{begin}` or `{end}`")
    return before + begin + "\n" + text + end + rest.partition(end)[2]


def report(name: str, rows: Sequence[Mapping[str, object]], **facts: object) -> None:
    """Print a table of rows and keep them, with the machine's facts (and others), as benchmarks/results/<name>.json."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=name)
    columns = {key: value for row in reversed(rows) for key, value in row.items()}
    columns = {key: columns[key] for key in [*rows[0], *(key for key in columns if key not in rows[0])]}
    for key, value in columns.items():
        table.add_column(key, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        values = (row.get(key, "") for key in columns)
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values))
    Console().print(table)
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    found = {"machine": machine() | facts, "rows": list(rows)}
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
