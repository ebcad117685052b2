"""A run that is mirrored on gs://, here an emulated one that is slow, refuses, cuts off or stalls.

    python tests/stress/mirror.py [--steps=60] [--faults=10] [--kills=20] [--seed=0]

steps: of each run whose time is measured with and without an upload; faults: runs under changing
faults; kills: runs that are killed at a random moment, and go on from the bucket on an empty
machine. 0 leaves a part out.
"""
import os
import random
import shutil
import signal
import statistics
import sys
import time
from unittest import mock

import common
import gcs_emulator
from common import Process, Table

import train


URL = "gs://gresearch"
FAULTS = [{"mode": "status", "code": 503}, {"mode": "status", "code": 429}, {"mode": "drop"},
          {"mode": "stall"}, {"mode": "cut", "of": "request", "after": 0, "match": "PUT"},
          {"mode": "alter", "of": "request", "after": 40, "match": "PUT"},
          {"mode": "cut", "after": 20, "match": "GET"}, {"mode": "slow", "seconds": 0.5}]


def timed_train(args):
    """Prints when each step was logged."""
    def log(self, step, **values):
        print(f"at {time.monotonic():.4f}", flush=True)
        write(self, step, **values)
    write = train.Logger.log
    with mock.patch.object(train.Logger, "log", log):
        common.train_main(args)


def step_times(text):
    """Seconds from one step to the next, without the first five, which are warming up."""
    at = [float(line.split()[1]) for line in text.splitlines() if line.startswith("at ")]
    return [b - a for a, b in zip(at, at[1:])][5:]


def compare_step_times(tmp, gs, n_steps, table):
    """Runs with and without uploads in turn, since other work changes the machine's speed. One
    upload follows the other, and each request takes half a second."""
    gs.set_faults({"mode": "slow", "seconds": 0.5})
    args = common.arguments(tmp / "base", tmp / "out", f"--max_steps={n_steps}", "--save_every=10",
                            "--val_every=0", "--batch_size=8", "--gcs_minutes=0")
    medians = {"": [], "--gcs_dir": []}
    for i in range(3):
        for name, seen in medians.items():
            shutil.rmtree(tmp / "out", ignore_errors=True)
            url = [f"--gcs_dir={URL}/speed-{i}"] * bool(name)
            process = Process(timed_train, args + url)
            text = common.must(process.wait(600)).text
            seen.append(1e3 * statistics.median(step_times(text)))
    plain, uploading = map(statistics.median, medians.values())
    change = uploading / plain - 1
    table.row("step time", f"{plain:.1f} ms, while uploading {uploading:.1f} ms ({change:+.1%})",
              fault="more than 5 % slower" if change > 0.05 else "")


def stop_while_stalled(tmp, gs, table):
    """SIGTERM to a run whose upload hangs."""
    shutil.rmtree(tmp / "out", ignore_errors=True)
    args = common.arguments(tmp / "base", tmp / "out", "--max_steps=100000", "--val_every=0",
                            "--save_every=10", "--gcs_minutes=0", f"--gcs_dir={URL}/stalled")
    process = Process(common.train_main, args)
    must_run(process, lambda: "saved" in process.text())
    gs.set_faults({"mode": "stall"})
    time.sleep(3)
    done = process.text().count("\nstep ")
    time.sleep(2)
    trained = process.text().count("\nstep ") - done
    begin = time.monotonic()
    process.kill(signal.SIGTERM)
    outcome = process.wait(process.begin and time.monotonic() - process.begin + 60)
    seconds, newest = time.monotonic() - begin, max(common.whole_steps(tmp / "out"), default=0)
    saved = common.reported_steps(outcome.text)
    fault = (outcome.hung and "hung") or (trained < 5 and "training stood still") or (
        newest != max(saved) and f"step {newest} is whole, {saved[-1]} reported") or (
        seconds > 30 and "took too long") or (
        "not all of" not in outcome.text and f"did not say so: {outcome.last}")
    table.row("SIGTERM while stalled", f"ended after {seconds:.1f} s, step {newest} saved, exit "
              f"status {outcome.code}", fault=fault or "")


def must_run(process, until):
    outcome = process.wait(300, until=until)
    if outcome:
        sys.exit(f"ended too early:\n{outcome.text}")


def train_under_faults(tmp, gs, i, chance, table):
    """Faults come and go during a run; its end waits until the bucket has everything."""
    shutil.rmtree(tmp / "out", ignore_errors=True)
    gs.set_faults()
    args = common.arguments(tmp / "base", tmp / "out", "--max_steps=300", "--save_every=20",
                            "--gcs_minutes=0", "--val_every=0", f"--gcs_dir={URL}/faults-{i}")
    process, seen = Process(common.train_main, args), []
    must_run(process, lambda: "\nstep " in process.text())
    while process.wait(600, until=lambda: True) is None and "step 300/" not in process.text():
        fault = chance.choice(FAULTS)
        seen.append(fault.get("code", fault["mode"]))
        gs.set_faults(*[fault | ({"times": chance.randint(1, 5)} if chance.random() < 0.5 else {})])
        time.sleep(chance.uniform(0, 5))
    gs.set_faults()
    outcome = process.wait(900)
    fault = outcome.fault() or fault_of_mirror(tmp, i, "faults")
    table.row("faults", f"{', '.join(map(str, seen))}; {outcome.seconds:.0f} s", fault=fault)


