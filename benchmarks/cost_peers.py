"""What lxt, zennit, captum, autoLRP and dl-backtrace cost beside dlbc: time and added peak memory over forward +
input-gradient.

All run in turn in one process, on the same models, inputs, threads and element type (`_cases.py`), where the peers are:

    make peers                                              sets up .venv-peers
    .venv-peers/bin/python benchmarks/cost_peers.py         measures, and writes the table of docs/peers.md
    python benchmarks/cost_peers.py --table                 writes the table from the kept figures only

lxt patches the classes of a model family for good, so it gets a copy of the module that defines them. dl-backtrace
changes torch for good (`_dlbacktrace.py`), so it has a process for each model, with a baseline of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT), str(ROOT / "runtime")]

import _dlbacktrace as alone  # noqa: E402
from _cases import BASELINE, Case, Run, llama, mlp, resnet18, vgg11  # noqa: E402
from _measure import added_memory, interleaved, kept, peak_memory, ratios, report, write_section  # noqa: E402

PAGE = ROOT / "docs" / "peers.md"
BEGIN, END = "<!-- cost: begin (python benchmarks/cost_peers.py --table) -->", "<!-- cost: end -->"
PEERS = ("lxt", "zennit", "captum", "autolrp", "dl-backtrace")
LIMIT = 600.0  # seconds for the times of one model beside dl-backtrace, and for the memory of one case


def ours(case: Case, *presets: str) -> dict[str, Run]:
    """dlbc's runs, each compiled when it is first run: memory is measured of one in a process."""
    def run(preset: str) -> Run:
        compiled = cache(partial(case.explanation, preset))

        def explained() -> object:
            return compiled()()

        return explained

    return {f"dlbc {preset}": run(preset) for preset in presets}


def language_model() -> dict[str, Run]:
    """LLaMA 8 x 512, 128 tokens."""
    case = llama()
    return {BASELINE: case.baseline, **ours(case, "attnlrp", "cp-lrp"), "lxt attnLRP": _lxt(),
            "autoLRP ATTNLRP": _autolrp_text(case)}


def pictures(case: Case) -> dict[str, Run]:
    """A CNN, four pictures of 224 x 224."""
    return {BASELINE: case.baseline, **ours(case, "epsilon-plus", "epsilon-plus-flat", "epsilon-gamma-box"),
            "zennit EpsilonPlusFlat": _zennit(case, "EpsilonPlusFlat"),
            "zennit EpsilonGammaBox": _zennit(case, "EpsilonGammaBox"), "autoLRP composite": _autolrp(case)}


def rows_of_a_table() -> dict[str, Run]:
    """MLP 30-64-2, one row."""
    case = mlp()
    return {BASELINE: case.baseline, **ours(case, "epsilon"), "captum LRP": _captum(case),
            "autoLRP composite": _autolrp(case)}


MODELS: dict[str, Callable[[], dict[str, Run]]] = {
    "LLaMA 8 x 512, 128 tokens": language_model,
    "ResNet-18, 4 pictures of 224 x 224": lambda: pictures(resnet18()),
    "VGG-11, 4 pictures of 224 x 224": lambda: pictures(vgg11()),
    "MLP 30-64-2, 1 row": rows_of_a_table,
}
ALONE: dict[str, tuple[Callable[[], dict[str, Run]], int]] = {  # and how many runs: one takes up to half a minute
    "LLaMA 8 x 512, 8 tokens": (alone.prompt, 3),
    "BERT-base, 1 text of 8 tokens": (alone.text, 1),
    "ResNet-18, 1 picture of 224 x 224": (alone.picture, 3),
    "MLP 30-64-2, 1 row, beside dl-backtrace": (alone.rows_of_a_table, 360),
}


def _lxt() -> Run:
    from lxt.efficient import monkey_patch
    from lxt.efficient.models import llama as maps

    modeling = _copy("transformers.models.llama.modeling_llama")
    monkey_patch(modeling, {getattr(modeling, what.__name__, what) if isinstance(what, type) else modeling: patch
                            for what, patch in maps.attnLRP.items()})
    case = llama(modeling=modeling)
    embed = case.model.get_input_embeddings()

    def run() -> object:
        x = embed(case.inputs).detach().requires_grad_(True)
        logits = case.model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits
        logits.max(dim=-1).values.sum().backward()
        return (x * x.grad).sum(-1)

    return run


def _copy(name: str) -> types.ModuleType:
    """A module loaded once more, with classes of its own."""
    found = importlib.util.find_spec(name)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _zennit(case: Case, name: str) -> Run:
    from copy import deepcopy

    import zennit.composites
    from zennit.attribution import Gradient
    from zennit.torchvision import ResNetCanonizer

    box = {"low": torch.full_like(case.inputs[:1], -6.0), "high": torch.full_like(case.inputs[:1], 6.0)}
    composite = getattr(zennit.composites, name)(canonizers=[ResNetCanonizer()], **(box if "Box" in name else {}))
    model, x = deepcopy(case.model), case.inputs
    with torch.no_grad():
        seed = torch.nn.functional.one_hot(model(x).argmax(-1), 1000).float()

    def run() -> object:
        with Gradient(model, composite) as attributor:
            return attributor(x, seed)

    return run


def _captum(case: Case) -> Run:
    from captum.attr import LRP

    method, target = LRP(case.model), int(case.model(case.inputs).argmax())
    return lambda: method.attribute(case.inputs.clone().requires_grad_(True), target=target)


def _autolrp(case: Case) -> Run:
    import autolrp

    def run() -> object:
        x = autolrp.tensor(case.inputs)
        case.model(x).max(-1).values.sum().lrp(config=autolrp.LRPConfig.composite())
        return x.relevance

    return run


