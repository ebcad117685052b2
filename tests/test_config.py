"""The config is strict: a typo in a key or value ends in one line with the key and the cure."""
import dataclasses
import os
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import config
import train
from running import command_line


def keys(value, prefix=""):
    """All dotted names in nested dicts."""
    if not isinstance(value, dict):
        return {prefix}
    return set().union(*(keys(v, f"{prefix}.{k}".lstrip(".")) for k, v in value.items()))


def test_config_yaml_holds_every_key_with_its_default():
    """Readers of either file see the same recipe."""
    in_file = yaml.safe_load(open("config.yaml"))
    assert keys(in_file) == keys(dataclasses.asdict(config.Config()))
    assert config.load(["config.yaml"]) == config.Config()


def test_the_users_recipe():
    cfg = config.load(["config.yaml"])
    assert (cfg.batch_size * cfg.grad_accum, cfg.lr, cfg.grad_clip) == (32, 1e-4, 1.0)
    assert (cfg.optimizer, cfg.precision) == ("adamw8bit", "bf16")
    assert cfg.activation_checkpointing
    assert (cfg.save_every, cfg.keep, cfg.gcs_minutes) == (1000, 5, 30)
    assert {5000, 20000} <= set(cfg.milestones)
    assert (cfg.lora.rank, cfg.lora.alpha) == (16, 32)
    assert (cfg.lora.dropout, cfg.lora.rslora) == (0.05, True)
    assert (cfg.data.clip_frames, cfg.data.clip_stride) == (16, 8)
    assert (cfg.data.camera, cfg.data.crop) == ("wrist_image_left", "center")


def test_every_key_has_a_comment():
    """It is what --help says about it; a section's keys may share one."""
    meanings = command_line.key_meanings()
    assert meanings.keys() >= config.flat(config.Config()).keys()
    bare = [name for name in config.flat(config.Config()) if not meanings[name][1]]
    assert not bare, bare


@pytest.mark.parametrize("arg, get, expected", [
    ("--max_steps=10", lambda c: c.max_steps, 10),
    ("--max-steps=10", lambda c: c.max_steps, 10),
    ("--lr=3e-4", lambda c: c.lr, 3e-4),
    ("--lr=1", lambda c: c.lr, 1.0),
    ("--resume", lambda c: c.resume, True),
    ("--resume=false", lambda c: c.resume, False),
    ("--lora.targets=[attn.qkv]", lambda c: c.lora.targets, ("attn.qkv",)),
    ("--data.keys.gripper=", lambda c: c.data.keys.gripper, ""),
    ("--out_dir=2026", lambda c: c.out_dir, "2026"),
    ("--model.size={image_size: 64}", lambda c: c.model.size, {"image_size": 64}),
    ("--milestones=[]", lambda c: c.milestones, ()),
    ("--milestones=", lambda c: c.milestones, ()),
    ("--milestones=7", lambda c: c.milestones, (7,)),
    ("--milestones=5e3, 20_000", lambda c: c.milestones, (5000, 20000)),
    ("--energy.planes=xy,xz", lambda c: c.energy.planes, ("xy", "xz")),
    ("--lora.targets=['attn.qkv', \"mlp.fc1\"]", lambda c: c.lora.targets,
     ("attn.qkv", "mlp.fc1")),
    ("--max_steps=5e3", lambda c: c.max_steps, 5000),
    ("--max_steps=5_000", lambda c: c.max_steps, 5000),
    ("--max_steps=010", lambda c: c.max_steps, 10),
    ("--max_steps= 7 ", lambda c: c.max_steps, 7),
    ("--lr=1_0e-5", lambda c: c.lr, 1e-4),
    ("--weight_decay=.5", lambda c: c.weight_decay, 0.5),
    ("--debug=No", lambda c: c.debug, False),
    ("--compile=OFF", lambda c: c.compile, False),
    ("--resume=Yes", lambda c: c.resume, True),
    ("--resume=changed", lambda c: c.resume, "changed"),
    ("--lora={rank: 8, alpha: 1}", lambda c: (c.lora.rank, c.lora.alpha), (8, 1.0)),
    ("--data.keys={gripper: }", lambda c: c.data.keys.gripper, ""),
    ("--model.size.image_size=64", lambda c: c.model.size, {"image_size": 64}),
])
def test_command_line(arg, get, expected):
    assert get(config.load(["config.yaml", arg])) == expected


TEXTS = ["~~", "2026", "0712", "1e5", "1_000", "null", "no", "True", "2026-11-26", "12:30:00",
         "[x]", "{a: 1}", "a: b", "a b", "x#y", "'quoted'", "=", "0x10", ".5", "é/ñ", "-x", "a~b",
         "*", "&a", "!!int 3", "%x", "@x", "`x", "|", ">", "a\nb", " x", "<<", "---"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["out_dir", "data.camera", "data.keys.image", "wandb"])
