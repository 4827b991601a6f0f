"""Memory: the plan is what is allocated, calls within a budget say the same, and texts of different lengths too."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dlbc
import dlbc_runtime
from dlbc.apart import batch_of
from dlbc.backends.layout import Layout
from dlbc.errors import ArtifactError, InputError
from dlbc.ir.interpreter import interpret
from dlbc.ir.verifier import verify
from dlbc.passes import run
from dlbc.passes.checkpoint import Checkpoint
from dlbc.passes.eliminate_dead import EliminateDead
from dlbc.passes.lower import Lower
from dlbc.passes.pair import Pair
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.memory import Plan, as_bytes, as_text
from tests import zoo
from tests.random_graphs import Model, models

TEXTS = ["llama", "bert"]


def small(width: int = 32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5)
        return nn.Sequential(*layers).eval()


class Mixing(nn.Module):
    """Each row is compared with the mean of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x - x.mean(0))
        return found


def compiled(name: str, rules: str = "dlb", **options: Any) -> tuple[Explainer, dict[str, torch.Tensor]]:
    """An explainer of a model of the zoo, and a batch of six for it."""
    if not zoo.available(name):
        pytest.skip(f"needs {', '.join(zoo.NEEDS[name])}")
    case = zoo.CASES[name]()
    explainer = dlbc.compile(case.model, case.args or case.kwargs, rules=rules, cache=False, **options)
    return explainer, batch(explainer, case)


kept = cache(compiled)


def batch(explainer: Explainer, case: Any) -> dict[str, torch.Tensor]:
    """Six rows of the kind of the example's."""
    bound = explainer.manifest.inputs.bind(case.args, case.kwargs)
    return {name: value.repeat(6, *[1] * (value.dim() - 1))[:6] for name, value in bound.items()}


def close(found: Explanation, expected: Explanation, tolerance: float = 1e-5) -> None:
    for group in ("relevance", "outputs", "positive", "negative"):
        for name, value in getattr(expected, group).items():
            own = getattr(found, group)[name]
            assert own.shape == value.shape
            np.testing.assert_allclose(own, value, rtol=0, atol=tolerance * max(1.0, float(np.abs(value).max())))
    assert [(t.row, t.seed, t.index, t.position) for t in found.target] == [
        (t.row, t.seed, t.index, t.position) for t in expected.target]


# --- the plan ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("512 MiB", 512 * 2**20), ("1.5e9", 1_500_000_000),
                                            (4096, 4096), ("10kb", 10_000), ("1_000", 1000)])
def test_budgets_are_bytes_or_text(text: object, size: int) -> None:
    assert as_bytes(text) == size


@pytest.mark.parametrize("wrong", ["", "GB", "2 pages", 0, -1, True, None, 1.5, "inf", "nan"])
def test_what_is_no_budget_is_an_error(wrong: object) -> None:
    with pytest.raises(InputError, match="memory_budget"):
        as_bytes(wrong)


def test_the_plan_is_a_table_with_the_peak_first() -> None:
    explainer, x = dlbc.compile(small(), torch.ones(2, 6), rules="dlb", cache=False), torch.randn(3, 6)
    memory = explainer.memory(x)
    assert memory.peak == max(memory.steps, key=lambda step: step.total) == memory.largest()[0]
    assert {step.section for step in memory.steps} == {"forward", "relevance"} == set(memory.peaks)
    assert memory.peak.total == memory.peak.inputs + memory.peak.saved + memory.peak.working + memory.peak.results
    lines = str(memory).splitlines()
    assert as_text(memory.peak.total) in lines[0] and memory.peak.op in lines[1]
    assert memory.to_dict()["peak"]["total"] == memory.peak.total  # type: ignore[index, call-overload]
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as shown:
        console.print(memory)
    assert as_text(memory.peak.total) in shown.get()


def test_sizes_stand_for_inputs() -> None:
    explainer = dlbc.compile(small(), torch.ones(2, 6), rules="dlb", cache=False)
    assert explainer.memory(sizes={"B": 7}).steps == explainer.memory(torch.zeros(7, 6)).steps
    assert explainer.memory(sizes={"B": 14}).peak.total > explainer.memory(sizes={"B": 7}).peak.total
    with pytest.raises(InputError, match="'Q' = 3"):
        explainer.memory(sizes={"Q": 3})


