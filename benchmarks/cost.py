"""What an explanation costs: time and memory over plain torch forward + input-gradient of the same model.

The baseline is the strict one: float32, eager, no gradients of weights, and for language models the head
computed at the last position only (`logits_to_keep=1`). Both are warm, run in turn in one process with the
same threads. Run: `python benchmarks/cost.py [--threads 2] [--runs 15]`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests"), str(Path(__file__).resolve().parent)]

from _measure import added_memory, input_gradient, interleaved, peak_memory, ratios, report  # noqa: E402

import dlbc  # noqa: E402

Run = Callable[[], object]
LLAMA, RESNET = "LLaMA 8 x 512, 128 tokens", "ResNet-18, 224 x 224, batch 4"
LIMITS = {(LLAMA, "cp-lrp"): 1.0, (LLAMA, "attnlrp"): 1.2, (LLAMA, "dlb"): 1.8, (RESNET, "dlb"): 2.0,
          (RESNET, "epsilon"): 1.5}
BASELINE = "forward + gradient"


def llama(tokens: int = 128) -> tuple[torch.nn.Module, torch.Tensor]:
    """An 8-layer, 512-wide LLaMA with a vocabulary of 32,000, random weights, and a prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
                             num_attention_heads=8, num_key_value_heads=8)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        return model, torch.randint(0, 32000, (1, tokens))


def llama_cases(presets: list[str]) -> dict[str, Run]:
    """The baseline and one explanation per preset."""
    model, ids = llama()
    embed = model.get_input_embeddings()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits

    cases: dict[str, Run] = {BASELINE: lambda: input_gradient(forward, embed(ids))}
    return cases | {rules: _explanation(model, ids, rules) for rules in presets}


def resnet_cases(presets: list[str]) -> dict[str, Run]:
    """The baseline and one explanation per preset."""
    import zoo

    model = zoo.resnet18(width=64).eval().requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(4, 3, 224, 224)
    cases: dict[str, Run] = {BASELINE: lambda: input_gradient(model, x)}
    return cases | {rules: _explanation(model, x, rules) for rules in presets}


def _explanation(model: torch.nn.Module, x: torch.Tensor, rules: str) -> Run:
    explainer = dlbc.compile(model, x, rules=rules, cache=False)
    return lambda: dict(explainer(x).relevance)


MODELS: dict[str, Callable[[list[str]], dict[str, Run]]] = {LLAMA: llama_cases, RESNET: resnet_cases}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--measure-memory", nargs=2, metavar=("MODEL", "CASE"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure_memory:
        name, case = options.measure_memory
        run = MODELS[name]([] if case == BASELINE else [case])[case]
        print(added_memory(run))
        return
    rows = []
    for name, cases in MODELS.items():
        presets = [preset for model, preset in LIMITS if model == name]
        timed = ratios(interleaved(cases(presets), runs=options.runs), BASELINE)
        memory = {case: peak_memory(__file__, name, case) for case in timed}
        for case, found in timed.items():
            rows.append({"model": name, "case": case, **found, "limit": LIMITS.get((name, case), 1.0),
                         "memory MiB": memory[case], "memory ratio": memory[case] / memory[BASELINE]})
    report("cost", rows)


if __name__ == "__main__":
    main()
