"""Calls like one before go straight: the same explanations and errors as the whole way, none of them stale."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dlbc
from dlbc.errors import InputError
from dlbc_runtime.c_library import compiler
from dlbc_runtime.call import Call
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.straight import MOST
from dlbc_runtime.target import Target

BACKENDS = ("torch", "numpy", *(("c",) if compiler() else ()))


class Two(nn.Module):
    """Two inputs, one of them whole numbers, and an output of `classes` numbers (0: one number without an axis)."""

    def __init__(self, classes: int = 3, *, softmax: bool = False) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(5, 4), nn.Linear(6, 8), nn.Linear(12, max(classes, 1))
        self.classes, self.softmax = classes, softmax

    def forward(self, x: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.cat([torch.relu(self.first(x)), self.embed(kind)], -1))
        return y[:, 0] if not self.classes else torch.softmax(y, -1) if self.softmax else y


def inputs(batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 6, generator=generator), torch.randint(0, 5, (batch,), generator=generator)


def own_explainer(backend: str, rules: str = "epsilon", classes: int = 3, softmax: bool = False) -> Explainer:
    """Of a model that nobody else has."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Two(classes, softmax=softmax).eval()
    found = dlbc.compile(model, inputs(), rules=rules, backend=backend, cache=False)
    assert found.model is model
    return found


_compiled = functools.cache(own_explainer)


def explainer_of(*args: Any, **options: Any) -> Explainer:
    """One that has seen no call, of a model that nobody changes."""
    return _compiled(*args, **options).with_options()


