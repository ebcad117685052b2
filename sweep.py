"""Many short runs of train.py over other settings, and which is best.

    python sweep.py config.yaml --data.latents=latents/droid_100 --max_steps=500 \\
        --over=lora.rank=8,16,32 --over=lr=1e-5,1e-4,1e-3
    python sweep.py … --over=lr=1e-5..1e-2 --sampler=tpe --runs=20      # or random; needs optuna

Every combination is a run of train.py in a folder of its own, out_dir/sweep/lora.rank=8,lr=1e-4,
as `python train.py` would make it, with the same numbers. At half of the steps the worse half is
stopped (--halvings=0 for none, 2 for a quarter at a quarter, and so on), by the key `best`, after
all runs have come so far: what goes on depends neither on the order nor on the time. A sweep that
was killed goes on when it is called again, and ends with the same table.

With several GPUs each takes a run; --workers=N is for a CPU. A process reads the base's weights
once for runs from stored latents, and copies them for each run. In out_dir/sweep: report.html, to
open in a browser, sweep.csv, sweep.json (every validation) and sweep.png; the output of each run is
in its log.txt.
"""
import copy
import csv
import gc
import io
import json
import os
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from running import script


# Before PyTorch, whose import takes seconds.
if __name__ == "__main__":
    arguments = script.begin("sweep.py", __doc__)

import torch

import checkpoint
import config
import files
import model
import train
from analysis import sweeps
from episodes.prefetch import cores
from files.reading import read_json
from report import sweep_page
from running import processes, settings, stop, sweep_line
from running.best import CRITERIA
from running.lock import Lock
from running.log import validations


class LoadOnce:
    """`model.load` for many runs: of the same file it reads the predictor once, and gives each run
    a copy, which it may change. With an encoder it is as `model.load`: two would fill a GPU."""

    def __init__(self):
        self.key = self.predictor = None

    def __call__(self, path, size, dtype, device, encoder=True):
        # Random weights are drawn, and what is drawn after them depends on that.
        if encoder or path == "random":
            return model.load(path, size, dtype, device, encoder=encoder)
        key = path, os.stat(path).st_mtime_ns, str(size), dtype, device
        if key != self.key:
            self.key, self.predictor = None, None       # not two at once
            self.predictor = model.load(path, size, dtype, device, encoder=False)[1]
            self.key = key
        return None, copy.deepcopy(self.predictor)


load_once = LoadOnce()


def sweep(given):
    """Runs the sweep, writes its files and prints its table. Raises ValueError and OSError."""
    out = Path(given.cfg.out_dir, "sweep")
    with Lock(out):
        with Workers(given) as workers:
            _claim(out, given, workers)
            if given.sampler == "tpe":
                runs = _tpe(given, out, workers)
            else:
                chosen = sweep_line.grid(given) if given.sampler == "grid" else _random(given)
                runs = _halving(given, [Run(given, out, one) for one in chosen], workers)
    result = sweeps.result(given.cfg.best, *CRITERIA[given.cfg.best], given.cfg.max_steps, runs)
    files.write_file(out / "sweep.json", json.dumps(result, indent=1).encode())
    text = io.StringIO()
    csv.writer(text).writerows(sweeps.rows(result))
    files.write_file(out / "sweep.csv", text.getvalue().encode(errors="backslashreplace"))
    sweeps.draw(result, out / "sweep.png")
    shared = {name: value for name, value in settings.kept(given.cfg).items()
              if name not in given.values}
    sweep_page.write(out, result, shared, _command(given))
    print(f"\n{sweeps.summary(result)}\n\n{out}: report.html, sweep.csv, sweep.json, sweep.png")
    return result


def _command(given):
    """The words of this command."""
    options = [f"--{name}={value}" for name, values in given.options.items()
               for value in (values if isinstance(values, list) else [values])]
    return ["python", "sweep.py", *given.paths, *given.keys, *options]


