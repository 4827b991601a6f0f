"""Beside torch.compile: CP-LRP and epsilon as one would write them by hand for one model, eager and compiled.

Rules that only stop gradients (CP-LRP: attention weights, gates and norms as constants; epsilon in a ReLU network) can
be written as `input x gradient` of a changed model, which torch.compile fuses. It is the fairest rival there is, and
serves one model class and one rule. All run in turn in one process; relevance is compared first.

    python benchmarks/cost_compiled.py [--threads 2] [--runs 15] [--only MLP]
    python benchmarks/cost_compiled.py --table          writes the table of docs/speed.md from the kept figures only
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _cases import BASELINE, Case, Run, llama, mlp
from _measure import interleaved, kept, ratios, report, write_section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "speed.md"
BEGIN, END = "<!-- compiled: begin (python benchmarks/cost_compiled.py --table) -->", "<!-- compiled: end -->"
Forward = Callable[[Tensor], Tensor]


def by_hand_llama(model: Any) -> Any:
    """A copy of a LLaMA whose input x gradient is CP-LRP: no gradient goes through norms, gates, attention weights."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        return sdpa_attention_forward(module, q.detach(), k.detach(), v, mask, **options)

    def norm(self: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
        return self.weight * (x * scale)

    def gated(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).detach() * self.up_proj(x))  # type: ignore[no-any-return]

    AttentionInterface.register("by_hand", attention)
    found = copy.deepcopy(model)
    found.set_attn_implementation("by_hand")
    for module in found.modules():
        for kind, forward in ((LlamaRMSNorm, norm), (LlamaMLP, gated)):
            if isinstance(module, kind):
                module.forward = forward.__get__(module)
    return found


def input_times_gradient(forward: Forward, x: Tensor) -> Tensor:
    """x times the gradient of the predicted class, for one row, in percent of it."""
    given = x.detach().requires_grad_()
    output = forward(given)
    value = output[..., int(output.argmax())].sum()
    (gradient,) = torch.autograd.grad(value, given)
    return given.detach() * gradient * (100 / value.detach().abs())


def of_llama() -> tuple[Case, str, Callable[[bool], Callable[[], Tensor]]]:
    """LLaMA 8 x 512, 128 tokens, and the hand-written rule: relevance of each token."""
    case = llama()

    def by_hand(compiled: bool) -> Callable[[], Tensor]:
        model = by_hand_llama(case.model)
        run = torch.compile(model) if compiled else model
        x = model.get_input_embeddings()(case.inputs)

        def forward(given: Tensor) -> Tensor:
            logits: Tensor = run(inputs_embeds=given, use_cache=False, logits_to_keep=1).logits[0, -1]
            return logits

        return lambda: input_times_gradient(forward, x).sum(-1)

    return case, "cp-lrp", by_hand


def of_mlp() -> tuple[Case, str, Callable[[bool], Callable[[], Tensor]]]:
    """MLP 30-64-2, one row: epsilon is input x gradient where activations are ReLU."""
    case = mlp()

    def by_hand(compiled: bool) -> Callable[[], Tensor]:
        run = torch.compile(case.model) if compiled else case.model
        return lambda: input_times_gradient(lambda given: run(given)[0], case.inputs)

    return case, "epsilon", by_hand


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--only", default="", help="models whose name holds this; rows of others are kept as they were")
    parser.add_argument("--table", action="store_true", help="write the table from the last results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.table:
        measure(options.runs, options.only)
    write_section(PAGE, BEGIN, END, table(kept("cost_compiled")["rows"]))


def table(rows: list[dict[str, object]]) -> str:
    """The table of docs/speed.md."""
    return "\n".join(["| model | | time ÷ (forward + gradient) | largest difference |", "|---|---|---|---|", *(
        f"| {row['model']} | {row['case']} | {row['median']:.2f} ({row['min']:.2f} to {row['max']:.2f}) "
        f"| {row['difference']:.0e} |" for row in rows if row["case"] != BASELINE), ""])


def measure(runs: int, only: str) -> None:
    """Run all cases, and keep what was found."""
    rows: list[dict[str, object]] = []
    for name, make, more in (("LLaMA 8 x 512, 128 tokens", of_llama, 1), ("MLP 30-64-2, 1 row", of_mlp, 40)):
        if only not in name:
            rows += [row for row in kept("cost_compiled")["rows"] if row["model"] == name]
            continue
        case, rules, by_hand = make()
        ours, eager, compiled = case.explanation(rules), by_hand(False), by_hand(True)
        (own,) = ours().values()  # type: ignore[attr-defined]
        difference = max(float(np.abs(own - run().numpy()).max() / np.abs(own).max()) for run in (eager, compiled))
        cases: dict[str, Run] = {BASELINE: case.baseline, f"dlbc {rules}": ours, f"{rules} by hand": eager,
                                 f"{rules} by hand, torch.compile": compiled}
        rows += [{"model": name, "case": label, **found, "difference": difference}
                 for label, found in ratios(interleaved(cases, runs=more * runs), BASELINE).items()]
    report("cost_compiled", rows)


if __name__ == "__main__":
    main()
