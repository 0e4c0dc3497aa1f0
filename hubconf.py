"""Load the trained networks of results/runs through torch.hub.

    torch.hub.list("OWNER/REPOSITORY")     # the networks; torch.hub.help describes one of them
    model = torch.hub.load("OWNER/REPOSITORY", "resnet32_bn_only", seed=0)
    model = torch.hub.load(".", "resnet32_bn_only", source="local")    # from a local folder

Frozen weights are drawn again from their seed, and all weights are verified.
"""

import contextlib
import json
import os
import pathlib
import re
import sys

import torch

dependencies = ["torch", "numpy", "PIL", "filelock", "pydantic", "rich", "safetensors", "tabulate"]

_HERE = pathlib.Path(__file__).parent
_PREFIX = re.sub(r"\W", "_", f"{_HERE}/")  # of the names that our modules keep in sys.modules
_SETTING = ("data_title", "image_size", "epochs", "quick", "train_subset", "val_split")


@contextlib.contextmanager
def _own_modules():
    """Import our modules in this block only, and undo the settings that they make for a whole process.

    Names such as `models` and `datasets` stay free for the caller's own modules, imported before or after.
    """
    files = {file.stem: file for file in _HERE.glob("*.py")}
    files |= {file.parent.name: file for file in _HERE.glob("*/__init__.py")}

    def named_like_ours() -> dict:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in files}

    def is_ours(name: str) -> bool:
        top = name.partition(".")[0]
        file = getattr(sys.modules.get(top), "__file__", None)
        return pathlib.Path(file or "").resolve() == files[top].resolve()

    before, environment = named_like_ours(), dict(os.environ)
    settings = [(torch.backends.cudnn, "benchmark"), *_tf32_settings()]
    values = [getattr(*setting) for setting in settings]
    for name in [name for name in before if not is_ours(name)]:
        del sys.modules[name]
    for name in [name for name in sys.modules if name.startswith(_PREFIX)]:
        sys.modules.setdefault(name.removeprefix(_PREFIX), sys.modules[name])
    try:
        yield
    finally:
        for name, module in named_like_ours().items():
            del sys.modules[name]
            if before.get(name) is not module:
                _rename(module, _PREFIX + name)
        sys.modules.update(before)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        for setting, value in zip(settings, values, strict=True):
            setattr(*setting, value)


def _tf32_settings() -> list[tuple[object, str]]:
    """Return the attributes that hold cuDNN's TF32 settings: the old API's, unless the new one was used."""
    cudnn = torch.backends.cudnn
    try:
        _ = cudnn.allow_tf32
        return [(cudnn, "allow_tf32")]
    except RuntimeError:
        return [(cudnn.conv, "fp32_precision"), (cudnn.rnn, "fp32_precision")]


def _rename(module, name: str) -> None:
    """Keep `module` in sys.modules under another name, where torch.compile and pickle look it up."""
    for thing in vars(module).values():
        if getattr(thing, "__module__", None) == module.__name__ and isinstance(thing, type):
            thing.__module__ = name
    module.__name__ = name
    sys.modules[name] = module


def _entry(name: str, runs: dict[int, dict]):
    """Return the function that loads one of these networks; `runs` maps seeds to what _entries has read."""
    first = next(iter(runs.values()))

    def load(seed: int = min(runs)) -> torch.nn.Module:
        if seed not in runs:
            raise ValueError(f"{name} was not trained with seed {seed}; give one of {sorted(runs)}")
        with _own_modules():
            import checkpoint
            import kernels

            model, spec = checkpoint.restore(runs[seed]["folder"])
            kernels.configure(model, compiled=False)  # so that the first call compiles nothing
        model.mean, model.std = (tuple(value / 255 for value in values) for values in (spec.mean, spec.std))
        model.classes = spec.classes
        return model.eval()

    reached = ", ".join(f"{run['final_test_acc']:.2f} % (seed {seed})" for seed, run in sorted(runs.items()))
    load.__doc__ = f"""{first["arch"]}, trained with --mode {first["mode"]} for {first["epochs"]} epochs.

    On {first["data_title"]}, it reached a test accuracy of {reached}.
    Returns the network in eval mode, on the CPU. It maps images [N, 3, H, W] to logits [N, classes]. Scale
    pixels to 0..1, then normalise them with its attributes `mean` and `std`, one value per channel, as for
    torchvision's Normalize; `classes` lists the class names. Raises ValueError for any other seed, or if a
    weight is not bit for bit the trained one.
    """
    return load


def _entries() -> dict:
    """Return, by name, a load function for each architecture and mode trained with the published options.

    The first run in results/runs sets the images and the number of epochs; others that differ are left out.
    """
    found = {}
    for file in sorted(_HERE.glob("results/runs/**/model.safetensors")):
        read = (file.with_name(f"{name}.json").read_bytes() for name in ("summary", "config"))
        summary, config = map(json.loads, read)
        run = config["options"] | summary | {"folder": file.parent}
        if run["status"] == "done" and not run["variant"]:
            runs = found.setdefault(f"{run['arch']}_{run['mode']}".replace("+", "_"), {})
            if all(other[key] == run[key] for other in runs.values() for key in _SETTING):
                runs.setdefault(run["seed"], run)
    return {name: _entry(name, runs) for name, runs in found.items()}


globals().update(_entries())
