"""Generated torch and numpy code against the float64 interpreter: every op, then whole sections.

What the generated text looks like is in `filecheck/backends`.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import traceback
import weakref
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlbc.backends import load
from dlbc.backends.liveness import FRESH, VIEWS
from dlbc.errors import InputError, IRError, UnsupportedOpError
from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Section, Type, Value
from dlbc.ir.interpreter import interpret
from dlbc.ir.ops import OPS
from dlbc.ir.parser import parse_graph
from dlbc_runtime import numpy_kernels, torch_kernels
from dlbc_runtime.module import load_module
from tests.test_reference import ADJOINTS, CASES, NAMES, Adjoint, Case, numpy, rand, run

TOLERANCE = {"f64": 1e-6, "f32": 1e-5, "f16": 1e-2, "bf16": 5e-2}
LIBRARIES = ("numpy", "torch")
"""The backends that run op by op; kernels are tested in test_triton.py."""
both = pytest.mark.parametrize("backend", LIBRARIES)


def loaded(graph: Graph, backend: str) -> ModuleType:
    """The generated module of a graph."""
    return load_module(load(backend).emit(graph), graph.name)


def given(array: Any, backend: str) -> Any:
    """A tensor or array as the backend takes it."""
    array = torch.as_tensor(array)
    if backend == "torch":
        return array
    return array.float().numpy() if array.dtype == torch.bfloat16 else array.numpy()


def check_types(results: tuple[Value, ...], found: tuple[Any, ...]) -> None:
    """Results have the element types that the IR says."""
    names = [NAMES[y.dtype if isinstance(y, Tensor) else torch.from_numpy(np.zeros(1, y.dtype)).dtype] for y in found]
    assert names == [result.type.dtype for result in results]


# --- every op ----------------------------------------------------------------------------------------

def check_op(backend: str, name: str, operands: tuple[Any, ...], attrs: dict[str, Any]) -> None:
    """One op: generated code against the interpreter."""
    results, expected = run(name, *operands, **attrs)
    params = [Value(f"x{i}", Type(NAMES[x.dtype], tuple(x.shape))) for i, x in enumerate(operands)
              if isinstance(x, Tensor)]
    builder, known = Builder(), {p.name: p for p in params}
    made = builder.op(name, *(known.get(f"x{i}", x) for i, x in enumerate(operands)), **attrs)
    assert made == results
    module = loaded(Graph("one", Section(tuple(params), tuple(builder.ops), made)), backend)
    with torch.inference_mode():
        found, state = module.forward({}, (), *(given(x, backend) for x in operands if isinstance(x, Tensor)))
    assert state == []
    check_types(results, found)
    widest = max((TOLERANCE.get(p.type.dtype, 0.0) for p in params), default=1e-5)
    for result, y, right in zip(results, found, expected, strict=True):
        tolerance = max(widest, TOLERANCE.get(result.type.dtype, 0.0))
        np.testing.assert_allclose(numpy(y) if isinstance(y, Tensor) else y, right, rtol=tolerance, atol=tolerance)


def has(dtype: torch.dtype, operands: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.dtype == dtype for x in operands)


@both
@pytest.mark.parametrize("case", CASES, ids=[f"{c.name}-{i}" for i, c in enumerate(CASES)])
def test_op(case: Case, backend: str) -> None:
    if backend == "numpy" and has(torch.bfloat16, case.operands):
        with pytest.raises(UnsupportedOpError, match="no element type bf16"):
            check_op(backend, case.name, case.operands, case.attrs)
    else:
        check_op(backend, case.name, case.operands, case.attrs)


@both
@pytest.mark.parametrize("case", ADJOINTS, ids=[f"{a.name}-{i}" for i, a in enumerate(ADJOINTS)])
def test_adjoint(case: Adjoint, backend: str) -> None:
    x = case.x.float()
    _, (y,) = run(case.forward, x, *case.others, **case.attrs)
    y32 = torch.from_numpy(y).float()
    check_op(backend, case.name, case.back(rand(3, *y.shape), x, y32), case.back_attrs)


# --- whole graphs ------------------------------------------------------------------------------------

MODEL = """
graph @model(B: 1..8, T: 1..64, S: 1..64) {inputs=["user x", "ids"], outputs=["logits"]}

