"""data.cache under kills, damage, full and read-only disks, and changing sources: no clip is wrong.

    python tests/stress/caches.py [--n=200] [--kills=60] [--operations=1] [--only=WORD] [--seed=0]

n: caches with one to three random damages, each read by a process of its own, half of them while it
reads; kills: of readers, at random moments; operations=1: one kill before each file operation.
Every clip of every reading is compared with the records, pixel by pixel.
"""
import ctypes
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
import zlib
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path

import common
import numpy as np
from common import Process, Table
from stress.damaged_caches import damage
from stress.dying import die_before

import droid
import tabletop
from episodes import rounds
from episodes.clips import Clips
from small import data_recipe


CAMERAS = "wrist_image_left", "exterior_image_1_left"
N_EPISODES, N_SHARDS, EPOCHS = 12, 4, 3


def one_episode(i, shade=0):
    """16 frames, noise that belongs to the episode and the camera; lengths are those of others, so
    that shards have files of the same shape."""
    random = np.random.default_rng([i, shade])
    states = np.zeros((16, 7))
    states[:, 0], states[:, 1] = np.arange(16) / 100, i / 10
    frames = {camera: random.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8) for camera in CAMERAS}
    every = dict.fromkeys(tabletop.CAMERAS, frames[CAMERAS[1]]) | {CAMERAS[0]: frames[CAMERAS[0]]}
    return {"states": states, "frames": every, "file_path": f"/lab/success/{i}"}


def recipe(folder, cache="off", camera=CAMERAS[0], *args):
    cache = [] if cache == "off" else [f"--data.cache={cache}"]
    return data_recipe(folder, f"--data.camera={camera}", "--data.max_bad_share=1",
                       "--data.shuffle_buffer=9", "--data.offsets=any", *cache, *args)


def seen(cfg, after=()):
    """{(epoch, episode, start): checksum of frames, states and actions} of three epochs. after:
    (n, function) to call after the n-th clip."""
    rounds.FIRST_ROUND = 4
    loader, found = Clips(droid.open_source(cfg), cfg, "train", True), {}
    for state, clip, episode, start in loader._decoded_clips(loader.state):
        if state["epoch"] == EPOCHS:
            break
        data = b"".join(np.ascontiguousarray(clip[key]).tobytes()
                        for key in ("frames", "states", "actions"))
        found[f"{state['epoch']} {episode.name} {start}"] = zlib.crc32(data)
        if after and len(found) == after[0]:
            after[1]()
    return found


def read(cfg, out, after=()):
    """In a fork: writes what `seen` says to a file."""
    common.limit_memory()
    found = seen(cfg, after)
    Path(f"{out}.part").write_text(json.dumps(found))
    os.replace(f"{out}.part", out)


# What has to hold

def fault_of(outcome, out, wanted, complete=True):
    """What is wrong with a reading. wanted: [what `seen` says of the records], of which one has to
    fit; complete: whether no clip may be lost."""
    fault = outcome.fault()
    if fault or outcome.code:
        return fault or f"refused: {outcome.last[:200]}"
    found = json.loads(out.read_text())
    out.unlink()
    faults = []
    for one in wanted:
        wrong = [key for key in found if one.get(key) != found[key]]
        lost = one.keys() - found.keys()
        if wrong:
            faults.append(f"{len(wrong)} wrong clips, such as {wrong[0]}")
        elif lost and complete:
            faults.append(f"{len(lost)} clips are lost")
        elif lost and "left out" not in outcome.text:
            faults.append(f"{len(lost)} clips are lost, and nothing is said")
        else:
            return ""
    return faults[-1]


