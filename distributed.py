"""Several processes that train one network together, started by torchrun: the one place that knows how many there are.

    torchrun --nproc-per-node 2 train.py ...

Each process computes the same batch indices and draws the same random numbers, those of the whole batch, and takes its
part of them. Sums over all processes then give each the gradient, losses and codebook statistics of the whole batch, so
that all hold the same weights, bit for bit. The first process alone owns the run directory and the terminal.

Where there is one process, as without torchrun, every function here does nothing.
"""

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from console import RunError, UserError, logger, summarise

T = TypeVar("T")

# Others wait so long for the first, which may have a large data set to decode. A process that ends, ends all at once.
TIMEOUT = timedelta(hours=12)


# ---------------------------------------------------------------- who takes part


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Return the number of this process on its machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def is_first() -> bool:
    """Return whether this is the process that writes files and messages."""
    return rank() == 0


@contextmanager
def processes() -> Iterator[None]:
    """Connect with the other processes that torchrun started, until the end of the block. The first alone has a voice.

    Raises:
        SystemExit: An error that the first process reports, or the loss of the others, ends this one too.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    # Before there is a group, which its default arguments would keep if an optimiser imported it later. A thread of a
    # group that is left at the end may call the interpreter while that is closing, which aborts the process.
    import torch.distributed.nn.functional

    with_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if with_gpus else "gloo", timeout=TIMEOUT)
    if not is_first():
        sys.stdout, logger.disabled = io.StringIO(), True
        warnings.simplefilter("ignore")
    complete = False
    try:
        yield
        complete = True
    except UserError:
        if is_first():
            raise
        raise SystemExit(2) from None
    finally:
        if complete or not with_gpus:  # NCCL may wait for processes that have not failed
            dist.destroy_process_group()


def device_name(name: str) -> str:
    """Return the device of this process for a --device that is the same in all: each has a GPU of its own.

    Raises:
        RunError: There are fewer GPUs than processes on this machine, or a GPU is named by its number.
    """
    if size() == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    if name not in ("auto", "cuda"):
        raise RunError(f"--device {name}: several processes take one GPU each: choose cuda, or cpu")
    count = torch.cuda.device_count()
    if count <= local_rank():
        raise RunError(f"this machine has GPUs for {count} processes: lower --nproc-per-node, or choose --device cpu")
    return f"cuda:{local_rank()}"


# ---------------------------------------------------------------- the parts of a batch


def part(count: int) -> slice:
    """Return this process's part of `count` slices. Parts differ by one at most."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


@contextmanager
def connected() -> Iterator[None]:
    """Turn the loss of another process into a RunError."""
    try:
        yield
    except RuntimeError as error:
        if size() == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = summarise(error)
        raise RunError(f"another process has ended ({reason:.80}): the same command resumes") from error


def add_up(tensor: Tensor) -> None:
    """Replace a tensor by its sum over all processes, which all get bit for bit."""
    if size() > 1:
        with connected():
            dist.all_reduce(tensor)


def add_up_numbers(*numbers: float) -> list[float]:
    """Return the sums of numbers over all processes."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    add_up(sums)
    return sums.tolist()


def average(tensors: list[Tensor], weight: float) -> None:
    """Replace float32 tensors of one device by their weighted means over all processes, whose weights add up to 1."""
    flat = flatten(tensors) * weight
    add_up(flat)
    unflatten(flat, tensors)


def take_from_first(tensors: list[Tensor]) -> None:
    """Replace float32 tensors of one device by those of the first process."""
    if size() > 1:
        flat = flatten(tensors)
        with connected():
            dist.broadcast(flat, 0)
        unflatten(flat, tensors)


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return a checksum of float32 tensors of one device. Of one process alone it is 0, without work."""
    return int(flatten(tensors).view(torch.int32).sum()) if size() > 1 else 0


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Return all values, in one vector."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@torch.no_grad()
def unflatten(flat: Tensor, tensors: list[Tensor]) -> None:
    """Copy values of `flatten` back into the tensors that they came from."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [values.view(tensor.shape) for values, tensor in zip(parts, tensors)])


# ---------------------------------------------------------------- decisions that all take together


def gather(value: T) -> list[T]:
    """Return the values of all processes, in their order."""
    values: list[Any] = [value] * size()
    if size() > 1:
        with connected():
            dist.all_gather_object(values, value)
    return values


def together(function: Callable[[], T]) -> T:
    """Return what a function returns in this process. A user's error in one of them ends all, and is reported once.

    Raises:
        RunError: Where there are several processes; otherwise whatever the function raises.
    """
    if size() == 1:
        return function()
    problem = None
    try:
        result = function()
    except (UserError, OSError) as error:
        problem = str(error)
    for number, text in enumerate(gather(problem)):
        if text is not None:
            raise RunError(text if number == 0 else f"process {number}: {text}")
    return result


def from_first(function: Callable[[], T]) -> T:
    """Return in all processes what a function returns in the first, where it is called. Errors as in `together`."""
    result: list[Any] = [together(lambda: function() if is_first() else None)]
    if size() > 1:
        with connected():
            dist.broadcast_object_list(result)
    return result[0]


def in_turn(function: Callable[[], T]) -> T:
    """Return what a function returns, called in the first process, then in the first of each machine, then in the rest.

    So what the function leaves on a disk, its own or a shared one, is made once. Errors as in `together`.
    """
    own = 0 if is_first() else 1 if local_rank() == 0 else 2
    results: list[T] = []

    def take_turn(turn: int) -> None:
        if turn == own:
            results.append(function())

    for turn in range(3 if size() > 1 else 1):
        together(partial(take_turn, turn))
    return results[0]


def check_same(what: str, value: object, advice: str) -> None:
    """Raise RunError if a value differs between processes."""
    if len(set(gather(value))) > 1:
        raise RunError(f"{what} differ between the processes: {advice}")


class Poll:
    """A number that all processes ask each other for, again and again.

    No process waits for the others: each time, the answer is that of the time before.
    """

    def __init__(self) -> None:
        self.pending: tuple[dist.Work, Tensor] | None = None

    def largest(self, number: int) -> int:
        """Return the largest number that a process gave the last time, 0 at first. All have to call it alike."""
        answer = 0
        with connected():
            if self.pending:
                work, numbers = self.pending
                work.wait()
                answer = int(numbers)
            numbers = torch.tensor(number)
            self.pending = dist.all_reduce(numbers, dist.ReduceOp.MAX, async_op=True), numbers
        return answer


def wait_for_all() -> None:
    """Wait until all processes have come here."""
    gather(None)
