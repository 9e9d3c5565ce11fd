"""Pretend CUDA device for machines without one: tensors compute on the CPU and refuse what CUDA refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
FREE, TOTAL = 70 * 2**30, 80 * 2**30  # bytes

aten = torch.ops.aten
_MOVES = {aten.copy_, aten._to_copy}  # copy from one device to another
_INDEXING = {aten.index, aten.index_put, aten.index_put_}  # take indices from the CPU, too
_driver = SimpleNamespace(initialized=False, operations=0)  # done on the device


class DeviceMix(RuntimeError):
    """Tensors of two devices met in one operation."""


class CudaTensor(torch.Tensor):
    """A tensor that says it is on ``cuda:0`` and computes on ``held``, a tensor on the CPU that nobody else has.

    The C++ side of torch takes it for a CPU tensor without memory, since nothing there works on a device that torch was
    not built for: what asks for its device in C++, or reads its memory there, is overridden here.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    # ``tensor.data = values`` is no operation, so that ``held`` would stay what it was.
    data = property(lambda self: self.detach(), lambda self, values: self._set_data(values))

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool | None = None) -> torch.Tensor:
        if requires_grad is not None:  # accelerate makes a parameter by the type of the one that was there before
            return torch.nn.Parameter(held, requires_grad)
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=CPU)
        made.held = held
        return made

    __torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: _compute(func, args, kwargs or {}))

    def _set_data(self, values: torch.Tensor) -> None:
        if not isinstance(values, CudaTensor):
            raise RuntimeError("incompatible tensor type: the data of a CUDA tensor cannot be set to a CPU tensor")
        torch.Tensor.data.__set__(self, values)
        self.held = values.held

    def to(self, *args, copy: bool = False, **kwargs) -> torch.Tensor:
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        away = device is not None and device.type != "cuda"
        if not (away or copy or dtype not in (None, self.dtype) or memory_format):
            return self
        dtype = dtype or self.dtype
        return aten._to_copy(self, dtype=dtype, device=device if away else CUDA, memory_format=memory_format)

    def cpu(self) -> torch.Tensor:
        return self.to(CPU)

    def cuda(self, device: object = None) -> torch.Tensor:
        return self

    def tolist(self) -> object:
        return self.cpu().tolist()

    def numpy(self, **_) -> None:
        where = "Use Tensor.cpu() to copy the tensor to host memory first."
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy. {where}")

    def __array__(self, *_, **__) -> None:
        self.numpy()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()  # by which tied weights are recognised when a model is saved

    def __reduce_ex__(self, protocol: int) -> tuple:
        return CudaTensor, (self.held,)  # loads to the device that it came from

    def __repr__(self, **_) -> str:
        return f"{self.held!r} on {CUDA}"


def _compute(func, args: tuple, kwargs: dict) -> object:
    """Return what ``func`` gives on the CPU, on the device on which CUDA would have it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
    packet = func.overloadpacket
    if ours and packet not in _MOVES:
        _refuse_mix(packet, args, tensors)
    device = kwargs.get("device")
    if ours and packet is aten._to_copy and torch._C._current_autograd_node() is not None:
        # The backward of a change of dtype is asked for in C++, which takes the gradient's device for the CPU.
        device = CUDA
    if device is not None:
        on_cuda = torch.device(device).type == "cuda"
    else:
        on_cuda = isinstance(args[0], CudaTensor) if packet is aten.copy_ else bool(ours)
    generator = kwargs.get("generator")
    if generator is not None and on_cuda:
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
    if on_cuda and device is not None:
        _initialize()
        kwargs = kwargs | {"device": CPU}
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    _driver.operations += on_cuda
    if func is aten.mm.dtype:  # which CUDA alone has
        func, args = aten.mm.default, tuple(_held(arg).to(args[2]) for arg in args[:2])
    args, kwargs = tree_map(_held, (args, kwargs))
    out = func(*args, **kwargs)
    return tree_map(lambda leaf: _wrapped(leaf, ours), out) if on_cuda else out


def _refuse_mix(packet, args: tuple, tensors: list[torch.Tensor]) -> None:
    """Raise DeviceMix if a tensor is on the CPU, unless it has no dimension or is an index."""
    indices = args[1] if packet in _INDEXING and isinstance(args[0], CudaTensor) else ()
    for tensor in tensors:
        if not isinstance(tensor, CudaTensor) and tensor.ndim and not any(tensor is index for index in indices):
            shapes = ", ".join(f"{list(t.shape)} on {t.device}" for t in tensors)
            raise DeviceMix(f"Expected all tensors to be on the same device, but {packet} got {shapes}")


def _held(leaf: object) -> object:
    return leaf.held if isinstance(leaf, CudaTensor) else leaf


def _wrapped(leaf: object, arguments: list[CudaTensor]) -> object:
    """Return ``leaf`` as a CudaTensor; an operation in place returns the very tensor that it was given."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    for tensor in arguments:
        if tensor.held is leaf:
            if tensor.shape != leaf.shape or tensor.stride() != leaf.stride():
                raise NotImplementedError("the pretend device knows no operation that changes a shape in place")
            return tensor
    return CudaTensor(leaf)


