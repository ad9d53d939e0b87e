"""What every test relies on: no network, one torch thread in each parallel worker, repeatable examples, GPU tests only on a GPU."""

import functools
import gc
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; the processes that a test starts inherit this
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

from tests.once import captured_once, capturing_once, differentiated_once

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# HYPOTHESIS_PROFILE=thorough searches longer and anew in every run; "ci", the default, tries the same few examples each time.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_finish() -> None:
    """What the imports have made stays: the collector, which runs often while graphs are built, need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    """Or libraries report at the exit what nobody has collected."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def derivative() -> Iterator[Callable[..., Any]]:
    """`differentiate` that does a body once in a worker, for whatever tests compile it."""
    with differentiated_once() as template:
        yield template


@pytest.fixture(scope="session")
def captured() -> Callable[..., Any]:
    """`capture` that does backbones of one structure once in a worker."""
    return capturing_once()


@pytest.fixture(scope="module")
def one_capture(captured: Callable[..., Any]) -> Iterator[None]:
    """For files that compile backbones of few structures many times."""
    with captured_once(captured):
        yield


DEVICE_PRODUCTS = (
    "tile_mm", "tile_outer", "drop", "linears", "linears_backward", "prefix_join", "prefix_queries", "prefix_tables"
)  # fmt: skip


@contextmanager
def _interpreter() -> Iterator[None]:
    """Kernel text that is loaded within runs on CPU tensors, by Triton's interpreter; nothing of it is left outside.

    `triton.jit` asks for TRITON_INTERPRET when it decorates. Triton's own library was decorated when it was first imported: here
    always natively, and it is replaced within. What is loaded within is kept apart from what is loaded natively.
    """
    from codegen.kernels import build

    patches, loaded = _interpreted_library()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module, name, function in patches:
            patch.setattr(module, name, function)
        patch.setattr(build, "_LOADED", loaded)
        yield


@functools.cache
def _interpreted_library() -> tuple[list[tuple[Any, str, Any]], dict[str, Any]]:
    """Triton's own functions for its interpreter, and the kernels that were loaded for it so far."""
    assert not os.environ.get("TRITON_INTERPRET"), "the tests set TRITON_INTERPRET where they need it"
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    modules = [importlib.import_module(f"triton.language{name}") for name in ("", ".standard", ".random")]
    # A function has one counterpart, under whatever names.
    counterpart = functools.cache(lambda function: InterpretedFunction(function.fn))
    patches = [
        (module, name, counterpart(function))
        for module in modules
        for name, function in vars(module).items()
        if isinstance(function, JITFunction)
    ]
    return patches, {}


@pytest.fixture(scope="session")
def interpreter() -> Callable[[], AbstractContextManager[None]]:
    """Within `with interpreter():` the device's kernels run on CPU tensors; for tests with many examples."""
    return _interpreter


@pytest.fixture
def interpreted() -> Iterator[None]:
    """The device's kernels run on CPU tensors throughout the test."""
    with _interpreter():
        yield


@pytest.fixture(scope="session")
def interpreted_device() -> SimpleNamespace:
    """The products of `codegen.device`, each call of which runs on CPU tensors by itself."""
    from codegen import device

    _interpreted_library()  # skips the test where there is no Triton

    def within(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _interpreter():
                return function(*args, **kwargs)

        return call

    return SimpleNamespace(**{name: within(getattr(device, name)) for name in DEVICE_PRODUCTS})


@contextmanager
def _nan_memory() -> Iterator[None]:
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def nan_memory() -> Callable[[], AbstractContextManager[None]]:
    """Within `with nan_memory():` what torch allocates without a value is NaN (its deterministic mode fills it)."""
    return _nan_memory
