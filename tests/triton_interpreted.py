"""Run by test_triton.py under pytest in a process of its own, with TRITON_INTERPRET=1: what Triton kernels compute is
what the float64 interpreter of the IR computes, on small ragged shapes. The interpreter says nothing of races or speed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dlbc
from dlbc.backends.triton.emit import emit, refused
from dlbc.compiler import FUSE
from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Kernel, Section, Type, Value
from dlbc.ir.dims import evaluate
from dlbc.ir.fusible import MOVES, POINTWISE, fits, is_product, is_row, template_of
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.passes import parse, run
from dlbc.passes.inline import Inline
from dlbc.passes.recompute import Recompute
from dlbc.presets import PRESETS
from dlbc_runtime.module import load_module
from dlbc_runtime.triton_launch import INTERPRETED
from tests import zoo
from tests.random_graphs import IMAGE, SEQUENCE, make
from tests.test_reference import ADJOINTS, CASES, NAMES, numpy
from tests.test_reference import run as reference
from tests.triton_attention_runs import interpret_with_any_numpy

interpret_with_any_numpy()
assert INTERPRETED, "run by test_triton.py"
TOLERANCE = {"f64": 1e-5, "f32": 1e-5, "f16": 2e-3}


def kernels(graph: Graph) -> list[Kernel]:
    """Every kernel of a graph."""
    bodies = [section.body for _, section in graph.sections()] + [f.body for f in graph.functions.values()]
    return [item for body in bodies for item in body if isinstance(item, Kernel)]


# --- every op ----------------------------------------------------------------------------------------


def alone(name: str, operands: tuple[Any, ...], attrs: dict[str, Any]) -> Graph | None:
    """A graph whose only op is a kernel; None where no kernel is for that op, or its element types."""
    builder = Builder()
    params = {i: Value(f"x{i}", Type(NAMES[x.dtype], tuple(x.shape))) for i, x in enumerate(operands)
              if isinstance(x, Tensor)}
    made = builder.op(name, *(params.get(i, x) for i, x in enumerate(operands)), **attrs)
    (op,) = builder.ops
    template = template_of(op) if is_product(op) else "row" if is_row(op) else "elementwise" if fits(op) else ""
    if not template or any(t.dtype == "bf16" for t in (*(p.type for p in params.values()), *(r.type for r in made))):
        return None
    kernel = Kernel("k0", template, (op,), made)
    return Graph("one", Section(tuple(params.values()), (kernel,), made))


ALONE = [(c.name, c.operands, c.attrs) for c in CASES]
HELD = {name for name, operands, attrs in ALONE if alone(name, operands, attrs) is not None}


@pytest.mark.parametrize("number", range(len(ALONE)), ids=[f"{name}-{i}" for i, (name, *_) in enumerate(ALONE)])
def test_op(number: int) -> None:
    name, operands, attrs = ALONE[number]
    graph = alone(name, operands, attrs)
    if graph is None or not any(isinstance(x, Tensor) for x in operands):
        pytest.skip("no kernel is for this")
    assert not refused(graph)
    results, expected = reference(name, *operands, **attrs)
    module = load_module(emit(graph), "one")
    found, _ = module.forward({}, (), *(x for x in operands if isinstance(x, Tensor)))
    dtypes = [NAMES[x.dtype] for x in operands if isinstance(x, Tensor)] + [r.type.dtype for r in results]
    tolerance = max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    for result, y, right in zip(results, found, expected, strict=True):
        assert NAMES[y.dtype] == result.type.dtype and tuple(y.shape) == right.shape
        np.testing.assert_allclose(numpy(y), right, rtol=tolerance, atol=tolerance)


def test_every_op_of_the_sets_was_run() -> None:
    missing = (POINTWISE | MOVES) - HELD - {c.name for c in ADJOINTS} - {"full"}
    assert not missing


@pytest.mark.parametrize("number", range(len(ADJOINTS)), ids=[f"{a.name}-{i}" for i, a in enumerate(ADJOINTS)])
def test_adjoint(number: int) -> None:
    case = ADJOINTS[number]
    x = case.x.float()
    _, (y,) = reference(case.forward, x, *case.others, **case.attrs)
    operands = case.back(torch.randn(3, *y.shape), x, torch.from_numpy(y).float())
    graph = alone(case.name, operands, case.back_attrs)
    if graph is None:
        pytest.skip("no kernel is for this")
    _, expected = reference(case.name, *operands, **case.back_attrs)
    found, _ = load_module(emit(graph), "one").forward({}, (), *(x for x in operands if isinstance(x, Tensor)))
    for y, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(numpy(y), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x", [1e-30, -1e-12, 1e-7, -3e-4, 0.01, -0.2, 0.3, 0.36, -1.0, 4.0, -30.0, 80.0])
@pytest.mark.parametrize("name", ["tanh", "expm1", "log1p", "sigmoid", "softsign", "log_sigmoid"])
def test_functions_keep_their_digits_near_0(name: str, x: float) -> None:
    """Relative to the number itself, which relevance divides by."""
    given = torch.full((3,), abs(x) if name == "log1p" else x)
    graph = alone(name, (given,), {})
    assert graph is not None
    _, (expected,) = reference(name, given.double())
    found, _ = load_module(emit(graph), "one").forward({}, (), given)
    np.testing.assert_allclose(found[0].double(), expected, rtol=2e-6, atol=1e-38)


# --- whole graphs ------------------------------------------------------------------------------------


def distances(graph: Graph, sizes: dict[str, int], *, dtype: torch.dtype = torch.float32,
              weights: dict[str, Any] | None = None) -> list[float]:
    """How far the kernels of a lowered graph are from the interpreter, by the largest number of each result: the
    outputs, then relevance from what the kernels' own forward saved."""
    fused = run(graph.with_attrs(target="triton:sm_90"), FUSE["triton"], verified=True)
    assert kernels(fused) and not refused(fused)
    source = np.random.default_rng(0)

    def given(type_: Type) -> Tensor:
        shape = tuple(evaluate(d, sizes) for d in type_.shape)
        if not type_.floating:
            numbers = source.integers(0, 2, shape)
            return torch.from_numpy(numbers.astype(bool) if type_.dtype == "bool" else numbers)
        kind = {"f16": torch.float16, "f64": torch.float64}.get(type_.dtype, torch.float32)
        return torch.from_numpy(source.normal(size=shape)).to(kind)

    held = {n: weights[n] if weights else given(w.type) for n, w in graph.weights.items()}
    inputs = {p.name: given(p.type) for p in graph.forward.params}
    module = load_module(emit(fused), "graph")
    with torch.no_grad():
        prepared = module.prepare(held)
        outputs, state = module.forward(held, prepared, *inputs.values())
        ran = interpret(fused, _wide(inputs), _wide(held))
        found = [_far(y, right) for y, right in zip(outputs, ran.outputs, strict=True)]
        if graph.relevance is None:
            return found
        seeds = {p.name: given(p.type) for p in graph.relevance.params}
        saved = dict(zip((v.name for v in fused.forward.saves), (s for s in state if not isinstance(s, int)),
                         strict=True))
        saved |= dict(zip((v.name for v in graph.forward.params), inputs.values(), strict=True))
        ran = interpret(fused, _wide(inputs), _wide(held), _wide(seeds), saved=_wide(saved))
        relevance = module.relevance(held, prepared, state, *seeds.values())
    return [*found, *(_far(y, right) for y, right in zip(relevance, ran.relevance, strict=True))]