def test_a_name_is_the_text_that_was_written(tmp_path, name, text):
    """On the command line and, quoted, in a YAML file; also after saving and loading."""
    if text.startswith("~") and name == "out_dir":
        text = f"./{text}"
    cfg = config.load([f"--{name}={text}"])
    assert config.flat(cfg)[name] == text
    config.save(cfg, tmp_path / "saved.yaml")
    assert config.load([str(tmp_path / "saved.yaml")]) == cfg


@pytest.mark.parametrize("name", ["out_dir", "init", "model.checkpoint", "data.path",
                                  "data.latents"])
def test_a_path_may_begin_at_home(monkeypatch, tmp_path, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    section, _, key = name.rpartition(".")
    (tmp_path / "mine.yaml").write_text(f"{section}: {{{key}: ~/x}}" if section else f"{key}: ~/x")
    for args in ([f"--{name}=~/x"], ["~/mine.yaml"]):
        assert config.flat(config.load(args))[name] == f"{tmp_path}/x"
    with pytest.raises(ValueError, match=r"~nobody-here/x: no such user"):
        config.load([f"--{name}=~nobody-here/x"])
    assert config.load(["--data.path=gs://b/~x"]).data.path == "gs://b/~x"
    assert config.load(["--wandb=~"]).wandb == "~"


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_characters="\0"), min_size=1), st.floats(1e-9, 1e9),
       st.integers(0, 2 ** 53))
def test_any_text_and_number_survives_saving_and_loading(tmp_path_factory, text, number, whole):
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    cfg = config.load([f"--data.camera={text}", f"--weight_decay={number!r}", f"--seed={whole}",
                       f"--wandb={text}"])
    assert (cfg.data.camera, cfg.weight_decay, cfg.seed) == (text, number, whole)
    config.save(cfg, path)
    assert config.load([str(path)]) == cfg


