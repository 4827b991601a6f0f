"""The C backend as users have it: every op of its loops, models, explainers, and numbers that are easily lost."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dlbc
import dlbc_runtime
from dlbc import gpu
from dlbc.backends import load
from dlbc.backends.c import nests
from dlbc.errors import InputError
from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Kernel, Section, Type, Value, Weight
from dlbc.ir.fusible import LOOP_MOVES, LOOP_POINTWISE, LOOP_PRODUCTS, LOOP_SUMS, loops
from dlbc.passes import run as run_passes
from dlbc.passes.fuse_loops import FuseLoops
from dlbc_runtime import c_compiler, c_library, folders
from dlbc_runtime.c_library import compiler
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.module import load_module
from dlbc_runtime.target import Target
from tests import fuzz, test_models
from tests.test_backends import TOLERANCE
from tests.test_reference import ADJOINTS, CASES, NAMES, numpy, rand, run

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C compiler on this machine")

OPS = sorted(LOOP_POINTWISE | LOOP_MOVES | LOOP_SUMS | LOOP_PRODUCTS)
FLOATS = (torch.float32, torch.float64)
EMIT = importlib.import_module("dlbc.backends.c.emit")
MOST = 4
"""Cases of an op and an element type that are compiled: of sums and quotients there are hundreds."""


def ran(graph: Graph, *inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> tuple[Tensor, ...]:
    """What the functions of a graph's forward section find; they compute all of it."""
    fused = run_passes(graph, (FuseLoops(fewest=1),), verified=True)
    assert all(isinstance(item, Kernel) for item in fused.forward.body)
    module = load_module(load("c").emit(fused), graph.name)
    with torch.inference_mode():
        outputs: tuple[Tensor, ...] = module.forward(weights or {}, (), *inputs)[0]
    return outputs


@pytest.fixture(scope="module", autouse=True)
def always() -> Iterator[None]:
    """Functions are called whatever their size, except where a test says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EMIT, "PAYS", 10**12)
        yield


# --- every op ----------------------------------------------------------------------------------------

Found = dict[str, list[tuple[str, Value, np.ndarray, Tensor, float]]]


@pytest.fixture(scope="module")
def found() -> Found:
    """By op, of each case: its label, its result, the interpreter's numbers, those of C, and a tolerance. One module
    computes all of them."""
    at, params, inputs, wanted = Builder(), list[Value](), list[Tensor](), list[tuple[str, Value, np.ndarray, float]]()
    taken: dict[tuple[str, torch.dtype], int] = {}
    for number, (name, operands, attrs) in enumerate(cases()):
        for dtype in FLOATS:
            given = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in operands]
            named = {i: Value(f"x{number}.{dtype}.{i}".replace("torch.", ""), Type(NAMES[x.dtype], tuple(x.shape)))
                     for i, x in enumerate(given) if isinstance(x, Tensor)}
            if dtype != FLOATS[0] and not any(x.type.floating for x in named.values()):
                continue
            trial = Builder([v.name for v in named.values()])
            trial.op(name, *(named.get(i, x) for i, x in enumerate(given)), **attrs)
            taken[name, dtype] = taken.get((name, dtype), 0) + all(map(loops, trial.ops))
            if not all(map(loops, trial.ops)) or taken[name, dtype] > MOST:
                continue
            made = at.op(name, *(named.get(i, x) for i, x in enumerate(given)), **attrs)
            params += named.values()
            inputs += [x for x in given if isinstance(x, Tensor)]
            tolerance = max((TOLERANCE.get(v.type.dtype, 0.0) for v in (*named.values(), *made)), default=0.0)
            wanted += [(f"case {number} in {dtype}", value, expected, tolerance or 1e-6)
                       for value, expected in zip(made, run(name, *given, **attrs)[1], strict=True)]
    graph = Graph("ops", Section(tuple(params), tuple(at.ops), tuple(value for _, value, *_ in wanted)))
    definitions, results = graph.forward.definitions(), Found()
    for (label, value, expected, tolerance), y in zip(wanted, ran(graph, *inputs), strict=True):
        results.setdefault(definitions[value.name].name, []).append((label, value, expected, y, tolerance))
    return results


def cases() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The cases of test_reference.py: op, operands and attributes."""
    for case in CASES:
        yield case.name, case.operands, case.attrs
    for rows, columns in (((2, 3, 4), 5), ((3, 4), 1), ((1, 1), 2), ((2, 1, 3, 33), 17)):
        yield "matmul", (rand(*rows), rand(rows[-1], columns)), {}
    for each in ADJOINTS:
        x = each.x.float()
        _, (y,) = run(each.forward, x, *each.others, **each.attrs)
        yield each.name, each.back(rand(3, *y.shape), x, torch.from_numpy(y).float()), each.back_attrs


