"""What is counted without a GPU: exact where it can be known by hand, current in the docs, and within what we want."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dlbc

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytest.importorskip("triton")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def predicted() -> Any:
    """The benchmark's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import predicted as module

        yield module
    for name in ("predicted", "_cases", "_eager", "_floors", "_gpu_models", "_measure", "_program"):
        sys.modules.pop(name, None)


def test_the_table_is_what_was_counted(predicted: Any) -> None:
    text = predicted.PAGE.read_text(encoding="utf-8")
    assert predicted.page(text, predicted.kept("predicted")) == text, "run `python benchmarks/predicted.py`"


def test_what_was_counted_is_current(predicted: Any) -> None:
    """One case that is quick to compile; small changes of kernels may come and go."""
    case = next(case for case in predicted.CASES if case.model == "BERT-base")
    kept = next(row for row in predicted.kept("predicted")["rows"] if row["case"] == case.name)
    found = predicted.row_of(case)
    for name in ("memory, GB", "forward + gradient, GB", "moved, GB", "products, ms", "launches", "floor, ms"):
        assert found[name] == pytest.approx(kept[name], rel=0.05), "run `python benchmarks/predicted.py`"


def test_memory_is_within_a_tenth_of_forward_and_gradient(predicted: Any) -> None:
    rows = [row for row in predicted.kept("predicted")["rows"] if row["targets"] == 1]
    assert len(rows) >= 10
    for row in rows:
        assert row["memory, GB"] <= 1.1 * row["forward + gradient, GB"], row["case"]
        assert row["memory, GB"] + row["weights, GB"] < 40


def test_steps_of_a_product_are_known_by_hand(predicted: Any) -> None:
    """x W^T with epsilon: forward, relevance divided by the output, and the product back."""
    with torch.device("meta"):
        model = nn.Linear(256, 128, bias=False).eval()
    explainer = dlbc.compile(model, torch.zeros(2, 256, device="meta"), rules="epsilon", backend="triton",
                             target="sm_90", cache=False)
    rows = 64
    floors = sys.modules["_floors"]
    found = predicted.steps_of(explainer, explainer.memory(sizes={"B": rows}, target=[0, 1, 2]).sizes)
    products = [step for step in found if step.products]
    x, w, y = 4 * rows * 256, 4 * 256 * 128, 4 * rows * 128
    assert products[0].bytes == x + w + y
    assert products[0].products == pytest.approx(2 * rows * 256 * 128 / floors.RATES["float32"])
    assert sum(step.launches for step in found) == len(found) <= 8
    whole = predicted.Total.of(found)
    assert whole.seconds >= max(whole.bytes / floors.BANDWIDTH, whole.products)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_is_known_by_hand(predicted: Any, dtype: torch.dtype) -> None:
    """Two layers and an activation: what autograd keeps, and what each op reads and writes."""
    rows, wide, size = 32, 64, torch.empty((), dtype=dtype).element_size()
    with torch.device("meta"):
        first, second = (nn.Linear(wide, wide, bias=False, dtype=dtype).requires_grad_(False) for _ in range(2))
        x = torch.zeros(rows, wide, dtype=dtype).requires_grad_(True)
        given = torch.zeros(rows, wide, dtype=dtype)
    tally = predicted.counted(lambda: second(torch.sigmoid(first(x))).backward(given))
    one = rows * wide * size
    assert [step.bytes for step in tally.steps if step.products] == [2 * one + wide * wide * size] * 4
    pointwise = [step for step in tally.steps if "sigmoid" in step.op]
    assert [step.bytes for step in pointwise] == [2 * one, 3 * one]
    assert tally.peak == 4 * one  # the output, sigmoid's result, and a gradient before and after it


def test_the_meta_device_counts_what_a_cpu_does(predicted: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(5)).eval()
    x = torch.zeros(2, 3, 12, 12)
    model(x)
    real = predicted.counted(predicted.gradient_of_vectors(model, x), meta=False)
    assert real.peak > 2 * 8 * 10 * 10 * 4
    meta = predicted.counted(predicted.gradient_of_vectors(model.to("meta"), x.to("meta")))
    assert meta.peak == pytest.approx(real.peak, rel=0.05)
    assert predicted.Total.of(meta.steps).products == pytest.approx(predicted.Total.of(real.steps).products, rel=1e-6)


def test_attention_is_one_op_that_keeps_no_scores(predicted: Any) -> None:
    q, k, v = (torch.zeros(2, 4, 256, 16, device="meta").requires_grad_(True) for _ in range(3))

    def run() -> None:
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    tally = predicted.counted(run)
    assert tally.peak < 4 * 2 * 4 * 256 * 256
    attended = [step for step in tally.steps if "attention" in step.op]
    rate = sys.modules["_floors"].RATES["float32"]
    assert [step.products * rate for step in attended] == [2 * 2 * 4 * 256 * 256 * 16, 5 * 2 * 4 * 256 * 256 * 16]