def test_the_runtime_alone_knows_the_plan(tmp_path: Path) -> None:
    explainer, x = dlbc.compile(small(), torch.ones(2, 6), rules="dlb", cache=False), torch.randn(4, 6)
    explainer.save(tmp_path / "e.dlbc", weights=True)
    loaded = dlbc_runtime.load(tmp_path / "e.dlbc", trust=True)
    assert loaded.memory(x) == explainer.memory(x)
    least = explainer.memory(x[:1]).peak.total * 2
    close(loaded(x, memory_budget=least), explainer(x))
    with pytest.raises(InputError, match="give at least"):  # there is no compiler for a program that computes again
        loaded(x, memory_budget=100)


@pytest.mark.parametrize("wrong", [{"steps": [[7, 0, 0]]}, {"buffers": [[0, 0, 99, 0]]}, {"sizes": 3}, {}])
def test_a_plan_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    good = Plan(("mul", ""), ((0, 0, 1),), ("4*B",), ((0, 0, -1, 1),)).to_json()
    with pytest.raises((KeyError, TypeError, ValueError)):
        Plan.from_json({**good, **wrong} if wrong else {})


@pytest.mark.parametrize(("name", "rules"), [("llama", "dlb"), ("llama", "attnlrp"), ("bert", "cp-lrp")])
def test_the_plan_is_what_torch_allocates(name: str, rules: str) -> None:
    explainer, inputs = kept(name, rules)
    large = {n: v.repeat(16, 1) for n, v in inputs.items()}
    explainer(**large)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        explainer(**large)
    changes = sorted((event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events()
                     if event.name() == "[memory]")
    allocated = int(np.cumsum([size for _, size in changes]).max())
    assert explainer.memory(**large).peak.total == pytest.approx(allocated, rel=0.1)


@pytest.mark.parametrize(("shape", "order", "new", "view"), [
    ((2, 3, 8), None, (2, 3, 2, 4), True), ((2, 3, 8), None, (6, 8), True), ((2, 3, 8), (1, 0, 2), (6, 8), False),
    ((2, 5, 4, 3), (0, 2, 1, 3), (2, 5, 12), False), ((1, 3, 1, 8), None, (3, 8, 1), True),
    ((2, 3), (1, 0), (3, 2), False)])
def test_views_are_torchs(shape: tuple[int, ...], order: tuple[int, ...] | None, new: tuple[int, ...], view: bool
                          ) -> None:
    # A layout in another order of axes is that of a permuted array.
    base = torch.zeros([shape[axis] for axis in order or range(len(shape))])
    tensor = base.permute([(order or tuple(range(len(shape)))).index(axis) for axis in range(len(shape))])
    layout = Layout.plain(shape, order)
    assert layout.strides == tensor.stride()
    assert (tensor.reshape(new).data_ptr() == tensor.data_ptr()) is view
    found = layout.reshaped(new)
    assert (found is not None) is view
    if found is not None:
        assert all(n == 1 or a == b for n, a, b in zip(new, found.strides, tensor.reshape(new).stride(), strict=True))


# --- parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rules"), [("llama", "dlb"), ("bert", "dlb"), ("lenet", "dlb"),
                                             ("lenet", "dlb-contrastive"), ("resnet18_small", "epsilon")])
@pytest.mark.parametrize("share", [0.9, 0.4, 0.12])
def test_parts_say_what_the_whole_says(name: str, rules: str, share: float) -> None:
    explainer, inputs = kept(name, rules)
    target = [0, dlbc.Target.index([1, 0, 1, 0, 1, 1]), 1]
    whole = explainer(**inputs, target=target)
    with pytest.raises(InputError, match="give at least") as problem:
        explainer.memory(**inputs, target=target, memory_budget=1)
    least = int(problem.value.hint.split()[3])
    budget = max(int(share * explainer.memory(**inputs, target=target).peak.total), least)
    planned = explainer.memory(**inputs, target=target, memory_budget=budget)
    assert planned.peak.total <= budget and planned.budget == budget
    found = explainer(**inputs, target=target, memory_budget=budget)
    close(found, whole)
    one = explainer(**inputs, memory_budget=budget)
    close(one, explainer(**inputs))


def test_conservation_of_a_call_in_parts() -> None:
    explainer, inputs = kept("llama")
    budget = int(0.3 * explainer.memory(**inputs).peak.total)
    assert explainer.memory(**inputs, memory_budget=budget).rows < 6
    ledger = explainer(**inputs, memory_budget=budget).conservation()
    assert ledger.closes()
    assert ledger.seed == pytest.approx(explainer(**inputs).conservation().seed)


