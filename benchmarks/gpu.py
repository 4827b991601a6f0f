"""Speed and memory on a GPU: dlbc's Triton kernels beside its torch backend, plain forward and input-gradient, the same
compiled by torch.compile, and lxt where it is installed. LLaMA-3.2-3B's architecture with random bfloat16 weights, and
smaller models.

`python benchmarks/gpu.py` runs all cases and writes results/gpu.json; `--case NAME` runs one, `--small` takes small
models (to see that everything runs). Without a CUDA device it says so and ends with status 0.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in (".", "runtime")]

from _gpu_models import (  # noqa: E402
    LEAST,
    bert,
    gradient_of_texts,
    gradient_of_tokens,
    gradient_of_vectors,
    llama,
    resnet,
    vit,
)
from _measure import machine, report  # noqa: E402

import dlbc  # noqa: E402

Row = dict[str, object]


def timed(run: Callable[[], object], *, runs: int = 20, warmup: int = 8) -> float:
    """Milliseconds of a call, the median of `runs`, measured by the device."""
    for _ in range(warmup):
        run()
    found = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def peak(run: Callable[[], object]) -> float:
    """GiB that a call holds at most, weights aside."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measured(case: str, runs: Mapping[str, Callable[[], object]], **facts: object) -> Row:
    """One row: milliseconds and GiB of each way."""
    row: Row = {"case": case, **facts}
    for name, run in runs.items():
        try:
            row[f"{name}, ms"] = round(timed(run), 3)
            row[f"{name}, GiB"] = round(peak(run), 3)
        except Exception as problem:  # another way failing is a finding, not the end of the measurement
            row[f"{name}, failed"] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
    print(row, flush=True)
    return row


def language(small: bool) -> list[Row]:
    """One explanation at 128 and 512 tokens."""
    model, rows = llama("cuda", small=small), []
    for tokens in (128, 512):
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), device="cuda")  # type: ignore[union-attr]
        plain = gradient_of_tokens(model, ids)
        for rules in ("attnlrp", "dlb"):
            ways = {backend: dlbc.compile(model, ids, rules=rules, backend=backend, cache=False, cuda_graphs=False)
                    for backend in ("triton", "torch")}
            ways["triton, graphs"] = ways["triton"].with_options(cuda_graphs=True)
            runs: dict[str, Callable[[], object]] = {
                name: (lambda found=found, ids=ids: dict(found(ids, target=7).relevance))
                for name, found in ways.items()}
            rows.append(measured("llama-3.2-3b", {**runs, "forward + gradient": plain}, rules=rules, tokens=tokens,
                                 least=LEAST[rules, tokens]))
    return rows


def experts(small: bool) -> list[Row]:
    """GPT-OSS-20B's widths, four layers, 1 and 512 tokens: experts by grouped kernels, beside torch's products."""
    from transformers import GptOssConfig, GptOssForCausalLM

    layers = ["sliding_attention", "full_attention"] * (1 if small else 2)
    config = GptOssConfig(num_hidden_layers=len(layers), layer_types=layers,
                          **({"hidden_size": 256, "intermediate_size": 256, "vocab_size": 1000} if small else {}))
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = GptOssForCausalLM(config)
    model = model.to(torch.bfloat16).eval()
    rows = []
    for tokens in (1, 512):
        ids = torch.randint(0, 1000, (1, tokens), device="cuda")
        ways = {backend: dlbc.compile(model, ids, rules="dlb", backend=backend, cache=False, cuda_graphs=False)
                for backend in ("triton", "torch")}
        ways["triton, graphs"] = ways["triton"].with_options(cuda_graphs=True)
        runs: dict[str, Callable[[], object]] = {
            name: (lambda found=found, ids=ids: dict(found(ids, target=7).relevance)) for name, found in ways.items()}
        rows.append(measured("gpt-oss, 4 layers", runs, rules="dlb", tokens=tokens))
    return rows


def lxt(small: bool) -> list[Row]:
    """lxt's efficient AttnLRP on the same model, where lxt is installed; last, for it changes transformers' classes."""
    try:
        from lxt.efficient import monkey_patch
        from transformers.models.llama import modeling_llama
    except ImportError as problem:
        return [{"case": "llama-3.2-3b, lxt", "skipped": str(problem)}]
    monkey_patch(modeling_llama)
    model, rows = llama("cuda", small=small), []
    for tokens in (128, 512):
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), device="cuda")  # type: ignore[union-attr]
        rows.append(measured("llama-3.2-3b, lxt", {"lxt": gradient_of_tokens(model, ids)}, tokens=tokens))
    return rows


def many_targets(small: bool) -> list[Row]:
    """64 targets at 512 tokens in one call, over 64 calls with one."""
    model = llama("cuda", small=small)
    ids = torch.randint(0, model.config.vocab_size, (1, 512), device="cuda")  # type: ignore[union-attr]
    explainer = dlbc.compile(model, ids, rules="dlb", backend="triton", cache=False, cuda_graphs=False)
    targets = list(range(64))
    return [measured("64 targets", {"one call": lambda: dict(explainer(ids, target=targets).relevance),
                                    "one of 64": lambda: dict(explainer(ids, target=0).relevance)}, tokens=512)]


