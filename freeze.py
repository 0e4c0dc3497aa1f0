"""What trains, and what that leaves behind: modes, random-feature choice, counts, the seed checkpoint.

python freeze.py table [--arch resnet32 vgg16 ...]    # parameters: in total, and what each part trains
python freeze.py rebuild RUN --out full.safetensors   # every weight again, from seed + trained tensors
python freeze.py evaluate RUN_OR_FILE [--data ...]    # test accuracy of a run, or of a rebuilt model
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

import data
import loaders
import models
import runs
import step

PARTS = ("bn", "bn_main", "shortcut", "output", "conv")
TABLE_ARCHS = [f"resnet{depth}" for depth in (14, 20, 32, 44, 56, 110, 218, 434, 866)]
TABLE_ARCHS += [f"resnet14_w{width}" for width in (2, 4, 8, 16, 32)]
TABLE_ARCHS += [f"vgg{depth}" for depth in (11, 13, 16, 19)]


# What the seed checkpoint's metadata records for `restore` and `evaluate`.
RECIPE = {
    **dict.fromkeys(("arch", "mode", "shortcut", "conv_init", "bn_init"), str),
    **dict.fromkeys(("data", "fingerprint", "dtype", "device"), str),
    **dict.fromkeys(("seed", "per_channel", "image_size", "batch_size"), int),
    **dict.fromkeys(("classes", "mean", "std"), list),
    **{"init_from": (str, type(None)), "reset_bn": bool, "compile": bool},
}


class FreezeError(ValueError):
    """A mode, checkpoint or file that cannot be used; the message says what would do."""


def canonical_mode(mode: str) -> str:
    """One spelling per mode: parts in a fixed order, each once, and `bn_only` for `bn` alone."""
    if mode in ("all", "none", "random"):
        return mode
    asked = {"bn" if part == "bn_only" else part for part in mode.split("+")}
    if unknown := asked - set(PARTS):
        raise FreezeError(
            f"--mode {mode}: {sorted(unknown)[0]!r} is not known; choose all, none, random, bn_only, "
            f"or parts joined by +: {', '.join(PARTS)}"
        )
    asked -= {"bn_main"} if "bn" in asked else set()
    asked -= {"shortcut"} if "conv" in asked else set()
    return "bn_only" if asked == {"bn"} else "+".join(part for part in PARTS if part in asked)


def parameter_parts(model: nn.Module) -> dict[str, set[str]]:
    """The parts (as in `--mode`) that each parameter of `model` belongs to, by its name."""
    parts = {}
    for name, module in model.named_modules():
        in_shortcut = ".downsample." in f"{name}."
        if isinstance(module, nn.BatchNorm2d):
            own = {"bn"} if in_shortcut else {"bn", "bn_main"}
        elif isinstance(module, nn.Conv2d):
            own = {"conv", "shortcut"} if in_shortcut else {"conv"}
        else:
            own = {"output"}
        for parameter_name, _ in module.named_parameters(prefix=name, recurse=False):
            parts[parameter_name] = own
    return parts


def choose_random_features(model: nn.Module, per_channel: int, seed: int) -> None:
    """Set apart `per_channel` weights, at random places, in every filter of every convolution of `model`.

    Two per channel are as many as BatchNorm has: Frankle et al. 2020's control.
    """
    for name, module in model.named_modules():
        if isinstance(module, models.Conv2d):
            size = module.weight[0].numel()
            if not 1 <= per_channel <= size:
                raise FreezeError(f"--per-channel {per_channel}: {name} has filters of 1 to {size} weights")
            rng = models.stream(seed, f"random/{name}")
            places = [rng.choice(size, per_channel, replace=False) for _ in range(len(module.weight))]
            module.set_apart(torch.from_numpy(np.stack(places).astype(np.int64)))


def freeze(model: nn.Module, mode: str, per_channel: int = 2, seed: int = 0) -> None:
    """Leave `requires_grad` on what `mode` trains, and only there. Call it once, on initialised weights."""
    mode = canonical_mode(mode)
    model.requires_grad_(mode == "all")
    if mode == "random":
        choose_random_features(model, per_channel, seed)
    elif mode not in ("all", "none"):
        wanted = {"bn" if part == "bn_only" else part for part in mode.split("+")}
        parts = parameter_parts(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(parts[name] & wanted))
        for part in wanted - set().union(*parts.values()):
            raise FreezeError(f"--mode {mode}: this network has no parameters in its {part}")


def count(model: nn.Module) -> tuple[int, int]:
    """Parameters of `model`: total, trained. Weights set apart count as trained, and once in the total."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for name, p in model.named_parameters() if not name.endswith(".values"))
    return total, trained