def _wide(found: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double().numpy() if x.is_floating_point() else x.numpy() for name, x in found.items()}


def _far(found: Tensor, right: np.ndarray) -> float:
    return float(np.abs(found.double().numpy() - right).max() / max(np.abs(right).max(), 1e-30))


LOWER = "pair{composite=%s},lower,eliminate_common,simplify,eliminate_common,eliminate_dead"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["sequence", "image"])
def test_random_graphs(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = sorted(IMAGE if kind == "image" else SEQUENCE)
    steps = [(names[rng.integers(len(names))], int(rng.integers(8)), int(rng.integers(8))) for _ in range(6)]
    model = make(kind, steps, seed, seed)
    graph = run(model.graph, parse(LOWER % ("dlb", "epsilon", "gamma", "attnlrp")[seed % 4]))
    held = {n: torch.from_numpy(np.asarray(w)) for n, w in model.weights.items()}
    held = {n: w.float() if w.is_floating_point() else w for n, w in held.items()}
    assert max(distances(graph, {"B": 3, "S": 2}, weights=held)) < 1e-4


class Cnn(nn.Module):
    """Convolutions (torch's), and what is around them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                                  nn.Linear(45, 7), nn.SiLU(), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class Blocks(nn.Module):
    """Two transformer blocks, alike."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, activation="gelu",
                                                               norm_first=bool(i % 2)) for i in range(2))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x.mean(1))
        return out


