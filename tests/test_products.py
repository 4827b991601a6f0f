"""Which library multiplies float32 matrices, and that it multiplies as torch does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dlbc
from dlbc_runtime import torch_products as products

OWN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
needs_onednn = pytest.mark.skipif(OWN is None, reason="this torch has no product of oneDNN")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What was found out of a processor that a test invented is forgotten."""
    products.onednn.cache_clear()
    yield
    products.onednn.cache_clear()


def processor(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, capability: str = "AVX512") -> None:
    (folder / "cpuinfo").write_text(text)
    monkeypatch.setattr(products, "CPUINFO", folder / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


@needs_onednn
@pytest.mark.parametrize(("text", "capability", "chosen"), [
    ("processor : 0\nvendor_id\t: AuthenticAMD\n", "AVX512", True), ("vendor_id\t: AuthenticAMD\n", "AVX2", False),
    ("vendor_id\t: GenuineIntel\n", "AVX512", False), ("CPU implementer : 0x41\n", "AVX512", False)])
def test_who_multiplies_depends_on_the_processor(text: str, capability: str, chosen: bool, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, tmp_path, text, capability)
    assert (products.onednn() is OWN) == (chosen and torch.backends.mkl.is_available())


def test_a_processor_that_says_nothing_is_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(products, "CPUINFO", tmp_path / "none")
    assert products.vendor() == "" and products.onednn() is None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the rows that oneDNN was given, on any processor."""
    found: list[tuple[int, ...]] = []

    def noted(x: Tensor, *others: object) -> Tensor:
        found.append(tuple(x.shape))
        assert OWN is not None
        result: Tensor = OWN(x, *others)
        return result

    monkeypatch.setattr(products, "onednn", type("Own", (), {
        "__call__": lambda self: noted, "cache_clear": lambda self: None})())
    return found


def close(found: Tensor, wanted: Tensor) -> None:
    """To float32's rounding of sums, by the largest number."""
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert float((found.double() - wanted).abs().max()) <= 3e-6 * float(wanted.abs().max())


@needs_onednn
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(60, 300), st.integers(60, 300),
       st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_products_are_torchs(lead: list[int], inner: int, outer: int, bias: bool, across: bool, turned: bool, seed: int
                             ) -> None:
    """Any rows, matrices that lie either way, rows that do not lie together."""
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(inner, outer, generator=draw).t() if turned else torch.randn(outer, inner, generator=draw)
    x = torch.randn(*lead, inner, 9, generator=draw).transpose(-1, -2)
    x = x if across else x.contiguous()
    b = torch.randn(outer, generator=draw) if bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "WORTH", 0)
        patch.setattr(products, "onednn", lambda: OWN)
        close(products.linear(x, matrix, b), F.linear(x.double(), matrix.double(), None if b is None else b.double()))
        r = torch.randn(*lead, 9, outer, generator=draw)
        close(products.matmul(r, matrix), r.double() @ matrix.double())


@needs_onednn
def test_what_stays_torchs(calls: list[tuple[int, ...]]) -> None:
    """Few rows, small products, other element types, matrices of one number, and who switched oneDNN off."""
    x, matrix = torch.ones(2, 600, 512), torch.ones(512, 512)
    products.linear(x, matrix)
    products.matmul(x, matrix)
    assert calls == [(1200, 512)] * 2
    calls.clear()
    products.linear(x[:1, :3], matrix)
    products.linear(x[..., :8], matrix[:8, :8])
    products.matmul(x.double(), matrix.double())
    products.matmul(x.bfloat16(), matrix.bfloat16())
    products.matmul(x, torch.ones(1).expand(512, 512))
    products.matmul(x[:0], matrix)
    products.linear(x.to("meta"), matrix.to("meta"))
    with torch.backends.mkldnn.flags(enabled=False):
        products.matmul(x, matrix)
    assert not calls


@needs_onednn
@pytest.mark.parametrize("rules", ["input-x-gradient", "dlb"])  # which divide by nothing that may be near 0
def test_explanations_are_the_same(rules: str, calls: list[tuple[int, ...]]) -> None:
    """By both libraries, to rounding; twice by oneDNN, to the bit."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.LayerNorm(256),
                                torch.nn.Linear(256, 128), torch.nn.GELU(), torch.nn.Linear(128, 4)).eval()
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    explainer = dlbc.compile(model, x, rules=rules, cache=False)
    own, again = explainer(x, target=1).relevance["input"], explainer(x, target=1).relevance["input"]
    assert calls
    np.testing.assert_array_equal(own, again)
    with torch.backends.mkldnn.flags(enabled=False):
        plain = explainer(x, target=1).relevance["input"]
    np.testing.assert_allclose(own, plain, rtol=0, atol=1e-5 * np.abs(plain).max())