def _sha256(tensors: dict[str, torch.Tensor]) -> str:
    """Over names, shapes, dtypes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def frozen_sha256(model: nn.Module) -> str:
    """SHA-256 of what training must not touch: frozen parameters, and the places of weights set apart."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    frozen |= {name: b for name, b in model.named_buffers() if name.endswith(".places")}
    return _sha256(frozen)


def full_sha256(model: nn.Module) -> str:
    """SHA-256 of every weight and BatchNorm statistic."""
    return _sha256(full_state(model))


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every weight and BatchNorm statistic as the network applies it, under torchvision's names."""
    state = {name: t for name, t in model.state_dict().items() if not name.endswith(".values")}
    for name, module in model.named_modules():
        if isinstance(module, models.Conv2d):
            state[f"{name}.weight"] = module.effective_weight()
    return {name: t.detach().cpu().contiguous() for name, t in state.items()}


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes, by name: the trained tensors and BatchNorm's running statistics."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return state | {n: b for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))}


def set_steps(model: nn.Module, steps: int) -> None:
    """Set BatchNorm's counts of training batches, which `trained_state` leaves out: they are all the same."""
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(steps)


def full_bytes(model: nn.Module) -> int:
    """The size in bytes of every weight and BatchNorm statistic, which a full checkpoint would hold."""
    return sum(
        t.numel() * t.element_size() for n, t in model.state_dict().items() if not n.endswith(".values")
    )


def seed_checkpoint(model: nn.Module, recipe: dict, steps: int) -> bytes:
    """The file that stands for the whole network: its trained tensors, BatchNorm's statistics and `recipe`.

    `recipe` holds the keys of RECIPE. Safetensors format; it runs no code when read. BatchNorm's counts of
    batches, which training does not keep, are set to `steps`.
    """
    set_steps(model, steps)
    metadata = {key: str(recipe[key]) for key in ("arch", "mode", "seed")}
    metadata |= {"recipe": json.dumps(recipe), "steps": str(steps), "frozen_sha256": frozen_sha256(model)}
    metadata["full_sha256"] = full_sha256(model)
    return save({name: t.cpu().contiguous() for name, t in trained_state(model).items()}, metadata)


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a run folder's seed checkpoint, or of a file that `rebuild` wrote."""
    file = Path(path)
    if file.is_dir():
        file /= runs.CHECKPOINT
        if not file.exists():
            raise FreezeError(f"{path} has no model.safetensors; a run leaves one when it is done")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a dict
        check_recipe(
            {"reset_bn": False} | json.loads(metadata["recipe"])
        )  # which the first runs did not have
        if not 0 <= int(metadata["steps"]) < 2**63 or len(metadata["full_sha256"]) != 64:
            raise ValueError("steps or full_sha256 are out of range")
    except FileNotFoundError:
        raise FreezeError(f"{path}: there is no such run or file") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FreezeError(f"{file} is no checkpoint of train.py ({error!r}); give a run folder") from None
    return tensors, metadata


def check_recipe(recipe: dict) -> None:
    """ValueError, KeyError or TypeError for what train.py would not have written."""
    wrong = {key for key, kind in RECIPE.items() if not isinstance(recipe[key], kind)}
    wrong |= {key for key in ("image_size", "batch_size", "per_channel") if not 0 < recipe[key] < 65536}
    wrong |= {key for key in ("mean", "std") if [type(x) for x in recipe[key]] != [float] * 3}
    wrong |= {"classes"} if not all(isinstance(name, str) for name in recipe["classes"] or [0]) else set()
    wrong |= {"seed"} if not 0 <= recipe["seed"] < 2**64 else set()
    wrong |= {"dtype"} if recipe["dtype"] not in step.DTYPES else set()
    if wrong:
        raise ValueError(f"unusable: {', '.join(sorted(wrong))}")