@pytest.mark.parametrize("name", OPS)
def test_op(name: str, found: Found) -> None:
    assert found[name]
    for label, value, expected, y, tolerance in found[name]:
        assert NAMES[y.dtype] == value.type.dtype, label
        np.testing.assert_allclose(numpy(y), expected, rtol=tolerance, atol=tolerance, err_msg=label)


# --- whole graphs ------------------------------------------------------------------------------------

def test_random_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same models each time: a compiler's run is dear. `make fuzz` tries many."""
    monkeypatch.delenv("DLBC_DEBUG")
    bug = fuzz.find(fuzz.in_c, 8, 0)
    if bug is not None:
        pytest.fail(fuzz.report(bug, tmp_path), pytrace=False)


@pytest.mark.parametrize(("name", "rules"), [
    ("mlp_batch_norm", "gamma"), ("tabular_embeddings", "dlb"), ("lenet", "gamma"),
    ("bert_ids_only", "attnlrp"), ("llama_ids_only", "dlb"), ("moe_mixtral", "attnlrp"),
    ("lstm_text", "dlb"), ("move_flip_roll", "attnlrp"), ("move_pad", "dlb"), ("move_dtype", "dlb"),
    ("double_precision", "dlb"), ("two_outputs_dict", "dlb"), ("softmax_outputs", "gamma"), ("max_min_reduce", "dlb")])
def test_models_equal_the_oracle(name: str, rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_models, "backends", lambda name: ("c",))
    built = test_models.compiled(name)
    test_models.check_against_oracle(built, rules)
    assert "C = library(" in built.shared(rules, "c").source


def test_a_small_model_is_one_function_for_each_section() -> None:
    source = mlp()[0].source
    assert len(re.findall(r"^    +C\.\w+\(", source, re.MULTILINE)) == 2


# --- as users call it --------------------------------------------------------------------------------