class Run:
    """One run of a sweep: `chosen` {key: text}, `validations` {step: {name: value}}, and `fault`,
    why it ended, or ""."""

    def __init__(self, given, out, chosen):
        self.chosen, self.title, self.fault = chosen, sweep_line.title_of(chosen), ""
        try:
            cfg = sweep_line.config_of(given, chosen)
        except ValueError as error:
            # Each value alone is right, and nobody chose what is drawn together: one run less. A
            # grid is as it was asked for, and ends before its first run.
            if given.sampler == "grid":
                raise
            cfg, self.fault = given.cfg, str(error)
        # resume: what an earlier call has trained is taken over.
        self.cfg = replace(cfg, out_dir=str(out / sweep_line.folder_of(chosen)), resume=True)
        self.read()

    def read(self):
        """Reads what the run has logged."""
        logged = validations(Path(self.cfg.out_dir, "metrics.jsonl"), self.cfg.max_steps)
        self.validations = {entry["step"]: entry for entry in logged}

    def is_at(self, step):
        """Whether it has trained and validated as far as this step."""
        return step in self.validations and (
            checkpoint.newest_step(self.cfg.out_dir) or 0) >= step

    def value(self, step):
        """What is compared, lower is better; None if it failed."""
        name, larger = CRITERIA[self.cfg.best]
        value = None if self.fault else self.validations.get(step, {}).get(name)
        return None if value is None or value != value else -value if larger else value


