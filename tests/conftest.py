"""Fixtures shared by all tests."""

import functools
import inspect
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def _work_on_a_core_of_its_own():
    """Under pytest-xdist every worker and what it starts has one core, before anything counts how many there are.

    Most of the suite's time is one thread of Python starting an engine, and two engines that each use every core only
    wait for one another.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


_work_on_a_core_of_its_own()


def _interpret_triton_where_there_is_no_gpu():
    """Triton decides at import whether its own functions run in its interpreter; child processes are not touched."""
    import torch

    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton  # noqa: F401
    except ImportError:
        pass
    finally:
        del os.environ["TRITON_INTERPRET"]


def pytest_configure(config):
    # The process that only hands out work to others runs no test.
    if not getattr(config.option, "numprocesses", None):
        _interpret_triton_where_there_is_no_gpu()


def pytest_collection_modifyitems(items):
    """Files that start engines go first, so that no worker is left with one while the others have nothing to do."""
    items.sort(key=lambda item: item.path.parent.name not in ("engine", "serving"))


@functools.cache
def _builtin_names(module):
    from triton.language.core import is_builtin

    return [name for name, member in inspect.getmembers(module) if is_builtin(member)]


def _patch_builtin_quickly(module, *how):
    """What Triton's interpreter does in every call of a function, for which it looks through the whole language."""
    from triton.language.core import is_builtin
    from triton.runtime.interpreter import _patch_attr

    for name in _builtin_names(module):
        member = getattr(module, name)
        if is_builtin(member):
            _patch_attr(module, name, member, *how)


@pytest.fixture(scope="module")
def interpreted():
    """Our GPU kernels as Python functions, in place of those that Triton would compile."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/gpu runs these tests on it")
    import importlib
    import pkgutil

    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    from vllm_tokenfilter.kernels import gpu

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # Triton asks again where kernels are launched
        patch.setattr(interpreter, "_patch_builtin", _patch_builtin_quickly)
        for found in pkgutil.iter_modules(gpu.__path__, f"{gpu.__name__}."):
            module = importlib.import_module(found.name)
            for name, kernel in list(vars(module).items()):
                if isinstance(kernel, JITFunction):
                    patch.setattr(module, name, interpreter.InterpretedFunction(kernel.fn))
        yield


@pytest.fixture
def device():
    """Where tests of the GPU's kernels put their tensors; tests/gpu has another answer."""
    import torch

    return torch.device("cpu")


@pytest.fixture(scope="session")
def model_path():
    """The embedded model, made ready once."""
    from vllm_tokenfilter.local.models import default_model_path

    return str(default_model_path())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, model_path):
    """Folder of the model in tests/tiny.py, with the embedded model's tokenizer."""
    from tests import tiny

    return tiny.save(tmp_path_factory.mktemp("tiny"), model_path)


@pytest.fixture(scope="session")
def prose():
    """Text every installation has: the licence, our README, and some of Python's documented library code."""
    import argparse
    import pathlib
    import textwrap

    root = pathlib.Path(__file__).parent.parent
    documents = [inspect.getsource(textwrap), inspect.getdoc(argparse) or "", inspect.getsource(pathlib)]
    return (root / "LICENSE").read_text() + "\n\n" + (root / "README.md").read_text() + "\n".join(documents)


def pytest_addoption(parser):
    parser.addoption("--scaling-json", help="where tests/scaling writes what it measured")
    parser.addoption("--soak-minutes", type=float, default=30.0, help="how long tests/serving/test_soak.py goes on")
