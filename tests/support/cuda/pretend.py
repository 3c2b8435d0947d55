"""A GPU that is not there: tensors in CPU memory are real, those on cuda are fake. What mixes them, or waits, shows.

`with Pretend() as gpu:` runs any code. `gpu.events` counts, by the line of the project that asked for it, what moves
between devices ("to device", "to host"), what waits for the device ("wait"), and what mixes devices ("mixed"; "host
scalar" where the tensor in CPU memory has one entry). Values that are read from the device are made up: all `read`.
Import it before torch. It reaches into private parts of torch: see the version in guard.py.
"""

from tests.support.cuda import guard

guard.load()

import collections  # noqa: E402
import contextlib  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

PROJECT = tuple(str(Path(__file__).parents[3] / name) + "/" for name in ("elastic_core", "tasks", "benchmarks"))
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)

# Without CUDA's own kernel the dispatcher takes this operation apart before any mode sees it.
_library = torch.library.Library("aten", "IMPL")
_library.impl("silu_backward", lambda grad, x: torch.empty_like(x), "CUDA")

torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda *args, **keywords: True
torch.cuda._lazy_init = lambda: None
torch.cuda.get_device_capability = lambda *args: (9, 0)
torch.cuda.max_memory_allocated = lambda *args: 0
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.set_device = lambda *args: None  # one function each: the compiler looks them up by identity
torch.cuda.synchronize = lambda *args: None


def caller() -> str:
    """The project's innermost line in the stack; "backward" in autograd's own threads."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PROJECT):
            return f"{name.removeprefix(str(Path(__file__).parents[3]) + '/')}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "backward"


class Pretend(TorchDispatchMode):
    def __init__(self, read: float = 1.0):
        super().__init__()
        self.fake, self.read = FakeTensorMode(allow_non_fake_inputs=True), read
        self.events: collections.Counter[tuple[str, str, str]] = collections.Counter()

    def __enter__(self):
        self.lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") as a copy from the host
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.lifts)
        return super().__exit__(*error)

    def count(self, kind: str) -> dict[str, int]:
        """The events of one kind: "operation at line" → number."""
        return {f"{func} in {where}": n for (what, func, where), n in self.events.items() if what == kind}

    def log(self, kind: str, func) -> None:
        self.events[kind, str(func), caller()] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        asked = kwargs.get("device")
        asked = None if asked is None else torch.device(asked)
        if func in (aten.pin_memory.default, aten._pin_memory.default):
            return args[0].clone()
        if not fakes and not (asked is not None and asked.type == "cuda"):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.log("wait", func)
            dtype = fakes[0].dtype
            return True if dtype == torch.bool else self.read if dtype.is_floating_point else int(self.read)
        if func is aten.equal.default:
            self.log("wait", func)
            return True
        if func in COPIES:
            source, held = (args[1], args[0]) if func is aten.copy_.default else (args[0], None)
            target = (asked or source.device) if held is None else held.device
            if source.device.type == "cuda" and target.type == "cpu":
                self.log("to host", func)
                if held is not None:
                    return held.fill_(self.read)
                return torch.full(source.shape, self.read, dtype=kwargs.get("dtype") or source.dtype)
            if source.device.type == "cpu" and target.type == "cuda":
                is_free = kwargs.get("non_blocking", False) or (held is not None and len(args) > 2 and args[2])
                self.log("to device" if is_free else "wait", func)
        elif fakes and (real := [t for t in tensors if not isinstance(t, FakeTensor) and t.device.type == "cpu"]):
            self.log("mixed" if any(t.dim() for t in real) else "host scalar", func)
        return self._run(func, args, kwargs)

    def _run(self, func, args, kwargs):
        try:
            with self.fake:
                out = func(*args, **kwargs)
        except Exception as error:
            if "DynamicOutputShape" in type(error).__name__ or "DataDependent" in type(error).__name__:
                self.log("wait", func)
            raise
        return tree_map(self._in_host_memory, out)

    def _in_host_memory(self, value):
        """A fake tensor in CPU memory as a real one, for example of zeros_like(t, device="cpu")."""
        is_host = isinstance(value, FakeTensor) and value.device.type == "cpu"
        return torch.full(value.shape, self.read, dtype=value.dtype) if is_host else value


def _set_data(self, value):
    """`parameter.data = parameter.data.to("cuda")`: a real tensor becomes a fake one, the same Python object."""
    if isinstance(value, FakeTensor) and not isinstance(self, FakeTensor):
        torch.utils.swap_tensors(self, torch.nn.Parameter(value, self.requires_grad))
    else:
        torch._C.TensorBase.data.__set__(self, value)


torch.nn.Parameter.data = property(lambda self: torch._C.TensorBase.data.__get__(self), _set_data)


class Stream:
    """torch.cuda's stream and event in one, for FSDP: everything has happened."""

    device = CUDA

    def __init__(self, *args, **keywords):
        pass

    def record_event(self, event=None):
        return event or self

    def query(self):
        return True

    def record(self, stream=None):
        return self

    def _nothing(self, *args):
        pass

    wait = wait_event = wait_stream = synchronize = _nothing


def pretend_streams() -> None:
    """torch.cuda's streams and events, which FSDP uses."""
    current = Stream()
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.current_stream = lambda *args, **keywords: current
    torch.cuda.default_stream = lambda *args, **keywords: current
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.is_current_stream_capturing = lambda: False
