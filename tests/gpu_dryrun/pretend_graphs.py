"""CUDA graphs where there is no GPU: a capture notes what would be launched, a replay runs it on the same memory.

As on a GPU:

- A capture launches nothing: no memory is written. Asking for what the device holds raises.
- A replay uses the addresses of the capture. It raises if memory that the graph did not make itself was freed since; on
  a GPU it would read and write whatever lies there now.
- Python does not run again: numbers, grids and branches stay those of the capture.
- What a graph makes is undefined until its replay has made it anew: NaN, or 1 where there is none.

Noted are the operations of PyTorch and of vLLM's compiled extension, by PyTorch's dispatcher, and Triton's launches.
Not as on a GPU: graphs share no memory with each other, and host and device memory are one.
"""

import inspect

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from triton.runtime.interpreter import InterpretedFunction

#: The graph that is being captured, and the bodies of operations that vLLM writes in Python, by qualified name.
_capturing = None
bodies = {}

#: Operations whose result, or its shape, the host must know.
_READ_BY_HOST = {f"aten::{name}" for name in ("item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero")}

#: Graphs that were captured and replayed: whole forwards, and pieces between attentions.
counts = {"captured whole": 0, "captured pieces": 0, "replayed whole": 0, "replayed pieces": 0}


def is_capturing(*args):
    """Whether a graph is being captured."""
    return _capturing is not None


def at_replay(action):
    """Do something here at every replay of the graph that is being captured, or now if there is none."""
    if _capturing is None:
        action()
    else:
        _capturing.actions.append(action)


class _Place:
    """Where a tensor lies; keeps its memory only if the graph made it."""

    def __init__(self, tensor, owned):
        storage = tensor.untyped_storage()
        self._storage, self._weak = (storage if owned else None), storage._weak_ref()
        self._layout = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self):
        storage = self._storage or torch.UntypedStorage._new_with_weak_ptr(self._weak)
        if storage is None:
            raise RuntimeError(f"a captured CUDA graph uses {self._layout[1]} of {self._dtype} that was freed since")
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._layout)

    def spoil(self):
        tensor = self.tensor()
        if not tensor.dtype.is_floating_point:
            tensor.fill_(1)
        elif tensor.dtype.itemsize == 1:
            tensor.view(torch.uint8).fill_(0x7F)
        else:
            tensor.fill_(float("nan"))

    def __del__(self):
        torch.UntypedStorage._free_weak_ref(self._weak)


class Graph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self, keep_graph=False):
        self.actions, self.kind = [], "pieces"
        self._made, self._memory = [], set()

    def capture_begin(self, pool=None, **kwargs):
        global _capturing
        assert _capturing is None and not self.actions
        _capturing = self
        _notes.__enter__()

    def capture_end(self):
        global _capturing
        _capturing = None
        _notes.__exit__(None, None, None)
        counts[f"captured {self.kind}"] += 1

    def replay(self):
        counts[f"replayed {self.kind}"] += 1
        with torch.inference_mode():
            for place in self._made:
                place.spoil()
            for action in self.actions:
                action()

    def make(self, tensor):
        """Take over a tensor that was made during the capture."""
        self._memory.add(tensor.untyped_storage()._cdata)
        self._made.append(_Place(tensor, True))
        return self._made[-1]

    def note(self, function, args, kwargs, results=()):
        """Call a function at each replay, on tensors that lie where these lie, and put what it returns into `results`:
        (position, place), by position among the tensors that are returned."""
        args, kwargs = tree_map_only(torch.Tensor, self._place, (args, kwargs))

        def action():
            own = tree_map_only(_Place, _Place.tensor, (args, kwargs))
            returned = function(*own[0], **own[1])
            if results:
                returned = _tensors(returned)
            for position, place in results:
                place.tensor().copy_(returned[position])

        self.actions.append(action)

    def _place(self, tensor):
        return _Place(tensor, tensor.untyped_storage()._cdata in self._memory)


class capture:
    """In place of `torch.cuda.graph`."""

    def __init__(self, cuda_graph, pool=None, stream=None, **kwargs):
        self._graph = cuda_graph

    def __enter__(self):
        self._graph.kind = "whole"
        self._graph.capture_begin()

    def __exit__(self, *args):
        self._graph.capture_end()


class _Notes(TorchDispatchMode):
    """Notes operations in the graph that is captured. Those that only make tensors run, for their results' shapes.

    There is one, whatever the graph: a piece ends, and the next begins, inside an operation, where PyTorch takes the
    mode that met the operation away and puts it back behind it.
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, operation._schema
        if schema.name in bodies:
            with self:
                return bodies[schema.name](*args, **kwargs)
        if schema.name in _READ_BY_HOST:
            refuse(schema.name)
        if schema.is_mutable:
            _capturing.note(operation, args, kwargs)
            given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
            written = [given[argument.name] for argument in schema.arguments if _written(argument)]
            return (None, *written[:1])[len(schema.returns)] if len(schema.returns) < 2 else tuple(written)
        returned = operation(*args, **kwargs)
        there = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        fresh = [
            (position, _capturing.make(tensor))
            for position, tensor in enumerate(_tensors(returned))
            if tensor.untyped_storage()._cdata not in there
        ]
        if "empty" in schema.name:
            for _, place in fresh:
                place.tensor().zero_()  # an index that is garbage would not even run here
        elif fresh:
            _capturing.note(operation, args, kwargs, fresh)
        return returned


_notes = _Notes()


def refuse(name):
    """A capture fails where the host asks for what the device holds."""
    raise RuntimeError(f"{name}: the host reads from the device while a CUDA graph is being captured")


def _tensors(tree):
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def _written(argument):
    return argument.alias_info is not None and argument.alias_info.is_write


def note_launches():
    """Triton's launches are noted while a graph is captured."""
    launch = InterpretedFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        if _capturing is None or warmup:
            return launch(self, *args, grid=grid, warmup=warmup, **kwargs)
        if callable(grid):
            own = {name: value for name, value in kwargs.items() if name in self.arg_names}
            bound = inspect.signature(self.fn).bind(*args, **own)
            bound.apply_defaults()
            grid = grid(bound.arguments)
        _capturing.note(lambda *args, **kwargs: launch(self, *args, grid=grid, warmup=False, **kwargs), args, kwargs)

    InterpretedFunction.run = run


def note_bodies():
    """vLLM's operations written in Python are looked into: they launch kernels of their own."""
    import vllm.utils.torch_utils

    register = vllm.utils.torch_utils.direct_register_custom_op

    def noted(op_name, op_func, *args, target_lib=None, **kwargs):
        library = target_lib or vllm.utils.torch_utils.vllm_lib
        bodies[f"{library.ns}::{op_name}"] = op_func
        register(op_name, op_func, *args, target_lib=target_lib, **kwargs)

    vllm.utils.torch_utils.direct_register_custom_op = noted


def install():
    """From now on graphs are captured and replayed as above; before vLLM's models are imported."""
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture
    torch.cuda.graph_pool_handle = lambda: (0, 1)
    torch.cuda.is_current_stream_capturing = is_capturing
    note_launches()
    note_bodies()
