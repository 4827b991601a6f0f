"""Run by test_trial.py under pytest in a process of its own, with TRITON_INTERPRET=1: `tune=True` on a machine that
says it has a GPU, whose kernels are interpreted and whose clock is made up.
"""

from __future__ import annotations

import logging
import re
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
from dlbc.backends.triton.blocks import pointwise_blocks, row_blocks
from dlbc.backends.triton.choices import CANDIDATES, MEASURED, Choice, Options, at, bound_of, bounds, legal, measured
from dlbc.backends.triton.config import DEVICES, device
from dlbc.backends.triton.emit import choices
from dlbc.backends.triton.tiles import Product, product_tiles
from dlbc.ir.parser import parse_graph
from dlbc.passes import run as passed
from dlbc.passes.fuse_attention import FuseAttention
from dlbc_runtime import folders, triton_launch
from dlbc_runtime.explainer import Explainer
from tests.triton_attention_runs import graph_of, interpret_with_any_numpy

interpret_with_any_numpy()
assert triton_launch.INTERPRETED, "run by test_trial.py"

X = torch.linspace(-1, 2, 3 * 24).reshape(3, 24)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 20), nn.GELU(), nn.Linear(20, 18)).eval()


class Attending(nn.Module):
    """Kernels of every kind but experts'."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.both, self.out = nn.LayerNorm(16), nn.Linear(16, 3 * 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.both(self.norm(x)).reshape(batch, length, 3, 1, 16).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, 16)).mean(1)
        return out


class Clock:
    """A GPU's clock: a kernel takes as long as `cost` says of its name and options."""

    def __init__(self, cost: Callable[[str, Mapping[str, Any]], float]) -> None:
        self.cost, self.measured = cost, list[tuple[str, Mapping[str, Any]]]()
        self.launched: tuple[str, Mapping[str, Any]] = "", {}

    def time(self, run: Callable[[], None], *, cold: bool) -> Callable[[], float]:
        run()
        name, meta = self.launched
        assert cold == name.startswith("gemm")
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
    folders.say_once.cache_clear()
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Narrow tiles of many warps are the fastest. Few are measured, for kernels are interpreted."""
    found = Clock(lambda name, meta: meta.get("BN", 0) / meta["num_warps"] + meta.get("BM", 0) / 100
                  + meta.get("BLOCK_R", 0) / meta["num_warps"] + meta.get("BLOCK_K", 0) / 10 + meta.get(
                      "num_stages", 0) / 100)
    real = triton_launch.run

    def run(kernel: Any, grid: Any, args: Any, meta: Mapping[str, Any]) -> None:
        found.launched = kernel.__name__, dict(meta)
        real(kernel, grid, args, meta)

    monkeypatch.setattr(triton_launch, "run", run)
    monkeypatch.setattr(tuning, "Events", lambda where: found)
    monkeypatch.setattr("dlbc.backends.triton.choices.CANDIDATES", 3)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tiles were to be measured, each time; the last candidate is found without measuring."""
    found: list[int] = []

    def fastest(self: tuning.Measuring, wanted: Any, *others: Any) -> dict[tuning.Spot, tuple[Options, float]]:
        found.append(len(wanted))
        return {spot: (self.choices[spot[0]].candidates(spot[1])[-1], 1.0) for spot in wanted}

    monkeypatch.setattr(tuning.Measuring, "fastest", fastest)
    monkeypatch.setattr(tuning, "Events", lambda where: None)
    return found


def compiled(tune: bool = True, **options: Any) -> Explainer:
    return dlbc.compile(net(), X, **{"backend": "triton", "rules": "dlb", **options}, tune=tune)


def tables(explainer: Explainer, rows: int = 3) -> dict[str, Mapping[str, Any]]:
    """The tile that each kernel of the default program has for so many rows."""
    module = explainer.program_of(explainer.default).module()
    return {name.removesuffix("_tiles"): triton_launch.chosen(table, rows) for name, table in vars(module).items()
            if name.endswith("_tiles") and isinstance(table, tuple)}


