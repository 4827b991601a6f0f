"""What lxt, zennit, captum and autoLRP cost beside dlbc: time and added peak memory over forward + input-gradient.

All run in turn in one process, on the same models, inputs, threads and element type (`_cases.py`), where the peers are:

    make peers                                              sets up .venv-peers
    .venv-peers/bin/python benchmarks/cost_peers.py         measures, and writes the table of docs/peers.md
    python benchmarks/cost_peers.py --table                 writes the table from the kept figures only

lxt patches the classes of a model family for good, so it gets a copy of the module that defines them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT), str(ROOT / "runtime")]

from _cases import BASELINE, Case, Run, llama, mlp, resnet18, vgg11  # noqa: E402
from _measure import added_memory, interleaved, kept, peak_memory, ratios, report, write_section  # noqa: E402

PAGE = ROOT / "docs" / "peers.md"
BEGIN, END = "<!-- cost: begin (python benchmarks/cost_peers.py --table) -->", "<!-- cost: end -->"
PEERS = ("lxt", "zennit", "captum", "autolrp")


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


MODELS = {
    "LLaMA 8 x 512, 128 tokens": language_model,
    "ResNet-18, 4 pictures of 224 x 224": lambda: pictures(resnet18()),
    "VGG-11, 4 pictures of 224 x 224": lambda: pictures(vgg11()),
    "MLP 30-64-2, 1 row": rows_of_a_table,
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


def table(measured: Mapping[str, Any]) -> str:
    """The section between the markers."""
    lines = ["| model | | time ÷ (forward + gradient) | added memory ÷ the same |", "|---|---|---|---|"]
    lines += [f"| {row['model']} | {row['case']} | {row['median']:.2f} ({row['min']:.2f} to {row['max']:.2f}) | "
              f"{row['memory ratio']:.2f} |" for row in measured["rows"] if row["case"] != BASELINE]
    machine = measured["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return "\n".join([*lines, "", f"Measured on {machine['cpu']}, {machine['threads']} threads, torch "
                      f"{machine['torch']}, {versions}."]) + "\n"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--table", action="store_true", help="write the table from the figures that were kept")
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
            print(added_memory(MODELS[name]()[case]))
            return
        rows: list[dict[str, object]] = []
        for name, made in MODELS.items():
            cases = made()
            timed = ratios(interleaved(cases, runs=options.runs if "MLP" not in name else 40 * options.runs), BASELINE)
            memory = {case: peak_memory(__file__, name, case) for case in timed}
            rows += [{"model": name, "case": case, **found, "memory ratio": memory[case] / max(memory[BASELINE], 1.0)}
                     for case, found in timed.items()]
        versions = {name: importlib.metadata.version(name) for name in (*PEERS, "transformers")}
        report("cost_peers", rows, packages=versions)
    write_section(PAGE, BEGIN, END, table(kept("cost_peers")))


if __name__ == "__main__":
    main()
