"""The Triton kernels: tests/triton_cases.py, in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fullgrad_theory.operators import fused

CASES = Path(__file__).parent / "triton_cases.py"


@pytest.mark.skipif(find_spec("triton") is None, reason="this PyTorch has no Triton")
def test_the_kernels_in_the_interpreter() -> None:
    """They are made for the CPU there; 30 cases and more, each one passed."""
    told = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(
        command, env=os.environ | told, capture_output=True, text=True, cwd=CASES.parent.parent
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 30, done.stdout[-500:]


def test_on_the_cpu_they_are_not_taken() -> None:
    q = torch.randn(1, 2, 4, 8)
    assert not fused.takes(q, q, None, q)
    assert not fused.takes_gelu(q, q)