weights {
  @table     : f32[7,4]
  @fc.weight : f32[6,4]
  @fc.bias   : f32[6]
  @up        : f32[4,6]
}

function @block(%h : f32[B,T,4], @weight : f32[6,4], @bias : f32[6]) {
  %long = arange() {stop=T, dtype="f32"}             : f32[T]
  %z    = linear(%h, @weight, @bias)                 : f32[B,T,6]
  %s    = reshape(%long) {shape=[T,1]}               : f32[T,1]
  %t    = mul(%z, %s)                                : f32[B,T,6]
  return %t, %z
}

prepare {
  %size = abs(@up)                                   : f32[4,6]
  %two  = full() {shape=[4], value=2.0, dtype="f32"} : f32[4]
  return %size, %two
}

forward(%x : f32[B,T,4], %ids : i64[B,T]) {
  %e      = embedding(%ids, @table)                  : f32[B,T,4]  #embed
  %h      = add(%x, %e)                              : f32[B,T,4]  #embed
  %t, %z  = call @block(%h, @fc.weight, @fc.bias)    : f32[B,T,6], f32[B,T,6]  #layer
  %m, %at = max_with_index(%t) {dim=-1}              : f32[B,T], i64[B,T]  #layer.max
  %a      = exp(%z)                                  : f32[B,T,6]  #layer.act
  %n      = mul(%a, 0.5)                             : f32[B,T,6]  #layer.act
  %y      = linear(%n, %size, %two)                  : f32[B,T,4]  #head
  %logits = add(%y, %h)                              : f32[B,T,4]  #head
  return %logits, %at save %h, %n, %y, %logits, %t
}

relevance(%R.logits : f32[S,B,T,4], %R.at : f32[S,B,T]) {
  %e.logits = stabilise(%logits)                     : f32[B,T,4]  #head
  %M.logits = div(%R.logits, %e.logits)              : f32[S,B,T,4]  #head
  %R.y      = mul(%M.logits, %y)                     : f32[S,B,T,4]  #head
  %share    = safe_div(%R.y, %y)                     : f32[S,B,T,4]  #head
  %M.n      = matmul(%share, %size)                  : f32[S,B,T,6]  #head
  %R.n      = mul(%M.n, %n)                          : f32[S,B,T,6]  #head
  kernel @k on group {
    %flat = reshape(%R.n) {shape=[S*B*T,6]}          : f32[S*B*T,6]  #layer
    %twice = add(%flat, %flat)                       : f32[S*B*T,6]  #layer
    %R.z  = reshape(%twice) {shape=[S,B,T,6]}        : f32[S,B,T,6]  #layer
  } -> %R.z
  %past   = gt(%t, 0.0)                              : bool[B,T,6]  #layer
  %won    = where(%past, %R.z, 0.0)                  : f32[S,B,T,6]  #layer
  %M.h    = matmul(%won, @fc.weight)                 : f32[S,B,T,4]  #layer
  %R.h    = mul(%M.h, %h)                            : f32[S,B,T,4]  #layer
  %R.x    = add(%R.h, %two)                          : f32[S,B,T,4]  #embed
  %R.ids  = sum(%R.h) {dims=[-1]}                    : f32[S,B,T]  #embed
  return %R.x, %R.ids
}
"""


def arrays(graph: Graph, sizes: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Random weights, inputs and seeds of a graph."""
    random = np.random.default_rng(0)

    def make(type_: Type) -> Any:
        shape = tuple(d if isinstance(d, int) else sizes[str(d)] for d in type_.shape)
        return (random.standard_normal(shape).astype(np.float32) if type_.floating else random.integers(0, 4, shape))

    seeds = graph.relevance.params if graph.relevance else ()
    return ({name: make(w.type) for name, w in graph.weights.items()},
            {p.name: make(p.type) for p in graph.forward.params}, {p.name: make(p.type) for p in seeds})


