"""Why a test of this folder is skipped: the compiler of its device is not installed."""

from __future__ import annotations

import importlib.util

import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU's compiler: pip install '.[test]'"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the CUDA plugin, the GPU's compiler: pip install '.[cuda-compiler]'",
)