def create(recipe: dict, say: Callable[[str], None] = lambda line: None) -> nn.Module:
    """The network of `recipe` at its initial weights, frozen as its mode says; on the CPU."""
    start = read_start(recipe["init_from"]) if recipe["init_from"] else None
    with torch.device("meta"):  # no draw of torch's own that ours would replace
        model = models.build(recipe["arch"], len(recipe["classes"]), recipe["shortcut"])
    model.to_empty(device="cpu")
    models.initialise(model, recipe["seed"], recipe["conv_init"], recipe["bn_init"])
    if start is not None:
        for name in models.load_weights(model, start, recipe["init_from"]):
            say(f"{name} is drawn anew: {recipe['init_from']} has another number of classes")
        if recipe["reset_bn"]:
            models.initialise_batchnorm(model, recipe["seed"], recipe["bn_init"])
    freeze(model, recipe["mode"], recipe["per_channel"], recipe["seed"])
    return model


def read_start(path: str | Path) -> dict[str, torch.Tensor]:
    """Every weight of a run folder, a seed checkpoint, or a file of weights (models.read_weights)."""
    metadata = {}
    if Path(path).suffix == ".safetensors":
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
    if not Path(path).is_dir() and "frozen_sha256" not in metadata:
        return models.read_weights(path)
    try:
        return full_state(restore(path)[0])
    except RecursionError:
        raise FreezeError(f"--init-from {path}: this run starts, by whatever others, from itself") from None


def restore(path: str | Path, init_from: str | None = None) -> tuple[nn.Module, dict]:
    """The trained network of a run or file, verified by its SHA-256, and its recipe; on the CPU.

    Raises FreezeError where what is rebuilt is not bit for bit what was trained. `init_from` says where the
    weights of a run with `--init-from` lie now.
    """
    tensors, metadata = read_checkpoint(path)
    recipe = {"reset_bn": False} | json.loads(metadata["recipe"])
    if recipe["mode"] == "all":  # everything is in the file
        recipe["init_from"] = None
    elif recipe["init_from"] and not Path(recipe["init_from"]).exists():  # moved, perhaps together
        folder, start = Path(path), Path(recipe["init_from"])
        folder = folder if folder.is_dir() else folder.parent
        recipe["init_from"] = str(
            folder.parent / (start.parent if start.name == runs.CHECKPOINT else start).name
        )
    rebuilt_before = "frozen_sha256" not in metadata
    if rebuilt_before:
        with torch.device("meta"):
            model = models.build(recipe["arch"], len(recipe["classes"]), recipe["shortcut"])
        model.to_empty(device="cpu")
    else:
        recipe |= {"init_from": init_from} if init_from else {}
        model = create(recipe)
        if frozen_sha256(model) != metadata["frozen_sha256"]:
            why = f"{recipe['init_from']} has changed" if recipe["init_from"] else "it was altered"
            raise FreezeError(f"{path} does not match: its seed gives other frozen weights\n({why})")
    try:
        _, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise FreezeError(
            f"{path} does not match its recipe: {str(error).splitlines()[-1].strip()}"
        ) from None
    set_steps(model, int(metadata["steps"]))
    if unexpected or full_sha256(model) != metadata["full_sha256"]:
        raise FreezeError(
            f"{path} does not match: its tensors are not those that were trained; it was altered"
        )
    return model, recipe


def rebuild(run: str | Path, out: str | Path, init_from: str | None = None) -> None:
    """Write every weight of `run` to `out` (.safetensors), bit for bit as trained."""
    if Path(out).is_dir() or not Path(out).absolute().parent.is_dir():
        raise FreezeError(f"--out {out}: name a file in a folder that exists")
    model, _ = restore(run, init_from)
    _, metadata = read_checkpoint(run)
    kept = {key: value for key, value in metadata.items() if key != "frozen_sha256"}
    runs.write_atomically(Path(out), save(full_state(model), kept))


