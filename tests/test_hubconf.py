"""hubconf.py offers the trained networks of results/ to torch.hub, with every weight verified."""

import ast
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from made_runs import write_run
from networks import trained_for
from small_runs import ROOT

import checkpoint
import freeze
import hubconf


def add_network(repository: Path, folder: str = "runs/these", mode: str = "bn+output", seed: int = 3, **more):
    """Write a resnet8, trained for two steps, as a run in results/; return its folder and full state."""
    model, spec = trained_for(2, mode=mode, seed=seed)
    run = write_run(repository / "results" / folder, "resnet8", mode, seed, analysis=False, **more)
    (run / "model.safetensors").write_bytes(checkpoint.seed_checkpoint(model, spec, steps=2))
    return run, freeze.full_state(model)


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """Return a copy of our code without results, which torch.hub also uses for every GitHub repository."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.toml")]:
        shutil.copy(file, tmp_path)
    for file in ROOT.glob("*/__init__.py"):
        folder, unwanted = file.parent, shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder, tmp_path / folder.name, ignore=unwanted)
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda *_, **__: str(tmp_path))
    return tmp_path


def load(repository: Path, name: str, **settings) -> torch.nn.Module:
    return torch.hub.load(str(repository), name, source="local", **settings)


def test_a_network_has_its_trained_weights_and_its_normalisation(repository):
    _, trained = add_network(repository)
    model = load(repository, "resnet8_bn_output", seed=3)
    state = model.state_dict()
    assert trained.keys() == state.keys() and all(torch.equal(state[name], trained[name]) for name in trained)
    assert not model.training and model.classes == tuple("abcdefghij")
    assert model.mean == pytest.approx([120 / 255] * 3) and model.std == pytest.approx([60 / 255] * 3)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_there_is_an_entry_for_each_architecture_and_mode(repository):
    add_network(repository)
    add_network(repository, "runs/more", "random", final_test_acc=12.34)
    add_network(repository, "runs/more", "all", lr=0.3)  # not the published learning rate
    add_network(repository, "runs/more", "none", status="interrupted")
    add_network(repository, "gpu/cold", "bn_only")  # not among the finished runs
    write_run(repository / "results" / "runs", "resnet14")  # without a seed checkpoint
    assert torch.hub.list("owner/name") == ["resnet8_bn_output", "resnet8_random"]
    shown = torch.hub.help("owner/name", "resnet8_random")
    assert "resnet8, trained with --mode random for 4 epochs" in shown and "12.34 % (seed 3)" in shown
    assert "CIFAR-10" in shown and "`mean` and `std`" in shown


def test_seed_selects_the_network_and_an_unknown_seed_lists_the_known(repository):
    states = {seed: add_network(repository, seed=seed)[1] for seed in (12, 3)}
    add_network(repository, "runs/zfp32", seed=3, dtype="fp32")  # the same run with another dtype
    add_network(repository, "runs/zlonger", seed=4, epochs=8)  # left out: it has another number of epochs
    for seed, options in ((12, {"seed": 12}), (3, {"seed": 3}), (3, {})):
        model = load(repository, "resnet8_bn_output", **options)
        assert torch.equal(model.conv1.weight, states[seed]["conv1.weight"])
    with pytest.raises(ValueError, match=r"resnet8_bn_output was not trained with seed 4; .* \[3, 12\]"):
        load(repository, "resnet8_bn_output", seed=4)


def test_a_network_that_is_not_the_trained_one_is_refused(repository):
    run, _ = add_network(repository)
    altered = bytearray((run / "model.safetensors").read_bytes())
    altered[-1] ^= 1
    (run / "model.safetensors").write_bytes(altered)
    with pytest.raises(ValueError, match="it was altered"):
        load(repository, "resnet8_bn_output", seed=3)
    altered[-1] ^= 1
    (run / "model.safetensors").write_bytes(altered.replace(rb"\"seed\":3", rb"\"seed\":4"))
    with pytest.raises(ValueError, match="its seed gives different frozen weights"):
        load(repository, "resnet8_bn_output", seed=3)


def test_the_callers_modules_with_our_names_are_kept(repository, monkeypatch):
    """Examples are `datasets` of Hugging Face and a models.py of the caller."""
    add_network(repository)
    theirs = {name: types.ModuleType(name) for name in ("datasets", "datasets.load", "models", "kernels")}
    for name, module in theirs.items():
        monkeypatch.setitem(sys.modules, name, module)
    before = dict(sys.modules)
    model = load(repository, "resnet8_bn_output")
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert {name: sys.modules[name] for name in theirs} == theirs
    own = [
        name for name in sys.modules if name.split(".")[0] in ("datasets", "models", "kernels", "checkpoint")
    ]
    assert all(sys.modules[name] is before.get(name) for name in own)


def test_loading_a_network_leaves_the_callers_process_as_it_was(repository, tmp_path_factory):
    """In particular, modules that the caller imports later may have the names of ours."""
    add_network(repository)
    theirs = tmp_path_factory.mktemp("theirs")
    for name in ("models", "datasets", "records"):
        (theirs / f"{name}.py").write_text("its = 'theirs'")
    (theirs / "use.py").write_text("""
import io, os, sys, torch
before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, dict(os.environ)
for _ in range(2):
    model = torch.hub.load(sys.argv[1], "resnet8_bn_output", source="local")
assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, dict(os.environ))
import models, datasets, records
assert models.its == datasets.its == records.its == "theirs"
images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    assert torch.equal(torch.compile(model, backend="eager")(images), model(images))
model.train()(images).sum().backward()
torch.save(model, file := io.BytesIO())
file.seek(0)
assert torch.equal(torch.load(file, weights_only=False).eval()(images), model.eval()(images))
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.hub.load(sys.argv[1], "resnet8_bn_output", source="local")
assert torch.backends.cudnn.conv.fp32_precision == "ieee"
""")
    command = [sys.executable, "use.py", str(repository)]
    ended = subprocess.run(command, cwd=theirs, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def imported(nodes) -> set[str]:
    """Return what the import statements among `nodes` may import: for `from a import b`, both a and a.b."""
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_imported_package_is_listed_as_a_dependency():
    """torch.hub names all missing packages of this list at once."""
    packages, read = set(), set()
    left = imported(list(ast.walk(ast.parse((ROOT / "hubconf.py").read_text()))))
    while left - read:
        read.add(name := min(left - read))
        stem = ROOT / name.replace(".", "/")
        own = [file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.exists()]
        if own:
            left |= imported(ast.parse(own[0].read_text()).body)
        elif not stem.parent.with_suffix(".py").exists() and not (stem.parent / "__init__.py").exists():
            packages.add(name.split(".")[0])
    listed = hubconf.dependencies
    assert {name for name in packages if name not in sys.stdlib_module_names} == set(listed)


@pytest.mark.parametrize("name", ["resnet14_random", "resnet14_bn_only", "resnet32_bn_only"])
def test_networks_of_results_match_their_summaries(name):
    model = load(ROOT, name, seed=0)
    stored = [file.with_name("summary.json") for file in ROOT.glob("results/runs/**/model.safetensors")]
    every = [json.loads(file.read_text()) for file in stored]
    (summary,) = [of for of in every if (f"{of['arch']}_{of['mode']}", of["seed"]) == (name, 0)]
    assert freeze.frozen_sha256(model) == summary["frozen_sha256"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == summary["params_trained"]
