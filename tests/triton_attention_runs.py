"""Run as a program by test_triton_attention.py, in a process of its own: Triton decides at import to interpret kernels.

Prints, as JSON, for each run asked for on standard input (`Run`): how far what the kernels compute is from the float64
interpreter, and how far what torch computes in the same element type is, both by the largest number of each result.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TypedDict

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from dlbc.backends.torch.emit import emit as emit_torch
from dlbc.backends.triton.emit import emit, refused
from dlbc.ir.core import Graph, Kernel
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_graph
from dlbc.passes import run
from dlbc.passes.fuse_attention import FuseAttention
from dlbc.passes.stream_attention import StreamAttention
from dlbc_runtime.module import load_module
from tests.test_stream import CASES, Given, arrays, attention, lowered

Numbers = tuple[np.ndarray, ...]


class Run(TypedDict):
    """What to run: a case of test_stream.py (or a graph of `OTHERS`) under a rule, B, T, U and S, seeds that share a
    program, the element type of q, k and v, the numbers of a head."""

    case: str
    rule: str
    sizes: list[int]
    seeds: int
    dtype: str
    width: int


OTHERS = {
    # Deeper than any rule: a maximum over keys, sums over keys of what reads it, sums over rows without numbers of a
    # head, a norm within a head, what is computed after a sum over rows, weights that are no result's only source.
    "reductions": """
graph @reductions(B: 1..8, T: 1..64, U: 1..64, S: 1..8)

forward(%q : f32[B,2,T,3], %k : f32[B,2,U,3], %v : f32[B,2,U,3]) {
  %y = attention(%q, %k, %v) {scale=0.5} : f32[B,2,T,3]
  return %y save %q, %k, %v
}

relevance(%R.y : f32[S,B,2,T,3]) {
  %p = attention_weights(%q, %k) {scale=0.5}           : f32[B,2,T,U]
  %top = amax(%p) {dims=[-1], keepdim=true}            : f32[B,2,T,1]
  %part = safe_div(%p, %top)                           : f32[B,2,T,U]
  %low = amin(%part) {dims=[-1], keepdim=true}         : f32[B,2,T,1]
  %rest = sub(%part, %low)                             : f32[B,2,T,U]
  %total = sum(%rest) {dims=[-1], keepdim=true}        : f32[B,2,T,1]
  %share = safe_div(%rest, %total)                     : f32[B,2,T,U]
  %o = matmul(%share, %v)                              : f32[B,2,T,3]
  %sq = mul(%o, %R.y)                                  : f32[S,B,2,T,3]
  %norm = sum(%sq) {dims=[-1], keepdim=true}           : f32[S,B,2,T,1]
  %spread = mul(%share, %norm)                         : f32[S,B,2,T,U]
  %column = sum(%spread) {dims=[-2], keepdim=true}     : f32[S,B,2,1,U]
  %st = permute(%spread) {dims=[0,1,2,4,3]}            : f32[S,B,2,U,T]
  %back = matmul(%st, %o)                              : f32[S,B,2,U,3]
  %R.v = mul(%back, %v)                                : f32[S,B,2,U,3]
  return %R.v, %column, %norm, %o
}
""",
}


def graph_of(asked: Run) -> Graph:
    """The lowered graph of a run."""
    if asked["case"] in OTHERS:
        return run(parse_graph(OTHERS[asked["case"]]), [StreamAttention()])
    text = print_graph(attention(**CASES[asked["case"]])).replace(",3]", f",{asked['width']}]")
    return lowered(parse_graph(text.replace("f32[", f"{asked['dtype']}[")), asked["rule"])


def interpret_with_any_numpy() -> None:
    """From numpy 2.4 on an array of one number is no index any more; Triton 3.6 makes one of it."""
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    interpreter._patch_lang_tensor = patched


def given_to(graph: Graph, sizes: dict[str, int], dtype: torch.dtype) -> Given:
    """Inputs and seeds that `dtype` holds exactly; v is away from 0, so that shares of its sums are not steep."""
    inputs, seeds = arrays(graph, sizes)
    inputs["v"] = np.abs(inputs["v"]) + 0.5
    return ({name: torch.from_numpy(x).to(dtype).double().numpy() if x.dtype != np.bool_ else x
             for name, x in inputs.items()}, {name: x.astype(np.float32).astype(float) for name, x in seeds.items()})


def computed(source: str, given: Given, dtype: torch.dtype) -> Numbers:
    """The outputs and relevance that a module computes, floating inputs given in an element type."""
    module = load_module(source, "attention")
    inputs = [torch.from_numpy(x).to(dtype if x.dtype != np.bool_ else torch.bool) for x in given[0].values()]
    outputs, state = module.forward({}, (), *inputs)
    results = module.relevance({}, (), state, *(torch.from_numpy(seed).float() for seed in given[1].values()))
    return tuple(x.double().numpy() for x in (*outputs, *results))


def differences(asked: Run) -> tuple[float, float]:
    """How far kernels and torch are from the interpreter."""
    graph = graph_of(asked)
    kernels = run(graph, [FuseAttention(forward=True, seeds=asked["seeds"])])
    assert any(isinstance(item, Kernel) for _, part in kernels.sections() for item in part.body)
    assert not refused(kernels)
    dtype = {"f32": torch.float32, "f16": torch.float16}[asked["dtype"]]
    given = given_to(graph, dict(zip("BTUS", asked["sizes"], strict=True)), dtype)
    expected = interpret(graph, given[0], {}, given[1])
    right = (*expected.outputs, *expected.relevance)

    def far(found: Numbers) -> float:
        assert all(np.isfinite(a).all() for a in found)
        return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in zip(found, right, strict=True))

    return far(computed(emit(kernels), given, dtype)), far(computed(emit_torch(graph), given, dtype))


def main() -> None:
    """The runs asked for on standard input."""
    interpret_with_any_numpy()
    with np.errstate(all="ignore"):
        json.dump([differences(asked) for asked in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