def mlp(rules: str = "dlb", seed: int = 0, **options: Any) -> tuple[Explainer, Explainer, nn.Sequential]:
    """A model in double precision in C and in torch. Relevance is in single precision for some rules."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3)).double().eval()
    one, other = (dlbc.compile(model, rows(2), rules=rules, backend=backend, cache=False, **options)
                  for backend in ("c", "torch"))
    return one, other, model


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(found: Explanation, wanted: Explanation, *, tolerance: float = 2e-6) -> None:
    assert [each.index for each in found.target] == [each.index for each in wanted.target]
    for name in ("outputs", "relevance", "nodes", "positive", "negative"):
        arrays, others = getattr(found, name), getattr(wanted, name)
        assert list(arrays) == list(others)
        for key in others:
            assert arrays[key].dtype == others[key].dtype and arrays[key].shape == others[key].shape
            np.testing.assert_allclose(arrays[key], others[key], rtol=tolerance, err_msg=f"{name} {key}",
                                       atol=tolerance * np.abs(others[key]).max(initial=0.0))


@pytest.fixture(scope="module")
def both() -> tuple[Explainer, Explainer]:
    """A model that nobody changes."""
    return mlp()[:2]


@pytest.mark.parametrize("count", [1, 3, 0, 1000])
def test_any_number_of_rows(count: int, both: tuple[Explainer, Explainer]) -> None:
    for _ in range(2):  # the second call goes straight
        same(*(explainer(rows(count)) for explainer in both))


@pytest.mark.parametrize("options", [
    {"target": 1}, {"target": [0, 1]}, {"target": [0, 2, Target.predicted()]},
    {"target": Target.difference(2), "multiplier": 3.0}, {"keep": "all"}, {"memory_budget": "100KB"}], ids=str)
def test_what_calls_ask_for(options: dict[str, Any], both: tuple[Explainer, Explainer]) -> None:
    found, wanted = (explainer(rows(40), **options) for explainer in both)
    same(found, wanted)


def test_relevance_is_accounted_for(both: tuple[Explainer, Explainer]) -> None:
    found, wanted = (explainer(rows(4)).conservation() for explainer in both)
    assert found.closes() and [row.place for row in found.rows] == [row.place for row in wanted.rows]
    np.testing.assert_allclose([row.outgoing for row in found.rows], [row.outgoing for row in wanted.rows], rtol=1e-6)


def test_checkpoints(both: tuple[Explainer, Explainer]) -> None:
    found, wanted = (explainer.with_options(checkpoint=True)(rows(4)) for explainer in both)
    same(found, wanted)


def test_memory_is_that_of_ops(both: tuple[Explainer, Explainer]) -> None:
    """Calls too large for a function to pay take it."""
    one, other = (explainer.memory(rows(64)) for explainer in both)
    assert one.steps == other.steps


@pytest.mark.parametrize("rules", ["gamma", "attnlrp", "dlb-contrastive", "auto-lm"])
def test_rules(rules: str) -> None:
    one, other, _ = mlp(rules)
    for count in (2, 2, 7):
        same(one(rows(count)), other(rows(count)))


def test_large_calls_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function is called where it takes less time than its ops; the others give torch's very numbers."""
    monkeypatch.setattr(EMIT, "PAYS", 100)
    one, other, _ = mlp()
    called: list[str] = []
    functions = vars(vars(one._load(one.default).module)["C"])
    for name, function in functions.items():
        def counted(*arguments: int, name: str = name, function: Callable[..., object] = function) -> None:
            called.append(name)
            function(*arguments)

        monkeypatch.setitem(functions, name, counted)
    same(one(rows(1)), other(rows(1)))
    assert len(called) == 2
    np.testing.assert_array_equal(one(rows(500)).relevance["input"], other(rows(500)).relevance["input"])
    assert len(called) == 2


GIVEN: dict[str, Callable[[Tensor], Any]] = {
    "every other row": lambda x: torch.stack([x, -x], 1).reshape(-1, 5)[::2],
    "by columns": lambda x: x.t().contiguous().t(),
    "one row for all": lambda x: x[:1].expand(len(x), 5),
    "numpy": lambda x: x.numpy(),
    "numpy, backwards": lambda x: x.numpy()[::-1],
    "parameter": nn.Parameter,
}


@pytest.mark.parametrize("given", list(GIVEN))
def test_inputs_of_any_form(given: str, both: tuple[Explainer, Explainer]) -> None:
    for seed in range(2):
        x = GIVEN[given](rows(4, seed))
        plain = torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x.detach().clone().contiguous()
        same(both[0](x), both[1](plain))


def test_weights_of_any_form() -> None:
    one, other, model = mlp()
    layer, x = model[2], rows(4)
    assert isinstance(layer, nn.Linear)
    before = one(x)
    with torch.no_grad():
        layer.weight.mul_(-1.5)
    assert not np.array_equal(one(x).relevance["input"], before.relevance["input"])
    same(one(x), other(x))
    layer.weight.data = torch.randn(8, 6, dtype=torch.float64).t()
    assert not layer.weight.is_contiguous()
    same(one(x), other(x))
    layer.bias.data = torch.randn(12, dtype=torch.float64)[::2]
    same(one(x), other(x))