class Bench:
    """The data sets, the caches that they give, and what they hold."""

    def __init__(self, tmp):
        self.tmp, self.records, self.other = tmp, tmp / "records", tmp / "other"
        self.cache, self.whole, self.out = tmp / "cache", tmp / "whole", tmp / "seen.json"
        common.must(common.run(self._prepare, timeout=120))
        self.wanted, self.wanted_other = (
            json.loads((tmp / f"{name}.json").read_text()) for name in ("records", "other"))

    def _prepare(self):
        for folder, shade in ((self.records, 0), (self.other, 1)):
            episodes = [one_episode(i, shade) for i in range(N_EPISODES)]
            tabletop.write_rlds(folder, episodes, N_SHARDS)
            Path(f"{folder}.json").write_text(json.dumps(seen(recipe(folder))))
        for camera in CAMERAS:
            assert len(seen(recipe(self.records, self.whole, camera))) > 3 * N_EPISODES
        assert seen(recipe(self.records, self.whole)) == seen(recipe(self.records))

    def fresh(self, whole=False):
        """An empty cache, or a whole one."""
        shutil.rmtree(self.cache, ignore_errors=True)
        shutil.rmtree(self.tmp / "set", ignore_errors=True)
        shutil.copytree(self.records, self.tmp / "set", copy_function=shutil.copy2)
        if whole:
            shutil.copytree(self.whole, self.cache, copy_function=shutil.copy2)

    def start(self, path=None, after=(), before=(), out=None, prepare=None):
        def work():
            if prepare:
                prepare()
            read(recipe(path or self.records, self.cache), out or self.out, after)
        return Process(*before, work)

    def fault(self, outcome, **kwargs):
        return fault_of(outcome, self.out, [self.wanted], **kwargs)


def damaged(bench, n, seed, table):
    """Before it is read, or while: then what a clip needs can be lost, and is said."""
    for i in range(n):
        bench.fresh(whole=True)
        chance = random.Random(1000 * seed + i)
        if i % 2:
            moment = chance.randint(1, 60)

            def later(chance=chance, moment=moment):
                print("after", moment, "clips:", damage(bench.cache, chance), flush=True)

            outcome = bench.start(after=(moment, later)).wait()
            what = next((line for line in outcome.text.splitlines() if " clips: " in line), "")
        else:
            what = damage(bench.cache, chance)
            outcome = bench.start().wait()
        fault = bench.fault(outcome, complete=not i % 2)
        again = bench.start().wait()
        table.row("damaged", what, outcome.last.replace(str(bench.tmp), "…")[-60:],
                  fault=fault or bench.fault(again))


# Kills

def random_kills(bench, n, random, table):
    """Each time two readers on one cache, one of which is killed; then one more."""
    bench.fresh()
    seconds = common.must(bench.start().wait()).seconds
    for i in range(n):
        if i % 4 == 0:
            bench.fresh()
        first, second = bench.start(out=bench.tmp / "first.json"), bench.start()
        time.sleep(random.uniform(0, seconds))
        first.kill()
        first.wait()
        fault = bench.fault(second.wait())
        table.row("killed", f"read by two, one killed ({i % 4 + 1} of 4)",
                  fault=fault or bench.fault(bench.start().wait()))


def before_operations(bench, random, table):
    for k in itertools.count(1):
        bench.fresh()
        outcome = bench.start(before=(die_before, k, bench.cache)).wait()
        if outcome.code != -signal.SIGKILL:
            return
        again = random.randint(1, 12)
        bench.start(before=(die_before, again, bench.cache)).wait()
        fault = bench.fault(bench.start().wait())
        left = sorted(bench.cache.glob("*/*.tmp"))
        table.row("killed", f"before operation {k}, then {again}",
                  fault=fault or (f"left: {left[0].name}" if left else ""))


def at_once(bench, random, table):
    """Five readers on one cache, of which one removes files."""
    for i in range(6):
        bench.fresh(whole=i % 2)
        outs = [bench.tmp / f"{k}.json" for k in range(5)]
        readers = [bench.start(out=out) for out in outs]
        for _ in range(5 * (i > 1)):
            time.sleep(random.uniform(0, 0.3))
            for path in bench.cache.glob("*/*.npz" if i % 2 else "*/*.images"):
                path.unlink(missing_ok=True)
        faults = [fault_of(one.wait(60), out, [bench.wanted], complete=i < 2)
                  for one, out in zip(readers, outs)]
        table.row("at once", f"five readers, {('nobody', 'somebody')[i > 1]} removes files",
                  fault=next(filter(None, faults), ""))


# Disks