@both
@pytest.mark.parametrize("sizes", [{"B": 2, "T": 3, "S": 2}, {"B": 1, "T": 40, "S": 40}])
def test_sections_agree_with_the_interpreter_and_change_no_argument(backend: str, sizes: dict[str, int]) -> None:
    graph = parse_graph(MODEL)
    weights, inputs, seeds = arrays(graph, sizes)
    expected = interpret(graph, inputs, weights, seeds)
    module = loaded(graph, backend)
    assert (module.INPUTS, module.OUTPUTS) == (("user x", "ids"), ("logits", "at"))
    assert (module.SEEDS, module.RELEVANCE) == (("R.logits", "R.at"), ("R.x", "R.ids"))
    w, x, r = ({name: given(array.copy(), backend) for name, array in each.items()}
               for each in (weights, inputs, seeds))
    with torch.inference_mode():
        p = module.prepare(w)
        outputs, state = module.forward(w, p, *x.values())
        kept = [np.asarray(y).copy() for y in outputs]
        first = module.relevance(w, p, list(state), *r.values())
        again = module.relevance(w, p, state, *r.values())
    assert state == []
    for found, right in zip((*outputs, *first), (*expected.outputs, *expected.relevance), strict=True):
        np.testing.assert_allclose(np.asarray(found), right, rtol=2e-4, atol=2e-4)
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)
    for before, after in ((weights, w), (inputs, x), (seeds, r)):
        assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(np.array_equal(before, after) for before, after in zip(kept, outputs, strict=True))


def test_without_relevance_the_state_is_empty() -> None:
    graph = parse_graph("graph @half(B: 1..8)\n forward(%x : f32[B]) { %y = neg(%x) : f32[B]\n return %y }")
    module = loaded(graph, "numpy")
    assert module.RELEVANCE == () and not hasattr(module, "relevance")
    assert module.forward({}, module.prepare({}), np.ones(2, np.float32))[1] == []