@pytest.mark.parametrize("change", ["type", "shape", "device", "value"])
def test_weights_that_functions_must_not_read(change: str) -> None:
    """Their memory is not what was compiled for: an error before any function sees it."""
    one, _, model = mlp()
    layer, x = model[0], rows(2)
    assert isinstance(layer, nn.Linear)
    one(x)
    weight = layer.weight.detach()
    changed = {"type": weight.float(), "shape": weight[:, :3], "device": weight.to("meta"), "value": weight / 0}[change]
    if change == "device":
        one._weights["0.weight"] = changed  # as `model.to` leaves it: torch lets nobody change a parameter's device
    else:
        layer.weight.data = changed
    with pytest.raises(InputError, match=r"weight `0\.weight`"):
        one(x)


@pytest.mark.parametrize("change", [Tensor.float, lambda x: x.to("meta"), lambda x: x[:, :3], lambda x: x[0]])
def test_inputs_that_functions_must_not_read(change: Callable[[Tensor], Tensor],
                                             both: tuple[Explainer, Explainer]) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match="`input`"):
            both[0](change(rows(2)))
        both[0](rows(2))


def test_nothing_of_the_users_is_written_to(both: tuple[Explainer, Explainer]) -> None:
    x = rows(3)
    weights = {name: weight.clone() for name, weight in both[0].weights.items()}
    first, second = both[0](x), both[0](x)
    assert torch.equal(x, rows(3))
    assert all(torch.equal(weights[name], weight) for name, weight in both[0].weights.items())
    first.relevance["input"][...] = 7
    assert not (second.relevance["input"] == 7).any()


# --- saved, kept, and without a compiler -------------------------------------------------------------

@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Explanation, nn.Module]:
    one, _, model = mlp()
    one.save(tmp_path / "model.dlbc", weights=True)
    return tmp_path / "model.dlbc", one(rows(3)), model


def loaded(saved: tuple[Path, Explanation, nn.Module]) -> list[Explainer]:
    """By everyone's ways."""
    path, _, model = saved
    return [dlbc.load(path, model), dlbc.load(path), dlbc_runtime.load(path, trust=True)]


def test_saved_explainers(saved: tuple[Path, Explanation, nn.Module]) -> None:
    for explainer in loaded(saved):
        assert explainer.manifest.backend == "c"
        same(explainer(rows(3)), saved[1], tolerance=0)


def test_the_cache_has_programs_and_binaries(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a second process nothing is compiled, by dlbc or by the compiler."""
    monkeypatch.setattr(c_library, "_opened", {})
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).eval(), torch.randn(2, 4)
    first = dlbc.compile(model, x, rules="dlb", backend="c")(x)
    binaries = list(cache_dir.glob(c_library.BINARIES))
    assert len(binaries) == 1
    c_library._opened.clear()

    def fails(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(c_compiler, "compiled", fails)
    monkeypatch.setattr("dlbc.api.compile_now", fails, raising=True)
    second = dlbc.compile(model, x, rules="dlb", backend="c")(x)
    np.testing.assert_array_equal(first.relevance["input"], second.relevance["input"])


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has just begun on a machine that has none, nor has seen one."""
    monkeypatch.setenv("CC", "/nowhere/cc")
    monkeypatch.setattr(c_library, "_opened", {})
    folders.say_once.cache_clear()


def test_without_a_compiler_saved_explainers_run_in_torch(
        saved: tuple[Path, Explanation, nn.Module], no_compiler: None, caplog: pytest.LogCaptureFixture) -> None:
    for explainer in loaded(saved):
        for count in (3, 1, 3):
            found = explainer(rows(count))
        same(found, saved[1])
    (said,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert "/nowhere/cc" in said and "slower" in said


def test_without_a_compiler_there_is_nothing_to_compile_with(no_compiler: None) -> None:
    with pytest.raises(InputError, match="/nowhere/cc") as problem:
        mlp()
    assert "backend" in str(problem.value) and "gcc" in str(problem.value.hint)


@pytest.mark.parametrize(("device", "shown"), [("meta", "meta"), ("cuda:1", "cuda:1")])
def test_models_elsewhere(device: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "devices_of", lambda model: [torch.device("cpu"), torch.device(device)])
    with pytest.raises(InputError, match=shown):
        mlp()


def test_there_are_no_targets() -> None:
    with pytest.raises(InputError, match="no target"):
        mlp(target="sm_90")


# --- numbers -----------------------------------------------------------------------------------------

def of(build: Callable[[Builder, Value], Value | tuple[Value, ...]], x: Tensor) -> tuple[Tensor, ...]:
    """What a few ops find for one input."""
    param, at = Value("x", Type(NAMES[x.dtype], tuple(x.shape))), Builder(["x"])
    made = build(at, param)
    return ran(Graph("few", Section((param,), tuple(at.ops), made if isinstance(made, tuple) else (made,))), x)


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_products_cancel_exactly(dtype: torch.dtype) -> None:
    """A product that is not rounded before another is taken from it leaves what a stabiliser makes large."""
    types = [Type(NAMES[dtype], (1000,))] * 3
    params = tuple(Value(name, type_) for name, type_ in zip("xzw", types, strict=True))
    x, z, w = params
    at = Builder(["x", "z", "w"])
    y = at.div(at.sub(at.mul(x, w), at.mul(z, w)), at.stabilise(at.sub(x, z), eps=1e-9))
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1000, dtype=dtype, generator=generator) for _ in range(2))
    (found,) = ran(Graph("ratio", Section(params, tuple(at.ops), (y,))), a, a.clone(), b)
    assert (found == 0).all()


