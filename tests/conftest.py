"""What all tests share: threads, Triton's interpreter, and real models and data for the tests marked `real`.

The last are named by environment variables, never downloaded.
"""

import os
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes of two threads each would wait for one another most of the time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that a test starts
    torch.set_num_threads(1)


if not torch.cuda.is_available():
    # Read where Triton is imported, which some tests do through other libraries: its kernels then run on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def real() -> Path:
    """The directory of configs/, models/, templates/, tokenizers/ and preferences/ that DPO_REAL names."""
    return _directory("DPO_REAL")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, named by DPO_SMOLLM2."""
    return _directory("DPO_SMOLLM2")


def _directory(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set: this test needs the real files in the directory that it names")
    path = Path(os.environ[variable])
    assert path.is_dir(), f"{variable}={path}: no such directory"
    return path
