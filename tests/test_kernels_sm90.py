"""The Triton kernels compile for Hopper, which needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import kernels

ROOT = Path(kernels.__file__).parents[1]


def test_the_kernels_compile_for_hopper_to_its_own_matrix_instructions_without_spilling(tmp_path):
    program = """if True:
        import torch
        from kernels import cuda, sm90
        like = torch.empty(0, dtype=torch.bfloat16, device="meta")
        x = cuda.empty_image(like, (128, 64, 8, 8))
        sm90.block(sm90.Forecast(cuda.CONFIGS[0], set()), x, [(64, 3, 1)], shortcut=x)
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", program]
    rows = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    convolutions = [row for row in rows if row.startswith("convolve")]
    assert len(convolutions) == 2 and all("wgmma" in row for row in convolutions)
    assert all(int(row.split()[9]) == 0 for row in convolutions), "bytes spilt"
