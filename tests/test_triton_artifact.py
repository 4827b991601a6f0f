"""Compiled kernels in saved explainers: all that a GPU would ask for is there, and what does not fit is not used.

No GPU is needed: Triton is told that there is one of an architecture, asked to make kernels ready, and watched for
whether it compiles. Nothing is launched.
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dlbc
import dlbc_runtime
from dlbc import tuning
from dlbc.backends.triton.choices import at, measured
from dlbc.backends.triton.emit import choices, emit
from dlbc.backends.triton.record import kernels_of, recorded
from dlbc.compiler import FUSE
from dlbc.errors import ArtifactError, InputError
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_graph
from dlbc.passes import run
from dlbc.passes.fuse_attention import FuseAttention
from dlbc_runtime import triton_store
from dlbc_runtime.artifact import MANIFEST, read
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.program import Program
from tests.test_triton_grouped import fused, layer
from tests.triton_attention_runs import graph_of

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="nothing is compiled")

MODEL = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32)).eval().requires_grad_(False)
X = torch.linspace(-1, 1, 2 * 5 * 64).reshape(2, 5, 64)


@dataclass
class Gpu:
    """A driver of a GPU that is not there, and what Triton did when it was asked for kernels."""

    arch: int
    compiled: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def heard(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        (self.found if cache_hit else self.compiled).append(src.name)

    def ready(self, program: Program, **sizes: int) -> None:
        """Make the kernels of a call with these sizes ready, as Triton's launcher does."""
        from triton.runtime.driver import driver

        before, triton.knobs.compilation.listener = driver._active, self.heard
        driver.set_active(self)  # type: ignore[arg-type]
        try:
            for one in recorded(program, [sizes]):
                one.kernel.warmup(*one.args, grid=one.grid, **one.meta, enable_fp_fusion=True)
        finally:
            driver._active, triton.knobs.compilation.listener = before, None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An explainer with the kernels of its target."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        compiled().save(folder / "x.dlbc", kernels=True)
    yield folder / "x.dlbc"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Triton that has compiled nothing yet, on a machine with a GPU of sm_90."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(triton_store, "present", lambda: {"sm_90"})


def compiled(**options: Any) -> Explainer:
    return dlbc.compile(MODEL, X, rules="dlb", cache=False, **{"backend": "triton", "target": "sm_90", **options})


def program(explainer: Explainer) -> Program:
    return explainer.program_of(explainer.default)


def sizes_of(explainer: Explainer, **sizes: int) -> dict[str, int]:
    """Sizes by name: the inputs' two, and seeds."""
    named = [str(d) for d in explainer.manifest.inputs.tensors[0].shape[:-1]]
    return {**dict(zip(named, (sizes["rows"], sizes["steps"]), strict=True)), "S": sizes["seeds"]}


@pytest.mark.parametrize("loader", ["dlbc", "runtime"])
def test_what_a_gpu_asks_for_is_stored(saved: Path, loader: str) -> None:
    """Of many sizes, small and large: Triton finds every kernel and compiles none."""
    explainer = (dlbc.load(saved, MODEL, trust=True) if loader == "dlbc" else
                 dlbc_runtime.load(saved, trust=True, weights=dict(MODEL.named_parameters())))
    gpu = Gpu(90)
    for rows, steps, seeds in ((1, 1, 1), (2, 37, 5), (1, 128, 1), (32, 512, 3), (1, 7, 64)):
        gpu.ready(program(explainer), **sizes_of(explainer, rows=rows, steps=steps, seeds=seeds))
    assert not gpu.compiled and {name.split("_")[0] for name in gpu.found} >= {"gemm", "elementwise"}


def test_kernels_of_experts_are_stored() -> None:
    """For any number of rows and targets. How rows are routed is no part of a kernel."""
    graph = fused(layer(2, 16, 16, "f16", part="abs"))
    experts = replace(program(compiled()), source=emit(graph), ir={"fused": print_graph(graph)})
    assert triton_store.install(kernels_of([experts], ["sm_90"]), {"sm_90"}) > 10
    gpu = Gpu(90)
    for rows, seeds in ((1, 1), (2, 1), (37, 5), (256, 1), (2000, 3), (6, 64)):
        gpu.ready(experts, N=rows, S=seeds)
    assert not gpu.compiled and {name.split("_")[0] for name in gpu.found} == {"grouped", "elementwise"}


NORM = """
graph @rows(B: 1..64) {target="triton:sm_90"}
weights { @n : f16[100] }
forward(%x : f16[B,100]) {
  %y = rms_norm(%x, @n) : f16[B,100]
  return %y
}"""


@pytest.mark.parametrize("kind", ["model", "row", "attention"])
def test_all_tiles_of_all_kinds_of_kernels_are_stored(kind: str) -> None:
    """Those for small sizes, and those for large ones, where measuring found them to differ."""
    source = program(compiled())
    if kind != "model":
        graph = run(graph_of({"case": "self_causal", "rule": "attnlrp", "sizes": [], "seeds": 1, "dtype": "bf16",
                              "width": 64}), [FuseAttention()]) if kind == "attention" else run(
        parse_graph(NORM), FUSE["triton"])
        graph = graph.with_attrs(target="triton:sm_90")
        source = replace(source, source=emit(graph), ir={"fused": print_graph(graph)})
    found = choices(parse_graph(source.ir["fused"]))
    assert {name.split("_")[0] for name in found} == ({"gemm", "elementwise"} if kind == "model" else {kind})
    last = {name: choice.candidates(16)[-1] for name, choice in found.items()}
    changed = tuning._changed(source, {tuning.key_of(source.source, name): {"16": measured(name, tile)}
                                       for name, tile in last.items()})
    launched = [(one.kernel.__name__, one.meta) for one in recorded(changed)]
    assert {name for name, _ in launched} == set(found)
    for name, choice in found.items():
        for tile in (last[name], at(choice.table, 32), at(choice.table, None)):
            assert any(other == name and tile.items() <= meta.items() for other, meta in launched), (name, tile)


