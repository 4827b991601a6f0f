"""The table of costs in docs/peers.md is what was measured, and dl-backtrace runs and leaves torch as it was."""

from __future__ import annotations

import importlib.metadata
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALONE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import cost_peers

def flags():
    return [torch.get_num_threads(), torch.backends.mkldnn.enabled, torch.are_deterministic_algorithms_enabled()]

before = flags()
run = cost_peers.alone.rows_of_a_table()["dl-backtrace"]  # kept: its results are emptied with it
found = run()
print(json.dumps([before, flags(), [list(relevance.shape) for relevance in found.values()]]))
"""


def test_the_table_is_current() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "cost_peers.py"))
    text = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    shown = text.partition(script["BEGIN"] + "\n")[2].partition(script["END"])[0]
    assert shown == script["table"](script["kept"]("cost_peers")), "run `python benchmarks/cost_peers.py --table`"


@pytest.mark.peers
def test_dl_backtrace_explains_on_a_cpu_and_torch_is_as_before() -> None:
    """In a process of its own: it turns autograd off."""
    if not list(importlib.metadata.distributions(name="dl-backtrace")):
        pytest.skip("not installed: dl-backtrace; `make peers` sets up an environment that has it")
    done = subprocess.run([sys.executable, "-c", ALONE, str(ROOT / "benchmarks")], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    before, after, shapes = json.loads(done.stdout.strip().splitlines()[-1])
    assert before == after
    assert [1, 2] in shapes and [1, 30] in shapes  # the output, and the input
