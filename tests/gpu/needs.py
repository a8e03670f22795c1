"""What a test needs of the machine. Without it the test is skipped; with CUBN_REQUIRE_GPU=1 it fails instead."""

import functools
import os

import pytest


@functools.cache
def missing(library):
    """Why a library cannot work on a CUDA device here; empty if it can."""
    try:
        if library == "cupy":
            import cupy

            cupy.cuda.runtime.getDeviceCount()
        elif library == "torch":
            import torch

            return "" if torch.cuda.is_available() else "this PyTorch finds no CUDA device"
        else:
            import jax

            jax.devices("gpu")
    except ImportError as error:
        return f"{error.name} is not installed"
    except RuntimeError as error:  # CuPy's and JAX's
        return f"{library} finds no CUDA device ({str(error).partition(chr(10))[0]})"
    return ""


def need(library):
    if reason := missing(library):
        if os.environ.get("CUBN_REQUIRE_GPU") == "1":
            pytest.fail(f"needs a GPU: {reason}", pytrace=False)
        pytest.skip(f"needs a GPU: {reason}")
