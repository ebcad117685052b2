"""How a run is stopped."""
import signal
import threading

import torch
import torch.distributed as dist

from running.ranks import sum_over_ranks


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag, so that a step ends and is saved; the second
    one kills."""

    def __enter__(self):
        self.seen, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, *_):
        self.seen = True
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_any_rank(self, device):
        # Alone, a process need not ask: reading a tensor back would wait for the GPU in each step.
        if not dist.is_initialized():
            return self.seen
        return bool(sum_over_ranks(torch.tensor(float(self.seen), device=device)))
