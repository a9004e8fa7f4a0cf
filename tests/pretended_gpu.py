"""A GPU simulated on the CPU, for tests of code that only runs on a GPU.

Tensors report the device cuda:0 and are computed on the CPU. Operations that mix them with CPU tensors raise, as in
CUDA. Operations that make the host wait for the GPU are recorded with the line that called them. This needs no CUDA
build of PyTorch.

    with pretended_gpu(monkeypatch) as gpu:
        train.main(["--device", "cuda", ...])
    print(gpu.waits)

Not simulated: bfloat16, the rounding of a GPU's kernels, and CUDA graphs (rows of codes are computed, not replayed).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._dynamo  # PyTorch imports it for a dispatch mode, and must not do so while a GPU is simulated
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from modules import GatedPixelCNN, RowSampler

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda", 0)
MEMORY = 1 << 30  # bytes
COPIES = {"_to_copy", "copy_"}
# Their result has a size that depends on the values, or is a number on the host.
WAITED_FOR = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "_unique2"}
WAITED_FOR |= {"unique_dim", "unique_consecutive", "repeat_interleave", "_linalg_eigh", "histc"}
INDEXED = {
    "index",
    "index_put_",
    "index_put",
    "_unsafe_index",
}  # by masks, whose result has an unknown size, or by indices on the CPU


class GPUTensor(Tensor):
    """A tensor that reports the device cuda:0; its `values` are a CPU tensor."""

    @staticmethod
    def __new__(cls, values: Tensor):
        # For PyTorch's C++ its device is "meta": cuda would need parts that a CPU build lacks.
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, device="meta", **layout)
        made.values = values
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __repr__(self, **how):
        return f"GPUTensor({self.values})"

    def __format__(self, form: str) -> str:
        return format(self.item(), form) if form else repr(self)

    def __reduce_ex__(self, protocol: int):
        return self.values.__reduce_ex__(protocol)  # a checkpoint holds the values

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        raise AssertionError("outside of pretended_gpu")


class PretendedGPU(TorchDispatchMode):
    """Computes the GPU's operations, and records in `waits` the lines that made the host wait."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.generators: list[torch.Generator] = []  # of the GPU

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = dict(named or {})
        leaves = tree_leaves((arguments, named))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, GPUTensor)]
        here = [tensor for tensor in tensors if not isinstance(tensor, GPUTensor)]
        name = function._schema.name.removeprefix("aten::")
        to_gpu = bool(there)
        if name == "copy_":
            to_gpu = isinstance(arguments[0], GPUTensor)
        elif named.get("device") is not None:
            to_gpu = is_gpu(named["device"])
            named["device"] = torch.device("cpu")
        named.pop("pin_memory", None)
        self.refuse_mixtures(name, there, here)
        if named.get("generator") is not None and self.owns(named["generator"]) != to_gpu:
            raise RuntimeError(f"{name}: a generator of another device than the tensor")
        if self.waited_for(name, arguments, named, there, here, to_gpu):
            self.waits.append(asking_line())
        results = function(*tree_map(values_of, arguments), **tree_map(values_of, named))
        changed = {id(tensor.values): tensor for tensor in there}  # changed in place, and returned as the same tensor

        def given_back(value: object) -> object:
            if not to_gpu or not isinstance(value, Tensor):
                return value
            return changed[id(value)] if id(value) in changed else GPUTensor(value)

        return tree_map(given_back, results)

    def owns(self, generator: torch.Generator) -> bool:
        """Return whether a generator is the GPU's, by its address: PyTorch returns it as another object."""
        return generator._cdata in [own._cdata for own in self.generators]

    def refuse_mixtures(self, name: str, there: list[Tensor], here: list[Tensor]) -> None:
        """Raise as CUDA does if tensors of both devices are mixed; scalars may be, except when they are stacked."""
        if not there or not here or name in COPIES | INDEXED:
            return
        if name in ("cat", "stack", "index_select") or any(tensor.dim() for tensor in here):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")

    def waited_for(self, name: str, arguments: tuple, named: dict, there: list, here: list, to_gpu: bool) -> bool:
        """Return whether an operation makes the host wait."""
        if name in COPIES:
            pinned = all(getattr(tensor, "pinned", False) for tensor in here)
            blocking = not (named.get("non_blocking") or name == "copy_" and arguments[2:] == (True,))
            return (bool(here) == to_gpu or bool(there) != to_gpu) and (blocking or not pinned)
        if name in INDEXED and there:
            indices = tree_leaves(arguments[1])
            masked = any(index.dtype in (torch.bool, torch.uint8) for index in indices if isinstance(index, Tensor))
            return masked or bool(here)
        return name in WAITED_FOR and bool(there)


