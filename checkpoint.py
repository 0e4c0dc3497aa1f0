"""Write seed checkpoints (seed, trained tensors, BatchNorm statistics) and rebuild every weight from them.

    python checkpoint.py rebuild runs/RUN --out full.safetensors    # write every weight, verified by SHA-256

This module also reads other weight files for --init-from.
"""

import progress  # isort: split

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

import freeze
import models
import runs
from records import CHECKPOINT, NetworkSpec, files


class CheckpointError(progress.OptionError):
    """Raised when a checkpoint or weight file cannot be used."""


# ---- writing ----


def seed_checkpoint(model: nn.Module, spec: NetworkSpec, steps: int) -> bytes:
    """Return the bytes of a seed checkpoint: trained tensors, BatchNorm's running statistics, and spec.

    The format is safetensors, which runs no code when it is read. `steps` is the number of training steps;
    `model`'s num_batches_tracked buffers are set to it, because training does not update them.
    """
    set_steps(model, steps)
    metadata = {
        "arch": spec.arch,
        "mode": spec.mode,
        "seed": str(spec.seed),
        "spec": spec.to_json(None).strip(),
        "steps": str(steps),
        "frozen_sha256": freeze.frozen_sha256(model),
        "full_sha256": freeze.full_sha256(model),
    }
    return to_bytes({name: t.cpu() for name, t in freeze.trained_state(model).items()}, metadata)


def to_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """Serialise `tensors` and `metadata` as safetensors; equal contents give equal bytes.

    The library writes metadata in random order, so this function writes the header itself.
    """
    plain = save({name: t.contiguous() for name, t in tensors.items()})
    end = 8 + int.from_bytes(plain[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items()))} | json.loads(plain[8:end])
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the library's alignment
    return b"".join([len(header).to_bytes(8, "little"), header, plain[end:]])


def set_steps(model: nn.Module, steps: int) -> None:
    """Set num_batches_tracked of every BatchNorm to `steps`."""
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(steps)


# ---- rebuilding ----


def create(spec: NetworkSpec, say: Callable[[str], None] = lambda line: None) -> nn.Module:
    """Return the network of `spec` with its initial weights, frozen according to its mode, on the CPU.

    `say` receives a one-line note on each tensor that --init-from does not provide. Raises ModelError,
    ModeError or CheckpointError if the spec or the weights of --init-from cannot be used.
    """
    given = spec.init_from and read_initial(spec.init_from)  # before anything is drawn
    model = freeze.empty(spec.arch, len(spec.classes), spec.shortcut)
    models.initialise(model, spec.seed, spec.conv_init, spec.bn_init, spec.nonzeros)
    if spec.init_from:
        for name in load_weights(model, given, spec.init_from):
            say(f"{name} keeps its random draw: {spec.init_from} has another number of classes")
    if spec.reset_bn:
        models.initialise(model, spec.seed, conv_init=None, bn_init=spec.bn_init)
    freeze.freeze(model, spec.mode, spec.per_channel, spec.seed)
    return model


def read_safetensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return a file's tensors by name, and its metadata. Raises FileNotFoundError if it is no plain file."""
    if not file.is_file():
        raise FileNotFoundError(file)
    file.open("rb").close()  # safetensors calls a file missing that may not be read
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a dict
        return tensors, opened.metadata() or {}


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str], NetworkSpec]:
    """Return tensors, metadata and spec of a run folder, a seed checkpoint or a file that `rebuild` wrote.

    Raises CheckpointError if there is none or it is damaged.
    """
    file = Path(path)
    if file.is_dir():
        file /= CHECKPOINT
        if not file.exists():
            raise CheckpointError(f"{path} has no {CHECKPOINT}; a run writes it when it is done")
    try:
        tensors, metadata = read_safetensors(file)
        if not 0 <= int(metadata["steps"]) < 2**63 or len(metadata["full_sha256"]) != 64:
            raise ValueError("steps or full_sha256 are out of range")
        return tensors, metadata, NetworkSpec.parse(metadata["spec"], "its spec")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such run or file") from None
    except (SafetensorError, OSError, MemoryError, KeyError, TypeError, ValueError) as error:
        why = repr(error) if isinstance(error, KeyError) else error
        raise CheckpointError(f"{file} is not a checkpoint of train.py ({why}); give a run folder") from None


