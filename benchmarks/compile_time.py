"""How long compiling takes: cold (nothing in the cache) and warm (a new process that finds it there).

Each case runs in a process of its own, on an architecture with random weights; importing torch, transformers and dlbc,
and making the model, are not counted. `wall` is what a user waits for, `cpu` what the process itself needed: on a
machine that does other things the latter is the better figure. `lines` is the length of the generated code.
Run: `python benchmarks/compile_time.py [--threads 1] [--only MiniLM]`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "runtime")]

from _measure import report  # noqa: E402

Made = tuple[torch.nn.Module, Any]


def minilm() -> Made:
    """BERT of 6 layers, 384 wide, that classifies: all-MiniLM-L6."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    return BertForSequenceClassification(config).eval(), torch.randint(0, 30000, (1, 12))


def _llama(device: str, **sizes: Any) -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes)).eval()
        return model, torch.zeros((1, 12), dtype=torch.int64)


def smollm2() -> Made:
    """LLaMA of 30 layers, 576 wide: SmolLM2-135M."""
    return _llama("cpu", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                  num_key_value_heads=3, vocab_size=49152)


def llama_1b() -> Made:
    """LLaMA of 16 layers, 2048 wide, without numbers (on the meta device): LLaMA-3.2-1B."""
    return _llama("meta", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                  num_key_value_heads=8, vocab_size=128256)


MODELS: dict[str, tuple[Callable[[], Made], float]] = {
    "MiniLM": (minilm, 5.0), "SmolLM2-135M": (smollm2, 10.0), "LLaMA-3.2-1B": (llama_1b, 15.0)}
WITHOUT_NUMBERS = {"LLaMA-3.2-1B"}
"""Nothing of these could be kept: the cache holds the numbers of constants. They are compiled cold only."""
WARM_LIMIT = 0.5
RULES = "dlb"


def measure(name: str) -> dict[str, float]:
    """Seconds that `dlbc.compile` takes in this process."""
    import dlbc
    import dlbc.compiler
    import dlbc.frontends.torch_export

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = MODELS[name][0]()
    wall, cpu = time.perf_counter(), time.process_time()
    explainer = dlbc.compile(model, inputs, rules=RULES, cache=name not in WITHOUT_NUMBERS)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu,
            "lines": len(explainer.source.splitlines())}


def in_fresh_process(name: str, cache: str, threads: int) -> dict[str, float]:
    """`measure` in a new process with a cache folder of its own."""
    done = subprocess.run([sys.executable, __file__, "--measure", name, "--threads", str(threads)], check=True,
                          capture_output=True, text=True, env={**os.environ, "DLBC_CACHE_DIR": cache})
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=MODELS, default=None)
    parser.add_argument("--measure", choices=MODELS, help="measure in this process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    rows: list[dict[str, object]] = []
    for name in [options.only] if options.only else MODELS:
        with tempfile.TemporaryDirectory() as cache:
            limits = {"cold": MODELS[name][1]} | ({} if name in WITHOUT_NUMBERS else {"warm": WARM_LIMIT})
            for state, limit in limits.items():
                found = in_fresh_process(name, cache, options.threads)
                rows.append({"model": name, "rules": RULES, "cache": state, **found, "limit": limit})
    report("compile_time", rows)


if __name__ == "__main__":
    main()