class Moves(TorchFunctionMode):
    """Intercepts functions that move tensors to the GPU, before PyTorch's C++ looks for one."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = dict(named or {})
        if function is Tensor.tolist:  # PyTorch refuses it for subclasses
            return function(arguments[0].cpu())
        if function in (Tensor.to, Tensor.cuda):
            tensor, *how = arguments
            target = [of for of in (*how, *named.values()) if is_gpu(getattr(of, "device", of))]
            if target or function is Tensor.cuda:
                return move(tensor, [*how, *named.values()], named)
        if function is Tensor.new_tensor and isinstance(arguments[0], GPUTensor):
            return move(torch.tensor(arguments[1], dtype=named.get("dtype") or arguments[0].dtype), [], {})
        if function in (torch.tensor, torch.as_tensor) and is_gpu(named.get("device")):
            return move(function(*arguments, **named | {"device": "cpu"}), [], {})
        return function(*arguments, **named)


def move(tensor: Tensor, how: list, named: dict) -> Tensor:
    """Move a tensor to the GPU, in the type and memory format that `how` names."""
    dtype = next((of for of in how if isinstance(of, torch.dtype)), None)
    given = {"memory_format": named["memory_format"]} if named.get("memory_format") else {}
    if isinstance(tensor, GPUTensor) and dtype in (None, tensor.dtype) and not given:
        return tensor
    given |= {"dtype": dtype, "non_blocking": named.get("non_blocking", False), "device": GPU}
    return torch.ops.aten._to_copy.default(tensor, **given)


def is_gpu(device: object) -> bool:
    """Return whether an argument names the GPU."""
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def values_of(argument: object) -> object:
    return argument.values if isinstance(argument, GPUTensor) else argument


def asking_line() -> str:
    """Return the innermost line of the project on the stack, and its function."""
    frame = sys._getframe()
    while frame and (Path(frame.f_code.co_filename).parent != ROOT):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}" if frame else "a test"


def pinned(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.pinned = True
    return copy


def warm_up_and_reset(sampler: RowSampler) -> Callable[[], None]:
    """Replace the capture of a CUDA graph: sample one row, then reset."""
    sampler.sample_row()
    sampler.reset()
    return sampler.sample_row


@contextmanager
def pretended_gpu(patch) -> Iterator[PretendedGPU]:
    """Simulate a GPU; `patch` is pytest's monkeypatch."""
    gpu = PretendedGPU()
    generator = torch.Generator

    def made(device="cpu"):
        one = generator()
        if is_gpu(device):
            gpu.generators.append(one)
        return one

    answers = {"is_available": True, "is_bf16_supported": False, "current_device": 0, "device_count": 1}
    answers |= {"get_device_name": "a pretended GPU", "mem_get_info": (MEMORY, MEMORY), "_lazy_init": None}
    answers |= dict.fromkeys(("memory_reserved", "memory_allocated", "max_memory_allocated"), 0)
    answers |= dict.fromkeys(("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"))
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    patch.setattr(torch, "Generator", made)
    patch.setattr(Tensor, "pin_memory", pinned)
    patch.setattr(RowSampler, "capture_graph", warm_up_and_reset)
    for name in ("sample", "generate"):  # inference mode does not support such tensors
        patch.setattr(GatedPixelCNN, name, torch.no_grad()(getattr(GatedPixelCNN, name).__wrapped__))
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Moves(), gpu:
            yield gpu
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
