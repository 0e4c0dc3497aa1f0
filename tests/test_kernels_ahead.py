"""Kernels are compiled ahead of a first step, in several processes, and found when they are tried."""

import pickle

import pytest
import torch
from test_kernels_sm90 import run

import freeze
import models


def test_what_is_compiled_ahead_is_all_that_a_step_and_an_evaluation_compile(tmp_path):
    (tmp_path / "claims").mkdir()
    program = f"""if True:
        import pathlib, pickle, torch
        from triton import knobs
        import freeze, models
        from kernels import ahead, choices, sm90, triton_kernels
        ahead.CONFIGS = choices.CONFIGS[:1] + choices.CONFIGS[6:7]
        model = models.build("resnet8")
        freeze.freeze(model, "bn_only")
        given = ahead.pickled((model, (8, 3, 32, 32), torch.bfloat16))
        for train in (True, False):
            passes = ahead.Share(pathlib.Path({str(tmp_path / "claims")!r}), sm90.HOPPER, True)
            ahead.run(passes, pickle.loads(given)[0].train(train), (8, 3, 32, 32), torch.bfloat16)
        expected = ahead.Trials()
        for train in (True, False):
            ahead.run(expected, pickle.loads(given)[0].train(train), (8, 3, 32, 32), torch.bfloat16)

        class Trying(ahead.Compiler):  # as Choices does, with tensors that have memory
            def tries(self, key, attempt):
                keys.add(key)
                for config in (None, *ahead.CONFIGS):
                    ahead._suits(attempt, config)

        compiled, keys = [], set()
        knobs.compilation.listener = lambda *_, cache_hit, **more: (
            compiled.append(cache_hit) or cache_hit or print(more["src"].name, more["src"].constants)
        )
        for kernel in vars(triton_kernels).values():
            if hasattr(kernel, "device_caches"):
                kernel.device_caches.clear()
        for train in (True, False):
            passes = Trying(sm90.HOPPER, None)
            passes.choose = passes.tries
            for module in model.train(train).modules():
                if hasattr(module, "execution"):
                    module.execution = module.execution._replace(passes=passes)
            with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16):
                y = model.features(torch.rand(8, 3, 32, 32).to(memory_format=torch.channels_last))
            if train:
                y.sum().backward()
        print(*expected.keys ^ keys)
        print(len(compiled), sum(compiled))
    """
    *missed, others, row = run(program, tmp_path / "cache")
    tried, found = row.split()
    assert not missed and not others, (missed, others)
    assert int(tried) == int(found) > 40


def test_processes_share_the_kernels_of_a_network(tmp_path):
    for name in ("kernels", "torch", "pickle"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit")
    program = f"""if True:
        import os, pathlib, torch
        import models
        from kernels import ahead, choices, sm90
        os.chdir({str(tmp_path)!r})
        os.environ["TRITON_CACHE_DIR"] = "cache"
        ahead.os.sched_getaffinity = lambda _: {{0, 1}}
        ahead.driver.set_active(ahead.Driver(sm90.HOPPER))
        chooses = choices.Choices(pathlib.Path("/dev/null/none"))
        model = models.build("vgg11").eval()
        model.layers = torch.nn.Sequential(model.layers[0])
        passes = ahead.CudaPasses(chooses, pdl=True)
        ahead.compile_all(passes, model, (8, 3, 8, 8), torch.bfloat16)
        cubins = set(pathlib.Path("cache").rglob("*.cubin"))
        print(len(cubins), *{{file.stem for file in cubins}})
        ahead.in_processes = lambda *_: print("again")
        chooses.made = dict.fromkeys(["convolve 3->64 8x8 k3 s1 n8 bf16 after trains"])
        ahead.compile_all(passes, model, (8, 3, 8, 8), torch.bfloat16)
    """
    (row,) = run(program, tmp_path)  # nothing is compiled again
    count, *names = row.split()
    assert int(count) >= 4 and "convolve" in names


def test_a_network_travels_without_the_values_of_its_tensors():
    from kernels import ahead

    model = models.build("resnet8").to(memory_format=torch.channels_last)
    freeze.freeze(model, "random")
    given = ahead.pickled(model)
    made = pickle.loads(given)
    assert len(given) < 30_000 < freeze.full_bytes(model)
    for (name, was), now in zip(model.named_parameters(), made.parameters(), strict=True):
        assert now.is_meta and (was.shape, was.stride()) == (now.shape, now.stride()), name
        assert (was.dtype, was.requires_grad) == (now.dtype, now.requires_grad), name


def test_a_network_that_another_process_cannot_load_is_left_alone(monkeypatch):
    from kernels import ahead

    class Local(torch.nn.Module):
        features = torch.nn.Identity()

    monkeypatch.setattr(ahead, "in_processes", lambda *_: pytest.fail("processes were started"))
    assert ahead.compile_all(None, Local(), (8, 3, 8, 8), torch.bfloat16) is None
