"""A table of timings, printed line by line while they are measured."""
import gc
import time
from functools import partial

import torch

from fast import memory


class Table:
    """Times what it is given and prints a line for each."""

    # (title, key of a row, width, decimals)
    COLUMNS = (("ms", "ms", 10, 1), ("spread", "spread_ms", 9, 1), ("first s", "first_s", 9, 1),
               ("ms/clip", "ms_per_clip", 9, 1), ("clips/s", "clips_per_s", 9, 1),
               ("TFLOP/s", "tflops", 9, 0), ("share", "share", 7, 0), ("GiB", "peak_gib", 7, 1))
    NAME_WIDTH = 66

    def __init__(self, device, repeats):
        self.device, self.repeats = device, repeats
        self.rows, self.peak_tflops = [], None
        titles = (f"{title:>{width}}" for title, _, width, _ in self.COLUMNS)
        print(" " * self.NAME_WIDTH + "".join(titles))
        on_gpu = device.type == "cuda"
        n = 8192 if on_gpu else 512
        dtype = torch.bfloat16 if on_gpu else torch.float32
        a = torch.randn(n, n, device=device, dtype=dtype)
        self.row("one large matrix product", partial(torch.matmul, a, a), flops=2 * n ** 3)
        self.peak_tflops = self.rows[0]["tflops"]

    def row(self, name, work, clips=0, flops=0.0, repeats=0, calls=1):
        """Times work(); clips and flops are those of one call. Returns the row as a dict, or None
        if memory ran out.

        calls: one after the other without waiting for the GPU, as one measurement."""
        gc.collect()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            # Before the first call, which allocates the memory of a CUDA graph.
            torch.cuda.reset_peak_memory_stats()
        try:
            first = self._seconds(work)
            times = sorted(self._seconds(work, calls) / calls
                           for _ in range(repeats or self.repeats))
        except torch.OutOfMemoryError:
            print(f"{name:<{self.NAME_WIDTH}} out of memory", flush=True)
            return None
        median = times[len(times) // 2]
        row = {"name": name, "ms": 1e3 * median, "spread_ms": 1e3 * (times[-1] - times[0]),
               "first_s": first}
        if clips:
            row |= {"clips": clips, "ms_per_clip": 1e3 * median / clips,
                    "clips_per_s": clips / median}
        if flops:
            tflops = flops / median / 1e12
            row |= {"tflops": tflops, "share": tflops / (self.peak_tflops or tflops)}
        if on_gpu:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / memory.GIB
        self.rows.append(row)
        cells = (self._cell(row, *column) for _, *column in self.COLUMNS)
        print(f"{name:<{self.NAME_WIDTH}}" + "".join(cells), flush=True)
        return row

    def _seconds(self, work, calls=1):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    @staticmethod
    def _cell(row, key, width, decimals):
        if key not in row:
            return " " * width
        if key == "share":
            return f"{row[key]:>{width}.0%}"
        if key == "tflops" and row[key] < 1:        # on a CPU
            decimals = 2
        return f"{row[key]:>{width}.{decimals}f}"