def restore(path: str | Path, init_from: str | None = None) -> tuple[nn.Module, NetworkSpec]:
    """Return the trained network of a run or file, on the CPU and verified by its SHA-256, and its spec.

    `init_from` is the current path of the weights that the run's --init-from named. Raises CheckpointError if
    the file is unusable, or if the rebuilt network is not bit for bit the trained one.
    """
    tensors, metadata, spec = read_checkpoint(path)
    try:
        _check_shapes(tensors, spec, path)
        if whole := "frozen_sha256" not in metadata:  # written by `rebuild`: has every weight
            model = freeze.empty(spec.arch, len(spec.classes), spec.shortcut)
        else:
            spec = spec.model_copy(update={"init_from": _initial_path(path, spec, init_from)})
            model = create(spec)
    except (freeze.ModeError, models.ModelError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not whole and freeze.frozen_sha256(model) != metadata["frozen_sha256"]:
        why = f"{spec.init_from} has changed" if spec.init_from else "it was altered"
        raise CheckpointError(f"{path} does not match: its seed gives different frozen weights\n({why})")
    try:
        _, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path} does not match its spec: {why}") from None
    set_steps(model, int(metadata["steps"]))
    if unexpected or freeze.full_sha256(model) != metadata["full_sha256"]:
        raise CheckpointError(f"{path} does not match: its tensors are not the trained ones; it was altered")
    _check_finite(model, path)
    return model, spec


def _check_shapes(tensors: dict[str, torch.Tensor], spec: NetworkSpec, path: str | Path) -> None:
    """Raise CheckpointError if `tensors` cannot belong to the network of `spec`; allocates no weights."""
    with torch.device("meta"):
        own = models.build(spec.arch, len(spec.classes), spec.shortcut).state_dict()
    wrong = [name for name in own if ".running_" in name and name not in tensors]
    wrong += [name for name, t in tensors.items() if name in own and own[name].shape != t.shape]
    if wrong:
        raise CheckpointError(f"{path} does not match its spec: {wrong[0]} is missing or has another shape")


def _check_finite(model: nn.Module, path: str | Path) -> None:
    """Raise CheckpointError if a weight or statistic of `model`, loaded from `path`, is infinite or NaN."""
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: this network has infinite or NaN values ({name}); train it again")


def _initial_path(path: str | Path, spec: NetworkSpec, init_from: str | None) -> str | None:
    """Return the current path of the --init-from weights, or None if the checkpoint does not need them."""
    if spec.mode == "all" or spec.init_from is None:  # every weight is stored, or drawn
        return None
    if init_from or Path(spec.init_from).exists():
        return init_from or spec.init_from
    folder, start = Path(path), Path(spec.init_from)  # perhaps both runs were moved together
    folder = (folder if folder.is_dir() else folder.parent).resolve()
    return str(folder.parent / (start.parent if start.name == CHECKPOINT else start).name)


def rebuild(run: str | Path, out: str | Path, init_from: str | None = None, overwrite: bool = False) -> None:
    """Write every weight of `run`, bit for bit as trained, to the safetensors file `out`.

    Raises CheckpointError if `run` cannot be restored, or if `out` is in a run folder, cannot be written, or
    exists while `overwrite` is False.
    """
    out = Path(out)
    for folder in Path(os.path.realpath(out.parent), out.name).parents:
        if folder == Path(os.path.realpath(run)) or runs.is_run(folder):
            raise CheckpointError(f"--out {out}: {folder} is a run's folder; name a file outside it")
    if os.path.lexists(out) and not overwrite:
        raise CheckpointError(f"--out {out} exists; add --overwrite to replace it, or name another file")
    model, _ = restore(run, init_from)
    metadata = {key: text for key, text in read_checkpoint(run)[1].items() if key != "frozen_sha256"}
    try:
        files.write_atomically(out, to_bytes(freeze.full_state(model), metadata))
    except OSError as error:
        why = f"cannot be written ({error.strerror}); name a file in a folder that exists and has room for it"
        raise CheckpointError(f"--out {out}: {why}") from None


