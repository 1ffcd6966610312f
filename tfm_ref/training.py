"""Training: the loop that takes a batch and follows the gradient, in one process or in several."""

import atexit
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from tfm_ref.checkpoints import distinct, latest_checkpoint, load_checkpoint, save_checkpoint
from tfm_ref.expert_parallel import ExpertParallel, expert_shares
from tfm_ref.progress import progress
from tfm_ref.validation import check_size


def set_seed(*numbers: int) -> None:
    """Let the random numbers of PyTorch, on the CPU and on GPUs, follow from some numbers.

    Weights, dropout and samples are then the same in every run with the same version of PyTorch,
    number of threads and kind of processor: bit for bit on the CPU. On a GPU what is drawn is the
    same, but sums may round otherwise unless ``torch.use_deterministic_algorithms(True)``. NumPy's
    and Python's own generators are left alone.

    Args:
        numbers: integers from 0 to 2³² - 1; others, or another order, give another seed.

    Example:
        >>> set_seed(7, 1)
        >>> first = torch.randn(3)
        >>> set_seed(7, 1)
        >>> torch.equal(torch.randn(3), first)
        True
    """
    entropy = [len(numbers), *numbers]  # NumPy takes 1 and 1, 0 for the same
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterable],
    loss: Callable[[nn.Module, object], tuple[Tensor, int]],
    *,
    optimizer: Optimizer,
    n_steps: int,
    lr: Callable[[int], float] | None = None,
    max_norm: float | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    every: int = 1000,
    settings: Mapping[str, object] | None = None,
    device: torch.device | str | None = None,
    timeout: timedelta = timedelta(minutes=10),
) -> list[float]:
    """Train a model, whatever it learns: take a batch, follow the gradient, n_steps times.

    Each step lowers the mean loss over the tokens of one batch. Started by ``torchrun``, every
    process takes its share of the batch (rows rank, rank + world size, ...), if there is one for
    it, and all take the same step: gradients are summed over all processes, and divided by the
    number of tokens of the whole batch. ``DistributedDataParallel`` gives the mean of means
    instead, and wants a share for everyone; in return it sends gradients while others are still
    computed. If a process dies, the others end with an error, after ``timeout`` at the latest.
    Process 0 alone writes and shows a bar.

    Experts that lie in several processes (:class:`~tfm_ref.expert_parallel.ExpertParallel`) stay
    there: each process keeps those that its model begins with; all else is that of process 0. A
    process without rows of its own computes on one of another, whose loss it counts for nothing:
    its experts are needed. Checkpoints hold the experts of all.

    With a folder, a run that was stopped at any moment goes on from its last checkpoint as if
    nothing had happened: bit for bit on the CPU, where the data are the same. The random numbers
    of a step, such as dropout, follow from the seed, its number and the process alone, and the
    learning rate from its number.

    Matrix products are in bfloat16 on CUDA (autocast), and in the dtype of the weights elsewhere.

    Args:
        model: the model; it is moved to the device and left in training mode.
        batches: gives the batches of an epoch, which is counted from 0, such as a
            :class:`~tfm_ref.batches.TokenBatches`. A batch has ``len``, ``batch[rows]`` for
            a slice of its rows, and ``to(device)``: a :class:`~tfm_ref.batches.Batch`, or a tensor.
        loss: gives, for model and batch, the sum of the losses of all tokens and their number.
            A further loss, already a mean, is added as many times as there are tokens.
        optimizer: changes the parameters. The paper's is
            ``torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)``.
        n_steps: number of the last step.
        lr: gives the learning rate of a step, from 1, such as
            :func:`~tfm_ref.schedules.noam_lr`; the optimizer's own if not given.
        max_norm: bound of the norm of all gradients together; no bound if not given.
        seed: seed of the random numbers in the steps.
        folder: where checkpoints are written and found, the same for all processes.
        every: number of steps between two checkpoints; the last step writes one, too.
        settings: what else makes this run what it is, for JSON; a checkpoint with others is
            refused.
        device: where to compute; CUDA, if there is any, or else the CPU.
        timeout: how long a process waits for the others, if this is the first fit: then the
            processes are joined, by ``torch.distributed.init_process_group``, if they are not.

    Returns:
        The loss of each step from the first, before the parameters changed.

    Raises:
        ValueError: if n_steps or every is not an integer of at least 1, max_norm is not above 0,
            an epoch has no batch, a batch has no token that counts, the loss is no finite number
            or depends on no parameter of the optimizer, experts lie in some of the processes
            only, or the last checkpoint is of another model or run, or of a later step.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> losses = fit(
        ...     model,
        ...     lambda epoch: [torch.ones(4, 1), torch.zeros(2, 1)],
        ...     lambda model, x: ((model(x) - 3 * x).square().sum(), len(x)),
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     n_steps=200,
        ...     device="cpu",
        ... )
        >>> round(model.weight.item(), 3)
        3.0
    """
    check_size("n_steps", n_steps)
    check_size("every", every)
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be above 0; got {max_norm}")
    device = _own(device)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    config = vars(model.config) if hasattr(model, "config") else {}

    def set_lr(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr(step)

    rank, world = _processes(device, timeout)
    settings = {"seed": seed, "max_norm": max_norm, "processes": world, "settings": settings}
    settings |= {f"config.{name}": repr(value) for name, value in config.items()}
    record = {"step": 0, "epoch": 0, "batch": 0, "losses": [], "settings": settings}
    model.to(device).train()
    shares = expert_shares(model)
    own = {*shares.values()}
    for layer in model.modules():
        if isinstance(layer, ExpertParallel) and layer.world != world:
            raise ValueError(
                f"experts must lie in all processes ({world}); got a layer in {layer.world}"
            )
    if folder is not None and (path := latest_checkpoint(folder)):
        last = int(path.name.removeprefix("step-"))
        check_size("n_steps", n_steps, least=last)
        set_lr(last)
        record = load_checkpoint(path, model, optimizer, settings)
    if world > 1:
        for name, t in distinct(model).items():
            if name not in shares:
                dist.broadcast(t, 0)
    stream = _stream(batches, record["epoch"], record["batch"])
    steps = range(record["step"] + 1, n_steps + 1)
    for step in progress(steps) if rank == 0 else steps:
        batch, record["epoch"], record["batch"] = next(stream)
        set_seed(seed, step, rank)
        set_lr(step)
        optimizer.zero_grad()
        total, n_tokens = 0.0, 0
        share = batch[rank::world]
        if len(share) or shares:  # who has experts must be there for the tokens of others
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                total, n_tokens = loss(model, (share if len(share) else batch[:1]).to(device))
            if not len(share):
                total, n_tokens = 0 * total, 0
            total.backward()
            total = total.item()
        mean = _mean_gradients(parameters, own, total, n_tokens, device, world)
        if not math.isfinite(mean):
            raise ValueError(f"the loss must be a finite number; got {mean} at step {step}")
        if max_norm is not None:
            clip_grads_with_norm_(parameters, max_norm, _norm_of_gradients(parameters, own))
        optimizer.step()
        record["step"] = step
        record["losses"].append(mean)
        writes = folder is not None and (step % every == 0 or step == n_steps)
        if writes and (rank == 0 or shares):  # what lies elsewhere must be sent here
            save_checkpoint(Path(folder) / f"step-{step:08}", model, optimizer, record)
    if world > 1:
        dist.barrier()  # what process 0 has written is there for all
    return record["losses"]


def _own(device: torch.device | str | None) -> torch.device:
    """Choose the GPU of this process, if none is named, and the CPU, if there is no GPU."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def _processes(device: torch.device, timeout: timedelta) -> tuple[int, int]:
    """Join the processes that torchrun started; give the number of this one, and of all."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _stream(
    batches: Callable[[int], Iterable], first: int, start: int
) -> Iterator[tuple[object, int, int]]:
    """Yield batches without end, from one of an epoch on, each with the place of the next."""
    for epoch in count(first):
        number = 0
        for number, batch in enumerate(batches(epoch), 1):
            if number > start:
                yield batch, epoch, number
        if not number:
            raise ValueError(f"an epoch must have at least one batch; got none in epoch {epoch}")
        start = 0


def _mean_gradients(
    parameters: list[Tensor],
    own: set[Tensor],
    total: float,
    n_tokens: int,
    device: torch.device,
    world: int,
) -> float:
    """Turn gradients of a sum in each process into those of the mean over all; give the mean.

    Those of a process's own parameters are already of the sum in all.
    """
    numbers = [total, n_tokens, *(p.grad is not None for p in parameters)]
    if world > 1:
        numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(numbers)
        numbers = numbers.tolist()
    total, n_tokens, *used = numbers
    if not n_tokens:
        raise ValueError("a batch must have at least one token that counts; got 0")
    if not any(used):
        raise ValueError("the loss must depend on parameters of the optimizer; it has none of them")
    for p in (p for p, some in zip(parameters, used, strict=True) if some):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if world > 1 and p not in own:
            dist.all_reduce(p.grad)
        p.grad /= n_tokens
    return total / n_tokens


def _norm_of_gradients(parameters: list[Tensor], own: set[Tensor]) -> Tensor:
    """Give the norm of all gradients together, those of other processes' own among them."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p not in own])
    if not own:
        return norm
    squares = get_total_norm([p.grad for p in parameters if p in own]).square()
    dist.all_reduce(squares)
    return (norm.square() + squares).sqrt()