def disks(bench, random, table):
    size = sum(path.stat().st_size for path in bench.whole.glob("wrist*/*.images")) // N_SHARDS
    for n_bytes in (0, 1, 100, size // 2, size - 1, size, size + 1, 2 * size):
        bench.fresh()

        def work(n_bytes=n_bytes):
            seen(recipe(bench.records))             # TensorFlow writes files when it begins
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            with redirect_stderr(StringIO()) as said:
                resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
                found = seen(recipe(bench.records, bench.cache))
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            bench.out.write_text(json.dumps(found))
            print(said.getvalue().strip())

        outcome = Process(work).wait()
        fault = bench.fault(outcome)
        if not fault and n_bytes < 100 and "nothing more can be kept" not in outcome.text:
            fault = "nothing is said"
        table.row("disk", f"no file above {n_bytes:,} bytes", outcome.last[-60:],
                  fault=fault or bench.fault(bench.start().wait()))
    if subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        return print("no mounts here: full and read-only disks are left out")
    for what, options in (("full", "size=16k"), ("full", "size=40k"), ("read-only", "ro"),
                          ("read-only, whole", "ro"), ("read-only, half", "ro"),
                          ("read-only, altered", "ro")):
        bench.fresh(whole="," in what)
        bench.cache.mkdir(exist_ok=True)
        if "half" in what:
            for path in sorted(bench.cache.glob("*/*.npz"))[::2]:
                path.unlink()
        if "altered" in what:
            for path in sorted(bench.cache.glob("*/*.images"))[::2]:
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 1
                path.write_bytes(data)

        def mount(what=what, options=options):
            ctypes.CDLL(None).unshare(0x00020000)                   # CLONE_NEWNS
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            kind = (["-t", "tmpfs", "-o", options, "tmpfs"] if what == "full"
                    else ["--bind", str(bench.cache)])
            subprocess.run(["mount", *kind, str(bench.cache)], check=True)
            if what != "full":
                subprocess.run(["mount", "-o", "remount,ro,bind", str(bench.cache)], check=True)

        outcome = bench.start(prepare=mount).wait()
        table.row("disk", f"{what} ({options})", outcome.last[-60:],
                  fault=bench.fault(outcome, complete="altered" not in what))


# Sources

def replace_files(shards, files, at_once):
    for shard, file in zip(shards, files):
        if at_once:
            shutil.copy2(file, f"{shard.parent}-part")
            os.replace(f"{shard.parent}-part", shard)
        else:
            shutil.copy2(file, shard)


def sources(bench, random, table):
    """Shards are replaced by those of another data set: before, between, and while they are read,
    and put back with their old times. What was read at one moment is right for one of both."""
    for i in range(20):
        bench.fresh()
        folder = bench.tmp / "set"
        wanted = [bench.wanted, bench.wanted_other]
        if i % 2:
            common.must(bench.start(folder).wait())
            bench.out.unlink()
        shards = sorted(folder.iterdir())
        others = sorted(bench.other.iterdir())

        replace = partial(replace_files, shards, at_once=i % 3 > 0)
        delay = random.uniform(0, 1.5)
        process = bench.start(folder)
        thread = threading.Timer(delay, replace, [others])
        thread.start()
        outcome = process.wait()
        thread.join()
        # Some shards may be old and some new: each clip is of one of both.
        either = {key: {one.get(key) for one in wanted} for one in wanted for key in one}
        fault = outcome.fault()
        if not fault and not outcome.code:
            found = json.loads(bench.out.read_text())
            wrong = [key for key in found if found[key] not in either.get(key, ())]
            fault = f"{len(wrong)} wrong clips" if wrong else ""
        bench.out.unlink(missing_ok=True)
        for files, one in ((others, bench.wanted_other), (sorted(bench.records.iterdir()),
                                                          bench.wanted)):
            replace(files)
            again = bench.start(folder).wait()
            fault = fault or fault_of(again, bench.out, [one])
        table.row("source", f"replaced after {delay:.2f} s, twice", outcome.last[-60:], fault=fault)


def main():
    options = common.options(n=200, kills=60, operations=1, only="", seed=0)
    chance = random.Random(options.seed)
    table = Table(("case", 8), ("what", 50), ("said", 60))
    droid.tensorflow()              # imported once; it starts no thread before it is used
    with common.temporary_folder() as tmp:
        bench = Bench(tmp)
        parts = {"damaged": lambda: damaged(bench, options.n, options.seed, table),
                 "killed": lambda: random_kills(bench, options.kills, chance, table),
                 "operations": lambda: options.operations and before_operations(
                     bench, chance, table),
                 "at once": lambda: at_once(bench, chance, table),
                 "disk": lambda: disks(bench, chance, table),
                 "source": lambda: sources(bench, chance, table)}
        for name, part in parts.items():
            if options.only in name:
                part()
    table.end("readings of caches")


if __name__ == "__main__":
    main()