@both
def test_a_buffer_is_freed_after_its_last_use(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = parse_graph("""
        graph @chain(B: 1..8, S: 1..8)
        forward(%x : f32[B,4]) {
          %a = softmax(%x) {dim=1} : f32[B,4]
          %b = cumsum(%a) {dim=1}  : f32[B,4]
          %c = softmax(%b) {dim=1} : f32[B,4]
          %y = rotary(%c, %x, %x)  : f32[B,4]
          return %y save %c
        }
        relevance(%R.y : f32[S,B,4]) {
          %d   = softmax(%c) {dim=1}  : f32[B,4]
          %e   = add(%d, %R.y)        : f32[S,B,4]
          %f   = rotary(%e, %e, %e)   : f32[S,B,4]
          return %f
        }""")
    module, alive = loaded(graph, backend), []
    kernels = {"numpy": numpy_kernels, "torch": torch_kernels}[backend]
    seen: list[int] = []
    softmax, rotary = (torch.softmax, kernels.rotary) if backend == "torch" else (kernels.softmax, kernels.rotary)

    def watched(*args: Any) -> Any:
        alive.append(weakref.ref(y := softmax(*args)))
        return y

    def counted(*args: Any, **options: Any) -> Any:
        gc.collect()
        seen.append(sum(ref() is not None for ref in alive))
        return rotary(*args, **options)

    monkeypatch.setattr(torch if backend == "torch" else kernels, "softmax", watched)
    monkeypatch.setattr(kernels, "rotary", counted)
    x = given(np.ones((2, 4), np.float32), backend)
    with torch.inference_mode():
        _, state = module.forward({}, (), x)
        assert seen == [1]  # of %a and %c, only %c lives when the last op runs
        module.relevance({}, (), state, given(np.ones((1, 2, 4), np.float32), backend))
    assert seen == [1, 0]  # neither %c, which left the state, nor %d


# Every op that could write over its operand, next to a reason not to.
@both
@pytest.mark.parametrize(("body", "why"), [
    ("%a = neg(%x) : f32[B,4]\n %b = exp(%a) : f32[B,4]\n return %a, %b", "returned"),
    ("%a = neg(%x) : f32[B,4]\n %b = exp(%a) : f32[B,4]\n %c = maximum(%b, %a) : f32[B,4]\n return %c", "read later"),
    ("%b = exp(%x) : f32[B,4]\n return %b", "a parameter"),
    ("%b = exp(@w) : f32[4,4]\n return %b", "a weight"),
    ("%a = reshape(%x) {shape=[4*B]} : f32[4*B]\n %b = exp(%a) : f32[4*B]\n return %b", "a view of a parameter"),
    ("%a = neg(%x) : f32[B,4]\n %v = reshape(%a) {shape=[4*B]} : f32[4*B]\n %b = exp(%v) : f32[4*B]\n"
     "return %a, %b", "a view of what is returned"),
    ("%a = neg(%x) : f32[B,4]\n %s = slice(%a) {dim=1, stop=2} : f32[B,2]\n %b = exp(%a) : f32[B,4]\n"
     "return %b, %s", "seen through a slice"),
    ("%a = sum(%x) {dims=[0]} : f32[4]\n %v = expand(%a) {shape=[B,4]} : f32[B,4]\n %b = exp(%v) : f32[B,4]\n"
     "return %b", "expanded"),
    ("%a = neg(@w) : f32[4,4]\n %t = permute(%a) {dims=[1,0]} : f32[4,4]\n %b = add(%a, %t) : f32[4,4]\n"
     "return %b", "read through another view by the same op"),
    ("%a = neg(%x) : f32[B,4]\n %b = add(%a, @w) : f32[B,4]\n return %b", "of another type"),
])
def test_nothing_that_is_still_needed_is_overwritten(backend: str, body: str, why: str) -> None:
    if why == "of another type":
        body = "%a = sum(%x) {dims=[0]} : f32[4]\n %b = add(%a, %x) : f32[B,4]\n return %b"
    graph = parse_graph(f"graph @g(B: 1..8)\nweights {{ @w : f32[4,4] }}\nforward(%x : f32[B,4]) {{ {body} }}")
    weights, inputs, _ = arrays(graph, {"B": 3})
    expected = interpret(graph, inputs, weights).outputs
    source = load(backend).emit(graph)
    assert "exp_(" not in source and "add_(" not in source and "out=" not in source
    with torch.inference_mode():
        found, _ = loaded(graph, backend).forward({"w": given(weights["w"], backend)}, (), given(inputs["x"], backend))
    for y, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(y), right, rtol=1e-6)


def test_names_are_identifiers_and_do_not_meet() -> None:
    graph = parse_graph("""
        graph @names(B: 1..8)
        forward(%w : f32[B], %lambda : f32[B]) {
          %M.h = add(%w, %lambda) : f32[B]
          %M_h = neg(%M.h) : f32[B]
          %B   = mul(%M_h, 2.0) : f32[B]
          %torch = add(%B, B) : f32[B]
          return %torch
        }""")
    for backend in LIBRARIES:
        x = given(np.ones(3, np.float32), backend)
        (y,), _ = loaded(graph, backend).forward({}, (), x, x)
        assert y.tolist() == [-1.0, -1.0, -1.0]


def test_repeated_runs_of_scattered_sums_give_the_same_bits() -> None:
    index = torch.randint(0, 50, (20_000,), generator=torch.Generator().manual_seed(0))
    r = rand(2, 20_000, 8)
    with torch.inference_mode():
        runs = [torch_kernels.index_adjoint(r, (index,), 1, (50,)) for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[1], runs[2])


def test_fast_roads_of_large_tensors_equal_the_short_ones() -> None:
    x = rand(64, 128)
    x.view(-1)[::5] = 0.0
    x.view(-1)[1::5] = -0.0
    r, mask = rand(3, 64, 128), rand(64, 128) > 0
    assert x.numel() > torch_kernels.SMALL
    zero = torch.zeros(())
    assert torch.equal(torch_kernels.safe_div(r, x), torch.where(x == 0, zero, r / x))
    assert torch.equal(torch_kernels.safe_div_(r.clone(), x), torch.where(x == 0, zero, r / x))
    right = torch.where(x < 0, x - 1e-6, x + 1e-6)
    assert torch.equal(torch_kernels.stabilise(x, 1e-6), right)
    assert torch.equal(torch_kernels.stabilise_(x.clone(), 1e-6), right)
    bad = torch.where(r > 1, torch.tensor(torch.nan), torch.where(r < -1, torch.tensor(torch.inf), r))
    for a, b in ((bad, x), (bad, 0.0), (0.0, bad), (bad, 1.5), (x, bad)):
        found, wanted = torch_kernels.where(mask, a, b), torch.where(mask, a, b)
        assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