def test_targets_in_parts_share_one_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = dlbc.compile(Mixing().eval(), torch.randn(3, 6), rules="dlb", cache=False)
    assert explainer.manifest.batch == ""
    x, target = torch.randn(64, 6), [dlbc.Target.index(i) for i in range(5)]
    whole, total = explainer(x, target=target), explainer.memory(x, target=target).peak.total
    planned = explainer.memory(x, target=target, memory_budget=int(0.75 * total))
    assert planned.targets < 5 and not planned.checkpoint and planned.rows == 64
    module, calls = explainer._load(explainer.default).module, []
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *given: calls.append(1) or forward(*given))
    found = explainer(x, target=target, memory_budget=int(0.75 * total))
    assert len(calls) == 1
    close(found, whole, 1e-6)


def test_weightings_of_rows_go_with_their_rows() -> None:
    explainer, x = dlbc.compile(small(), torch.ones(2, 6), rules="dlb", cache=False), torch.randn(6, 6)
    targets = [dlbc.Target.tensor(torch.rand(6, 5)), dlbc.Target.difference([0, 1, 2, 3, 4, 0], 1)]
    whole = explainer(x, target=targets)
    close(explainer(x, target=targets, memory_budget=explainer.memory(x[:2], target=targets).peak.total + 2000), whole)


def test_a_budget_below_the_least_is_an_error_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    explainer, x = dlbc.compile(small(), torch.ones(2, 6), rules="dlb", cache=False), torch.randn(6, 6)
    module = explainer._load(explainer.default).module
    monkeypatch.setattr(module, "forward", lambda *given: pytest.fail("it ran"))
    with pytest.raises(InputError, match="give at least") as problem:
        explainer(x, memory_budget=100)
    least = int(str(problem.value).split("give at least ")[1].split()[0])
    monkeypatch.undo()
    close(explainer(x, memory_budget=least), explainer(x))
    with pytest.raises(InputError, match="give at least"):
        explainer(x, memory_budget=least - 1)


def test_the_budget_of_an_explainer_holds_for_its_calls() -> None:
    x = torch.randn(6, 6)
    explainer = dlbc.compile(small(), x, rules="dlb", cache=False, memory_budget="20 kB")
    assert explainer.memory_budget == 20_000 and explainer.memory(x).budget == 20_000
    assert explainer.memory(x).peak.total <= 20_000
    assert explainer.with_options(memory_budget=None).memory_budget is None
    with pytest.raises(InputError, match="memory_budget"):
        dlbc.compile(small(), x, cache=False, memory_budget="much")


# --- rows apart ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "lenet", "resnet18_small", "vit", "densenet_small"])
def test_rows_of_ordinary_models_are_known_to_be_apart(name: str) -> None:
    assert kept(name)[0].manifest.batch == "B"


@settings(max_examples=40, deadline=None)
@given(models())
def test_rows_said_to_be_apart_are(model: Model) -> None:
    if batch_of(model.graph) != "B":
        return
    inputs = model.inputs(3)
    whole = interpret(model.graph, inputs, model.weights).outputs
    for row in range(3):
        alone = interpret(model.graph, {n: v[row:row + 1] for n, v in inputs.items()}, model.weights).outputs
        for a, b in zip(alone, whole, strict=True):
            np.testing.assert_allclose(a[0], b[row], rtol=1e-9, atol=1e-9)


class Flipped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.flip(0)


class Squared(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ x.T) @ x


class Cumulative(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1).cumsum(0).reshape(x.shape)


@pytest.mark.parametrize("model", [Mixing(), Flipped(), Squared(), Cumulative()], ids=lambda m: type(m).__name__)
def test_rows_that_depend_on_each_other_stay_together(model: nn.Module) -> None:
    from dlbc.frontends.torch_export import import_model
    from dlbc.passes.pipeline import CANONICALISE

    imported = import_model(model, (torch.randn(3, 6),), {}, dynamic=True)
    assert batch_of(run(imported.graph, CANONICALISE)) == ""


# --- computing forward values again --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rules"), [("llama", "dlb"), ("llama", "attnlrp"), ("bert", "cp-lrp"),
                                             ("resnet18_small", "dlb"), ("vit", "dlb")])
def test_computing_again_gives_the_same_numbers_in_less_memory(name: str, rules: str) -> None:
    explainer, inputs = kept(name, rules)
    again = explainer.with_options(checkpoint=True)
    close(again(**inputs), explainer(**inputs), 1e-6)
    assert again.memory(**inputs).peak.total <= explainer.memory(**inputs).peak.total
    assert again.memory(**inputs).checkpoint


