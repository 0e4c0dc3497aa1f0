"""The Triton kernels compile for Hopper without a GPU, and their launches and instructions are counted."""

import os
import subprocess
import sys
from pathlib import Path

import kernels
from kernels.choices import CONFIGS

ROOT = Path(kernels.__file__).parents[1]


def run(program: str, cache: Path) -> list[str]:
    """Run a program in a process whose Triton compiles, not interprets; return the lines it prints."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_kernels_compile_for_hopper_with_wgmma_and_without_spilling(tmp_path):
    program = """if True:
        import torch
        from kernels import cuda, sm90
        like = torch.empty(0, dtype=torch.bfloat16, device="meta")
        passes, x = sm90.Forecast(sm90.CONFIGS[:1]), cuda.empty_image(like, (128, 64, 8, 8))
        sm90.block(passes, x, [(64, 3, 1)], shortcut=x)
        for launch in passes.launches:
            print(launch.kernel, launch.code.matrix, launch.code.spilt_bytes, launch.code.instructions)
    """
    rows = [row.split() for row in run(program, tmp_path)]
    assert [row[0] for row in rows] == ["convolve", "activate", "mask_and_sum", "convolve_backward"]
    assert all(row[1] == ("wgmma" if row[0].startswith("convolve") else "-") for row in rows)
    assert all(row[2] == "0" for row in rows), "bytes spilt"
    assert all(9 * 100 < int(row[3]) < 9 * 1000 for row in rows if row[1] == "wgmma"), "of nine taps"


def test_kernels_access_no_memory_before_the_previous_kernel_is_done(tmp_path):
    program = r"""if True:
        import re, torch
        from kernels import cuda, sm90
        def order(sass, *loops):
            code = re.findall(r"\*/\s+(?:@\S+ )?(ACQBULK|PREEXIT|LDG|STG|ATOM|RED|LDGSTS|UBLKCP)", sass)
            print(*dict.fromkeys(code))
            return 0
        sm90.executed = order
        passes, new = sm90.Forecast(sm90.CONFIGS[:1]), torch.empty
        sm90.resnet(passes, 2, 128)
        like = torch.empty(0, dtype=torch.bfloat16, device="meta")
        z, norm = cuda.empty_image(like, (128, 64, 8, 8)), new(4, 64, device="meta")
        sm90.block(passes, z, [(64, 1, 1)])
        sm90.block(passes, z.detach(), [(64, 1, 1)], train=False)
        passes.gradient(z, z, norm, norm)
        passes.statistics(z, cuda.BatchNorm(*norm, 1e-5, 0.1))
        print(*sorted({launch.kernel for launch in passes.launches}))
    """
    *orders, kernels = run(program, tmp_path)
    launched = "activate batch convolve convolve_backward finish gradient head mask_and_sum record statistics"
    assert set(launched.split()) <= set(kernels.split()) and len(orders) > 9
    assert all(order.startswith("ACQBULK PREEXIT ") for order in orders), orders


def test_a_step_and_an_evaluation_have_the_expected_launches(tmp_path):
    program = """if True:
        from kernels import sm90
        sm90.Compiler.launch, sm90.code_of = (lambda *_, **__: None), lambda *_: sm90.Code(instructions=1000)
        for train in (True, False):
            passes = sm90.Forecast()
            sm90.resnet(passes, 32, 128, train)
            print(len(passes.launches), min(launch.seconds for launch in passes.launches))
    """
    (step, least), (evaluation, _) = (row.split() for row in run(program, tmp_path))
    # Forward, 33 convolutions and 18 ends of blocks; backward, 32, 18, and the sums of the stem; also zeros
    # for all sums, the batch, the head, its record, torch.cat and SGD.
    # In evaluation, 33 convolutions, the batch, and 24 kernels of PyTorch.
    assert int(step) == 33 + 18 + 32 + 18 + 1 + 6 and int(evaluation) == 33 + 1 + 24
    assert float(least) >= 2e-6, "no launch is free"


def test_no_config_overwrites_what_a_running_product_still_reads(tmp_path):
    """Every wait for wgmma waits for all of them, because registers may hold their left factors."""
    program = r"""if True:
        import re, torch
        from kernels import cuda, sm90
        read, like = sm90.read, torch.empty(0, dtype=torch.bfloat16, device="meta")
        def noted(cubin, what):
            text = read(cubin, what)
            if what == "-sass":
                waits = re.findall(r"WARPGROUP.DEPBAR.LE gsb0, (0x[0-9a-f]+)", text)
                print(len(re.findall("HGMMA", text)), len(re.findall("HMMA", text)), *waits)
            return text
        sm90.read = noted
        pipelined = [config for config in sm90.CONFIGS if config.stages > 1]
        for config in (sm90.Config(64, 8, 1), *pipelined):
            channels = 64 // config.patch**2
            x = cuda.empty_image(like, (128, channels, 8, 8))
            sm90.block(sm90.Forecast([config]), x, [(channels, 3, 1), (channels, 3, 1)], shortcut=x)
    """
    rows = [row.split() for row in run(program, tmp_path)]
    products = [row for row in rows if row[:2] != ["0", "0"]]
    configs = 1 + sum(config.stages > 1 for config in CONFIGS)
    assert len(products) == 4 * configs and any(row[0] != "0" for row in products), "four kernels per config"
    for asynchronous, _, *waits in products:
        assert bool(waits) == (asynchronous != "0") and set(waits) <= {"0x0"}


def test_all_configs_of_a_convolution_compile_together_and_none_is_launched(tmp_path):
    program = """if True:
        import pathlib, torch
        from kernels import ahead, choices, cuda, sm90, triton_kernels
        from kernels.reference import BatchNorm, Conv
        ahead.driver.set_active(ahead.Driver(sm90.HOPPER))  # a launch would ask it for more
        choices.CONFIGS = choices.CONFIGS[:1] + choices.CONFIGS[-1:]
        chooses = choices.Choices(pathlib.Path("/dev/null/none"))
        passes = cuda.CudaPasses(chooses)
        chooses.fastest = lambda key, attempt, expected: chooses.compile(attempt)
        x, weight = torch.ones(2, 16, 8, 8).bfloat16(), torch.ones(16, 16, 3, 3).bfloat16()
        x, weight = (a.contiguous(memory_format=torch.channels_last) for a in (x, weight))
        cuda.TorchPasses.convolve = lambda *_: (x, None)
        passes.convolve(x, None, weight, Conv((1, 1), (1, 1)), BatchNorm.of(torch.nn.BatchNorm2d(16)))
        (kept, *_), = triton_kernels.convolve.device_caches.values()
        for kernel in kept.values():
            print(type(kernel).__name__, kernel.metadata.num_warps)
    """
    assert sorted(run(program, tmp_path)) == ["CompiledKernel 16", "CompiledKernel 4"]


def test_instructions_count_once_per_iteration_of_their_loop(tmp_path):
    program = '''if True:
        from kernels import sm90
        sass = """
            /*0030*/  MOV R1, R2 ;
            /*0040*/  LDG R1, [R2] ;
            /*0050*/  FADD R1, R1, R2 ;
            /*0060*/  @P0 BRA 0x50 ;
            /*0070*/  @P0 BRA 0x40 ;
            /*0078*/  EXIT ;
            /*0080*/  BRA 0x80 ;
            /*0090*/  NOP ;
        """
        print(sm90.executed(sass, each=3, trips=9), sm90.executed(sass, each=9, trips=1))
    '''
    assert run(program, tmp_path) == [f"{1 + 3 * (1 + 9 * 2 + 1) + 1} {1 + 9 * 4 + 1}"]
