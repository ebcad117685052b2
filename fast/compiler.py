"""Compiled blocks and CUDA graphs: fewer and larger kernels, launched at once.

    compile_blocks(world.encoder.blocks)                # in place
    step = CUDAGraph(step, parameters)                  # forward and backward as one launch
"""
import sys
import warnings
from contextlib import nullcontext
from functools import lru_cache

import torch


def compile_blocks(blocks):
    """Compiles each block, in place; one compilation serves all blocks of a shape."""
    prepare_compiler()
    for block in blocks:
        block.compile(dynamic=False)


@lru_cache
def prepare_compiler():
    """Settings of torch.compile, once a process."""
    dynamo = torch._dynamo.config
    # Several shapes in one process (training, validation, planning); renamed in PyTorch 2.7.
    limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
    setattr(dynamo, limit, 64)
    # Layer norms are computed again in the backward pass, not kept; below 0.85 attention would be.
    torch._functorch.config.activation_memory_budget = 0.9
    # Inductor proposes TensorFloat32 for float32 matrix products; ours are in half precision.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    _normalise_wide_rows_in_one_pass()


def _normalise_wide_rows_in_one_pass():
    """Inductor keeps rows of up to 1,024 numbers in registers for a layer norm and reads wider ones
    twice. The encoder's have 1,408: with up to 2,048 in one pass, 2 clips from frames took 88.1
    instead of 89.7 ms on an H100. The hook is not a public name: where it is missing, nothing is
    changed."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V
    default = getattr(InductorChoices, "should_use_persistent_reduction", None)

    def persistent(features, *args, **options):
        if default(features, *args, **options):
            return True
        inner = features.get_reduction_hint() == ReductionHint.INNER
        sizes = V.graph.sizevars
        return inner and sizes.statically_known_leq(features.reduction_numel, 2048)

    if default:
        InductorChoices.should_use_persistent_reduction = staticmethod(persistent)


def eager():
    """Compiled blocks run uncompiled inside this context: for what is done too seldom, or in too
    many shapes, to be worth compiling."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


class CUDAGraph:
    """Forward and backward of a micro-batch as one CUDA graph: launching its kernels one by one
    takes longer than they run.

    step(batch) -> {name: scalar tensor}, and adds to the parameters' gradients. It may not wait for
    the GPU or talk to other processes. batch: {name: tensor on the host, page-locked}, each of the
    shapes of the first call. Gradients must stay where they are: zero_grad(set_to_none=False)."""

    def __init__(self, step, parameters):
        self.step, self.parameters, self.graph = step, parameters, None

    def __call__(self, batch):
        if self.graph is None:
            self._capture(batch)
        shapes = {name: value.shape for name, value in batch.items()}
        if shapes != {name: value.shape for name, value in self.staged.items()}:
            raise ValueError(f"a CUDA graph takes batches of one shape, this one has {shapes}")
        # Copied from the host while the micro-batch before it is being computed.
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(self.inputs_taken)
            for name, value in batch.items():
                self.staged[name].copy_(value, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self.copies)
        for name, value in self.staged.items():
            self.inputs[name].copy_(value)
        self.inputs_taken.record()
        self.graph.replay()
        return self.outputs

    def _capture(self, batch):
        rng_state = torch.cuda.get_rng_state()
        device = self.parameters[0].device
        self.inputs = {name: value.to(device) for name, value in batch.items()}
        self.staged = {name: torch.empty_like(value) for name, value in self.inputs.items()}
        self.copies, self.inputs_taken = torch.cuda.Stream(), torch.cuda.Event()
        # Warm-up on another stream, as torch.cuda.graph asks for.
        self.copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copies):
            for _ in range(2):
                self.step(self.inputs)
        torch.cuda.current_stream().wait_stream(self.copies)
        for parameter in self.parameters:
            if parameter.grad is not None:              # None: adapts a layer that nothing uses
                parameter.grad.zero_()
        torch.cuda.empty_cache()                        # the graph has a memory pool of its own
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread page-locks memory at the same time, and NCCL's watches.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = self.step(self.inputs)
        # A resumed run must draw the same numbers as an uninterrupted one.
        torch.cuda.set_rng_state(rng_state)