def fetch(url, out):
    from running.mirror import fetch_newest
    fetch_newest(url, out)


def fault_of_mirror(tmp, i, name):
    """What an empty machine gets, compared with the run folder."""
    shutil.rmtree(tmp / "fresh", ignore_errors=True)
    outcome = common.run(fetch, f"{URL}/{name}-{i}", tmp / "fresh", timeout=200)
    fetched, whole = common.whole_steps(tmp / "fresh"), common.whole_steps(tmp / "out")
    if outcome.code or fetched != whole[-1:]:
        return f"fetched {fetched}, has {whole}: {outcome.last}"
    step = f"step_{fetched[0]}"
    same = common.contents(tmp / "fresh" / step) == common.contents(tmp / "out" / step)
    return "" if same else f"{step} differs"


def kill_and_go_on_elsewhere(tmp, gs, i, wanted, chance, table):
    """SIGKILL while it uploads; another machine goes on from the bucket to the same end."""
    for name in ("out", "fresh"):
        shutil.rmtree(tmp / name, ignore_errors=True)
    gs.set_faults({"mode": "slow", "seconds": chance.choice([0, 0.05, 0.3])})
    args = common.arguments(tmp / "base", tmp / "out", "--max_steps=300", "--save_every=20",
                            "--gcs_minutes=0", "--val_every=0", f"--gcs_dir={URL}/kills-{i}")
    process = Process(common.train_main, args)
    must_run(process, lambda: common.reported_steps(process.text()))
    ended = process.wait(time.monotonic() - process.begin + chance.uniform(0, 12))
    text = ended.text
    local = max(common.whole_steps(tmp / "out"))
    gs.set_faults()
    elsewhere = [arg for arg in args if "out_dir" not in arg]
    outcome = common.run(common.train_main, [*elsewhere, f"--out_dir={tmp}/fresh", "--resume"],
                         timeout=600)
    start = common.went_on_from(outcome.text)
    said = [int(line.split()[0].removeprefix("step_")) for line in text.splitlines()
            if line.startswith("step_") and " is in gs://" in line]
    fault = outcome.fault() or (start is None and outcome.last)
    if not fault and not max(said, default=0) <= start <= local:
        fault = f"went on from {start}, said to be there: {said}"
    if not fault:
        end = common.contents(tmp / "fresh/step_300")
        fault = "another end" * (end["adapter_model.safetensors"] != wanted)
    table.row("SIGKILL", f"at step {local}, goes on elsewhere from {start}", fault=fault or "")


def refuse_other_runs(tmp, table):
    """A folder of the bucket that holds a run, and new ones that are given it."""
    for seed in (1, 2, 3):
        shutil.rmtree(tmp / "other", ignore_errors=True)
        args = common.arguments(tmp / "base", tmp / "other", "--max_steps=4", f"--seed={seed}",
                                f"--gcs_dir={URL}/stalled")
        outcome = common.run(common.train_main, args, timeout=200)
        refused = outcome.code == 1 and " run" in outcome.last and "--gcs_dir" in outcome.last
        table.row("another run", outcome.last[:100], fault="" if refused else "not refused")


def main():
    options = common.options(steps=60, faults=10, kills=20, seed=0)
    chance, table = random.Random(options.seed), Table(("case", 22), ("outcome", 70))
    with common.temporary_folder() as tmp, gcs_emulator.Bucket(tmp / "certificates") as gs:
        os.environ.update(gs.env, GCS_RETRY_CONFIG_INIT_DELAY_TIME_US="100000")
        if options.steps:
            compare_step_times(tmp, gs, options.steps, table)
        stop_while_stalled(tmp, gs, table)
        gs.set_faults()
        refuse_other_runs(tmp, table)
        for i in range(options.faults):
            train_under_faults(tmp, gs, i, chance, table)
        gs.set_faults()
        args = common.arguments(tmp / "base", tmp / "out", "--max_steps=300", "--save_every=20",
                                "--val_every=0")
        shutil.rmtree(tmp / "out", ignore_errors=True)
        if options.kills:
            common.must(common.run(common.train_main, args, timeout=600))
            wanted = common.contents(tmp / "out/step_300")["adapter_model.safetensors"]
        for i in range(options.kills):
            kill_and_go_on_elsewhere(tmp, gs, i, wanted, chance, table)
    table.end("cases")


if __name__ == "__main__":
    main()
