"""The processes of torchrun: what they tell each other.

    ranks.start(cfg, device, newest)        # outside torchrun these two do nothing,
    ...                                     # and the others answer as one rank alone
    ranks.end()

A rank that keeps the others waiting for cfg.dist_timeout_minutes ends the run: running/hang.py.
"""
import os
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice

import torch
import torch.distributed as dist
from tqdm import tqdm

from running import hang


SILENT = 10.0       # s that a rank waits for the others before it says so


def start(cfg, device, newest):
    """Joins the other processes, if torchrun started this one. newest(): as for `hang.watch`.

    Raises OSError if they do not find each other within cfg.dist_timeout_minutes."""
    # checks.check_ranks has looked at these variables. One alone has nobody to talk to.
    if "RANK" not in os.environ or os.environ["WORLD_SIZE"] == "1" or dist.is_initialized():
        return
    store, rank, n = _meet(cfg.dist_timeout_minutes)
    # Longer than a rank may take that hangs or that waits for gs://: both are told better.
    timeout = timedelta(
        minutes=min(24 * 60, cfg.dist_timeout_minutes + cfg.data.retry_minutes + 5))
    store.set_timeout(timeout)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=n, timeout=timeout)
    except RuntimeError as error:
        raise OSError(f"the ranks do not find each other: {_first_line(error)}") from None
    hang.watch(cfg.dist_timeout_minutes, newest, gather_from_ranks)


def _meet(minutes):
    """(the store by which the ranks find each other, rank, number of ranks), once all are there."""
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    text = f"rank {rank} waits at {host}:{port} for all {n} ranks, up to {minutes:g} minutes"
    # Said by the first one, and by another one only if that is not there.
    note = threading.Timer(SILENT * (1 if rank == 0 else 2), tqdm.write, [text, sys.stderr])
    note.daemon = True
    note.start()
    try:
        if rank:
            _wait_for_listener((host, port), 60 * minutes)
        return next(dist.rendezvous("env://", timeout=timedelta(minutes=minutes)))
    except (RuntimeError, OSError) as error:
        raise OSError(
            f"{n} ranks did not meet at {host}:{port} within {minutes:g} minutes: start all of "
            "them with torchrun, or this one alone after: unset RANK WORLD_SIZE LOCAL_RANK; "
            f"--dist_timeout_minutes waits longer ({_first_line(error)})") from None
    finally:
        note.cancel()


def _wait_for_listener(address, seconds):
    """PyTorch would wait too, and then print two traces of its own. Raises OSError."""
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(address, timeout=10).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def end():
    hang.end()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _together(what):
    """Around a collective operation. Raises ConnectionError, naming the rank, if one is gone."""
    with hang.waiting(what):
        try:
            yield
        except RuntimeError as error:
            # gloo's errors have no class of their own.
            if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            line = hang.lost_rank(_first_line(error))
            # One line is enough.
            raise ConnectionError(line) if line else SystemExit(1) from None


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def rank():
    """The number of this process among those of torchrun; 0 for a process alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather_from_ranks(value):
    """[value of each rank], on all ranks; any object that pickle takes."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    with _together("exchanging values"):
        dist.all_gather_object(values, value)
    return values


def sum_over_ranks(value):
    """The sum of a scalar tensor over all ranks, as a number: waits for the GPU."""
    if not dist.is_initialized():
        return value.item()
    with _together("adding numbers up"):
        value = value.clone()
        dist.all_reduce(value)
        return value.item()


def rows_of_ranks(row):
    """[row of each rank as numbers], on all ranks, of a tensor [n]: waits for the GPU once."""
    if not dist.is_initialized():
        return [row.tolist()]
    with _together("comparing losses"):
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, row)
        return torch.stack(rows).tolist()


def average_gradients(parameters, world_size, failed=None):
    """Over all ranks, in one all-reduce a step: the adapters are small (25 MB).

    failed: an exception that kept this rank from reading its clips. It is raised on all ranks, so
    that they can save the step before together."""
    if world_size == 1:
        if failed:
            raise failed
        return
    # None: a rank that failed, or a target that no forward pass uses, such as extrinsics_encoder
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    n_failed = grads[0].new_full((1,), float(failed is not None))
    flat = torch.cat([*(grad.flatten() for grad in grads), n_failed])
    with _together("averaging gradients"):
        dist.all_reduce(flat)
        # NCCL lets only the GPU wait: for the other ranks it is waited here.
        any_failed = bool(flat[-1].item())
    if any_failed:
        reasons = gather_from_ranks(failed and str(failed))
        raise failed or OSError(next(f"rank {rank}: {reason}"
                                     for rank, reason in enumerate(reasons) if reason))
    means = (flat[:-1] / world_size).split([grad.numel() for grad in grads])
    for parameter, mean in zip(parameters, means):
        if parameter.grad is not None:
            parameter.grad.copy_(mean.view_as(parameter))


def send_from_rank_0(tensors):
    """Rank 0's values for all ranks, in place."""
    if dist.is_initialized():
        with _together("getting rank 0's adapters"):
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def add_up(counter):
    """The sum of a Counter over all ranks, with whatever names they have."""
    total = Counter()
    for of_rank in gather_from_ranks(counter):
        total.update(of_rank)       # not +, which leaves out what is not above 0, such as NaN
    return total


def read_some(loaders, n, device):
    """The first n batches of each of {name: loader}: {name: list}. Raises ValueError, on all ranks,
    if there is none on any."""
    batches = {name: list(islice(loader, n)) for name, loader in loaders.items()}
    n_batches = torch.tensor(sum(map(len, batches.values())), device=device)
    if loaders and not sum_over_ranks(n_batches):
        raise next(iter(loaders.values())).no_clips_error()
    return batches
