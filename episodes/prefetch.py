"""Reading ahead in a thread, for batches of clips and for the frames that latents.py encodes."""
import atexit
import os
import queue
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from contextvars import ContextVar, copy_context
from functools import partial


# In a thread of `prefetch`: set once nobody reads from it any more.
stop_event = ContextVar("stop_event", default=None)

JOIN_SECONDS = 5        # for a thread to end: one that waits for a server is left behind


def prefetch(items, n, while_waiting=None):
    """The items of a generator that runs in a thread, at most `n` of them ahead of the caller.

    One thread, not worker processes: the order stays that of the generator, nothing is pickled,
    and TensorFlow and PyTorch let other threads run while they read and decode. What the generator
    raises is raised here; closing this generator ends the thread and closes the other one.

    while_waiting: is called with the seconds so far, a few times a second, while no item comes. It
    may raise."""
    ready, stop, stop_outside = queue.Queue(n), threading.Event(), stop_event.get()
    # In a copy of the context, since torch.compile keeps its settings in context variables.
    context = copy_context()
    context.run(stop_event.set, stop)
    run = partial(context.run, _fill, ready, stop, items)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    end = partial(_end_thread, thread, stop)
    # TensorFlow aborts the process if it is still at work when Python ends.
    atexit.register(end)
    begin = time.monotonic()
    try:
        while True:
            try:
                item, error = ready.get(timeout=0.2)
            except queue.Empty:
                if stop_outside and stop_outside.is_set():
                    return
                if while_waiting:
                    while_waiting(time.monotonic() - begin)
                continue
            if isinstance(error, StopIteration):
                return
            if error:
                raise error
            yield item
            begin = time.monotonic()
    finally:
        atexit.unregister(end)
        end()


def in_order(function, items):
    """(item, the Future of function(item)) for each item, computed by several threads, and a few
    items ahead of the caller."""
    n, waiting = n_threads(), deque()
    with ThreadPoolExecutor(n) as pool, closing(items):
        try:
            for item in items:
                waiting.append((item, pool.submit(copy_context().run, function, item)))
                if len(waiting) > 2 * n:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                future.cancel()


def n_threads():
    """How many threads decode: one more than there are cores for this process, since one waits for
    Python now and then; 8 at most."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(8, 1 + cores() // max(1, int(ranks) if ranks.isdecimal() else 1))


def cores():
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_thread(function, *args):
    """function(*args), from a thread: Ctrl-C works while it waits for a server."""
    def results():
        yield function(*args)
    with closing(prefetch(results(), 1)) as items:
        return next(items)


def _fill(ready, stop, items):
    """The thread of `prefetch`: puts (item, None), and at last (None, error or StopIteration)."""
    try:
        with closing(items):
            for item in items:
                _put(ready, stop, (item, None))
                if stop.is_set():
                    return
        _put(ready, stop, (None, StopIteration()))
    except Exception as error:          # raised again by `prefetch`
        _put(ready, stop, (None, error))


def _put(ready, stop, value):
    """Waits for room in the queue, but not longer than somebody reads from it."""
    while not stop.is_set():
        with suppress(queue.Full):
            ready.put(value, timeout=0.1)
            return


def _end_thread(thread, stop):
    stop.set()
    thread.join(JOIN_SECONDS)
