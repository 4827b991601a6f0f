"""Run by test_devices.py under compute-sanitizer: explanations by kernels (`python -m tests.gpu_sanitized cuda`)."""

from __future__ import annotations

import sys

import torch
from torch.utils._pytree import tree_map

import dlbc
from tests import zoo

MODELS = ("mlp", "bert", "llama_ids_only", "moe_gpt_oss")
"""Products, rows, attention relevance and experts."""


def main(device: str) -> None:
    """Explain each model by rules of absolute values and of multipliers; other sizes than those compiled for too."""
    for name in MODELS:
        case = zoo.CASES[name]()
        model = case.model.to(device)
        for rules in ("dlb", "attnlrp"):
            explainer = None
            for args, kwargs in ((case.args, case.kwargs), *case.other[:1]):
                args, kwargs = tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, (args, kwargs))
                explainer = explainer or dlbc.compile(model, args if args else kwargs, rules=rules, backend="triton",
                                                      cache=False)
                explainer(*args, **kwargs, target=1)
            print(name, rules, "done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
