"""Energy landscapes of a world model: how far each action's predicted outcome is from a goal image.

    python energy.py runs/droid --steps=5000,20000                  # with that run's settings
    python energy.py --from=runs/droid/energy/step_5000/landscapes.npz      # tables, figures again
    python energy.py runs/droid --decoder=runs/decoder      # also what they imagine, in pixels
    python energy.py check vjepa2-ac-vitg.pt            # are these weights what they should be?
    python energy.py probe config.yaml --over=data.crop=center,droid,none   # which images they know
    python energy.py plan runs/droid --image=now.png --pose="[0.4,0,0.3,3.14,0,0,0]" --goal=goal.png

The baseline is always computed too. Each comparison has a folder of its own, out_dir/energy/NAME:
report.html to open in a browser, landscapes.npz (every energy; analysis/__init__.py lists the
arrays), metrics.csv, comparison.json and figures. A run that was killed goes on when it is called
again. evaluation/ has the parts:

    h = world.encode(frames)[0]                                             # [T, N, D]
    energies = energy.landscape(world, h[:1], states[:1], h[1], actions)    # [K]
    numbers = energy.metrics(actions, energies, true_action)                # a dict
    plan = energy.cem(lambda a: energy.sequence_energy(world, h[:1], states[:1], h[1], a))

Energy of an action: mean |LN(P(z, a, s)) - z_goal| over the last frame's tokens (arXiv:2506.09985,
section 4), in evaluation/energies.py. Metrics that a landscape cannot determine are NaN, shown as
"undefined"; docs/evaluation.md says what each means.
"""
import os
import sys
import time
from pathlib import Path

from running import script


# Before PyTorch, whose import takes seconds.
if __name__ == "__main__":
    arguments = script.begin("energy.py", __doc__)

import evaluation.check
import evaluation.probe
from analysis import compare, figures, strips, verdict
from analysis.arrays import check
from analysis.measures import metrics  # noqa: F401
from analysis.planners import cem, cem_jepa_wms, gradient_plan, mppi  # noqa: F401
from evaluation import imagination
from evaluation.analysis import (  # noqa: F401
    BASELINE,
    Analysis,
    analyse,
    choose_adapter,
    names_of,
    read_clips,
)
from evaluation.energies import (  # noqa: F401
    BYTES_PER_TOKEN,
    chunk_size,
    grid,
    landscape,
    landscapes,
    sequence_energies,
    sequence_energy,
)
from evaluation.plan import plan
from evaluation.replay import replay_table
from files.reading import read_npz
from report import page
from running.lock import Lock


def load(path):
    """The arrays of landscapes.npz, compared with what analysis/__init__.py lists. Raises
    ValueError."""
    try:
        arrays = read_npz(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; energy.py config.yaml --adapters=… writes it"
                         ) from None
    except ValueError as error:
        raise ValueError(f"{error}, or compute it again") from None
    try:
        check(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; is it a landscapes.npz of energy.py?") from None
    return arrays


def report(arrays, folder, again=True, also=None):
    """Writes metrics, figures and report.html of the arrays into `folder` -> the content of
    comparison.json.

    again: figures also if they are there, newer than landscapes.npz; also: the content of
    comparison.json of a second data set."""
    result, last = compare.write(folder, arrays), folder / "horizon.png"
    drawn = last.exists() and os.path.getmtime(last) >= os.path.getmtime(folder / "landscapes.npz")
    if again or not drawn:
        figures.write(folder, arrays, result)
    page.write(folder, arrays, result, also)
    return result


def main(args):
    """args: of the command line, or what `script.begin` returned."""
    script.run("energy.py", __doc__, args, _run)


def _run(given):
    started = time.monotonic()
    if given.command == "check":
        expected = given.options.get("expected")
        sys.exit(0 if evaluation.check.run(given.cfg, expected) else 1)
    if given.source:
        folder, second = Path(given.source).parent, Path(given.source).parent / "also"
        also = ()
        if (second / "landscapes.npz").is_file():
            also = (second, load(second / "landscapes.npz"))
        show(folder, load(given.source), given.all, also, again=True)
        return
    if given.note:
        print(given.note)
    if given.command == "plan":
        if given.replay:
            print(replay_table(given.cfg, given.replay, given.adapters))
        else:
            # Of a run its newest step.
            adapter = given.adapters[-1] if given.adapters else BASELINE
            print(plan(given.cfg, given.image, given.pose, given.goal, adapter))
    elif given.command == "probe":
        print(evaluation.probe.probe(given.cfg, given.combinations, given.adapters, given.all))
    else:
        analysis = Analysis(given.cfg, given.adapters)
        # Before the landscapes, which may take hours: it may be of another encoder.
        decode = imagination.decoder_for(analysis, given.decoder) if given.decoder else None
        folders = analysis.folders(given.cfg)
        with Lock(folders[0]):
            paths = [folder / "landscapes.npz" for folder in folders]
            arrays = list(analysis.measure(paths))
            if decode:              # first, as the report shows its strips
                imagined = imagination.show(analysis, decode, folders[0] / strips.FOLDER)
            show(folders[0], arrays[0], given.all, *zip(folders[1:], arrays[1:]))
            if decode:
                print(f"\n{imagined}")
    print(f"{time.monotonic() - started:.0f} s")


def show(folder, arrays, everything=False, also=(), again=False):
    """Writes metrics, figures and report into a folder and prints the verdict and six rows.
    everything: all groups and metrics too; also: (folder, arrays) of the same checkpoints on a
    second data set, which tell what was forgotten; again: draw figures that are there already."""
    second = report(also[1], also[0], again) if also else None
    result = report(arrays, folder, again, second)
    _print(folder, result, everything, second)
    if also:
        print(f"\nON THE SECOND DATA SET, {also[1].get('also', 'energy.also')}:")
        _print(also[0], second, everything)


def _print(folder, result, everything, second=None):
    print(verdict.summary(result, second))
    if everything:
        print(f"\n{compare.table(result)}")
    print(f"\n{folder}: report.html, figures, landscapes.npz, metrics.csv, comparison.json"
          + "; --all shows all metrics" * (not everything))


if __name__ == "__main__":
    main(arguments)