def _autolrp_text(case: Case) -> Run:
    import autolrp

    embed, config = case.model.get_input_embeddings(), autolrp.LRPConfig(rule={**autolrp.BASE, **autolrp.ATTNLRP})

    def run() -> object:
        x = autolrp.tensor(embed(case.inputs).detach())
        logits = case.model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits
        logits.max(dim=-1).values.sum().lrp(config=config)
        return x.relevance.sum(-1)

    return run


def timed(name: str, runs: int) -> list[dict[str, object]]:
    """The times of the cases of a model, in turn in this process."""
    if name in ALONE:
        made, runs = ALONE[name]
        cases = made()
        few = runs < 10
        seconds = interleaved(cases, runs=runs, warmup=1 if few else 3,
                              repeats={case: 9 for case in cases if few and case != "dl-backtrace"})
    else:
        seconds = interleaved(MODELS[name](), runs=40 * runs if "MLP" in name else runs)
    return [{"model": name, "case": case, **found, "runs": len(seconds[case])}
            for case, found in ratios(seconds, BASELINE).items()]


def timed_alone(name: str, threads: int) -> list[dict[str, object]]:
    """`timed`, in a process of its own; a row that says why where it does not end well."""
    command = [sys.executable, __file__, "--threads", str(threads), "--measure-time", name]
    try:
        out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT).stdout
    except subprocess.TimeoutExpired:
        return [{"model": name, "case": "dl-backtrace", "error": f"more than {LIMIT:.0f} s for {ALONE[name][1]} runs"}]
    except subprocess.CalledProcessError as error:
        return [{"model": name, "case": "dl-backtrace", "error": str(error.stderr).strip().splitlines()[-1]}]
    found: list[dict[str, object]] = json.loads(out.strip().splitlines()[-1])
    return found


def with_memory(rows: list[dict[str, Any]]) -> list[dict[str, object]]:
    """The rows of a model with the memory of each case over the baseline's, where it was measured in time."""
    memory: dict[str, float] = {}
    for row in rows:
        if "error" not in row:
            with contextlib.suppress(subprocess.TimeoutExpired):
                memory[row["case"]] = peak_memory(__file__, row["model"], row["case"], seconds=LIMIT)
    return [{**row, "memory ratio": memory[row["case"]] / max(memory[BASELINE], 1.0)} if row["case"] in memory else row
            for row in rows]


def table(measured: Mapping[str, Any]) -> str:
    """The section between the markers."""
    lines = ["| model | | time ÷ (forward + gradient) | added memory ÷ the same |", "|---|---|---|---|"]
    lines += [f"| {row['model']} | {_case(row)} | {_time(row)} | {_memory(row)} |"
              for row in measured["rows"] if row["case"] != BASELINE]
    machine = measured["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return "\n".join([*lines, "", f"Measured on {machine['cpu']}, {machine['threads']} threads, torch "
                      f"{machine['torch']}, {versions}."]) + "\n"


def _case(row: Mapping[str, Any]) -> str:
    runs = row.get("runs", 0)
    return row["case"] + (f", {runs} run{'s' if runs > 1 else ''}" if 0 < runs < 5 else "")


def _time(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"does not run: {row['error']}"
    digits = 2 if row["median"] < 100 else 0
    spread = f" ({row['min']:.{digits}f} to {row['max']:.{digits}f})" if row.get("runs") != 1 else ""
    return f"{row['median']:.{digits}f}{spread}"


def _memory(row: Mapping[str, Any]) -> str:
    return f"{row['memory ratio']:.2f}" if "memory ratio" in row else "not measured"


def _others(rows: list[dict[str, object]], only: str) -> list[dict[str, object]]:
    """What is kept of the models that were not measured now, and what was, in the order of the models."""
    new = {row["model"] for row in rows}
    kept_rows = [row for row in kept("cost_peers")["rows"] if row["model"] not in new] if only else []
    order = {name: number for number, name in enumerate([*MODELS, *ALONE])}
    return sorted([row for row in kept_rows if row["model"] in order] + rows, key=lambda row: order[str(row["model"])])


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--only", default="", metavar="TEXT", help="only models whose name has TEXT; others stay")
    parser.add_argument("--table", action="store_true", help="write the table from the figures that were kept")
    parser.add_argument("--measure-time", metavar="MODEL", help="print the rows of a model")
    parser.add_argument("--measure-memory", nargs=2, metavar=("MODEL", "CASE"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.table:
        if any(not list(importlib.metadata.distributions(name=name)) for name in PEERS):
            print(f"The peers ({', '.join(PEERS)}) are not installed here; `make peers` sets up .venv-peers.")
            return
        from tests.peers.stubs import torchvision_names

        with torchvision_names():
            for name in ("lxt.efficient.models.llama", "zennit.composites", "zennit.torchvision"):
                importlib.import_module(name)
        if options.measure_memory:
            name, case = options.measure_memory
            print(added_memory((ALONE[name][0] if name in ALONE else MODELS[name])()[case]))
            return
        if options.measure_time:
            print(json.dumps(timed(options.measure_time, options.runs)))
            return
        rows: list[dict[str, object]] = []
        for name in [name for name in (*MODELS, *ALONE) if options.only in name]:
            found = timed_alone(name, options.threads) if name in ALONE else timed(name, options.runs)
            rows += with_memory(found)
        versions = {name: importlib.metadata.version(name) for name in (*PEERS, "transformers")}
        report("cost_peers", _others(rows, options.only), packages=versions)
    write_section(PAGE, BEGIN, END, table(kept("cost_peers")))


if __name__ == "__main__":
    main()