def test_later_arguments_override_earlier_ones_and_debug(tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 2e-4\nlora:\n  rank: 8\n")
    mine = str(tmp_path / "mine.yaml")
    cfg = config.load(["config.yaml", mine, "--lora.rank=4", "--lora.rank=2"])
    assert (cfg.lr, cfg.lora.rank, cfg.lora.alpha) == (2e-4, 2, 32)
    cfg = config.load(["config.yaml", "--batch_size=4", "--debug"])
    assert (cfg.max_steps, cfg.batch_size) == (3, 4)
    assert cfg.out_dir.startswith("runs/droid/debug-")


def test_debug_in_a_file_is_the_option(tmp_path):
    (tmp_path / "mine.yaml").write_text("debug: TRUE\nmax_steps: 50\nseed: 3\n")
    args = [str(tmp_path / "mine.yaml"), "--batch_size=4", "--out_dir=runs/x"]
    cfg = config.load(args)
    assert (cfg.max_steps, cfg.batch_size, cfg.seed, cfg.debug) == (3, 4, 3, True)
    assert re.fullmatch(r"runs/x/debug-\d{8}-\d{6}", cfg.out_dir)
    off = config.load([*args, "--debug=false"])
    assert (off.max_steps, off.out_dir, off.debug) == (50, "runs/x", False)
    # What it saves is what it ran with: no folder in the folder, no other steps.
    config.save(cfg, tmp_path / "saved.yaml")
    assert config.load([str(tmp_path / "saved.yaml")]) == cfg


def test_where_values_are_from(tmp_path):
    """Of files count the values that are not the default: config.yaml itself gives none."""
    assert config.load(["config.yaml"]).given == {} and config.Config().given is None
    mine, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    mine.write_text("seed: 1\nlr: 1e-3\nlora: {rank: 8, alpha: 32}\n")
    other.write_text("lr: 0.0001\n")
    cfg = config.load([str(mine), str(other), "config.yaml", "--max_steps=5000", "--data.camera=x"])
    assert cfg.given == {"max_steps": "command line", "data.camera": "command line"}
    cfg = config.load(["config.yaml", str(mine), "--resume"])
    assert cfg.given == {"seed": str(mine), "lr": str(mine), "lora.rank": str(mine),
                         "resume": "command line"}
    assert "given" not in config.dump(cfg) and cfg == config.load(["--resume", str(mine)])


def test_a_key_of_an_older_version(tmp_path, capsys, monkeypatch):
    """A run's config.yaml is still read; on the command line the key of today is named."""
    monkeypatch.setitem(config.REPLACED, "data.max_bad", ("data.crop", "10"))
    for value, said in (("10", ""), ("0", "data.max_bad is passed over: data.crop now\n")):
        (tmp_path / "old.yaml").write_text(f"seed: 3\ndata: {{max_bad: {value}}}\n")
        assert config.load([str(tmp_path / "old.yaml")]).seed == 3
        err = capsys.readouterr().err
        assert err.endswith(said) and bool(err) == bool(said)
    with pytest.raises(ValueError, match="unknown key data.max_bad; did you mean data.crop?"):
        config.load(["--data.max_bad=3"])


def test_save_and_load_give_the_same(tmp_path):
    cfg = config.load(["config.yaml", "--model.size={image_size: 64}", "--milestones=[1, 2]",
                       "--data.keys.episode="])
    config.save(cfg, tmp_path / "resolved.yaml")
    assert config.load([str(tmp_path / "resolved.yaml")]) == cfg


MISTAKES = [
    ("--max_step=10", "max_step", "did you mean max_steps?"),
    ("--lora.rnak=8", "lora.rnak", "did you mean lora.rank?"),
    ("--zzz=8", "zzz", "known: out_dir"),
    ("--data.zzz=8", "data.zzz", "known: data.path"),
    ("--rank=8", "rank", "did you mean lora.rank?"),
    ("--lora.lr=8", "lora.lr", "did you mean lr or lora.rank?"),
    ("--steps=8", "steps", "did you mean energy.steps or max_steps?"),
    ("--max_steps.x=8", "max_steps", "a whole number"),
    ("--...=8", "unknown key", "known: out_dir"),
    ("--data.key.pose=x", "data.key", "did you mean data.keys?"),
    ("--max_steps=many", "max_steps", "expects a whole number, got 'many'"),
    ("--max_steps=1.5", "max_steps", "expects a whole number"),
    ("--max_steps", "max_steps", "got no value; write --max_steps=VALUE"),
    ("--out_dir", "out_dir", "got no value; write --out_dir=VALUE"),
    ("--max_steps=true", "max_steps", "expects a whole number"),
    ("--max_steps=", "max_steps", "got ''"),
    ("--max_steps=0x10", "max_steps", "a whole number"),
    ("--max_steps=1:30", "max_steps", "a whole number"),
    ("--max_steps=1e30", "max_steps", "at most 9007199254740992"),
    (f"--max_steps={'9' * 5000}", "max_steps", "a whole number"),
    ("--seed=-1", "seed", "at least 0"),
    ("--milestones=5,x", "milestones", "got 'x'"),
    ("--milestones=[5", "milestones", "got '[5'"),
    ("--milestones={a: 1}", "milestones", "a whole number, got '{a: 1}'"),
    ("--dist_timeout_minutes=1e9", "dist_timeout_minutes", "at most 1000000"),
    ("--resume=1", "resume", "true or false"),
    ("--resume=maybe", "resume", "true or false"),
    ("--lr=fast", "lr", "expects a finite number"),
    ("--lr=1,5", "lr", "a finite number"),
    ("--lr=inf", "lr", "a finite number"),
    ("--lr=1e999", "lr", "a finite number"),
    ("--weight_decay=nan", "weight_decay", "a finite number"),
    ("--lora=8", "lora", "has keys such as lora.rank; got '8'"),
    ("--lora.targets=[[a]]", "lora.targets", "expects text, got ['a']"),
    ("--lora.targets=[]", "lora.targets", "is empty; give one"),
    ("--lora.targets=a,", "lora.targets", "is empty; give one"),
    ("--lora={rank", "command line", "not valid YAML: line 1"),
    ("--model.size={image_size: big}", "model.size.image_size", "a whole number, got 'big'"),
    ("absent.yaml", "absent.yaml", "no such config file"),
    ("--data.clip_frames=1", "data.clip_frames", "at least 2"),
    ("--rollout=16", "rollout", "--rollout=15"),
    ("--data.clip_frames=2", "data.clip_frames", "--rollout=1"),
    ("--precision=fp8", "precision", "choose from bf16, fp16, fp32"),
    ("--optimizer=sgd", "optimizer", "choose from adamw8bit, adamw"),
    ("--data.crop=left", "data.crop", "choose from center, droid, none"),
    ("--batch_size=0", "batch_size", "at least 1"),
    ("--lr=nan", "lr", "a finite number"),
    ("--lr=-1", "lr", "at least 0"),
    ("--lora.rank=0", "lora.rank", "at least 1"),
    ("--lora.dropout=1", "lora.dropout", "at most 0.99"),
    ("--data.val_fraction=0", "val_every", "set one of the two"),
    ("--min_lr=1", "min_lr", "above lr"),
    ("--schedule=wsd --decay_steps=9999", "decay_steps", "above max_steps"),
    ("--energy.planes=", "energy.planes", "is empty; give one"),
    ("--energy.planes=xx", "energy.planes", "choose from xy, xz, yz, xyz"),
    ("--energy.planners=best", "energy.planners", "choose from cem, cem_jepa_wms, mppi, gradient"),
    ("--data.val_fraction=2", "data.val_fraction", "at most 1"),
    ("--out_dir=gs://bucket/run", "out_dir", "--gcs_dir=gs://"),
    ("--gcs_dir=/tmp", "gcs_dir", "must start with gs://"),
    ("--model.size=vith --model.checkpoint=random", "model.size", "choose from vitg, tiny"),
    ("--model.size={depth: 2} --model.checkpoint=random", "model.size", "missing ['encoder_depth'"),
    ("--model.checkpoint=absent.pt", "absent.pt", "wget https://"),
    ("--device=cuda:99 --model.checkpoint=random", "device", "--device=cpu"),
    ("--device=gpu", "device", "--device=cpu"),
    ("--device=cuda:99999999999", "device", "--device=cpu"),
]


@pytest.mark.parametrize("args, key, cure", MISTAKES)
def test_mistakes_end_in_one_line_with_key_and_cure(tmp_path, args, key, cure):
    args = re.split(" (?=--)", args)             # not within {depth: 2}
    if not any(arg.startswith("--out_dir") for arg in args):
        args.append(f"--out_dir={tmp_path / 'run'}")
    with pytest.raises(SystemExit) as stopped:
        train.main(["config.yaml", *args])
    message = str(stopped.value)
    assert message.startswith("train.py: ") and "\n" not in message
    assert key in message and cure in message
    assert not (tmp_path / "run").exists()


BAD_FILES = [
    (b"- 1\n- 2\n", "a recipe has keys such as out_dir; got \\['1', '2'\\]"),
    (b"just text", "got 'just text'"),
    (b"", "a recipe has keys such as out_dir; got nothing"),
    (b"# only a comment\n", "got nothing"),
    (b"---\n", "got nothing"),
    (b"lora:\n", "lora has keys such as lora.rank; got nothing"),
    (b"a: [1", "not valid YAML: line 1"),
    (b"seed: 1\nlr:\t1\n\tx: 2\n", "not valid YAML: line 2: .*found character .\\\\t"),
    (b"seed: 1\nlora: {rank: 1, rank: 2}\n", "rank is there twice"),
    (b"lr: 1\nseed: 1\nlr: 2\n", "lr is there twice"),
    (b"out_dir: a: b\n", "not valid YAML: line 1"),
    (b"out_dir: [x]\n", "out_dir expects text, got \\['x'\\]"),
    (b'out_dir: "a\\0b"\n', "out_dir expects text"),
    (b"seed: {a: 1}\n", "seed expects a whole number"),
    (b"seed: \xff\n", "not valid YAML: "),
    (b"\x80\x02}q\x00.", "not valid YAML: "),
    (b"\0" * 100, "not valid YAML: "),
    (b"seed: 1\n---\nseed: 2\n", "expected a single document"),
    (b"a: &a [x]\nb: *a\n", "aliases .* are not read"),
    (b"a: &a [*a]\n", "aliases .* are not read"),
    (b"[" * 100_000, "nested too deeply"),
    (b"{a: " * 10_000, "nested too deeply"),
    (b"? [a]\n: b\n", "unhashable"),
    (b"<<: {seed: 1}\n", "unknown key <<"),
    (b"1: 2\n", "unknown key 1;"),
    (b"? \n: 2\n", "unknown key ;"),
    (b"x" * 300_000, "more than the 262,144"),
]


@pytest.mark.parametrize("data, says", BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_yaml_file_ends_in_one_line(tmp_path, data, says):
    (tmp_path / "bad.yaml").write_bytes(data)
    with pytest.raises(ValueError, match=says) as error:
        config.load([str(tmp_path / "bad.yaml")])
    assert "bad.yaml" in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 1500


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero", tmp_path, tmp_path / "x/y", "x" * 300, "a\0b"):
        with pytest.raises(ValueError) as error:
            config.load([str(path)])
        assert "\n" not in str(error.value)


def test_other_encodings_and_the_tags_of_python_are_harmless(tmp_path):
    path = tmp_path / "a.yaml"
    for data in ("seed: 3\nout_dir: é".encode("utf-16"), "\ufeffseed: 3\nout_dir: é\n".encode(),
                 b"seed: 3\r\nout_dir: \xc3\xa9\r\n", b"seed: !!python/name:os.abort 3\nout_dir: "
                 b"!!python/object/apply:os.system \xc3\xa9"):
        path.write_bytes(data)
        assert (config.load([str(path)]).seed, config.load([str(path)]).out_dir) == (3, "é")


def test_a_list_that_was_emptied_can_be_filled_again():
    assert config.load(["config.yaml", "--milestones=[]", "--milestones=[25]"]).milestones == (25,)
    with pytest.raises(ValueError, match="milestones expects a whole number, got 'a'"):
        config.load(["config.yaml", "--milestones=[]", "--milestones=[a]"])
