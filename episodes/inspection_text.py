"""What `python droid.py inspect` prints and writes: text, inspect.json and inspect.png."""
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from textwrap import wrap

import config
from episodes import contact_sheet, inspection
from episodes.several import labels, shares
from episodes.stored import with_frames
from files import say_once, write_file


WIDTH, INDENT = 100, 14
MOST_BAD = 10               # episodes that are listed; inspect.json has all


def run(given, open_files):
    """Prints and writes what the data sets of given.cfg hold.

    given: as from running/command_line.py. open_files: Config of one data set -> EpisodeSource.
    Raises ValueError at the end if anything is wrong that would stop a run, OSError."""
    cfg, reports, clips, known = given.cfg, [], [], {}
    sets = [_recorded(data) for data in config.data_sets(cfg.data)]
    folder = Path(given.options.get("out") or default_folder(sets))
    for data, label in zip(sets, labels(sets)):
        try:
            report, rows = _look(replace(cfg, data=data), label, open_files, known)
        except (ValueError, OSError) as error:
            if len(sets) == 1:
                raise
            report, rows = {"label": label, "path": data.path, "errors": [str(error)]}, []
        for row in rows:
            row.label = label if len(sets) > 1 else ""
        reports.append(report)
        # Of many data sets some rows each, so that the picture stays one that can be looked at.
        clips += rows[:max(1, 12 // len(sets))]
    _add_epochs(cfg, reports)
    for report in reports:
        print(*lines(report), "", sep="\n")
    command = train_command(given)
    folder.mkdir(parents=True, exist_ok=True)
    written = {"data_sets": reports, "train": shlex.join(command)}
    text = json.dumps(written, indent=1, ensure_ascii=False, allow_nan=False)
    write_file(folder / "inspect.json", text.encode(errors="replace"))
    if clips:
        contact_sheet.write(folder / "inspect.png", clips)
    else:
        (folder / "inspect.png").unlink(missing_ok=True)        # of another time
    n = sum(len(report["errors"]) for report in reports)
    print(*_entry("train", "mend the errors first; then:" if n else "with these settings:"),
          *_command_lines(command), sep="\n")
    print(*_entry("written", f"{folder}/inspect.json" + f", {folder}/inspect.png" * bool(clips)),
          sep="\n", flush=True)
    if n:
        raise ValueError(f"{n} error{'s' * (n > 1)} in these data, listed above after ERROR")


def default_folder(sets):
    """inspect/NAME, of the last parts of the paths."""
    name = "+".join(dict.fromkeys(label.partition("/")[0] for label in labels(sets)))
    return Path("inspect", re.sub(r"[^\w.+-]", "_", name)[:100].strip(".") or "data")


def _recorded(data):
    """A data set of a run that trained from latents: what these were made from."""
    if not data.latents:
        return data
    recorded = with_frames(data)
    say_once(f"{data.latents}: holds latents; {recorded.path} is inspected, which they were made "
             "from")
    return recorded


def _look(cfg, label, open_files, known):
    reopen = None
    if not cfg.data.drop_idle:
        # Joint velocities tell idle steps, and not all data have them.
        with_velocity = replace(cfg, data=replace(cfg.data, drop_idle=True))
        try:
            source = open_files(with_velocity)
        except ValueError:
            source = open_files(cfg)
        else:
            def reopen():
                return open_files(cfg)
    else:
        source = open_files(cfg)
    source.label = label
    return inspection.look(source, cfg, reopen, known)


def _add_epochs(cfg, reports):
    """To each report how many clips a run takes of it, and how often it sees each."""
    clips = cfg.max_steps * cfg.batch_size * cfg.grad_accum
    train = [report["clips"]["train"]["clips"] if "clips" in report else 0 for report in reports]
    parts = shares(cfg.data) if cfg.data.weights else [n / max(1, sum(train)) for n in train]
    for report, n, part in zip(reports, train, parts):
        report["run"] = {"clips": round(part * clips), "epochs": part * clips / n if n else None}


def train_command(given):
    """The words of the command that trains with these settings on these data."""
    cfg, recipes = given.cfg, given.paths or ["config.yaml"]
    keys = [key for key in given.keys if not key.startswith("--out_dir=")]
    sets = config.data_sets(cfg.data)
    out = cfg.out_dir
    if out == config.Config.out_dir or any(not name.endswith((".yaml", ".yml"))
                                           for name in recipes):
        out = f"runs/{default_folder(sets).name}"
    return ["python", "train.py", *recipes, *keys, f"--out_dir={out}"]


# Text

def lines(report):
    """A report as lines of at most 100 columns."""
    text = [_one_line(f"{report['label']}: {report['path']}")]
    if "format" in report:
        for name, value in _entries(report):
            if value:
                text += _entry(name, value)
    for name, kind in (("note", "notes"), ("ERROR", "errors")):
        for message in report.get(kind, ()):
            text += _entry(name, _one_line(message))
    return [line if len(line) <= WIDTH else f"{line[:WIDTH - 1]}…" for line in text]


def _entry(name, value):
    first, rest = f"  {name}".ljust(INDENT), " " * INDENT
    # A number stays with what follows it.
    value = re.sub(r"(?<=[\d×]) (?=[\d×]|cm\b|ms?\b|s\b|rad\b)", "\xa0", value)
    wrapped = [line.replace("\xa0", " ") for part in value.split("\n")
               for line in wrap(part, WIDTH - INDENT, break_on_hyphens=False) or [""]]
    return [f"{first if i == 0 else rest}{line}".rstrip() for i, line in enumerate(wrapped)]


def _command_lines(words):
    """A command that a shell takes as it is printed, over several lines if it is long."""
    wrapped = [" " * INDENT]
    for word in map(shlex.quote, words):
        if len(f"{wrapped[-1]} {word} \\") > WIDTH and wrapped[-1].strip():
            wrapped[-1] += " \\"
            wrapped.append(" " * INDENT)
        wrapped[-1] += " " * bool(wrapped[-1].strip()) + word
    return wrapped


def _entries(report):
    """(name, text) of each line; without a text there is nothing to say."""
    about = "" if report["complete"] else "about "
    yield "format", f"{report['format']}, {_count(report['files'], 'file')}"
    yield "episodes", _episodes(report)
    yield "steps", _steps(report, about)
    fps = report["fps_from"]
    yield "rate", f"{report['fps']:.4g} Hz ({fps})" + (
        ": set --data.fps if that is wrong" if fps.startswith("assumed") else "")
    yield "cameras", _cameras(report)
    yield "images", _images(report["images"])
    yield "success", _success(report["success"])
    yield "idle", _idle(report["idle"])
    yield "clips", _clips(report, about)
    clip = report["clip"]
    yield "a clip", (f"{clip['frames']} frames, {_count(clip['frame_step'], 'recorded frame')} "
                     f"apart: {clip['seconds']:.3g} s; an episode needs {clip['span']} steps")
    yield "a run", _run(report["run"], about)
    yield "moves", _moves(report["moves"])
    yield "positions", _ranges(report["ranges"], "xyz", "m")
    yield "angles", _angles(report)
    yield "gripper", _gripper(report)
    is_explained = any(one["explained"] for one in report["bad"])
    yield "jumps", "" if is_explained else _jumps(report["jumps"])
    yield "duplicates", _duplicates(report)
    yield "bad", _bad(report["bad"])
    yield "reading", _reading(report["reading"])


def _one_line(text):
    """Names are what people make them: nothing in them is to move the cursor."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _count(n, noun):
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _episodes(report):
    if report["complete"]:
        text = f"{report['episodes']:,}, all of them looked at"
    else:
        text = (f"a sample of {report['looked_at']:,} of about {report['episodes']:,} episodes; "
                "all numbers are those of the sample, or extrapolated from it")
    became = []
    for status, n in report["became"].items():
        names = report["unused"].get(status)
        became.append(f"{n:,} {status}" + (f" ({_few(names, 2)})" if names else ""))
    text = f"{text}: {', '.join(became)}" if became else text
    if report["duplicates"]["names"]:
        text += (f". They have {_count(report['recordings'], 'name')}: cameras or parts of one "
                 "recording are an episode each")
    return text


def _steps(report, about):
    if not report["steps_an_episode"]:
        return ""
    least, median, most = report["steps_an_episode"]
    total = report["steps_looked_at"]
    if about:
        total *= report["episodes"] / max(1, report["looked_at"])
    each = f"{least:,} to {most:,} an episode, in the middle {median:g}"
    return f"{about}{round(total):,}; {each if least < most else f'{least:,} an episode'}"


def _cameras(report):
    sizes = ", ".join(f"{h} × {w}" + f" ({_count(n, 'episode')})" * (len(report["image_sizes"]) > 1)
                      for h, w, n in report["image_sizes"][:6])
    names = ", ".join(f"{one['name']} ({one['height']} × {one['width']})"
                      for one in report["cameras"])
    own = f"read: {report['camera']}, " if names else "one a file, "
    share = report["share_of_image"]
    crop = f"; data.crop={report['crop']} keeps {share:.0%} of the image" if share else ""
    return f"{names}\n" * bool(names) + f"{own}images of {sizes or 'unknown size'} pixels{crop}"


def _images(images):
    if not images["looked_at"]:
        return ""
    text = f"{images['frames']} of each of {_count(images['looked_at'], 'episode')} looked at"
    wrong = [f"{one['name']}: {one['reason']}" for one in images["wrong"]]
    if not wrong:
        return f"{text}: none is of one colour or frozen"
    more = [f"and {len(wrong) - MOST_BAD:,} more, in inspect.json"] * (len(wrong) > MOST_BAD)
    return "\n".join([f"{text}; clips that are like that are left out:",
                      *map(_one_line, wrong[:MOST_BAD]), *more])


def _success(success):
    if not success:
        return "not recorded (no /success/ or /failure/ in names, no column)"
    return (f"{success['share']:.0%}: {success['success']:,} succeeded, {success['failure']:,} "
            "failed")


def _idle(idle):
    parts = []
    if idle["by_poses"] is not None:
        parts.append(f"{idle['by_poses']:.0%} of the steps, by the poses: slower than 5 mm/s and "
                     "1°/s, gripper at rest")
    if idle["by_joint_velocity"] is not None:
        parts.append(f"{idle['by_joint_velocity']:.0%} of the steps, by the joint velocities: "
                     "stretches that --data.drop_idle leaves out, and 10 steps before each")
    return "\n".join(parts)


def _clips(report, about):
    train, val = report["clips"]["train"], report["clips"]["val"]
    names = report["val_episodes"]
    text = (f"{about}{train['clips']:,} of {_count(train['episodes'], 'episode')} for training, "
            f"{val['clips']:,} of {val['episodes']:,} for validation")
    if names and report["complete"]:
        text += f": {_few(names, 4)}"
    return text


def _run(numbers, about):
    if not numbers["epochs"]:
        return ""
    text = (f"with the steps and batches of these settings: {numbers['clips']:,} clips, {about}"
            f"{_about(numbers['epochs'])} epochs")
    if numbers["epochs"] > 100:
        text += ("; more than 100: lower --max_steps, --data.clip_stride or --data.clip_frames, or "
                 "record more")
    return text


def _about(number):
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _moves(moves):
    if not moves["n"]:
        return "none: no episode is longer than data.frame_step"
    sigma = " ".join(f"{s:.1f}" for s in moves["sigma_cm"])
    known = {int(step): " ".join(f"{s:.1f}" for s in values)
             for step, values in moves["known_sigma_cm"].items()}
    return (
        f"σ of x y z from frame to frame ({moves['seconds']:.3g} s): {sigma} cm\n"
        "in DROID: " + "; ".join(f"{values} at step {step} ({step / 15:.2g} s)"
                                 for step, values in known.items())
        + ", which the released weights know\n"
        f"{moves['share_beyond_radius']:.0%} have an axis beyond ±{100 * moves['radius']:g} cm "
        f"(energy.radius; 95 % lie within {100 * moves['radius_of_95_percent']:.1f} cm); "
        f"{moves['share_under_1_cm']:.0%} are under 1 cm")


def _ranges(ranges, names, unit):
    each = [f"{name} {ranges[name][0]:.3g} to {ranges[name][1]:.3g}" for name in names
            if name in ranges]
    return f"{', '.join(each)} {unit}" if each else ""


def _angles(report):
    text = _ranges(report["ranges"], ("roll", "pitch", "yaw"), "rad")
    n, n_episodes = report["crossings"]["steps"], report["crossings"]["episodes"]
    if text and n:
        text += (f"; ±π is crossed {_count(n, 'time')} in {_count(n_episodes, 'episode')}, which "
                 "is handled")
    return text


def _gripper(report):
    if not report["ranges"]:
        return ""
    (low, high), first = report["ranges"]["gripper"], report["gripper_starts_at"]
    if low == high:
        return f"{low:.3g} always"
    likely = ("1 is likely closed, as it should be" if first < 0.35 else
              "which end is open, that does not say" if first <= 0.5 else
              "1 may be open, see --data.gripper.invert")
    return f"{low:.3g} to {high:.3g}; most episodes start at {first:.2g}: {likely}"


def _jumps(jumps):
    text = (f"the largest step is {100 * jumps['longest_m']:.3g} cm, the largest turn "
            f"{math.degrees(jumps['widest_rad']):.3g}°")
    if not jumps["steps"]:
        return f"none; {text}"
    return (f"{_count(jumps['steps'], 'step')} of more than {100 * jumps['limit_m']:.3g} cm or "
            f"{math.degrees(jumps['limit_rad']):.3g}°; {text}; in {_few(jumps['episodes'])}")


def _duplicates(report):
    parts = []
    names, poses = report["duplicates"]["names"], report["duplicates"]["poses"]
    if names:
        parts.append("names that several episodes have (cameras or parts of one recording, on one "
                     "side of the split): " + _few([f"{name} ({n})" for name, n in names.items()]))
    if poses:
        parts.append("the same poses under different names, perhaps on both sides of the split: "
                     + _few([" = ".join(group[:4]) for group in poses]))
    pairs = [" = ".join(pair) for pair in report["duplicates"]["such_as"]]
    if pairs:
        n = report["duplicates"]["elsewhere"]
        parts.append(f"{_count(n, 'episode')} that another data set has too (another camera, or a "
                     f"copy; on one side of the split): {_few(pairs)}")
    return "\n".join(parts) or "none"


def _bad(bad):
    if not bad:
        return "none"
    explained = [one for one in bad if one["explained"]]
    if explained:
        bad = [one for one in bad if not one["explained"]]
        n = sum(one["episodes"] for one in explained)
        return "\n".join([f"{_count(n, 'episode')}, for the reason after ERROR",
                          *([_bad(bad)] if bad else [])])
    n = sum(one["episodes"] for one in bad)
    listed = [_one_line(f"{one['name']}: {one['reason']}") for one in bad[:MOST_BAD]]
    more = [f"and {len(bad) - MOST_BAD:,} more, in inspect.json"] * (len(bad) > MOST_BAD)
    return "\n".join([f"{_count(n, 'episode')}, left out", *listed, *more])


def _reading(reading):
    if not reading["clips"]:
        return ""
    hours = reading["hours_an_epoch"]
    units = [(1, "h"), (60, "min"), (3600, "s")]
    factor, unit = next((one for one in units if hours * one[0] >= 1), units[-1])
    return (f"about {factor * hours:,.1f} {unit} an epoch for one process here: "
            f"{1000 * reading['seconds_an_episode']:.0f} ms an episode, and to decode a clip "
            f"{1000 * reading['seconds_a_clip']:.0f} ms ({_count(reading['clips'], 'clip')} tried)")


def _few(names, most=5):
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(_one_line, names[:most])) + more
