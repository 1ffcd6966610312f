"""Checkpoints of a training: a folder with all that a run needs to go on, or none at all."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from tfm_ref.expert_parallel import (
    expert_shares,
    own_moments,
    own_tensors,
    whole_moments,
    whole_state_dict,
)
from tfm_ref.validation import check_size


def distinct(model: nn.Module) -> dict[str, Tensor]:
    """Give what a model's state_dict holds, with one name for what is tied.

    Args:
        model: the model.
    """
    names = {}
    for name, t in model.state_dict(keep_vars=True).items():
        names.setdefault(t, name)
    return {name: t.detach() for t, name in names.items()}


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{t.dtype} {tuple(t.shape)}" for name, t in tensors.items()}


def _check_same(rule: str, here: Mapping[str, object], there: Mapping[str, object]) -> None:
    """Refuse two tables that differ, and name what does."""
    wrong = [
        f"{name} is {here.get(name, 'absent')} here and {there.get(name, 'absent')} there"
        for name in {**here, **there}
        if here.get(name, "absent") != there.get(name, "absent")
    ]
    if wrong:
        raise ValueError(f"{rule}: {'; '.join(wrong)}")


def _settings(optimizer: Optimizer, settings: Mapping[str, object]) -> dict[str, object]:
    """Add to settings those of the optimizer, as JSON gives them back."""
    settings = {"optimizer": type(optimizer).__name__, **settings}
    for i, group in enumerate(optimizer.param_groups):
        group = group | {"params": len(group["params"])}
        settings |= {f"{name} of group {i}": value for name, value in group.items()}
    return json.loads(json.dumps(settings, default=repr))


def save_checkpoint(
    path: str | Path, model: nn.Module, optimizer: Optimizer, record: Mapping[str, object]
) -> None:
    """Write a folder with all that a run needs to go on, or leave none at all.

    It holds ``model.safetensors`` (parameters and buffers; what is tied, once),
    ``optimizer.safetensors`` (the moments) and ``record.json``. It is written under another name
    and then renamed: whenever the process is killed, no folder of this name is half written.

    If experts lie in several processes (:class:`~tfm_ref.expert_parallel.ExpertParallel`), all
    must call it, and process 0 writes; what it writes is whole.

    Args:
        path: the folder, which must not exist.
        model: the model.
        optimizer: its optimizer.
        record: what else there is to say, for JSON. Its "settings", if any, are joined by those
            of the optimizer.
    """
    whole, moments = whole_state_dict(model), whole_moments(model, optimizer)
    if expert_shares(model) and dist.get_rank():
        return
    path = Path(path)
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({n: whole[n].contiguous() for n in distinct(model)}, part / "model.safetensors")
    save_file({n: t.contiguous() for n, t in moments.items()}, part / "optimizer.safetensors")
    record = {**record, "settings": _settings(optimizer, record.get("settings", {}))}
    (part / "record.json").write_text(json.dumps(record), encoding="utf-8")
    part.rename(path)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a checkpoint, or of several on average, into a model.

    Args:
        model: the model; what is tied stays tied.
        tensors: its parameters and buffers by name; of what is tied, only the first. Experts are
            whole: where they lie in several processes, each takes its own.

    Raises:
        ValueError: if names, shapes or dtypes differ: the message names them.
    """
    wanted, tensors = distinct(model), own_tensors(model, tensors)
    _check_same("weights must be of the same model", _kinds(wanted), _kinds(tensors))
    for name, t in wanted.items():
        t.copy_(tensors[name])


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    settings: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Read what :func:`save_checkpoint` wrote into a model, and into its optimizer.

    Nothing is unpickled, so that no file can run code, and nothing is changed if it is refused.

    Args:
        path: the folder.
        model: the model; it gets the weights.
        optimizer: its optimizer, with the settings of then, its learning rates among them; it
            gets the moments. If not given, only the weights are read.
        settings: those of the record, which must be the same, if there is an optimizer.

    Returns:
        The record.

    Raises:
        ValueError: if tensors or settings are not those of the checkpoint: the message names them.
    """
    path = Path(path)
    record = json.loads((path / "record.json").read_text(encoding="utf-8"))
    tensors = own_tensors(model, load_file(path / "model.safetensors"))
    _check_same("weights must be of the same model", _kinds(distinct(model)), _kinds(tensors))
    if optimizer is not None:
        here = _settings(optimizer, settings or {})
        _check_same("a checkpoint must be of the same run", here, record["settings"])
        state = {}
        moments = load_file(path / "optimizer.safetensors")
        for name, t in own_moments(model, optimizer, moments).items():
            i, moment = name.split(".", 1)
            state.setdefault(int(i), {})[moment] = t
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    load_weights(model, tensors)
    return record


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Find the last checkpoint that :func:`tfm_ref.training.fit` wrote into a folder, if any."""
    return max(Path(folder).glob("step-????????"), default=None)


def average_checkpoints(checkpoints: Sequence[Mapping[str, Tensor] | str | Path]) -> dict:
    """Give the mean of the weights at several moments of a run.

    Sums are kept in float64; each tensor gets back its dtype. What are no floating-point numbers,
    such as counters, is taken from the last.

    Args:
        checkpoints: state dicts, safetensors files or folders of :func:`save_checkpoint`.

    Returns:
        The tensors by name, for :func:`load_weights`; of whole state dicts, for
        ``load_state_dict``.

    Raises:
        ValueError: if there are none, or names, shapes or dtypes differ: the message names them.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 6.1: the last 5 checkpoints of
        the base model, written every 10 minutes.

    Example:
        >>> import torch
        >>> average_checkpoints([{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}])
        {'w': tensor([2.5000])}
    """
    check_size("the number of checkpoints", len(checkpoints))
    first, sums = None, {}
    for checkpoint in checkpoints:
        state = checkpoint
        if not isinstance(checkpoint, Mapping):
            path = Path(checkpoint)
            state = load_file(path / "model.safetensors" if path.is_dir() else path)
        first = first or _kinds(state)
        _check_same("checkpoints must have the same tensors", first, _kinds(state))
        for name, t in state.items():
            if t.is_floating_point():
                sums[name] = sums.get(name, 0) + t.detach().double()
    mean = {name: total / len(checkpoints) for name, total in sums.items()}
    return {name: mean.get(name, t).to(t.dtype, copy=True) for name, t in state.items()}