class _AllOperations(TorchDispatchMode):
    """Sees operations that no CudaTensor takes part in: ``torch.zeros(3, device="cuda")``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


# What autocast multiplies in its dtype, as far as the tests go.
_AUTOCAST = (torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention)
_TAKE_A_DEVICE = (torch.device, torch.Tensor.to, torch._C._nn._parse_to)


class _AllCalls(TorchFunctionMode):
    """Keeps torch from asking a CUDA library that it was built without."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: _numbered(value, name == "device") for name, value in (kwargs or {}).items()}
        args = tuple(_numbered(arg, func in _TAKE_A_DEVICE) for arg in args)
        if func is torch.device and args[0] is CUDA:
            return CUDA
        if func is torch.Tensor.pin_memory:
            if isinstance(args[0], CudaTensor):
                raise RuntimeError("only dense CPU tensors can be pinned")
            return args[0].clone()  # whose pages are not locked: a promise of speed, and of nothing else
        if func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, (args[0], CUDA)
        if func is torch.Tensor.to and isinstance(args[1] if len(args) > 1 else None, CudaTensor):
            args = (args[0], CUDA, args[1].dtype, *args[2:])
        if func is torch.nn.functional.softmax and kwargs.get("dtype") and isinstance(args[0], CudaTensor):
            args = (args[0].to(kwargs.pop("dtype")), *args[1:])  # which C++ would do on the CPU
        if func in _AUTOCAST and torch.is_autocast_enabled("cuda"):
            args = tuple(_autocast(arg) for arg in args)
        return func(*args, **kwargs)


def _autocast(argument: object) -> object:
    floating = isinstance(argument, CudaTensor) and argument.is_floating_point()
    return argument.to(torch.get_autocast_dtype("cuda")) if floating else argument


def _numbered(argument: object, device: bool) -> object:
    """Return ``cuda:0`` for ``cuda``, and for the 0 that a ``device`` may be: torch would ask which device that is."""
    if isinstance(argument, str | torch.device):
        return CUDA if str(argument) in ("cuda", "cuda:0") else argument
    return CUDA if device and type(argument) is int and argument == 0 else argument


# ------------------------------------------------------------------------------------------------------ torch.cuda


def _initialize(answer: object = None) -> object:
    """Make sure of the driver, as most of torch.cuda does, and return ``answer``."""
    _driver.initialized = True
    return answer


def _reset_peak_memory_stats(device: object = None) -> None:
    if device is None:
        _initialize()  # to find out which device is the current one
    if not _driver.initialized:
        raise RuntimeError("Invalid device argument 0: did you call init?")


def _memory_stats(device: object = None) -> dict:
    """Return a byte that is reserved: a device on which nothing is held is not in use."""
    one = {"all": {"current": 1, "peak": 1}}
    return {"reserved_bytes": one, "allocated_bytes": one} if _driver.initialized else {}


@contextmanager
def pretend_cuda(free: int = FREE) -> Iterator[SimpleNamespace]:
    """Let torch have one CUDA device inside the with statement, not initialised yet, as at the start of a program.

    It says that ``free`` bytes are free. Yields its state: whether it is ``initialized``, and how many ``operations``
    ran on it.

    Not pretended: generators, streams, several devices, how much memory is in use (always a byte), autocast but for
    linear layers and attention, and threads, which see CudaTensors but cannot make any.
    """
    properties = SimpleNamespace(name="pretend", major=9, minor=0, total_memory=TOTAL, multi_processor_count=100)
    names = {
        "_lazy_init": _initialize,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "is_initialized": lambda: _driver.initialized,
        "device_count": lambda: 1,
        "current_device": lambda *_, **__: _initialize(0),
        "synchronize": lambda *_, **__: _initialize(None),
        "set_device": lambda *_, **__: _initialize(None),
        "get_device_name": lambda *_, **__: _initialize("pretend"),
        "get_device_properties": lambda *_, **__: _initialize(properties),
        "get_device_capability": lambda *_, **__: _initialize((9, 0)),
        "mem_get_info": lambda *_, **__: _initialize((free, TOTAL)),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": _reset_peak_memory_stats,
        "default_generators": (torch.Generator(),),  # for torch.manual_seed
    }
    _driver.initialized, _driver.operations = False, 0
    settings = torch._C._only_lift_cpu_tensors(), torch.__future__.get_swap_module_params_on_conversion()
    with (
        patch.multiple(torch.cuda, **names),
        patch("torch.cuda.memory.memory_stats_as_nested_dict", _memory_stats),
        patch.dict("os.environ", {"HF_DEACTIVATE_ASYNC_LOAD": "1"}),  # transformers reads weights without threads
        _AllOperations(),
        _AllCalls(),
    ):
        try:
            # torch.tensor(1, device="cuda") is made on the CPU and moved; a parameter that moves stays the same object.
            torch._C._set_only_lift_cpu_tensors(True)
            torch.__future__.set_swap_module_params_on_conversion(True)
            yield _driver
        finally:
            torch._C._set_only_lift_cpu_tensors(settings[0])
            torch.__future__.set_swap_module_params_on_conversion(settings[1])
