"""step_best/ in a run folder: the adapter of the best validation so far, and best.json.

It goes with running/best.py, which says what is best, and needs nothing that a resume needs."""
import json
import os
import sys

from tqdm import tqdm

import lora
from episodes.identity import TRAINED_ON, trained_on_file
from files import free_name
from files.sums import check_sums, read_sums
from running.best import ABOUT, STEP_BEST, about_best
from running.folders import keep_aside, restore_replaced, write_folder
from running.ranks import gather_from_ranks


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_best(run, best, step, values, cfg, predictor, loader):
    """Writes step_best/: the adapter of a step that `best` found better, without what a resume
    needs, and best.json. All ranks call it, rank 0 writes.

    That it cannot be written is said, and does not end the run before its step is saved."""
    seen, value = gather_from_ranks(loader.seen), best.value_of(values)
    # A run folder that was moved is for `save` to find a place beside.
    saved = bool(run.lock and not run.lock.lost())
    if saved:
        contents = adapter_contents(run, predictor, cfg, seen) | _about_best(best, step, value)
        try:
            write_folder(run, STEP_BEST, contents, replace=True)
        except OSError as error:
            saved = False
            tqdm.write(f"{error}; {STEP_BEST} stays that of "
                       f"{f'step {best.step}' if best.step else 'no step'} and the run goes on",
                       file=sys.stderr)
    # What is better than what is there is to replace it, on all ranks.
    if gather_from_ranks(saved)[0]:
        best.step, best.value = step, value


def _about_best(best, step, value):
    about = {"step": step, "criterion": best.criterion, "value": value}
    return {ABOUT: json.dumps(about).encode()}


def restore_best(run, best):
    """Before the first step, on all ranks: lets `best` and step_best/ agree, of which metrics.jsonl
    and the folder may tell different things: after a kill between the two or a full disk, on
    another machine, by another criterion."""
    found = _restore_best(run, best) if run.lock and run.start else (0, None)
    best.step, best.value = gather_from_ranks(found)[0]


def _restore_best(run, best):
    """(step, value) of the best step so far whose adapter is there, (0, None) if none is."""
    folder = run.out / STEP_BEST
    if not best.criterion:
        return 0, None
    try:
        restore_replaced(folder)
        there = _read_best(folder, best.criterion) if os.path.lexists(folder) else (0, None)
        if there[0] > run.start:                                # which is about to be run again
            there = 0, None
        if best.value is None or there[0] == best.step:
            return there
        source = run.out / f"step_{best.step}"
        if (source / "adapter_config.json").is_file():
            lora.read(source)
            names = [*ADAPTER_FILES[::-1], *[TRAINED_ON] * (source / TRAINED_ON).is_file()]
            contents = {name: (source / name).read_bytes() for name in names}
            write_folder(run, STEP_BEST, contents | _about_best(best, best.step, best.value),
                          replace=True)
            return best.step, best.value
        if there[0]:
            return there
        reason = f"the best step so far by {best.criterion}, {best.step}, is not there any more"
    except (ValueError, OSError) as error:
        reason = str(error)
    tqdm.write(f"{folder}: {reason}; it will be the best one after step {run.start}",
               file=sys.stderr)
    return 0, None


def _read_best(folder, criterion):
    """(step, value) of step_best; (0, None), and it is kept aside, if it is not whole or the best
    by another criterion."""
    try:
        check_sums(folder, read_sums(folder))
        lora.read(folder)
        step, own, value = about_best(folder)
    except (ValueError, OSError):
        keep_aside(folder)
        return 0, None
    if own == criterion:
        return step, value
    aside = free_name(folder, "before")
    folder.rename(aside)
    tqdm.write(f"{folder}: is the best by {own}; kept as {aside.name}", file=sys.stderr)
    return 0, None


def adapter_contents(run, predictor, cfg, seen):
    """{name: bytes} of an adapter's files. seen: what each rank has been trained on."""
    contents = lora.adapter_files(predictor, cfg.model.checkpoint)
    # None: it goes on from an adapter that does not know its own.
    episodes = None if None in seen else {k: v for one in seen for k, v in one.items()}
    control = run.control or cfg.data.shuffle_actions
    if episodes is not None or control:
        contents[TRAINED_ON] = trained_on_file(episodes, control)
    return contents
