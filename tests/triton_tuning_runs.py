"""Run by test_trial.py under pytest in a process of its own, with TRITON_INTERPRET=1: `tune=True` on a machine that
says it has a GPU, whose kernels are interpreted and whose clock is made up.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dlbc
from dlbc import cache, gpu, tuning
from dlbc.backends.triton.config import device
from dlbc.backends.triton.emit import products
from dlbc.backends.triton.tiles import Tile, candidates
from dlbc.ir.parser import parse_graph
from dlbc_runtime import triton_launch
from dlbc_runtime.explainer import Explainer
from tests.triton_attention_runs import interpret_with_any_numpy

interpret_with_any_numpy()
assert triton_launch.INTERPRETED, "run by test_trial.py"

X = torch.linspace(-1, 2, 3 * 24).reshape(3, 24)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 20), nn.GELU(), nn.Linear(20, 18)).eval()


class Clock:
    """A GPU's clock: a kernel takes as long as `cost` says of its name and options."""

    def __init__(self, cost: Callable[[str, Mapping[str, Any]], float]) -> None:
        self.cost, self.measured = cost, list[tuple[str, Mapping[str, Any]]]()
        self.launched: tuple[str, Mapping[str, Any]] = "", {}

    def time(self, run: Callable[[], None]) -> Callable[[], float]:
        run()
        name, meta = self.launched
        self.measured.append((name, meta))
        noise = 100.0 if len(self.measured) % 13 == 0 else 0.0
        return lambda: self.cost(name, meta) + noise


