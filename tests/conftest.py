"""What every test runs under: one thread, all verification on, no network, its own cache."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Set before anything imports torch or numpy, and inherited by every process a test starts.
os.environ.update({
    "DLBC_DEBUG": "1",  # verify the IR after every pass
    "OMP_NUM_THREADS": "1",  # torch and MKL; the tests themselves run side by side
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "agg",
})

# `derandomize` makes a failure on a build machine the same failure everywhere.
settings.register_profile("dlbc", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("dlbc")

_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def _cache_of_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fixtures that live longer than a test compile into a cache of this session, never the user's."""
    os.environ["DLBC_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def unpacked_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models that come as GGUF are unpacked: once for a session, since one takes 20 seconds."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def cache_dir(_cache_of_session: None, unpacked_models: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The compile cache of this test (DLBC_CACHE_DIR): empty, and not there until something writes it.

    A test marked `real` finds the models in it that were unpacked for others.
    """
    session = os.environ["DLBC_CACHE_DIR"]
    fresh = Path(session) / f"test-{next(_numbers)}"
    if request.node.get_closest_marker("real"):
        fresh.mkdir()
        (fresh / "models").symlink_to(unpacked_models, target_is_directory=True)
    os.environ["DLBC_CACHE_DIR"] = str(fresh)
    yield fresh
    os.environ["DLBC_CACHE_DIR"] = session


def _model(item: pytest.Item) -> str:
    """The zoo model that a test of test_models.py or test_model_laws.py is about."""
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("name", "")) if callspec else ""


def pytest_configure(config: pytest.Config) -> None:
    """The marker of pytest-xdist, for environments without it, such as the peers'."""
    config.addinivalue_line("markers", "xdist_group(name): these tests run in one worker, where there are several")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one model run together, since exporting it is the dear part, and so do those of trained models, since
    unpacking them is; `gpu` tests need a CUDA device."""
    models = [item for item in items if item.path.name in ("test_models.py", "test_model_laws.py")]
    order = {name: number for number, name in enumerate(dict.fromkeys(map(_model, models)))}
    items[:] = sorted(models, key=lambda item: order[_model(item)]) + [i for i in items if i not in set(models)]
    for item in models:
        item.add_marker(pytest.mark.xdist_group(_model(item)))
    for item in items[len(models):]:
        if item.get_closest_marker("real"):
            item.add_marker(pytest.mark.xdist_group("real"))
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: not checked on this machine"))