def test_what_is_no_number_stays_so() -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[1.0, nan, 2.0], [inf, -1.0, 0.0], [-inf, nan, inf], [-inf, -inf, -inf], [0.0, -2.0, 1.0]])
    relu, top, bottom, share, large, total = of(lambda at, x: (
        at.relu(x), at.amax(x, dims=(1,)), at.amin(x, dims=(1,)), at.softmax(x, dim=1),
        at.maximum(x, at.full(shape=(3,), value=0.5, dtype="f32")), at.sum(x, dims=(1,))), x)
    pairs = [(relu, x.relu()), (top, x.amax(1)), (bottom, x.amin(1)), (share, x.softmax(1)),
             (large, torch.maximum(x, torch.tensor(0.5))), (total, x.sum(1))]
    for number, (found, wanted) in enumerate(pairs):
        torch.testing.assert_close(found, wanted, equal_nan=True, msg=lambda text, n=number: f"result {n}: {text}")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["normal", "uniform", "equal"])
def test_long_sums(kind: str, axis: int) -> None:
    """Of 100,000 float32 numbers, along and across rows. Equal ones are all rounded the same way: added as they come,
    they lost two digits."""
    generator = torch.Generator().manual_seed(0)
    x = {"normal": torch.randn(100_000, 2, generator=generator), "equal": torch.full((100_000, 2), 0.1),
         "uniform": torch.rand(100_000, 2, generator=generator)}[kind]
    count = len(x)
    x = x if axis == 0 else x.t().contiguous()
    found, mean = of(lambda at, x: (at.sum(x, dims=(axis,)), at.mean(x, dims=(axis,))), x)
    wanted, size = x.double().sum(axis), x.double().abs().sum(axis)
    assert ((found.double() - wanted).abs() <= 2e-7 * size).all()
    assert ((mean.double() * count - wanted).abs() <= 2e-7 * size).all()


# --- what was wrong ----------------------------------------------------------------------------------

def deep(layers: int, width: int) -> Graph:
    """Layers of one matrix, rows of a number that is known."""
    x, w = Value("x", Type("f64", (width, width))), Weight("w", Type("f64", (width, width)))
    at = Builder(["x"])
    h = x
    for _ in range(layers):
        h = at.linear(h, w)
    return Graph("deep", Section((x,), tuple(at.ops), (h,)), weights={"w": w})