@contextmanager
def whole_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often calls go the whole way."""
    found: list[int] = []
    run = Call.run

    def counted(self: Call) -> Explanation:
        found.append(1)
        return run(self)

    with monkeypatch.context() as patch:
        patch.setattr(Call, "run", counted)
        yield found


def whole(explainer: Explainer, *args: Any, **options: Any) -> Explanation:
    """What an explainer that has seen no call before makes of it."""
    return explainer.with_options()(*args, **options)


def same(a: Explanation, b: Explanation) -> None:
    """All fields, but for the seconds that they took."""
    for field in fields(Explanation):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert type(left) is type(right), field.name
        if field.name == "method":
            assert replace(left, seconds={}) == replace(right, seconds={})
            assert left.seconds.keys() == right.seconds.keys()
        elif field.name in ("outputs", "relevance", "inputs", "nodes", "activations", "positive", "negative", "sinks"):
            assert list(left) == list(right)
            for name in left:
                assert left[name].dtype == right[name].dtype
                np.testing.assert_array_equal(left[name], right[name])
        elif field.name not in ("ledger_source", "draw_source"):
            assert repr(left) == repr(right), field.name  # a value may be NaN
    assert vars(a).keys() == vars(b).keys()


@pytest.mark.parametrize(("backend", "rules", "classes", "softmax"), [
    *itertools.product(BACKENDS, ("epsilon", "dlb"), (3, 0), (False,)), ("torch", "gamma", 3, True),
    ("numpy", "epsilon", 1, False), ("torch", "epsilon", 100, False), ("torch", "auto-lm", 3, False),
    ("torch", "dlb-contrastive", 3, True), ("numpy", "dlb-contrastive", 3, False)])
def test_the_same_as_the_whole_way(backend: str, rules: str, classes: int, softmax: bool,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = explainer_of(backend, rules=rules, classes=classes, softmax=softmax)
    targets: list[object] = [None, 0, Target(), Target.index(0)]
    targets += [2, [0, 1][1], Target.index([2, 0]), Target.difference(1)] if classes > 1 else []
    contrastive = rules == "dlb-contrastive"
    targets = [target for target in targets if not (contrastive and isinstance(target, Target))]
    explainer(*inputs())
    for number, target in enumerate(targets):
        x, kind = inputs(seed=number)
        for multiplier, scaler in ((100.0, 1.0), (3 if contrastive else -3, 0.3)):
            options = {"target": target, "multiplier": multiplier, "scaler": scaler}
            expected = whole(explainer, x, kind, **options)
            with whole_way(monkeypatch) as calls:
                found = explainer(x, kind, **options)
            assert not calls
            same(found, expected)
            assert found.conservation() == expected.conservation()


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_kind_of_inputs_goes_the_whole_way_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = explainer_of(backend)
    (x, kind), (x3, kind3) = inputs(), inputs(3)
    kinds: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, kind), {}), ((x3, kind3), {}), ((x,), {"kind": kind}), ((), {"x": x, "kind": kind}),
        ((), {"kind": kind, "x": x}), ((x.numpy(), kind.numpy()), {}), ((nn.Parameter(x), kind), {})]
    expected = whole(explainer, x, kind)
    for args, kwargs in kinds:
        for expected_calls in (1, 0):
            with whole_way(monkeypatch) as calls:
                found = explainer(*args, **kwargs)
            assert len(calls) == expected_calls
            if len(found.inputs["x"]) == 2:
                same(found, expected)


def test_the_same_array_twice_does_not_tell_which_input_is_which() -> None:
    class Difference(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - 2 * b

    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 3.0]])
    explainer = dlbc.compile(Difference(), (x, y), rules="epsilon", cache=False)
    for given in ((x, x), (x, x), (x, y), (x, y)):
        np.testing.assert_array_equal(explainer(*given).outputs["output"], given[0] - 2 * given[1])


@pytest.mark.parametrize("rules", ["dlb", "dlb-contrastive"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_models_in_double_precision(backend: str, rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds are single precision in both ways: those of rivals were double, which functions in C read as single."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    x = inputs()[0].double()
    explainer = dlbc.compile(model, x, rules=rules, backend=backend, cache=False)
    expected = explainer(x)
    with whole_way(monkeypatch) as calls:
        found = explainer(x)
    assert not calls
    same(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_are_read_backwards(backend: str) -> None:
    """Torch takes no array of negative strides, and said so itself."""
    explainer = explainer_of(backend)
    x, kind = (value.numpy() for value in inputs(3))
    expected = whole(explainer, x.copy(), kind)
    for _ in range(2):
        found = explainer(x[::-1].copy()[::-1], kind)
        np.testing.assert_array_equal(found.relevance["x"], expected.relevance["x"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    """The targets of none are none; of the second call they could not be told."""
    explainer = own_explainer(backend)
    for _ in range(2):
        found = explainer(*inputs(0))
        assert found.relevance["x"].shape == (0, 6) and len(found.target) == 0


def test_kinds_are_not_remembered_without_end() -> None:
    explainer = explainer_of("torch")
    for batch in range(1, MOST + 3):
        explainer(*inputs(batch))
    assert explainer._straight is not None
    assert len(explainer._straight.patterns) == 2


def test_an_explainer_is_free_when_nobody_has_it() -> None:
    explainer = explainer_of("torch")
    for _ in range(2):
        found = explainer(*inputs())
    there = weakref.ref(explainer)
    gc.disable()
    try:
        del explainer
        assert there() is not None  # the explanation can draw its graph
        del found
        assert there() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [
    {"target": [0, 1]}, {"keep": "all"}, {"memory_budget": "1GB"}, {"target": Target.tensor(np.ones(3))},
    {"target": np.int64(1)}], ids=str)
def test_what_asks_for_more_goes_the_whole_way(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = explainer_of("torch")
    explainer(*inputs())
    with whole_way(monkeypatch) as calls:
        found = explainer(*inputs(), **options)
    assert calls
    same(found, whole(explainer, *inputs(), **options))
    with whole_way(monkeypatch) as calls:
        same(explainer(*inputs()), whole(explainer, *inputs()))
    assert len(calls) == 1  # that of the other explainer


WRONG: list[tuple[str, Callable[[torch.Tensor, torch.Tensor], tuple[tuple[Any, ...], dict[str, Any]]]]] = [
    ("NaN", lambda x, k: ((x.clone().fill_(float("nan")), k), {})),
    ("infinity", lambda x, k: ((x * float("inf"), k), {})),
    ("element type", lambda x, k: ((x.double(), k), {})),
    ("rank", lambda x, k: ((x[0], k), {})),
    ("size", lambda x, k: ((x[:, :5], k), {})),
    ("sizes", lambda x, k: ((x, k[:1]), {})),
    ("missing", lambda x, k: ((x,), {})),
    ("surplus", lambda x, k: ((x, k, k), {})),
    ("unknown", lambda x, k: ((x, k), {"extra": x})),
    ("twice", lambda x, k: ((x, k), {"kind": k})),
    ("no tensor", lambda x, k: ((x.tolist(), k), {})),
    ("target", lambda x, k: ((x, k), {"target": 3})),
    ("negative target", lambda x, k: ((x, k), {"target": -1})),
    ("true", lambda x, k: ((x, k), {"target": True})),
    ("target for each row", lambda x, k: ((x, k), {"target": Target.index([0, 1, 2])})),
    ("position", lambda x, k: ((x, k), {"target": Target.predicted(position=0)})),
    ("multiplier", lambda x, k: ((x, k), {"multiplier": 0})),
    ("infinite multiplier", lambda x, k: ((x, k), {"multiplier": float("inf")})),
    ("scaler", lambda x, k: ((x, k), {"scaler": float("nan")})),
    ("scaler text", lambda x, k: ((x, k), {"scaler": "2"})),
    ("sinks", lambda x, k: ((x, k), {"sinks": "apart"})),
]


@pytest.fixture(scope="module", params=BACKENDS)
def warm(request: pytest.FixtureRequest) -> Explainer:
    explainer = explainer_of(request.param)
    explainer(*inputs())
    return explainer


@pytest.mark.parametrize("wrong", [case for _, case in WRONG], ids=[name for name, _ in WRONG])
def test_errors_are_those_of_the_whole_way(warm: Explainer, wrong: Callable[..., Any]) -> None:
    args, kwargs = wrong(*inputs())
    with pytest.raises(InputError) as expected:
        whole(warm, *args, **kwargs)
    with pytest.raises(InputError) as found:
        warm(*args, **kwargs)
    assert str(found.value) == str(expected.value)
    assert found.value.hint == expected.value.hint


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", ["tensors", "arrays"])
def test_what_is_read_later_is_of_the_call(backend: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, and weights, are changed after the call and before anything of it is read."""
    explainer = own_explainer(backend)
    expected = whole(explainer, *inputs())
    dict(expected.relevance), dict(expected.outputs), dict(expected.inputs), tuple(expected.target)
    explainer(*inputs())
    explainer(*(value.numpy() for value in inputs()))
    x, kind = inputs()
    with whole_way(monkeypatch) as calls:
        found = explainer(x, kind) if given == "tensors" else explainer(x.numpy(), kind.numpy())
    assert not calls
    x.fill_(7.0)
    kind.zero_()
    with torch.no_grad():
        for weight in explainer.model.parameters():
            weight.mul_(-2.0)
    other = explainer(x, kind)
    dict(other.relevance), tuple(other.target)
    same(found, expected)
    with pytest.raises(InputError, match="weights have changed"):
        found.conservation()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_written_over_in_one_explanation_is_in_no_other(backend: str) -> None:
    explainer = explainer_of(backend)
    x, kind = inputs()
    expected = whole(explainer, x, kind)
    for _ in range(2):
        found = explainer(x, kind)
        for arrays in (found.outputs, found.relevance, found.inputs):
            for name in arrays:
                arrays[name][...] = 3
        dict(found.features)["x"] = ("a",)
        assert tuple(found.target) == tuple(expected.target)
    same(explainer(x, kind), expected)
    np.testing.assert_array_equal(x, inputs()[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rules", ["epsilon", "dlb", "gamma"])
def test_weights_changed_in_place_are_seen(backend: str, rules: str) -> None:
    explainer = own_explainer(backend, rules=rules)
    x, kind = inputs()
    first = explainer(x, kind)
    same(explainer(x, kind), first)
    for name in ("first.weight", "second.bias"):  # what is prepared from weights, and what is not
        with torch.no_grad():
            explainer.model.get_parameter(name).mul_(1.5)
        found = explainer(x, kind)
        assert not np.array_equal(found.relevance["x"], first.relevance["x"])
        same(found, whole(dlbc.compile(explainer.model, inputs(), rules=rules, backend=backend, cache=False), x, kind))
    with torch.no_grad():
        explainer.model.first.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"weight `first.weight` holds NaN"):
        explainer(x, kind)


def test_weights_put_in_place_of_others_are_seen() -> None:
    explainer = own_explainer("torch", rules="dlb")
    x, kind = inputs()
    for _ in range(2):
        before = explainer(x, kind)
    explainer.model.first.weight.data = explainer.model.first.weight.data * 2
    found = explainer(x, kind)
    assert not np.array_equal(found.relevance["x"], before.relevance["x"])
    same(found, whole(explainer, x, kind))
    explainer.model.first.weight.data = torch.ones(8, 7)
    with pytest.raises(InputError, match=r"weight `first.weight` is f32\[8, 7\] now"):
        explainer(x, kind)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "numpy"])