def long(small: bool) -> list[Row]:
    """8192 tokens: memory."""
    model = llama("cuda", small=small)
    ids = torch.randint(0, model.config.vocab_size, (1, 8192), device="cuda")  # type: ignore[union-attr]
    explainer = dlbc.compile(model, ids[:, :64], rules="dlb", backend="triton", cache=False, cuda_graphs=False)
    return [measured("8k tokens", {"triton": lambda: dict(explainer(ids, target=7).relevance)}, tokens=8192)]


def encoder(small: bool) -> list[Row]:
    """BERT-base, 32 texts of 128 tokens."""
    model = bert("cuda", small=small)
    ids = torch.randint(0, 1000, (32, 128), device="cuda")
    gradient = gradient_of_texts(model, ids)
    ways = {b: dlbc.compile(model, ids, rules="attnlrp", backend=b, cache=False, cuda_graphs=False)
            for b in ("triton", "torch")}
    runs = {name: (lambda found=found: dict(found(ids, target=1).relevance)) for name, found in ways.items()}
    return [measured("bert-base", {**runs, "forward + gradient": gradient}, batch=32, tokens=128)]


def pictures(small: bool) -> list[Row]:
    """ResNet-50 and ViT-B/16, 32 pictures."""
    rows, x = [], torch.randn(32, 3, 224, 224, device="cuda")
    for name, model, rules in (("resnet-50", resnet("cuda", small=small), "epsilon-plus"),
                               ("vit-b-16", vit("cuda", small=small), "epsilon")):
        plain = gradient_of_vectors(model, x)
        compiled = gradient_of_vectors(torch.compile(model), x)  # type: ignore[arg-type]
        ways = {b: dlbc.compile(model, x, rules=rules, backend=b, cache=False, cuda_graphs=False)
                for b in ("triton", "torch")}
        runs: dict[str, Callable[[], object]] = {
            key: (lambda found=found: dict(found(x, target=1).relevance)) for key, found in ways.items()}
        rows.append(measured(name, {**runs, "forward + gradient": plain, "torch.compile": compiled}, rules=rules,
                             batch=32))
    return rows


def tuned(small: bool) -> list[Row]:
    """Tiles by measuring beside those of the estimate, for one explanation at 512 tokens: what they are worth, and how
    long measuring takes."""
    model = llama("cuda", small=small)
    ids = torch.randint(0, model.config.vocab_size, (1, 512), device="cuda")  # type: ignore[union-attr]
    plain = dlbc.compile(model, ids, rules="dlb", backend="triton", cache=False, cuda_graphs=False)
    before = time.perf_counter()
    measured_tiles = dlbc.compile(model, ids, rules="dlb", backend="triton", cache=False, cuda_graphs=False, tune=True)
    seconds = time.perf_counter() - before
    ways = {name: found.with_options(cuda_graphs=True) for name, found in
            (("estimate", plain), ("measured", measured_tiles))}
    runs: dict[str, Callable[[], object]] = {
        name: (lambda found=found: dict(found(ids, target=7).relevance)) for name, found in ways.items()}
    return [measured("llama-3.2-3b, tiles", runs, rules="dlb", tokens=512, compiling=round(seconds, 1),
                     notes=list(measured_tiles.plan().notes))]


def trials(small: bool) -> list[Row]:
    """What `backend="auto"` chooses, and the largest difference that it saw."""
    ids, x = torch.randint(0, 1000, (2, 128), device="cuda"), torch.randn(2, 3, 224, 224, device="cuda")
    rows: list[Row] = []
    for name, model, given in (("llama-3.2-3b", llama("cuda", small=small), ids),
                               ("bert-base", bert("cuda", small=small), ids),
                               ("resnet-50", resnet("cuda", small=small), x)):
        for rules in ("auto", "dlb"):
            explainer = dlbc.compile(model, given, rules=rules, cache=False)
            rows.append({"case": f"{name}, auto", "rules": rules, "backend": explainer.manifest.backend,
                         "notes": list(explainer.plan().notes)})
            print(rows[-1], flush=True)
    return rows


CASES: dict[str, Callable[[bool], list[Row]]] = {
    "trials": trials, "language": language, "tuned": tuned, "experts": experts, "targets": many_targets, "long": long,
    "encoder": encoder, "pictures": pictures, "lxt": lxt}


def facts() -> dict[str, object]:
    """The GPU, its driver and the libraries' versions."""
    found = torch.cuda.get_device_properties(0)
    return {**machine(), "gpu": found.name, "gpu memory, GiB": round(found.total_memory / 2**30, 1),
            "capability": f"sm_{found.major}{found.minor}", "cuda": torch.version.cuda,
            **{name: importlib.metadata.version(name) for name in ("triton", "transformers")}}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, action="append", help="only this case; may be repeated")
    parser.add_argument("--small", action="store_true", help="small models; nothing is written")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: skipped, there is no CUDA device on this machine")
        return
    rows: list[Row] = []
    for name in options.case or CASES:
        rows += CASES[name](options.small)
        gc.collect()
        torch.cuda.empty_cache()
    if not options.small:
        report("gpu", rows, **facts())


if __name__ == "__main__":
    main()
