"""The config is strict: a typo in a key or value ends in one line with the key and the cure."""
import dataclasses
import re

import pytest
import yaml

import config
import train


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
])
def test_command_line(arg, get, expected):
    assert get(config.load(["config.yaml", arg])) == expected


def test_later_arguments_override_earlier_ones_and_debug(tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 2e-4\nlora:\n  rank: 8\n")
    mine = str(tmp_path / "mine.yaml")
    cfg = config.load(["config.yaml", mine, "--lora.rank=4", "--lora.rank=2"])
    assert (cfg.lr, cfg.lora.rank, cfg.lora.alpha) == (2e-4, 2, 32)
    cfg = config.load(["config.yaml", "--batch_size=4", "--debug"])
    assert (cfg.max_steps, cfg.batch_size) == (3, 4)
    assert cfg.out_dir.startswith("runs/droid/debug-")


def test_save_and_load_give_the_same(tmp_path):
    cfg = config.load(["config.yaml", "--model.size={image_size: 64}", "--milestones=[1, 2]",
                       "--data.keys.episode="])
    config.save(cfg, tmp_path / "resolved.yaml")
    assert config.load([str(tmp_path / "resolved.yaml")]) == cfg


MISTAKES = [
    ("--max_step=10", "max_step", "did you mean max_steps?"),
    ("--lora.rnak=8", "lora.rnak", "did you mean lora.rank?"),
    ("--zzz=8", "zzz", "known: out_dir"),
    ("--data.key.pose=x", "data.key", "did you mean data.keys?"),
    ("--max_steps=many", "max_steps", "expects int, got 'many'"),
    ("--max_steps=1.5", "max_steps", "expects int"),
    ("--max_steps", "max_steps", "write --max_steps=VALUE"),
    ("--max_steps=true", "max_steps", "expects int"),
    ("--resume=1", "resume", "true or false"),
    ("--lr=fast", "lr", "expects float"),
    ("--lora=8", "lora", "expects `key: value` lines"),
    ("--lora.targets=attn.qkv", "lora.targets", "a list, [a, b]"),
    ("--lora.targets=[1]", "lora.targets", "a list of str"),
    ("--lora.targets=[]", "lora.targets", "name layers"),
    ("--lr={", "--lr={", "not valid YAML"),
    ("absent.yaml", "absent.yaml", "no such config file"),
    ("--data.clip_frames=1", "data.clip_frames", "at least 2"),
    ("--rollout=16", "rollout", "--rollout=15"),
    ("--data.clip_frames=2", "data.clip_frames", "--rollout=1"),
    ("--precision=fp8", "precision", "choose from bf16, fp16, fp32"),
    ("--optimizer=sgd", "optimizer", "choose from adamw8bit, adamw"),
    ("--data.crop=left", "data.crop", "choose from center, droid, none"),
    ("--batch_size=0", "batch_size", "at least 1"),
    ("--lr=nan", "lr", "at least 0"),
    ("--lora.rank=0", "lora.rank", "at least 1"),
    ("--lora.dropout=1", "lora.dropout", "below 1"),
    ("--data.val_fraction=0", "val_every", "set one of the two"),
    ("--min_lr=1", "min_lr", "above lr"),
    ("--schedule=wsd --decay_steps=9999", "decay_steps", "above max_steps"),
    ("--out_dir=gs://bucket/run", "out_dir", "--gcs_dir=gs://"),
    ("--gcs_dir=/tmp", "gcs_dir", "must start with gs://"),
    ("--model.size=vith --model.checkpoint=random", "model.size", "choose from vitg, tiny"),
    ("--model.size={depth: 2} --model.checkpoint=random", "model.size", "missing ['encoder_depth'"),
    ("--model.checkpoint=absent.pt", "absent.pt", "wget https://"),
    ("--device=cuda:99", "device", "--device=cpu"),
    ("--device=gpu", "device", "--device=cpu"),
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


def test_a_yaml_file_that_is_no_mapping_or_not_yaml(tmp_path):
    for text, says in (("- 1\n- 2\n", "key: value"), ("a: [1", "not valid YAML"),
                       ("lora:\n", "key: value")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=says) as error:
            config.load([str(tmp_path / "bad.yaml")])
        assert "bad.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_list_that_was_emptied_can_be_filled_again():
    assert config.load(["config.yaml", "--milestones=[]", "--milestones=[25]"]).milestones == (25,)
    with pytest.raises(ValueError, match="milestones expects a list of int"):
        config.load(["config.yaml", "--milestones=[]", "--milestones=[a]"])