def test_without_trust_no_machine_code_is_taken(saved: Path) -> None:
    explainer, gpu = dlbc.load(saved, MODEL), Gpu(90)
    gpu.ready(program(explainer), **sizes_of(explainer, rows=1, steps=1, seeds=1))
    assert gpu.compiled and not gpu.found


def test_another_gpu_compiles(saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Kernels of one architecture are not put where another would look, and it would not find them there."""
    monkeypatch.setattr(triton_store, "present", lambda: {"sm_80"})
    with caplog.at_level(logging.INFO, "dlbc_runtime"):
        explainer = dlbc.load(saved, MODEL, trust=True)
    assert "kernels are for sm_90, and the GPUs here are sm_80: none is used" in caplog.text
    triton_store.install(read(saved).kernels, {"sm_90"})
    gpu = Gpu(80)
    gpu.ready(program(explainer), **sizes_of(explainer, rows=1, steps=1, seeds=1))
    assert gpu.compiled and not gpu.found


def test_another_triton_compiles(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    kernels = [replace(kernel, triton="0.1") for kernel in read(saved).kernels]
    with caplog.at_level(logging.INFO, "dlbc_runtime"):
        assert triton_store.install(kernels) == 0
    assert f"kernels by Triton 0.1 are not used by Triton {triton.__version__}" in caplog.text


def test_other_kernels_are_compiled(saved: Path) -> None:
    """Kernels of the same names and types, whose text differs."""
    explainer, gpu = dlbc.load(saved, MODEL, trust=True), Gpu(90)
    changed = replace(program(explainer), source=program(explainer).source.replace("tl.zeros(", "1.0 + tl.zeros("))
    gpu.ready(changed, **sizes_of(explainer, rows=1, steps=1, seeds=1))
    assert any(name.startswith("gemm") for name in gpu.compiled)
    assert not any(name.startswith("gemm") for name in gpu.found)


def test_the_file_can_be_read_without_a_gpu(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source, plan, IR and what is known of the kernels; they are data, and hold no paths of this machine."""
    monkeypatch.setattr(triton_store, "present", set)
    explainer, original = dlbc.load(saved, MODEL, trust=True), compiled()
    assert (explainer.source, explainer.plan(), explainer.ir("fused")) == (
        original.source, original.plan(), original.ir("fused"))
    kernels = read(saved).kernels
    assert {(kernel.arch, kernel.triton) for kernel in kernels} == {("sm_90", triton.__version__)}
    assert all(kernel.cubin[:4] == b"\x7fELF" and f"def {kernel.name}(" in explainer.source for kernel in kernels)
    with zipfile.ZipFile(saved) as archive:
        text = archive.read(MANIFEST).decode()
        assert not any(name.endswith((".pkl", ".so")) for name in archive.namelist())
    assert str(Path(triton.__file__).parent) not in text and str(Path.home()) + "/" not in text


def test_several_architectures_and_programs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU()).eval()
    explainer = dlbc.compile(model, torch.zeros(2, 32), rules="epsilon", backend="triton", target="sm_86", cache=False)
    explainer.save(tmp_path / "x.dlbc", kernels=("sm_86", "sm_89"))
    assert {kernel.arch for kernel in read(tmp_path / "x.dlbc").kernels} == {"sm_86", "sm_89"}


@pytest.mark.parametrize(("kernels", "said"), [
    (("sm_70",), "kernels cannot be written for `sm_70`"), ("gfx942", "kernels for gfx942 are not stored")])
def test_architectures_that_cannot_be_named(kernels: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        compiled().save(tmp_path / "x.dlbc", kernels=kernels)
    assert not (tmp_path / "x.dlbc").exists()


def test_a_kernel_too_large_for_an_architecture_is_named() -> None:
    launches = recorded(program(compiled()))
    with pytest.raises(InputError, match=r"kernel gemm_\w+ takes [\d,]+ bytes of shared memory, sm_90 has 1,024"):
        triton_store.compile_all([one for one in launches if one.kernel.__name__.startswith("gemm")], "sm_90", 1024)


def test_what_has_no_kernels(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no kernels to store"):
        compiled(backend="torch", target=None).save(tmp_path / "x.dlbc", kernels=True)
    alone = dlbc_runtime.load(saved, trust=True, weights=dict(MODEL.named_parameters()))
    with pytest.raises(ArtifactError, match="without the compiler"):
        alone.save(tmp_path / "x.dlbc", kernels=True)


@pytest.mark.parametrize("change", [{"name": "../x"}, {"arch": "sm_90/.."}, {"hash": "0" * 63}, {"metadata": []}])
def test_a_file_whose_kernels_are_not_plain_is_refused(saved: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    with zipfile.ZipFile(saved) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(entries[MANIFEST])
    manifest["kernels"][0] |= change
    with zipfile.ZipFile(tmp_path / "x.dlbc", "w") as archive:
        for name, content in {**entries, MANIFEST: json.dumps(manifest).encode()}.items():
            archive.writestr(name, content)
    with pytest.raises(ArtifactError, match="damaged"):
        read(tmp_path / "x.dlbc")


def test_a_program_that_runs_on_no_tensors_without_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("needs numbers")

    explainer = compiled()
    monkeypatch.setattr("dlbc.backends.triton.record._launches", failing)
    with pytest.raises(InputError, match="kernels cannot be found without running the model: needs numbers"):
        explainer.kernels()