def test_erf_is_exact_enough() -> None:
    x = np.linspace(-6, 6, 200_001, dtype=np.float32)
    exact = torch.erf(torch.from_numpy(x).double()).numpy()
    assert np.abs(numpy_kernels.erf(x) - exact).max() < 1.2e-7
    assert np.abs(numpy_kernels.erf(x.astype(np.float64)[::50]) - exact[::50]).max() < 1e-15


# --- errors ------------------------------------------------------------------------------------------

def test_unknown_backend() -> None:
    with pytest.raises(InputError, match=r"unknown backend `torhc`\n  hint: did you mean torch\?"):
        load("torhc")
    with pytest.raises(InputError, match="there are c, numpy, torch"):
        load("xla")


@both
def test_ops_without_code_are_named_with_their_place(backend: str) -> None:
    graph = parse_graph("""
        graph @paired(B: 1..8, S: 1..8)
        forward(%x : f32[B,4]) {
          %y = neg(%x) : f32[B,4] #act
          return %y
        }
        relevance(%R.y : f32[S,B,4]) {
          %R.x = rel.neg<identity>(%R.y) of %y : f32[S,B,4] #act
          return %R.x
        }""")
    with pytest.raises(UnsupportedOpError, match=r"#act: the \w+ backend has no code for `rel.neg`\n  hint: lower"):
        load(backend).emit(graph)


def test_sizes_and_values_that_nothing_gives_are_errors() -> None:
    builder, x = Builder(), Value("x", Type("f32", (4,)))
    y = builder.op("neg", x)
    other = Builder({"x", "neg"})
    far = other.op("neg", Value("gone", Type("f32", (4,))))
    graph = Graph("g", Section((x,), tuple(builder.ops), y), relevance=Section((), tuple(other.ops), far))
    with pytest.raises(IRError, match="`%gone` is read in the relevance section and defined nowhere"):
        load("torch").emit(graph)


def test_tracebacks_show_the_generated_line() -> None:
    graph = parse_graph("graph @g(B: 1..8)\nforward(%x : f32[B,4], %z : f32[B,4]) {"
                        " %y = add(%x, %z) : f32[B,4]\n return %y }")
    with pytest.raises(ValueError) as caught:
        loaded(graph, "numpy").forward({}, (), np.ones((2, 4)), np.ones((3, 4)))
    assert "y = x + z" in "".join(traceback.format_exception(caught.value))


def test_every_op_is_in_both_tables_and_emitting_imports_no_torch() -> None:
    from dlbc.backends.numpy.table import TABLE as NUMPY
    from dlbc.backends.torch.table import OVERWRITING, TABLE

    assert set(NUMPY) == set(TABLE) == set(OPS)
    assert set(OVERWRITING) | VIEWS | FRESH <= set(OPS)
    code = "import sys; from dlbc.backends import load; load('torch'), load('numpy'); print('torch' in sys.modules)"
    path = [p for p in sys.path if p]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"], capture_output=True,
                          text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("written", [False, True])
def test_damping_by_nothing_leaves_nothing(written: bool) -> None:
    """Multipliers that were divided by a stabiliser are as large as its inverse, and 0 times them is 0."""
    from dlbc_runtime import torch_kernels

    m = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 1e9
    y = torch.zeros(10_000)
    y[::2] = 3.0
    found = (torch_kernels.damp_ if written else torch_kernels.damp)(m.clone(), y, 1e-9)
    assert not found[1::2].any()
    torch.testing.assert_close(found[::2], m[::2])