def evaluate(
    path: str | Path,
    data_name: str | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    init_from: str | None = None,
) -> str:
    """Test loss and accuracy of a run or file, computed as the run did, as a line of text.

    Without `data_name` the images are the run's, looked for where the run found them.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise FreezeError("--device cuda: torch finds no CUDA GPU here; leave it out, or use --device cpu")
    on = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    model, recipe = restore(path, init_from)
    options = (runs.Run(Path(path)).config or {}).get("options", {}) if Path(path).is_dir() else {}
    data_name = data_name or options.get("data") or recipe["data"]
    data_dir = data_dir or options.get("data_dir") or "data"
    dataset = data.open_dataset(data_name, data_dir, image_size=recipe["image_size"], say=note)
    dataset = dataclasses.replace(dataset, mean=tuple(recipe["mean"]), std=tuple(recipe["std"]))
    if dataset.classes != tuple(recipe["classes"]):
        raise FreezeError(f"--data {dataset.name}: its classes are not those of {path}")
    if dataset.fingerprint != recipe["fingerprint"]:
        note(f"these are not the images of the run ({dataset.fingerprint}, not {recipe['fingerprint']})")
    if on.type != recipe["device"]:
        note(f"the run was on {recipe['device']}, this is {on.type}: the last digits may differ")
    model.to(on, memory_format=torch.channels_last)
    dtype = step.DTYPES[recipe["dtype"]]
    batch_size = step.evaluation_batch_size(recipe["batch_size"], dataset.image_size, on)
    batches = {"batch_size": batch_size, "device": on, "dtype": dtype, "compiled": recipe["compile"]}
    loader = loaders.make_loader(dataset, "test", **batches)
    loss, accuracy = step.Evaluation(model, loader, dtype, recipe["compile"])()
    return f"{accuracy:.2f} % test accuracy, loss {loss:.4f}, {loader.num_images:,} images of {dataset.title}"


def table(archs: list[str], num_classes: int = 10) -> list[list[str]]:
    """Rows of counts: arch, shortcut, total, then what each part, and two random weights a filter, train."""
    rows = []
    for arch in archs:
        for shortcut in models.SHORTCUTS if arch.startswith("resnet") else models.SHORTCUTS[:1]:
            with torch.device("meta"):
                model = models.build(arch, num_classes, shortcut)
            parts, sizes = parameter_parts(model), {n: p.numel() for n, p in model.named_parameters()}
            by_part = {part: sum(sizes[n] for n in sizes if part in parts[n]) for part in PARTS}
            total = sum(sizes.values())
            filters = sum(len(m.weight) for m in model.modules() if isinstance(m, models.Conv2d))
            share = f"{100 * by_part['bn'] / total:.2f} %"
            rows.append([arch, shortcut, f"{total:,}", f"{by_part['bn']:,}", share])
            rows[-1] += [f"{n:,}" for n in (*(by_part[p] for p in PARTS[1:]), 2 * filters)]
    return rows


def note(line: str) -> None:
    print(f"freeze.py: {line}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("table", help="parameter counts")
    command.add_argument("--arch", nargs="+", default=TABLE_ARCHS)
    command.add_argument("--num-classes", type=int, default=10)
    for name in ("rebuild", "evaluate"):
        what = (
            "every weight of a run, as a file" if name == "rebuild" else "the test accuracy of a run or file"
        )
        command = commands.add_parser(name, help=what)
        command.add_argument("run", help="a run folder, its model.safetensors, or a file that rebuild wrote")
        command.add_argument("--init-from", help="where the file of the run's --init-from lies now")
        if name == "rebuild":
            command.add_argument("--out", required=True, help="the .safetensors file to write")
        else:
            command.add_argument("--data", help="a data set or folder; default: the run's")
            command.add_argument("--data-dir", help="default: the run's")
            command.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    options = parser.parse_args(argv)
    try:
        if options.command == "table" and options.num_classes < 1:
            raise FreezeError(f"--num-classes {options.num_classes}: must be 1 or more")
        if options.command == "table":
            header = ["arch", "shortcut", "total", "bn", "bn/total", *PARTS[1:], "random (2)"]
            rows = [header, *table(options.arch, options.num_classes)]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for row in rows:
                cells = [
                    c.ljust(w) if i < 2 else c.rjust(w)
                    for i, (c, w) in enumerate(zip(row, widths, strict=True))
                ]
                print("  ".join(cells).rstrip())
        elif options.command == "rebuild":
            rebuild(options.run, options.out, options.init_from)
            print(f"{options.out}: every weight of {options.run}, verified by its SHA-256")
        else:
            print(evaluate(options.run, options.data, options.data_dir, options.device, options.init_from))
    except BrokenPipeError:  # the reader has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FreezeError, models.ModelError, data.DataError, runs.RunError, OSError) as error:
        note(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
