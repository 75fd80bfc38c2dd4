"""Fixtures: the backends, and a seed that is printed with every failure."""

import os

import numpy as np
import pytest
from support import NumpyBackend, TorchBackend, no_gpu

# JAX would take three quarters of a GPU that it shares with torch here.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request):
    """Each test that takes it runs on the CPU and, where there is one, on a GPU."""
    if request.param == "cpu":
        return NumpyBackend()
    if no_gpu():
        pytest.skip(no_gpu())
    return TorchBackend()


@pytest.fixture
def gpu():
    """The CUDA backend alone, for tests marked gpu."""
    if no_gpu():
        pytest.skip(no_gpu())
    return TorchBackend()


@pytest.fixture
def cpu():
    return NumpyBackend()


@pytest.fixture
def seed(request):
    """A number of its own for every test and parameter set, the same in every run."""
    value = sum(ord(c) * (i + 1) for i, c in enumerate(request.node.nodeid)) % 2**31
    print(f"seed {value}")
    return value


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)
