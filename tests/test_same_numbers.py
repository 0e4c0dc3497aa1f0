"""Training gives the recorded weights, bit for bit, on the kind of machine that recorded them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import train
from kernels import device

RECORDED_ON = ("AMD EPYC", "2.13.0+cpu", True)  # processor, torch, AVX-512 with bf16
FULL_SHA256 = {
    "all": "e7ae968f03092f888234f434d4a54df200189def387bebe729b09acb8b6d76ce",
    "bn+output": "c48a60d97cbf3ae16b86cc1b320625e0b98bbddbb6bc7a16fa0c5127317b52ca",
    "bn+shortcut": "a827352f65bcaa15bb8090e60a1f7a2df2a3b5e20df5a04c4558a5d4c82d32cb",
    "bn+shortcut+output": "8032591093bbf8c5d94ca7de81d05794cc68e744a368ec56ff9dd647eefb8bbb",
    "bn_main": "2dc80a53d55107d385aa2c9b82f6cf32331ffa2a42d47105d1d49d699717d57c",
    "bn_only": "b2c0e7f5b431180107e16d6d72eff9ef2f5e6a8677052b55a2dd1d98c36b7fcf",
    "conv": "d59d282627504706c9f934a7f0702e43545a9d1e12962a3bc519fa948efea682",
    "none": "dfa684b46f91e9331db0d879ea5d447cb2a31ce3a4806eaf3b0a5e075975504d",
    "output": "c1aed681c9937c3ca9cef46c3b7c4c315698345de7fac041acb906a41ebcd886",
    "random": "69f335d432ecd06f86ede32fbaf7d38954a3fde27fb8202bd224f886066fd07b",
    "shortcut": "d78166a0987a964124b439029b5d820067b701e1446eeabb83caddd11d9173d3",
}
EACH_MODE = """
import json, sys, train
for mode in json.loads(sys.argv[1]):
    train.main([*sys.argv[2:], "--mode", mode])
"""


def test_final_weights_equal_the_recorded_ones(tmp_path):
    here = device.maker_name(torch.device("cpu")), torch.__version__, torch.cpu._is_avx512_bf16_supported()
    if here != RECORDED_ON:
        pytest.skip(f"recorded on {RECORDED_ON}, and this is {here}: other machines round otherwise")
    options = "--data synthetic --arch resnet14 --train-subset 1000 --epochs 2 --milestones 1 --dtype fp32"
    options = [*options.split(), "--seed", "0", "--device", "cpu", "--data-dir", "data", "--out", "runs"]
    command = [sys.executable, "-c", EACH_MODE, json.dumps(list(FULL_SHA256)), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    found = {}
    for run in (tmp_path / "runs").iterdir():
        _, metadata, spec = checkpoint.read_checkpoint(run)
        found[spec.mode] = metadata["full_sha256"]
    assert found == FULL_SHA256