def test_functions_take_little_of_the_stack() -> None:
    """Values of known sizes each had an array there, of as many as there are: a deep model ended the process."""
    source = load("c").emit(FuseLoops().run(deep(20, 32)))
    arrays = [int(count) for count in re.findall(r"^    \w+ t\d+\[(\d+)\];", source, re.MULTILINE)]
    assert arrays and sum(arrays) <= nests.STACK
    (found,) = ran(deep(20, 32), torch.eye(32).double(), weights={"w": torch.eye(32).double().flip(0)})
    assert torch.equal(found, torch.eye(32).double())


def test_results_are_where_the_caller_expects_them() -> None:
    """Row statistics without a mean were written in the order of the ops that they are made of, which is another."""
    zeros, scale = of(lambda at, x: at.op("row_statistics", x, dims=1, centred=False, eps=0.0), torch.full((2, 3), 4.0))
    assert zeros.tolist() == [[0.0]] * 2 and scale.tolist() == [[0.25]] * 2


@pytest.mark.parametrize("name", ["mul", "sum", "div", "add", "sqrt", "reciprocal"])
def test_names_that_values_from_outside_have(name: str) -> None:
    """What a norm is made of was called as an input was, and read itself instead: numbers without end."""
    x, at = Value(name, Type("f32", (2, 4))), Builder([name])
    y = at.tanh(at.rms_norm(x))
    given = torch.arange(8.0).reshape(2, 4)
    (found,) = ran(Graph("named", Section((x,), tuple(at.ops), (y,))), given)
    torch.testing.assert_close(found, torch.tanh(nn.functional.rms_norm(given, (4,), eps=1e-6)))


def test_long_chains_are_written_in_parts() -> None:
    """Each op is written by the one that reads it: of more than 300 Python has no room for the calls."""
    def chain(at: Builder, x: Value) -> Value:
        for _ in range(700):
            x = at.add(x, 1.0)
        return at.sum(x, dims=(0,))

    (total,) = of(chain, torch.zeros(3))
    assert total.item() == 2100.0


def test_weights_that_lie_otherwise_are_other_weights() -> None:
    """What is prepared from weights was kept where they were turned in place, and a function read past their end."""
    square = nn.Linear(5, 5).double()
    turned = dlbc.compile(square, rows(2), rules="dlb", backend="c", cache=False)
    before = turned(rows(2))
    square.weight.data = square.weight.data.t()
    fresh = dlbc.compile(square, rows(2), rules="dlb", backend="torch", cache=False)
    assert not np.allclose(before.relevance["input"], turned(rows(2)).relevance["input"])
    same(turned(rows(2)), fresh(rows(2)))


def test_functions_have_no_more_arguments_than_can_be_passed() -> None:
    """ctypes passes 1024."""
    weights = {f"w{i}": Weight(f"w{i}", Type("f32", (2,))) for i in range(1300)}
    x, at = Value("x", Type("f32", (2,))), Builder(["x"])
    h, kept = x, list[Value]()
    for weight in weights.values():
        h = at.add(h, weight)
        kept += [h] if len(kept) < 100 else []
    graph = Graph("wide", Section((x,), tuple(at.ops), (*kept, h)), weights=weights)
    fused = FuseLoops().run(graph)
    assert len(fused.forward.body) == 3 and all(isinstance(item, Kernel) for item in fused.forward.body)
    *_, found = ran(graph, torch.zeros(2), weights=dict.fromkeys(weights, torch.ones(2)))
    assert found.tolist() == [1300.0] * 2


def test_the_plan_says_what_runs_where() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first, self.last = nn.Embedding(5, 8), nn.Linear(8, 16384), nn.Linear(16384, 3)

        def forward(self, kind: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.first(self.embed(kind) + x)))

    explainer = dlbc.compile(Odd().eval(), (torch.tensor([1]), torch.randn(1, 8)), rules="epsilon", backend="c",
                             cache=False)
    plan = explainer.plan()
    why = {op: row.why for row in plan for op in row.ops if row.section == "forward"}
    assert {row.runs for row in plan} == {"torch", "c loops"}
    assert why["embedding"] == "there is no loop for `embedding`: torch has one"
    assert why["linear"] == "torch's are faster for a matrix of this size"
    assert "c loops" in str(plan)
