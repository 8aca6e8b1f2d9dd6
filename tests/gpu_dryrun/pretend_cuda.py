"""Lets vLLM's GPU engine run where there is no GPU: tensors "on cuda" are CPU tensors, Triton kernels are interpreted.

For tests only, in a process of its own: `install()` before vLLM is imported. What is real: vLLM's Python (runner,
scheduler, block tables, attention backend) and every Triton kernel it launches, computed by Triton's interpreter; CUDA
graphs are noted and replayed (`pretend_graphs.py`). What is not: time, memory, streams and the compiled extensions,
whose few operations a Llama needs are written out in `_register_operations`.
"""

import contextlib
import os
import sys
import time
import types

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import pretend_graphs
import torch
from torch.overrides import TorchFunctionMode

MEMORY = 4 << 30
NAME = "pretended GPU"


class _Here(TorchFunctionMode):
    """Sends whatever asks for a CUDA device to the CPU, and pins nothing."""

    # Functions that take a device by position, and what becomes of methods that only make sense on a GPU.
    _BY_POSITION = frozenset({"to", "empty", "new_empty", "new_zeros", "new_full", "set_default_device", "type"})
    _READ_BY_HOST = frozenset({"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__"})
    _UNINITIALISED = frozenset({"empty", "empty_like", "new_empty", "empty_strided"})

    def __torch_function__(self, function, types_, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name in ("cuda", "pin_memory"):
            return args[0]
        if name == "is_pinned":
            return True
        if name == "record_stream":
            return None
        kwargs.pop("pin_memory", None)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        if name in self._BY_POSITION:
            args = tuple(torch.device("cpu") if _is_cuda(argument) else argument for argument in args)
        if name in self._READ_BY_HOST and pretend_graphs.is_capturing():
            pretend_graphs.refuse(name)
        result = function(*args, **kwargs)
        # Kernels read past what they use; on a GPU that is masked later, here NaN would warn.
        if name in self._UNINITIALISED and not pretend_graphs.is_capturing() and isinstance(result, torch.Tensor):
            result.zero_()
        return result


def _is_cuda(device):
    return (isinstance(device, torch.device) and device.type == "cuda") or (
        isinstance(device, str) and device.startswith("cuda")
    )


class _Stream:
    cuda_stream = stream_id = 0

    def __init__(self, *args, **kwargs):
        self.device = torch.device("cuda:0")

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False

    def query(self):
        return True

    def record_event(self, event=None):
        return event or _Event()

    def _nothing(self, *args):
        return None

    wait_stream = wait_event = synchronize = _nothing


class _Event:
    """Passed as soon as it is recorded: nothing is asynchronous here."""

    def __init__(self, *args, **kwargs):
        self._recorded = 0.0

    def record(self, *args):
        self._recorded = time.perf_counter()

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1000 * (other._recorded - self._recorded)

    def _nothing(self, *args):
        return None

    synchronize = wait = _nothing


def _constant(value):
    return lambda *args, **kwargs: value


def _pretend_device():
    stream = _Stream()
    properties = types.SimpleNamespace(
        name=NAME, major=9, minor=0, multi_processor_count=4, total_memory=MEMORY, is_integrated=False,
        shared_memory_per_block_optin=232448, warp_size=32, max_threads_per_multi_processor=2048, uuid="GPU-0",
        regs_per_multiprocessor=65536, L2_cache_size=50 << 20, gcnArchName="",
    )  # fmt: skip
    random_state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_available": True, "is_initialized": False, "is_current_stream_capturing": False, "device_count": 1,
        "current_device": 0, "get_device_properties": properties, "get_device_capability": (9, 0),
        "get_device_name": NAME, "mem_get_info": (MEMORY, MEMORY), "memory_stats": {}, "memory_allocated": 0,
        "memory_reserved": 0, "max_memory_allocated": 0, "current_stream": stream, "default_stream": stream,
        "current_blas_handle": 0, "get_rng_state": random_state, "get_rng_state_all": random_state,
    }  # fmt: skip
    silent = ("set_device", "synchronize", "empty_cache", "set_stream", "reset_peak_memory_stats", "manual_seed_all",
              "_lazy_init", "set_rng_state", "set_rng_state_all")  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, _constant(value))
    for name in silent:
        setattr(torch.cuda, name, _constant(None))
    torch.cuda.memory.get_allocator_backend = _constant("none")
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event
    torch.cuda.stream = torch.cuda.device = lambda *args: contextlib.nullcontext()
    answers = {
        "is_available": True, "current_accelerator": torch.device("cuda"), "device_count": 1,
        "current_device_index": 0, "get_memory_info": (MEMORY, MEMORY), "memory_stats": {}, "memory_reserved": 0,
        "memory_allocated": 0, "max_memory_allocated": 0, "current_stream": stream,
    }  # fmt: skip
    for name, value in answers.items():
        setattr(torch.accelerator, name, _constant(value))
    for name in ("set_device_index", "synchronize", "empty_cache", "reset_peak_memory_stats", "set_stream"):
        setattr(torch.accelerator, name, _constant(None))