@pytest.fixture(autouse=True)
def facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A GPU of which the rest of dlbc knows what is said here."""
    found = {"gpu": "Some GPU", "driver": "1", "triton": "3"}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpu, "devices_of", lambda model: [torch.device("cuda", 0)])
    monkeypatch.setattr(gpu, "supported", lambda where: "sm_90")
    monkeypatch.setattr(gpu, "facts", lambda where: dict(found))
    monkeypatch.setattr(gpu, "usable", lambda where: True)
    monkeypatch.setattr(triton_launch, "_failed", set())
    monkeypatch.setattr(tuning, "ROUNDS", 3)
    cache._say_once.cache_clear()
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Narrow tiles of many warps are the fastest."""
    found = Clock(lambda name, meta: meta["BN"] / meta["num_warps"] + meta["BM"] / 100)
    real = triton_launch.run

    def run(kernel: Any, grid: Any, args: Any, meta: Mapping[str, Any]) -> None:
        found.launched = kernel.__name__, dict(meta)
        real(kernel, grid, args, meta)

    monkeypatch.setattr(triton_launch, "run", run)
    monkeypatch.setattr(tuning, "Events", lambda where: found)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tiles were to be measured, each time; the narrowest is found without measuring."""
    found: list[int] = []

    def fastest(self: tuning.Measuring, wanted: Any, *others: Any) -> dict[tuning.Spot, tuple[Tile, float]]:
        found.append(len(wanted))
        return {spot: (Tile(16, 32, 16, 4, 1), 1.0) for spot in wanted}

    monkeypatch.setattr(tuning.Measuring, "fastest", fastest)
    monkeypatch.setattr(tuning, "Events", lambda where: None)
    return found


def compiled(tune: bool = True, **options: Any) -> Explainer:
    return dlbc.compile(net(), X, **{"backend": "triton", "rules": "dlb", **options}, tune=tune)


def tables(explainer: Explainer, rows: int = 3) -> dict[str, Mapping[str, Any]]:
    """The tile that each product of the default program has for so many rows."""
    module = explainer.program_of(explainer.default).module()
    return {name.removesuffix("_tiles"): triton_launch.chosen(table, rows) for name, table in vars(module).items()
            if name.endswith("_tiles")}


def expected(explainer: Explainer, clock: Clock, bound: int = 16) -> dict[str, Mapping[str, Any]]:
    """The fastest candidates."""
    found = {}
    for name, what in products(parse_graph(explainer.ir("fused"))).items():
        options = [eval(tile.options()) for tile in candidates(device("sm_90"), what, bound)]
        found[name] = min(options, key=lambda meta, name=name: clock.cost(name, meta))
    return found


def test_the_fastest_tiles_are_found_kept_and_used(clock: Clock, cache_dir: Path) -> None:
    plain = compiled(tune=False)
    first = compiled()
    count = len(clock.measured)
    assert tables(first) == expected(plain, clock) != tables(plain)
    assert all(tables(first, rows) == tables(plain, rows) for rows in (17, 5000))  # what was not measured
    assert count >= tuning.ROUNDS * 3 * len(tables(first))
    for again in (compiled(), compiled(tune=False)):
        assert tables(again) == tables(first) and len(clock.measured) == count
        assert again.plan().notes == (f"tiles of {len(tables(first))} products were measured on Some GPU",)
    assert tables(first.with_options(keep="all")) and tables(first.with_options(memory_budget="1 GB")) == tables(first)
    assert tables(compiled(tune=False, cache=False)) == tables(plain)
    np.testing.assert_allclose(first(X).relevance["input"], plain(X).relevance["input"], rtol=1e-5, atol=1e-5)
    assert first(X).conservation().closes()  # by a program that is built later
    cache.clear()
    assert tables(compiled(tune=False)) == tables(plain)


def test_loaded_explainers_have_them_too(asked: list[int], tmp_path: Path) -> None:
    tuned = compiled()
    tuned.save(tmp_path / "x.dlbc")
    loaded = dlbc.load(tmp_path / "x.dlbc", net())
    assert tables(loaded) == tables(tuned) and loaded.plan().notes == tuned.plan().notes
    assert loaded.source == tuned.source
    cache.clear()
    assert tables(dlbc.load(tmp_path / "x.dlbc", net())) != tables(tuned)


def test_another_machine_measures_again(facts: dict[str, str], asked: list[int]) -> None:
    for changed in ("driver", "gpu", "triton"):  # a driver is none: kernels are compiled by what Triton brings
        compiled()
        facts[changed] = "another"
    compiled()
    assert len(asked) == 3
    found = dlbc.compile(net(), X.repeat(7, 1), backend="triton", rules="dlb", tune=True)  # other numbers of rows
    assert len(asked) == 4 and {tile["BK"] for rows in (3, 21) for tile in tables(found, rows).values()} == {16}


def test_what_does_not_compile_is_left(clock: Clock, monkeypatch: pytest.MonkeyPatch,
                                       caplog: pytest.LogCaptureFixture) -> None:
    real, plain = triton_launch.run, compiled(tune=False)
    fastest = expected(plain, clock)

    def run(kernel: Any, grid: Any, args: Any, meta: Mapping[str, Any]) -> None:
        if kernel.__name__ in fastest and fastest[kernel.__name__].items() <= meta.items():
            raise triton_launch.KernelError("too large") from ValueError("out of resource")
        real(kernel, grid, args, meta)

    monkeypatch.setattr(triton_launch, "run", run)
    with caplog.at_level(logging.WARNING):
        found = tables(compiled())
    assert not caplog.records and not triton_launch._failed
    assert all(found[name] != tile for name, tile in fastest.items() if tile != tables(plain)[name])


def test_what_changes_the_numbers_is_left(clock: Clock, monkeypatch: pytest.MonkeyPatch,
                                          caplog: pytest.LogCaptureFixture) -> None:
    real, own = triton_launch.run, tables(compiled(tune=False))

    def run(kernel: Any, grid: Any, args: Any, meta: Mapping[str, Any]) -> None:
        real(kernel, grid, args, meta)
        if kernel.__name__ in own and not own[kernel.__name__].items() <= meta.items():
            next(arg for arg in reversed(args) if isinstance(arg, torch.Tensor)).mul_(1.5)  # the last result

    monkeypatch.setattr(triton_launch, "run", run)
    with caplog.at_level(logging.WARNING):
        found = tables(compiled())
    assert found == own and "change the numbers: they are left" in caplog.text


def test_notes_that_are_no_tiles_are_left(cache_dir: Path, asked: list[int]) -> None:
    """They would become code."""
    plain = compiled(tune=False)
    compiled()
    (note,) = cache_dir.glob(f"*.tiles{cache.NOTE}")
    note.write_text(note.read_text().replace('"rows": ', '"rows": 1e3, "more": '))
    assert tables(compiled(tune=False)) == tables(plain)


def test_it_comes_after_a_trial(asked: list[int]) -> None:
    explainer = compiled(backend="auto")
    tried, measured = explainer.plan().notes
    assert "kernels were tried" in tried and "were measured on Some GPU" in measured


def test_a_tile_is_legal_where_the_kernel_looks_for_no_end() -> None:
    """All candidates divide what the kernel's own tiles divide, and the first is the one that it would have."""
    from dlbc.backends.triton.tiles import BOUNDS, Product, tiles

    for name in ("sm_80", "sm_86", "sm_89", "sm_90"):
        for columns, depth, size, cores in ((64, 64, 2, True), (3072, 128, 2, True), (48, 80, 4, False),
                                            (1000, 768, 2, True), (32, 16, 4, False)):
            what = Product(columns, depth, 2, 2, size, size, cores, held=0.0 if cores else 1.0)
            own = tiles(device(name), what)
            for bound in (*BOUNDS[:-1], None):
                found = candidates(device(name), what, bound)
                assert 1 <= len(found) <= 8 and len(set(found)) == len(found)
                assert found[0] == next(tile for most, tile in own if most is None or (bound and bound <= most))
                for part, whole in (("columns", columns), ("depth", depth)):
                    if all(whole % getattr(tile, part) == 0 for _, tile in own):
                        assert all(whole % getattr(tile, part) == 0 for tile in found)


def test_tiles_are_tiles() -> None:
    assert tuning._LEGAL.keys() == Tile(1, 1, 1, 1, 1).__dict__.keys()
