"""Measurements: how long a run takes, how much memory, and how fast the device is at most."""

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from time import process_time

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tfm_ref.validation import check_size


def time_runs(
    run: Callable[..., object],
    inputs: Sequence[Sequence[Tensor]] = ((),),
    *,
    device: torch.device | str,
    seconds: float = 0.2,
    least: int = 10,
    most: int = 50,
) -> list[float]:
    """Time a function again and again, each time as if nothing were at hand.

    On a GPU its own events tell the time. Before each run its L2 cache is overwritten, which also
    keeps it busy while the CPU asks for the run: what is timed is the run, not the asking. On
    the CPU the time is that of the process, so that other programs do not count.

    Args:
        run: what is timed.
        inputs: what it is called with, one after the other and then again from the first.
        device: where it computes.
        seconds: how long all runs together should take.
        least: number of runs at least.
        most: number of runs at most.

    Returns:
        The time of each run in seconds, in order, without the runs that warm up.

    Raises:
        ValueError: if there are no inputs, or least is not an integer from 1 to most.
    """
    check_size("the number of inputs", len(inputs))
    check_size("least", least, most=most)
    clock = _cuda_clock(torch.device(device)) if _is_cuda(device) else _process_clock
    turns = itertools.cycle(inputs)
    clock(run, [next(turns) for _ in range(3)])
    (once,) = clock(run, [next(turns)])
    n_runs = min(most, max(least, int(seconds / max(once, 1e-9))))
    return clock(run, [next(turns) for _ in range(n_runs)])


def _is_cuda(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def _process_clock(run: Callable[..., object], inputs: Iterable[Sequence[Tensor]]) -> list[float]:
    """Time one run for each input by the time of the process."""
    seconds = []
    for terms in inputs:
        start = process_time()
        run(*terms)
        seconds.append(process_time() - start)
    return seconds


def _cuda_clock(device: torch.device) -> Callable[..., list[float]]:
    """Make a clock that times one run for each input by events of the GPU."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    overwritten = torch.empty(4 * l2, dtype=torch.int8, device=device)

    def clock(run: Callable[..., object], inputs: Iterable[Sequence[Tensor]]) -> list[float]:
        marks = []
        for terms in inputs:
            for _ in range(8):
                overwritten.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(*terms)
            stop.record()
            marks.append((start, stop))
        torch.cuda.synchronize(device)
        return [start.elapsed_time(stop) / 1000 for start, stop in marks]

    return clock


def peak_memory(run: Callable[[], object], *, device: torch.device | str) -> int:
    """Count the bytes that a run needs at its worst moment, beyond what was there before it.

    On a GPU the allocator tells. On the CPU the tensors that operations make are counted while
    they live; what a kernel takes and gives back within one operation is not seen.

    Args:
        run: what is measured.
        device: where it computes.

    Returns:
        The bytes, with those of what ``run`` returns.

    Example:
        Eight numbers of four bytes, then eight more.

        >>> ones = torch.ones(8)
        >>> peak_memory(lambda: (ones + 1).exp(), device="cpu")
        64
    """
    if _is_cuda(device):
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as live:
        result = run()
    del result
    return live.most


class _LiveTensors(TorchDispatchMode):
    """Count the bytes of all tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        result = operation(*args, **kwargs)
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self._meet(t.untyped_storage(), given)
        return result

    def _meet(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        """Count a storage, unless it is an old one seen in another way."""
        place, size = storage.data_ptr(), storage.nbytes()
        if place in given or place in self._known:
            return
        self._known.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._part, place, size)

    def _part(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def bytes_kept(run: Callable[[], object]) -> int:
    """Run something, and sum what autograd keeps of it for the backward pass.

    Args:
        run: what is run.

    Returns:
        Bytes; memory that several tensors share counts once.

    Example:
        >>> x = torch.zeros(3, dtype=torch.float32, requires_grad=True)
        >>> bytes_kept(lambda: x.square())
        12
    """
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    del output
    return sum(storage.nbytes() for storage in storages.values())


def measure(
    run: Callable[..., object],
    inputs: Sequence[Sequence[Tensor]] = ((),),
    *,
    device: torch.device | str,
    error: float,
    limit: float,
    **terms: float,
) -> dict[str, object]:
    """Time a function and count its memory, if what it computes is right.

    Args:
        run: what is measured.
        inputs: as for :func:`time_runs`.
        device: where it computes.
        error: how far its result was from what it should be.
        limit: how far it may be.
        terms: as for :func:`time_runs`.

    Returns:
        "seconds" of each run, "peak_bytes" of one, "error" and "limit", for a record.

    Raises:
        ValueError: if the error exceeds its limit or is no number.
    """
    if not error <= limit:
        raise ValueError(f"the error ({error:.3g}) exceeds its limit ({limit:.3g}): not measured")
    return {
        "seconds": time_runs(run, inputs, device=device, **terms),
        "peak_bytes": peak_memory(lambda: run(*inputs[0]), device=device),
        "error": error,
        "limit": limit,
    }


def kernels(run: Callable[[], object]) -> list[str]:
    """Name the kernels that a run has a GPU execute, in the order of their names."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sorted({e.name for e in profiler.events() if e.device_type == DeviceType.CUDA})


def matmul_peak(
    device: torch.device | str, dtype: torch.dtype = torch.bfloat16, *, size: int = 8192
) -> float:
    """Measure how fast a large matrix product is: what any other work can be held against.

    Args:
        device: where to compute.
        dtype: of both matrices.
        size: rows and columns of both.

    Returns:
        Operations per second, 2 · size³ in one product; from the median of the times.

    Raises:
        ValueError: if size is not an integer of at least 1.
    """
    check_size("size", size)
    pair = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)]
    return 2 * size**3 / median(time_runs(torch.mm, [pair], device=device))


def copy_peak(device: torch.device | str, *, n_bytes: int = 2**31) -> float:
    """Measure how fast memory is copied: the most that work bound by memory can hope for.

    Args:
        device: where the memory is.
        n_bytes: how much is copied, far more than any cache holds.

    Returns:
        Bytes per second, each byte counted as it is read and as it is written; from the median
        of the times.

    Raises:
        ValueError: if n_bytes is not an integer of at least 1.
    """
    check_size("n_bytes", n_bytes)
    pair = [torch.zeros(n_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    return 2 * n_bytes / median(time_runs(Tensor.copy_, [pair], device=device))


def read_peak(device: torch.device | str, *, n_bytes: int = 2**31) -> float:
    """Measure how fast memory is read: as :func:`copy_peak`, but with next to nothing written.

    Returns:
        Bytes per second.

    Raises:
        ValueError: if n_bytes is not an integer of at least 4.
    """
    check_size("n_bytes", n_bytes, least=4)
    numbers = torch.zeros(n_bytes // 4, device=device)
    return numbers.nbytes / median(time_runs(torch.sum, [[numbers]], device=device))


def peaks(device: torch.device | str) -> dict[str, float]:
    """Measure what the device can do at most: operations and bytes per second."""
    gpu = torch.device(device).type == "cuda"
    dtype, size, n_bytes = (torch.bfloat16, 8192, 2**31) if gpu else (torch.float32, 512, 2**26)
    return {
        "matmul": matmul_peak(device, dtype, size=size),
        "copy": copy_peak(device, n_bytes=n_bytes),
        "read": read_peak(device, n_bytes=n_bytes),
    }


def synchronize(device: torch.device | str) -> None:
    """Wait until all that was asked of a device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