@settings(max_examples=60, deadline=None)
@given(models(), st.integers(0, 4))
def test_checkpoint_keeps_what_random_graphs_compute(model: Model, every: int) -> None:
    before = run(model.graph, [Pair(composite="dlb"), Lower(), EliminateDead()])
    after = run(before, [Checkpoint(every=every)])
    verify(after)
    assert before.relevance is not None and after.relevance is not None
    inputs, seeds = model.inputs(), {before.relevance.params[0].name: model.seeds(2)}
    wanted, found = (interpret(graph, inputs, model.weights, seeds).relevance for graph in (before, after))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


# --- texts of different lengths ------------------------------------------------------------------------------


def texts(explainer: Explainer) -> list[torch.Tensor]:
    return [torch.tensor(ids) for ids in ([5, 9, 3, 7, 11, 2, 8], [4, 6, 3], [12, 1, 9, 2, 10])]


def alone(explainer: Explainer, ids: torch.Tensor, **options: Any) -> Explanation:
    return explainer(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **options)


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_different_lengths_are_explained_as_alone(name: str, tmp_path: Path) -> None:
    explainer, _ = kept(name)
    rows = texts(explainer)
    for given_rows in (rows, tuple(row.tolist() for row in rows), [row.numpy() for row in rows]):
        found = explainer(input_ids=given_rows)
        assert found.lengths["input_ids"] == (7, 3, 5)
        for row, ids in enumerate(rows):
            one = alone(explainer, ids)
            np.testing.assert_allclose(found.relevance_of("input_ids", row), one.relevance_of("input_ids"), atol=1e-3)
            assert found.value_of("input_ids", row).tolist() == ids.tolist()  # type: ignore[union-attr]
            assert (found.target[row].index, found.target[row].position) == (
                one.target[0].index, one.target[0].position)
            assert not found.relevance["input_ids"][row, len(ids):].any()
    loaded = Explanation.load(found.save(tmp_path / "x.json"))
    assert loaded.lengths == found.lengths and len(loaded.relevance_of("input_ids", 1)) == 3
    named = found.with_tokens([[f"t{i}" for i in row.tolist()] for row in rows])
    assert [len(row) for row in named.tokens or ()] == [7, 3, 5]
    assert {one.index[0] for one in named.top(9) if one.row == 1} <= {0, 1, 2}


def test_positions_count_from_the_end_of_each_row() -> None:
    explainer, _ = kept("llama")
    rows, target = texts(explainer), dlbc.Target.predicted(position=-2)
    found = explainer(rows, target=[target, 3])
    for row, ids in enumerate(rows):
        assert found.explained(row).position == len(ids) - 2  # type: ignore[union-attr]
        np.testing.assert_allclose(found.relevance_of("input_ids", row),
                                   alone(explainer, ids, target=target).relevance_of("input_ids"), atol=1e-3)
    with pytest.raises(InputError, match="position 5 is outside row 1"):
        explainer(rows, target=dlbc.Target.predicted(position=5))


def test_texts_within_a_budget() -> None:
    explainer, _ = kept("llama")
    whole = explainer(texts(explainer))
    budget = int(0.6 * explainer.memory(texts(explainer)).peak.total)
    found = explainer(texts(explainer), memory_budget=budget)
    close(found, whole)
    assert found.lengths == whole.lengths


@pytest.mark.parametrize(("rows", "fact"), [
    ([], "empty"), ([[1.5, 2.0]], "not token ids"), ([[[1, 2]]], "not token ids"), ([[1, 2], []], "not token ids")])
def test_what_are_no_rows_of_token_ids_is_an_error(rows: list[Any], fact: str) -> None:
    explainer, _ = kept("llama")
    with pytest.raises(InputError, match=fact):
        explainer(input_ids=rows)


def test_rows_of_different_lengths_need_a_mask() -> None:
    explainer, _ = kept("llama_ids_only")
    with pytest.raises(InputError, match="attention_mask among the example inputs"):
        explainer([[1, 2, 3], [4, 5]])
    found = explainer([[1, 2, 3], [4, 5, 6]])  # nothing to hide
    np.testing.assert_array_equal(found.relevance["input_ids"],
                                  explainer(torch.tensor([[1, 2, 3], [4, 5, 6]])).relevance["input_ids"])


def test_lengths_in_a_file_must_fit(tmp_path: Path) -> None:
    explainer, _ = kept("llama")
    found = explainer(texts(explainer))
    for wrong in ((7, 3), (7, 3, 99), (7, 0, 5)):
        path = dataclasses.replace(found, lengths={"input_ids": wrong}).save(tmp_path / "x.json")
        with pytest.raises(ArtifactError, match="lengths"):
            Explanation.load(path)
