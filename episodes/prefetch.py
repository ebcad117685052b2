"""Reading ahead in a thread, for batches of clips and for the frames that latents.py encodes."""
import atexit
import queue
import threading
from contextlib import closing, suppress
from contextvars import copy_context
from functools import partial


def prefetch(items, n):
    """The items of a generator that runs in a thread, at most `n` of them ahead of the caller.

    One thread, not worker processes: the order stays that of the generator, nothing is pickled,
    and TensorFlow and PyTorch let other threads run while they read and decode. What the generator
    raises is raised here; closing this generator ends the thread and closes the other one."""
    ready, stop = queue.Queue(n), threading.Event()
    # In a copy of the context, since torch.compile keeps its settings in context variables.
    run = partial(copy_context().run, _fill, ready, stop, items)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    end = partial(_end_thread, thread, stop)
    # TensorFlow aborts the process if it is still at work when Python ends.
    atexit.register(end)
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error:
                raise error
            yield item
    finally:
        atexit.unregister(end)
        end()


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
    thread.join()