def _halving(given, runs, workers):
    """Trains all runs, and goes on with the better half of them after each of `halvings` rungs ->
    all of them."""
    steps = given.cfg.max_steps
    rungs = [steps // 2 ** k for k in range(given.halvings, -1, -1)]
    alive = runs
    for rung in rungs:
        workers.train(alive, rung)
        alive = _better(alive, rung)
    return runs


def _better(runs, step):
    """The better half of the runs at a step, of those that failed none; all of them where none has
    a value: landscapes that are all flat at first have no Spearman."""
    going = [run for run in runs if not run.fault]
    valued = sorted((run for run in going if run.value(step) is not None),
                    key=lambda run: run.value(step))
    if not valued:
        return going
    return [*valued, *(run for run in going if run not in valued)][:-(-len(runs) // 2)]


def _random(given):
    """The {key: text} of runs that are drawn by the seed."""
    optuna = _optuna()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=given.cfg.seed))
    drawn = [_suggest(study.ask(), given.values) for _ in range(given.n_runs)]
    # Of a few choices one comes twice: that would be one folder, and two places among the best.
    return [one for i, one in enumerate(drawn) if one not in drawn[:i]]


def _tpe(given, out, workers):
    """Trains runs whose values the earlier ones suggest (Bergstra et al. 2011), as many at a time
    as there are workers -> all of them."""
    optuna, runs, known = _optuna(), [], {}
    while len(runs) < given.n_runs:
        # Made anew from what is known, so that a sweep that was killed suggests the same again.
        sampler = optuna.samplers.TPESampler(seed=given.cfg.seed + len(runs), constant_liar=True)
        study = optuna.create_study(sampler=sampler)
        for run in runs:
            value = run.value(run.cfg.max_steps)
            state = optuna.trial.TrialState
            study.add_trial(optuna.trial.create_trial(
                state=state.FAIL if value is None else state.COMPLETE, value=value,
                params=run.params, distributions=run.distributions))
        batch = []
        for _ in range(min(workers.n, given.n_runs - len(runs))):
            trial = study.ask()
            chosen = _suggest(trial, given.values)
            # Of a few choices the same may be suggested twice: that is one run.
            run = known.setdefault(str(chosen), Run(given, out, chosen))
            run.params, run.distributions = trial.params, trial.distributions
            batch.append(run)
        workers.train(list(dict.fromkeys(batch)), given.cfg.max_steps)
        runs += batch
    return list(known.values())


def _suggest(trial, values):
    """{key: text} for an Optuna trial. A range over more than a decade is searched by its
    logarithm; of a key that is a whole number, only those are."""
    defaults, chosen = config.flat(config.Config()), {}
    for name, some in values.items():
        if not isinstance(some, sweep_line.Range):
            chosen[name] = trial.suggest_categorical(name, some)
            continue
        low, high = map(float, some)
        log = low > 0 and high >= 10 * low
        if type(defaults[name]) is int:
            chosen[name] = str(trial.suggest_int(name, round(low), round(high), log=log))
        else:
            chosen[name] = f"{trial.suggest_float(name, low, high, log=log):.6g}"
    return chosen


def _optuna():
    try:
        import optuna
    except ImportError:
        raise ValueError("--sampler=random and tpe need Optuna: pip install optuna, or use "
                         "--sampler=grid") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _claim(out, given, workers):
    """Raises ValueError if the folder has a sweep with other settings: its runs are no part of
    this one."""
    about = {"over": [[name, *some] for name, some in given.values.items()],
             "sampler": given.sampler, "runs": given.n_runs, "halvings": given.halvings,
             "workers": workers.n if given.sampler == "tpe" else 0,
             "settings": {name: repr(value) for name, value in settings.kept(given.cfg).items()}}
    path = out / "settings.json"
    # Its runs may have taken days.
    if path.exists():
        there = read_json(path)
        there = there if isinstance(there, dict) else {}
        changed = [_changed(key, there.get(key), now) for key, now in about.items()
                   if there.get(key) != now]
        if changed:
            raise ValueError(f"{path}: this sweep was begun with other {', '.join(changed)}; "
                             "choose another --out_dir, or remove it")
    files.write_file(path, json.dumps(about, indent=1).encode())


def _changed(key, before, now):
    """What of a sweep is another one now, as text: of its settings, which."""
    if key != "settings" or not isinstance(before, dict):
        return key
    names = [name for name in {**now, **before} if now.get(name) != before.get(name)]
    return f"{key} ({', '.join(names[:4])}{' …' * (len(names) > 4)})"


# Processes

class Workers:
    """One process for each GPU, or as many as --workers says; a single one is this process."""

    def __init__(self, given):
        n_gpus = torch.cuda.device_count() if given.cfg.device != "cpu" else 0
        self.n = given.workers or max(1, n_gpus)
        self.pool = None
        if self.n > 1:
            devices = processes.SPAWN.Queue()
            for i in range(self.n):
                devices.put(i % n_gpus if n_gpus else None)
            threads = 0 if n_gpus else max(1, cores() // self.n)
            self.pool = processes.Pool(self.n, _begin, devices, threads)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.pool:
            self.pool.__exit__(*error)

    def train(self, runs, step):
        """Trains runs as far as a step, where they are not there yet, and reads what they logged.
        Ends the process after a signal."""
        todo = [run for run in runs if not (run.fault or run.is_at(step))]
        begin, done = time.monotonic(), len(runs) - len(todo)
        if todo:
            print(f"to step {step} of {runs[0].cfg.max_steps}: {len(todo)} runs", flush=True)
        cfgs = [replace(run.cfg, stop_at=step) for run in todo]
        faults = self._in_pool(cfgs) if self.pool else map(_train, cfgs)
        for run, fault in zip(todo, faults):
            run.fault = fault
            run.read()
            # A signal in the last step of a run is meant for the sweep as well.
            if stop.exit_code() or not (fault or run.is_at(step)):
                print(f"sweep.py: stopped in {run.title}; the same command goes on")
                raise SystemExit(stop.exit_code() or 1)
            done += 1
            value = run.validations.get(step, {}).get(CRITERIA[run.cfg.best][0])
            reached = f"no {run.cfg.best}" if value is None else f"{run.cfg.best} {value:.4g}"
            left = (time.monotonic() - begin) / (done - len(runs) + len(todo)) * (len(runs) - done)
            print(f"  {done}/{len(runs)}  {run.title}: "
                  f"{fault or reached}" + f"  ({left:.0f} s left)" * (left > 1), flush=True)

    def _in_pool(self, cfgs):
        try:
            yield from self.pool.map(_train_in_worker, cfgs)
        except BrokenProcessPool:
            raise OSError("a worker was ended from outside, perhaps for lack of memory; the same "
                          "command goes on, with fewer --workers if need be") from None


def _begin(devices, threads):
    """In a worker: its GPU and its threads."""
    # Before CUDA is initialised, which is when it looks at the variable.
    device = devices.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
    if threads:
        torch.set_num_threads(threads)


def _train(cfg):
    """Trains one run, with its output in log.txt -> "", or why it ended."""
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    try:
        processes.logged(out / "log.txt", train.train, cfg, load_once)
    except ValueError as error:
        return " ".join(str(error).split())
    finally:
        # The next run on this GPU may need all of its memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return ""


def _train_in_worker(cfg):
    fault = _train(cfg)
    # Training takes a signal as a wish to end this run; more of them are in the queue.
    if stop.exit_code():
        os._exit(stop.exit_code())
    return fault


def main(args):
    """args: of the command line, or what `script.begin` returned."""
    script.run("sweep.py", __doc__, args, sweep)


if __name__ == "__main__":
    main(arguments)
