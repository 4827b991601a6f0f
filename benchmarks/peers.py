"""How far dlbc is from published implementations: measures, keeps the figures, and writes the table in docs/peers.md.

    make peers                                     sets up .venv-peers and runs the tests
    .venv-peers/bin/python benchmarks/peers.py     measures all pairs; --table writes the table from kept figures only

The comparisons are those of tests/peers/comparisons.py, which the tests hold to their tolerances.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "peers.md", ROOT / "benchmarks" / "results" / "peers.json"
BEGIN, END = "<!-- peers: begin (python benchmarks/peers.py --table) -->", "<!-- peers: end -->"
PACKAGES = ("lxt", "zennit", "captum", "torch", "transformers", "numpy")
MODELS = {
    "llama": "LLaMA, 4 layers x 64", "qwen3": "Qwen3, 4 layers x 64",
    "qwen3_moe": "Qwen3-MoE, 4 layers x 64, 2 of 6 experts", "gpt2": "GPT-2, 4 layers x 64",
    "smollm2": "SmolLM2-135M-Instruct, trained", "transformer layer": "one transformer layer",
    "vgg_small": "VGG, 6 convolutions", "vgg_small_avg": "the same VGG with average pooling",
    "resnet18_small": "ResNet-18, width 8", "lenet": "LeNet", "lenet_avg": "LeNet with average pooling",
    "mlp": "MLP, ReLU", "mlp_tanh": "MLP, tanh and sigmoid"}


def table(measured: Mapping[str, object]) -> str:
    """The section between the markers."""
    packages, rows = measured["packages"], measured["rows"]
    assert isinstance(packages, dict) and isinstance(rows, list)
    lines = ["| peer | its method | ours | model | stabiliser | float32 | float64 |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {row['peer']} | {row['theirs']} | `{row['ours']}` | {MODELS[row['model']]} | "
              f"{_stabiliser(row['eps'])} | {row['float32']:.1e} | {row['float64']:.1e} |" for row in rows]
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    return "\n".join([*lines, "", f"Measured with {versions}, Python {measured['python']}, on the CPU."]) + "\n"


def _stabiliser(eps: float | None) -> str:
    return "none" if eps is None else f"{eps:g}"


def page(text: str, measured: Mapping[str, object]) -> str:
    """docs/peers.md with a current table."""
    before, found, rest = text.partition(BEGIN)
    assert found and END in rest, f"docs/peers.md lacks `{BEGIN}` or `{END}`"
    return before + BEGIN + "\n" + table(measured) + END + rest.partition(END)[2]


def kept() -> dict[str, object]:
    """What was measured last."""
    found: dict[str, object] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def measure() -> dict[str, object]:
    """Every comparison, with the versions of everything."""
    import platform

    from tests.peers.comparisons import ALL

    rows = []
    for one in ALL:
        found = one.measure()
        print(f"{one.name:45} {found.float32:.1e} {found.float64:.1e}", flush=True)
        rows.append({"peer": one.peer, "theirs": one.theirs, "ours": one.ours, "model": one.model, "eps": one.eps,
                     "float32": found.float32, "float64": found.float64})
    return {"packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "python": platform.python_version(), "rows": rows}


def installed() -> bool:
    """Whether all peers are there; the figures are only measured together."""
    return all(any(importlib.metadata.distributions(name=name)) for name in PACKAGES)


def main() -> None:
    """Measure and keep, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table from the figures that were kept")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "runtime")]
    if not options.table:
        if not installed():
            print("The peers (lxt, zennit, captum) are not installed here; `make peers` sets up .venv-peers.")
            return
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), kept()), encoding="utf-8")


if __name__ == "__main__":
    main()
