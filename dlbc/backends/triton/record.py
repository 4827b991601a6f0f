"""Which kernels a program launches, found without a GPU: its module runs on tensors without memory, at several sizes.

Triton compiles a kernel anew for each tile, and where a stride is 1, a multiple of 16, or neither. So every size is 1,
a small odd number and a multiple of 16 in turn, and every product is noted with all of its tiles.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dlbc.backends.triton.config import device
from dlbc.errors import InputError
from dlbc.ir.core import Graph, Type
from dlbc.ir.dims import evaluate, symbols
from dlbc.ir.parser import parse_graph

if TYPE_CHECKING:
    from dlbc_runtime.program import Program
    from dlbc_runtime.triton_launch import Launch
    from dlbc_runtime.triton_store import StoredKernel

log = logging.getLogger(__name__)

CLASSES = (1, 3, 16)
"""Sizes that stand for all: 1, odd, a multiple of 16."""
MOST = 243
"""Beyond so many combinations of sizes, they are varied one at a time."""

_DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32",
           "i16": "int16", "i8": "int8", "u8": "uint8", "bool": "bool"}


def kernels_of(programs: Sequence[Program], archs: Sequence[str]) -> list[StoredKernel]:
    """The kernels of programs, compiled for architectures. It takes about a second for each.

    InputError where there are none to compile, or no Triton to compile them, or an architecture is not known or too
    small for the tiles that were chosen for another.
    """
    if not all('target="triton:' in program.ir.get("fused", "") for program in programs):
        raise InputError("there are no kernels to store: another backend runs this explainer", where="kernels",
                         hint='compile with backend="triton" and a target, or save without kernels=')
    where = [device(name) for name in archs]
    for each in where:
        if each.kind != "cuda":
            raise InputError(f"kernels for {each.name} are not stored", where="kernels", hint="name NVIDIA GPUs: sm_90")
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise InputError("kernels cannot be compiled: Triton is not installed, or interprets them", where="kernels",
                         hint="pip install triton, and unset TRITON_INTERPRET")
    from dlbc_runtime.triton_store import compile_all

    found: dict[str, StoredKernel] = {}
    for program in programs:
        launches = recorded(program)
        for each in where:
            found |= {one.hash: one for one in compile_all(launches, each.name, each.shared)}
    return list(found.values())


def recorded(program: Program, sizes: Sequence[Mapping[str, int]] | None = None) -> list[Launch]:
    """One launch of each kernel that a program needs, at all sizes (or at those given, with the tiles they take)."""
    from dlbc_runtime.triton_compile import key

    graph, module = parse_graph(program.ir["fused"]), program.module()
    found: dict[tuple[object, ...], Launch] = {}
    failed: Exception | None = None
    for chosen in _sizes(graph) if sizes is None else sizes:
        try:
            launches = _launches(graph, module, chosen)
        except (RuntimeError, ValueError, IndexError, TypeError) as problem:
            failed = problem
            log.debug("no kernels are recorded for sizes %s: %s", chosen, problem)
            continue
        for launch in launches:
            for one in _tiled(launch, module) if sizes is None else [launch]:
                found.setdefault(key(one), one)
    if failed is not None and not found:
        raise InputError(f"kernels cannot be found without running the model: {failed}", where="kernels",
                         hint="save without kernels=; they are compiled when they first run") from failed
    return list(found.values())


def _launches(graph: Graph, module: Any, sizes: Mapping[str, int]) -> list[Launch]:
    import torch

    from dlbc_runtime.triton_launch import recording

    def empty(type_: Type) -> torch.Tensor:
        dtype = getattr(torch, _DTYPES[type_.dtype])
        return torch.empty([evaluate(d, sizes) for d in type_.shape], dtype=dtype, device="meta")

    held = {name: empty(weight.type) for name, weight in graph.weights.items()}
    with recording() as found, torch.no_grad():
        prepared = module.prepare(held)
        _, state = module.forward(held, prepared, *(empty(p.type) for p in graph.forward.params))
        if graph.relevance is not None:
            module.relevance(held, prepared, state, *(empty(p.type) for p in graph.relevance.params))
    return found.launches


def _tiled(launch: Launch, module: Any) -> Iterator[Launch]:
    """A launch with each tile of its kernel's table."""
    table: Sequence[tuple[int | None, dict[str, Any]]] = getattr(
        module, f"{launch.kernel.__name__}_tiles", ((None, {}),))
    for _, tile in table:
        yield replace(launch, meta={**launch.meta, **tile})


def _sizes(graph: Graph) -> list[dict[str, int]]:
    """Combinations of the classes of sizes, within what the graph allows."""
    params = (*graph.forward.params, *(graph.relevance.params if graph.relevance is not None else ()))
    names = sorted({name for p in params for d in p.type.shape for name in symbols(d)})
    values = []
    for name in names:
        low, high = graph.dims[name]
        values.append([size for size in CLASSES if low <= size <= high] or [low])
    count = 1
    for each in values:
        count *= len(each)
    if count <= MOST:
        return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
    bases = [[each[min(i, len(each) - 1)] for each in values] for i in range(len(CLASSES))]
    return [dict(zip(names, [*base[:at], size, *base[at + 1:]], strict=True))
            for base in bases for at, each in enumerate(values) for size in each]