def _pretend_generators():
    import torch._dynamo
    import torch._inductor.config
    import torch.distributed.tensor

    real = torch.Generator

    class Generator(real):
        def __new__(cls, device=None):
            return real.__new__(cls)

    torch.Generator = Generator


def pretend_driver():
    """Triton has an active driver, of compute capability 9.0, that launches nothing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        """Interpreted kernels ask a driver for the device, and for nothing else."""

        @staticmethod
        def is_active():
            return True

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def set_current_device(self, device):
            pass

        def get_device_capability(self, device=0):
            return 9, 0

        def get_device_interface(self):
            return torch.cuda

        def map_python_to_cpp_type(self, type_):
            return type_

        def get_benchmarker(self):
            return lambda function, quantiles=None, **kwargs: [1.0] * len(quantiles or [1])

        def get_empty_cache_for_benchmark(self):
            return torch.empty(1)

        def clear_cache(self, cache):
            pass

    triton.backends.backends["nvidia"].driver.is_active = staticmethod(lambda: True)
    triton.runtime.driver.set_active(Driver())


def _register_operations():
    """What a Llama over TRITON_ATTN asks vLLM's compiled extension for, by name."""
    library = torch.library.Library("_C", "FRAGMENT")

    def operation(schema, function, key="CompositeExplicitAutograd"):
        library.define(schema)
        library.impl(schema.partition("(")[0], function, key)

    def gated(activation):
        def run(result, input):
            gate, up = input.chunk(2, dim=-1)
            result.copy_(activation(gate) * up)

        return run

    for name in (
        "cutlass_scaled_mm_supports_fp8",
        "cutlass_scaled_mm_supports_block_fp8",
        "cutlass_group_gemm_supported",
        "cutlass_scaled_mm_supports_fp4",
    ):
        operation(f"{name}(int capability) -> bool", _constant(False), "CompositeImplicitAutograd")
    gelu = torch.nn.functional.gelu
    operation("silu_and_mul(Tensor! result, Tensor input) -> ()", gated(torch.nn.functional.silu))
    operation("gelu_and_mul(Tensor! result, Tensor input) -> ()", gated(gelu))
    operation("gelu_tanh_and_mul(Tensor! result, Tensor input) -> ()", gated(lambda x: gelu(x, approximate="tanh")))
    # "The device's view of pinned host memory" is that memory.
    operation("get_cuda_view_from_cpu_tensor(Tensor tensor) -> Tensor", lambda tensor: tensor.view(tensor.shape))
    operation("weak_ref_tensor(Tensor tensor) -> Tensor", lambda tensor: tensor.view(tensor.shape))
    return library


def _pretend_extensions():
    for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch", "_qutlass_C", "vllm_flash_attn._vllm_fa3_C"):
        sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
    # Asked for at shutdown only; without a GPU there is no memory of its kind to give back.
    allocator = sys.modules["vllm.cumem_allocator"] = types.ModuleType("vllm.cumem_allocator")
    for name in ("init_module", "python_create_and_map", "python_unmap_and_release"):
        setattr(allocator, name, _constant(None))
    sys.modules["vllm._C_stable_libtorch"].operations = _register_operations()


def _pretend_platform():
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Platform(NonNvmlCudaPlatform):
        dist_backend = "gloo"
        dispatch_key = "CPU"

        @classmethod
        def get_device_capability(cls, device_id=0):
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id=0):
            return NAME

        @classmethod
        def get_device_total_memory(cls, device_id=0):
            return MEMORY

        @classmethod
        def device_count(cls):
            return 1

        @classmethod
        def is_pin_memory_available(cls):
            return False

    vllm.platforms._current_platform = Platform()


def _skip_warmup():
    """Warming kernels up imports every model that has some; two sampling kernels are more than the interpreter can do,
    of which vLLM's own warm-up requests need one."""
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

    def in_pytorch(logits, k, p, has_topp_only_rows=True):
        return topk_topp_sampler.apply_top_k_top_p_pytorch(logits, k, p)

    topk_topp_sampler.apply_top_k_top_p_triton = in_pytorch
    StructuredOutputsWorker.apply_grammar_bitmask = _constant(None)
    gpu_worker.kernel_warmup = _constant(None)


def install():
    """From now on this process has a GPU, as far as vLLM can tell."""
    _pretend_device()
    _pretend_generators()
    pretend_driver()
    _pretend_extensions()
    _pretend_platform()
    pretend_graphs.install()
    _skip_warmup()
    _Here().__enter__()