def model_of(kind: str) -> tuple[nn.Module, Tensor]:
    """A small model and inputs."""
    torch.manual_seed(0)
    if kind == "mlp":
        layers = (nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 3))
        return nn.Sequential(*layers).eval(), torch.randn(2, 5)
    if kind == "cnn":
        return Cnn().eval(), torch.randn(2, 3, 8, 8)
    if kind == "transformer":
        return Blocks().eval(), torch.randn(2, 5, 12)
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                                      num_attention_heads=4, num_key_value_heads=2)
    return zoo.randomise(transformers.LlamaForCausalLM(config)).eval(), torch.randint(0, 31, (2, 5))


SEQUENTIAL = [("transformer", "dlb"), ("transformer", "attnlrp"), *(("llama", rules) for rules in (
    "dlb", "dlb-contrastive", "dlb-0.1", "attnlrp", "attnlrp-conserving", "cp-lrp", "gamma", "auto"))]


@pytest.mark.parametrize(("kind", "rules"), [
    *((kind, rules) for kind in ("mlp", "cnn") for rules in PRESETS), *SEQUENTIAL])
def test_presets(kind: str, rules: str) -> None:
    model, x = model_of(kind)
    x = x.clamp(-3, 3) if x.is_floating_point() else x  # within the bounds of zbox
    explainer = dlbc.compile(model, x, rules=rules, backend="torch", cache=False)
    graph = parse_graph(explainer.ir("lowered"))
    sizes = {"B": 3 if kind in ("mlp", "cnn") else 1, "T": 5, "S": 2, "P": 1, "K": 1}
    assert max(distances(graph, sizes, weights={n: w.detach() for n, w in explainer.weights.items()})) < 2e-5


def test_what_is_computed_again_in_kernels() -> None:
    """Forward values that are not kept, however small: kernels compute them where relevance reads them."""
    model, x = model_of("transformer")
    explainer = dlbc.compile(model, x, rules="attnlrp", backend="torch", cache=False)
    graph = run(parse_graph(explainer.ir("lowered")), (Inline(), Recompute(least=1, kernels=True)))
    inside = [op.result.name for kernel in kernels(run(graph, FUSE["triton"])) for op in kernel.body]
    assert any(".again" in name for name in inside)
    sizes = {"B": 1, "T": 5, "S": 2, "P": 1, "K": 1}
    assert max(distances(graph, sizes, weights={n: w.detach() for n, w in explainer.weights.items()})) < 2e-5


def test_float16() -> None:
    """Numbers are stored in the model's element type, computed and summed in float32."""
    model, x = model_of("llama")
    explainer = dlbc.compile(model.half(), x, rules="dlb", backend="torch", cache=False)
    held = {n: w.detach() for n, w in explainer.weights.items()}
    found = distances(parse_graph(explainer.ir("lowered")), {"B": 1, "T": 5, "S": 2, "P": 1, "K": 1}, weights=held)
    assert max(found) < 5e-3