def test_weights_that_lie_otherwise_are_seen(backend: str) -> None:
    """`weight.data = weight.data.t()` has the address of the weight before, and no change in place."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(6, 6).eval()
    x = inputs()[0]
    explainer = dlbc.compile(model, x, rules="dlb", backend=backend, cache=False)
    for _ in range(2):
        before = explainer(x)
    model.weight.data = model.weight.data.t()
    found = explainer(x)
    assert not np.array_equal(found.relevance["input"], before.relevance["input"])
    np.testing.assert_array_equal(
        found.relevance["input"],
        dlbc.compile(model, x, rules="dlb", backend=backend, cache=False)(x).relevance["input"])
    model.weight.data = model.weight.data[:, :3]
    with pytest.raises(InputError, match=r"weight `weight` is f32\[6, 3\] now"):
        explainer(x)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_that_are_not_numbers(backend: str) -> None:
    """What overflows in the model is found in the same place by both ways."""
    explainer = explainer_of(backend)
    explainer(*inputs())
    x, kind = inputs()
    for huge in (torch.full_like(x, 3e38), torch.full_like(x, -3e38)):
        same(explainer(huge, kind), whole(explainer, huge, kind))


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_and_loaded(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = explainer_of(backend)
    explainer.save(tmp_path / "model.dlbc", weights=True)
    loaded = dlbc.load(tmp_path / "model.dlbc")
    expected = explainer(*inputs())
    loaded(*inputs())
    with whole_way(monkeypatch) as calls:
        found = loaded(*inputs())
    assert not calls
    np.testing.assert_array_equal(found.relevance["x"], expected.relevance["x"])
    assert found.target == expected.target


def test_explanations_can_be_copied_changed_and_kept(tmp_path: Path) -> None:
    explainer = explainer_of("torch")
    explainer(*inputs())
    found = explainer(*inputs())
    same(copy.copy(found), found)
    assert replace(found, rules="other").rules == "other"
    assert found.with_labels(["a", "b", "c"]).target[0].label in ("a", "b", "c")
    kept = Explanation.load(found.save(tmp_path / "found.safetensors"))
    np.testing.assert_array_equal(kept.relevance["x"], found.relevance["x"])
    assert kept.target == found.target


def test_gradients_are_as_they_were() -> None:
    explainer = explainer_of("torch")
    x, kind = inputs()
    x.requires_grad_()
    explainer(x, kind)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            found = explainer(x, kind)
            assert torch.is_grad_enabled() == enabled
            with pytest.raises(InputError):
                explainer(x * float("nan"), kind)
            assert torch.is_grad_enabled() == enabled
    with torch.inference_mode():
        same(explainer(x, kind), found)
    same(explainer(x, kind), found)
    assert x.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_do_not_meet(backend: str) -> None:
    explainer = explainer_of(backend, rules="dlb")
    given = [inputs(seed=seed) for seed in range(4)]
    expected = [whole(explainer, *each).relevance["x"] for each in given]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            if not np.array_equal(explainer(*given[number]).relevance["x"], expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