def expected(explainer: Explainer, clock: Clock, bound: int = 16) -> dict[str, Mapping[str, Any]]:
    """The fastest candidates."""
    found = {}
    for name, choice in choices(parse_graph(explainer.ir("fused"))).items():
        found[name] = min(choice.candidates(bound), key=lambda meta, name=name: clock.cost(name, meta))
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
        assert again.plan().notes == (f"tiles of {len(tables(first))} kernels were measured on Some GPU",)
    assert tables(first.with_options(keep="all")) and tables(first.with_options(memory_budget="1 GB")) == tables(first)
    assert tables(compiled(tune=False, cache=False)) == tables(plain)
    np.testing.assert_allclose(first(X).relevance["input"], plain(X).relevance["input"], rtol=1e-5, atol=1e-5)
    assert first(X).conservation().closes()  # by a program that is built later
    cache.clear()
    assert tables(compiled(tune=False)) == tables(plain)


def test_every_kind_of_kernel_is_measured(clock: Clock, monkeypatch: pytest.MonkeyPatch,
                                          caplog: pytest.LogCaptureFixture) -> None:
    """The fastest by the clock wins, is kept, and is code again; explanations stay what they are."""
    monkeypatch.setattr("dlbc.backends.triton.choices.CANDIDATES", 4)
    clock.cost = lambda name, meta: meta["num_warps"] - sum(meta.get(part, 0) for part in ("BM", "BN", "BK")) / 1000 + (
        meta.get("BLOCK_R", 0) + meta.get("BLOCK_K", 0))
    torch.manual_seed(0)
    model, x = Attending().eval(), torch.randn(1, 5, 16)
    plain, first, again = (dlbc.compile(model, x, backend="triton", rules="attnlrp", tune=tune, cache=cache)
                           for tune, cache in ((False, False), (True, True), (False, True)))
    own, found = tables(plain, 5), tables(first, 5)
    assert {name.split("_")[0] for name in found} == {"gemm", "row", "elementwise", "attention"}
    assert {name.rpartition("_")[2] for name in found if name.startswith("attention")} == {"rows", "keys"}
    assert found == expected(plain, clock) == tables(again, 5) and again.source == first.source != plain.source
    for kind in ("gemm", "row", "elementwise", "attention"):
        assert any(found[name] != tile for name, tile in own.items() if name.startswith(kind)), kind
    assert all(found[name].keys() == tile.keys() for name, tile in own.items())
    assert all(found[name]["BN"] == tile["BN"] for name, tile in own.items() if name.startswith("row"))
    assert {name for name, _ in clock.measured} == set(found) and not caplog.records
    np.testing.assert_allclose(again(x).relevance["x"], plain(x).relevance["x"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [1, 4, 7])
def test_other_tiles_compute_the_same(number: int) -> None:
    """Candidates of all kernels together, of sizes that no tile divides."""
    torch.manual_seed(0)
    model, x = Attending().eval(), torch.randn(2, 37, 16)
    plain = dlbc.compile(model, x, backend="triton", rules="attnlrp", cache=False)
    found = {name: {str(bound): measured(name, choice.candidates(bound)[number]) for bound in bounds()
                    if len(choice.candidates(bound)) > number}
             for name, choice in choices(parse_graph(plain.ir("fused"))).items()}
    assert any(found[name] for name in found if name.startswith("attention"))
    other = tuning.with_tiles(plain, {tuning.key_of(plain.source, name): own for name, own in found.items()}, "here")
    assert other.source != plain.source
    np.testing.assert_allclose(other(x).relevance["x"], plain(x).relevance["x"], rtol=1e-5, atol=1e-6)


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
    plain = compiled(tune=False, cache=False)
    compiled()
    assert len(asked) == 3
    found = dlbc.compile(net(), X.repeat(7, 1), backend="triton", rules="dlb", tune=True)  # other numbers of rows
    assert len(asked) == 4
    for name, choice in choices(parse_graph(plain.ir("fused"))).items():
        assert [tables(found, rows)[name] for rows in (3, 21)] == [choice.candidates(b)[-1] for b in (16, 32)]


def test_what_does_not_compile_is_left(clock: Clock, monkeypatch: pytest.MonkeyPatch,
                                       caplog: pytest.LogCaptureFixture) -> None:
    real, plain = triton_launch.run, compiled(tune=False)
    own = tables(plain)
    fastest = {name: tile for name, tile in expected(plain, clock).items() if tile != own[name]}

    def run(kernel: Any, grid: Any, args: Any, meta: Mapping[str, Any]) -> None:
        if kernel.__name__ in fastest and fastest[kernel.__name__].items() <= meta.items():
            raise triton_launch.KernelError("too large") from ValueError("out of resource")
        real(kernel, grid, args, meta)

    monkeypatch.setattr(triton_launch, "run", run)
    with caplog.at_level(logging.WARNING):
        found = tables(compiled())
    assert not caplog.records and not triton_launch._failed
    assert fastest and all(found[name] != tile for name, tile in fastest.items())


def test_what_changes_the_numbers_is_left(clock: Clock, monkeypatch: pytest.MonkeyPatch,
                                          caplog: pytest.LogCaptureFixture) -> None:
    real, own = triton_launch.run, tables(compiled(tune=False))

    def run(kernel: Any, grid: Any, args: Any, meta: Mapping[str, Any]) -> None:
        real(kernel, grid, args, meta)
        if kernel.__name__ in own and not own[kernel.__name__].items() <= meta.items():
            next(arg for arg in reversed(args) if isinstance(arg, torch.Tensor)).fill_(float("nan"))  # the last result

    monkeypatch.setattr(triton_launch, "run", run)
    with caplog.at_level(logging.WARNING):
        found = tables(compiled())
    assert found == own and "change the numbers: they are left" in caplog.text


def test_what_changes_the_numbers_is_left_alone(clock: Clock, monkeypatch: pytest.MonkeyPatch,
                                                caplog: pytest.LogCaptureFixture) -> None:
    """Other kernels get the candidates of that round."""
    plain = compiled(tune=False)
    real, own, fastest = triton_launch.run, tables(plain), expected(plain, clock)
    odd = next(name for name in own if fastest[name] != own[name])

    def run(kernel: Any, grid: Any, args: Any, meta: Mapping[str, Any]) -> None:
        real(kernel, grid, args, meta)
        if kernel.__name__ == odd and fastest[odd].items() <= meta.items():
            next(arg for arg in reversed(args) if isinstance(arg, torch.Tensor)).mul_(1.5)

    monkeypatch.setattr(triton_launch, "run", run)
    with caplog.at_level(logging.WARNING):
        found = tables(compiled())
    assert f"of {odd} ({type(net()).__name__}) change the numbers" in caplog.text
    assert found[odd] != fastest[odd] and {**found, odd: fastest[odd]} == fastest


def test_a_candidate_hidden_by_another_that_does_not_compile_is_tried_too(
        clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the program of queries does not compile, torch's ops replace the one of keys too: that is tried again
    without it before it is measured."""
    torch.manual_seed(0)
    model, x, real = Attending().eval(), torch.randn(1, 5, 16), triton_launch.run
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    monkeypatch.setattr("dlbc.backends.triton.choices.CANDIDATES", 2)
    clock.cost = lambda name, meta: -float(len(clock.measured))
    plain = dlbc.compile(model, x, backend="triton", rules="attnlrp", cache=False)
    own = tables(plain, 5)

    def run(kernel: Any, grid: Any, args: Any, meta: Mapping[str, Any]) -> None:
        name = kernel.__name__
        if name.endswith("_rows") and not own[name].items() <= meta.items():
            raise triton_launch.KernelError("too large") from ValueError("out of resource")
        real(kernel, grid, args, meta)
        if name.endswith("_keys") and not own[name].items() <= meta.items():
            next(arg for arg in reversed(args) if isinstance(arg, torch.Tensor)).mul_(1.5)

    monkeypatch.setattr(triton_launch, "run", run)
    tuned = dlbc.compile(model, x, backend="triton", rules="attnlrp", tune=True, cache=False)
    assert {name: tile for name, tile in tables(tuned, 5).items() if name.startswith("attention")} == {
        name: tile for name, tile in own.items() if name.startswith("attention")}


@pytest.mark.parametrize("number", ["3", "64", "4.0", "true", '"__import__"', '4, "more": 1'])
def test_notes_that_are_no_tiles_are_left(number: str, cache_dir: Path, asked: list[int]) -> None:
    """They would become code; what they are of is measured again."""
    plain = compiled(tune=False)
    compiled()
    (note,) = cache_dir.glob(f"*.tiles{cache.NOTE}")
    note.write_text(re.sub(r'("num_warps": )\d+', rf"\g<1>{number}", note.read_text()))
    assert tables(compiled(tune=False)) == tables(plain)
    again = compiled()
    assert len(asked) == 2 and asked[0] == asked[1] and tables(again) != tables(plain)


def test_what_is_legal_for_a_kind() -> None:
    for kind, limits in MEASURED.items():
        least, most = ({part: pair[end] for part, pair in limits.items()} for end in (0, 1))
        assert legal(f"{kind}_0", least) and legal(f"{kind}_0_rows", most)
        for part in limits:
            assert not legal(f"{kind}_0", {**least, part: least[part] - 1})
            assert not legal(f"{kind}_0", {**most, part: most[part] + 1})
            assert not legal(f"{kind}_0", {key: n for key, n in least.items() if key != part})
            assert legal(f"{kind}_0", {**most, part: 3}) == (part == "num_stages")
    assert not legal("fft_0", {"num_warps": 4}) and not legal("row_0", [1, 4]) and not legal("row_0", None)


def test_it_comes_after_a_trial(asked: list[int]) -> None:
    explainer = compiled(backend="auto")
    tried, measured = explainer.plan().notes
    assert "kernels were tried" in tried and "were measured on Some GPU" in measured


def found_for(name: str, choice: Choice) -> list[Options]:
    """All candidates of a kernel, of which each is legal and the first of each size is the one that it would have."""
    every: list[Options] = []
    for bound in bounds():
        found = choice.candidates(bound)
        assert 1 <= len(found) <= CANDIDATES and all(tile not in found[:i] for i, tile in enumerate(found))
        assert found[0] == at(choice.table, bound)
        assert all(legal(name, measured(name, tile)) and tile.keys() == found[0].keys() for tile in found)
        every += [tile for tile in found if tile not in every]
    return every


@pytest.mark.parametrize("name", DEVICES)
def test_a_product_s_tiles_are_legal_where_it_looks_for_no_end(name: str) -> None:
    """All candidates divide what the kernel's own tiles divide."""
    for columns, depth, size, cores in ((64, 64, 2, True), (3072, 128, 2, True), (48, 80, 4, False),
                                        (1000, 768, 2, True), (32, 16, 4, False)):
        choice = product_tiles(device(name), Product(columns, depth, 2, 2, size, size, cores,
                                                     held=0.0 if cores else 1.0))
        every = found_for("gemm_0", choice)
        for part, whole in (("BN", columns), ("BK", depth)):
            if all(whole % int(tile[part]) == 0 for _, tile in choice.table):
                assert all(whole % int(tile[part]) == 0 for tile in every)


@pytest.mark.parametrize("name", DEVICES)
def test_blocks_hold_what_their_kernel_does(name: str) -> None:
    """Whole rows, or columns that have an end where the kernel looks for one."""
    for single in (False, True):
        for length in (1, 3, 64, 100, 768, 3072, 16384):
            every = found_for("row_0", row_blocks(device(name), length, single=single))
            assert {tile["BN"] for tile in every} == {1 << (length - 1).bit_length()}
            assert not single or {tile["BM"] for tile in every} == {1}
            assert len(every) > 1 or length < (256 if single else 3)
        for width in (None, 1, 3, 64, 200, 256, 300, 768, 3072, 4096):
            own = pointwise_blocks(device(name), width, single=single)
            columns = int(own.table[0][1]["BN"])
            every = found_for("elementwise_0", own)
            assert len(every) > 1 or (single and width is not None and width < 256)
            if width is not None and width <= columns:
                assert {tile["BN"] for tile in every} == {columns}
            elif width is not None and width % columns == 0:
                assert all(width % int(tile["BN"]) == 0 for tile in every)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("rule", "dtype", "width"), [
    ("dlb", "bf16", 128), ("attnlrp", "f32", 64), ("dlb", "f16", 200)])
def test_attention_s_tiles_hold_no_more_than_their_own(name: str, rule: str, dtype: str, width: int) -> None:
    graph = graph_of({"case": "self_causal", "rule": rule, "sizes": [], "seeds": 1, "dtype": dtype, "width": width})
    found = choices(passed(graph, [FuseAttention(forward=True)]).with_attrs(target=f"triton:{name}"))
    assert len(found) >= 3
    for kernel, choice in found.items():
        every, own = found_for(kernel, choice), choice.table[0][1]
        assert len(every) > 1 or device(name).shared < 100_000
        assert {tile["PRECISION"] for tile in every} == {own["PRECISION"]}
        assert all(threads(tile, width) <= threads(own, width) for tile in every)
        assert at(choice.table, bound_of(100)) == own


def threads(tile: Options, width: int) -> float:
    """What a warp holds: of scores, of one value of rows and of one of keys."""
    rows, keys = int(tile["BLOCK_R"]), int(tile["BLOCK_K"])
    return (rows * keys + (rows + keys) * (1 << (width - 1).bit_length())) / int(tile["num_warps"])