def test_an_explainer_with_kernels() -> None:
    """From the model to relevance, for other sizes than it was compiled with, one target and several."""
    model, x = model_of("llama")
    plain, fused = (dlbc.compile(model, x, rules="dlb", backend=b, cache=False) for b in ("torch", "triton"))
    for other, target in ((x, None), (torch.randint(0, 31, (1, 9)), [3, 5, 7])):
        expected, found = plain(other, target=target), fused(other, target=target)
        np.testing.assert_allclose(found.outputs["logits"], expected.outputs["logits"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.relevance["input_ids"], expected.relevance["input_ids"], rtol=1e-3, atol=1e-4)
    assert fused(x).conservation().closes()
    assert "triton gemm" in str(fused.plan()) and fused.plan().target == "sm_90"


def test_strides_and_offsets_of_inputs_are_their_own() -> None:
    """Inputs that lie in memory in another order, or with gaps."""
    model, x = model_of("cnn")
    explainer = dlbc.compile(model, x, rules="dlb", backend="triton", cache=False)
    expected = explainer(x).relevance["x"]
    for other in (x.to(memory_format=torch.channels_last), torch.randn(2, 8, 8, 4)[..., :3].permute(0, 3, 1, 2)):
        other = other if other.is_contiguous(memory_format=torch.channels_last) else other.copy_(x)
        np.testing.assert_allclose(explainer(other).relevance["x"], expected, rtol=1e-4, atol=1e-4)


def test_wide_offsets_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """64-bit offsets, which tensors of more than 2^31 elements need."""
    from dlbc_runtime import triton_launch

    model, x = model_of("mlp")
    explainer = dlbc.compile(model, x, rules="dlb", backend="triton", cache=False)
    expected = explainer(x).relevance["input"]
    monkeypatch.setattr(triton_launch, "WIDE", 0)
    np.testing.assert_array_equal(explainer(x).relevance["input"], expected)


def test_a_kernel_that_does_not_compile_runs_op_by_op(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """The explanation is the same, the failure is said once, and a file has what shows it again."""
    from pathlib import Path

    from dlbc_runtime import triton_launch

    class CompilationError(Exception):
        pass

    class Broken:
        def __init__(self, kernel: Any) -> None:
            self.arg_names, self.__name__, self.src = kernel.arg_names, kernel.__name__, "the source"

        def __getitem__(self, grid: object) -> Any:
            def fails(*args: object, **options: object) -> None:
                raise CompilationError("no such instruction")
            return fails

    model, x = model_of("mlp")
    explainer = dlbc.compile(model, x, rules="dlb", backend="triton", cache=False)
    expected = explainer(x).relevance["input"]
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(triton_launch, "_on_gpu", lambda args: True)
    module = explainer._load(explainer.default).module
    broken = [name for name in vars(module) if name.startswith(("gemm_", "elementwise_")) and "tiles" not in name]
    for name in broken:
        monkeypatch.setattr(module, name, Broken(getattr(module, name)))
    with caplog.at_level("WARNING"):
        for _ in range(2):
            np.testing.assert_allclose(explainer(x).relevance["input"], expected, rtol=1e-4, atol=1e-4)
    said = [record.getMessage() for record in caplog.records if "does not compile" in record.getMessage()]
    assert len(said) == len(broken)
    for text in said:
        file = Path(text.split("the file ")[1])
        assert "no such instruction" in file.read_text() and "the source" in file.read_text()
        file.unlink()


def test_a_kernel_of_another_template_is_an_error() -> None:
    graph = alone("exp", (torch.randn(3),), {})
    assert graph is not None
    (item,) = graph.forward.body
    assert isinstance(item, Kernel)
    odd = replace(graph, forward=replace(graph.forward, body=(replace(item, template="fft"),)))
    with pytest.raises(dlbc.errors.IRError, match="no template `fft`"):
        emit(odd)