# ---- initial weights ----


def read_initial(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the weights, by name, of a run folder, a seed checkpoint or another weight file.

    Another weight file is a `.safetensors` file or a state dict saved by `torch.save`. Raises CheckpointError
    if `restore` does, or if the file is missing, is no state dict, or cannot be read without running code.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return freeze.full_state(restore(path)[0])
        if path.suffix == ".safetensors":
            tensors, metadata = read_safetensors(path)
            if "frozen_sha256" in metadata:
                return freeze.full_state(restore(path)[0])
        else:
            tensors = files.load_tensors(path)
    except (CheckpointError, freeze.ModeError, models.ModelError):
        raise
    except FileNotFoundError:
        raise CheckpointError(f"--init-from {path}: there is no such file or run") from None
    except RecursionError:
        raise CheckpointError(f"--init-from {path}: its chain of parent runs leads back to itself") from None
    except Exception as error:  # corrupt files raise errors of many types
        what = f"--init-from {path}: not a weight file that loads safely ({progress.reason(error)})"
        give = "give a .safetensors file, or a state dict saved with torch.save(model.state_dict(), ...)"
        raise CheckpointError(f"{what};\n{give}") from None
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(t, torch.Tensor) and not t.is_nested for t in tensors.values()):
        raise CheckpointError(f"--init-from {path}: is not a state dict (a dict from names to tensors)")
    return tensors


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], path: str | Path) -> list[str]:
    """Load `tensors`, read from `path`, into `model` by name; return the names of those not loaded.

    These are the output layer's if its number of classes differs; they keep their initial draw. Raises
    CheckpointError if names, shapes or dtypes do not fit, or a value is not finite.
    """
    own = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    heads = [n for n in ("fc.weight", "fc.bias") if n in given and given[n].dim() == own[n].dim()]
    other_head = [n for n in heads if given[n].shape[0] != own[n].shape[0]]
    given |= {name: own[name] for name in other_head}
    wrong = [f"{n} (missing)" for n in own if n not in given]
    wrong += [f"{n} (not in this network)" for n in given if n not in own]
    wrong += [f"{n} (of {given[n].dtype})" for n in own if n in given and not given[n].is_floating_point()]
    shapes = {n: (list(given[n].shape), list(own[n].shape)) for n in own if n in given}
    wrong += [f"{n} ({found}, needs {needed})" for n, (found, needed) in shapes.items() if found != needed]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise CheckpointError(f"--init-from {path} does not fit the network: {', '.join(wrong[:4])}{more}")
    try:
        model.load_state_dict(given, strict=False)
    except RuntimeError as error:  # for example meta tensors, which have no values
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"--init-from {path} cannot be loaded ({reason})") from None
    _check_finite(model, f"--init-from {path}")
    return other_head


def main(argv: list[str] | None = None) -> None:
    parser = progress.Parser("checkpoint.py", __doc__)
    parser.add_argument("command", choices=["rebuild"], help="write every weight of a run to a file")
    parser.add_argument("run", help="a run folder, or its model.safetensors")
    parser.add_argument("--out", required=True, help="the .safetensors file to write")
    parser.add_argument("--init-from", help="current path of the weights that the run's --init-from named")
    parser.add_argument("--overwrite", action="store_true", help="replace the --out file if it exists")
    options = parser.parse_args(argv)
    rebuild(options.run, options.out, options.init_from, options.overwrite)
    print(f"{options.out}: every weight of {options.run}, verified by its SHA-256")


if __name__ == "__main__":
    sys.exit(progress.run("checkpoint.py", main))
