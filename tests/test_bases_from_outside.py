"""Base weights that others wrote: right, or refused in one line without running code; and random
ones to rehearse with."""
import sys
import types

import pytest
import torch
from safetensors import safe_open
from stress import odd_adapters
from stress.spoiled_bases import Code, bases, released

import export
import model
from files import weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", bases())
def test_an_odd_base_loads_right_or_is_refused_in_one_line(tmp_path, name):
    with odd_adapters.time_limit():
        odd_adapters.try_base(name, tmp_path)


def test_functions_that_a_pickle_names_are_not_called(tmp_path, monkeypatch):
    """Not even those whose values are passed over: NumPy's, which build memory from bytes."""
    called, allowed = [], torch.serialization.get_safe_globals()

    def attack(*args):
        called.append(args)

    attack.__module__, attack.__qualname__ = "numpy.random.attack", "attack"
    module = types.ModuleType("numpy.random.attack")
    module.attack = attack
    monkeypatch.setitem(sys.modules, "numpy.random.attack", module)
    torch.save(released() | {"loss": Code(attack, 1, 2)}, tmp_path / "base.pt")
    model.load(tmp_path / "base.pt", "tiny")
    assert not called
    # and nothing is allowed from now on that was not before
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


def test_fingerprints_are_those_of_before():
    """They stand in adapters, stored latents and packages that exist."""
    states = (part.state_dict() for part in odd_adapters.networks())
    prints = weights.fingerprints(model.flat_names(*states))
    assert prints == {"base_fingerprint": "d65849612bc33ce9",
                      "encoder_fingerprint": "ab11b6e4c11443cd"}


def test_names_beside_the_encoders_are_said_once(tmp_path, capsys):
    make, _, _ = bases()["pos_embed"]
    make(tmp_path / "base.pt")
    for _ in range(2):
        model.load(tmp_path / "base.pt", "tiny")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "passed over" in said[0] and "encoder.module.pos_embed" in said[0]


@pytest.mark.parametrize("of_encoder, of_predictor, name, passes", [
    ("encoder.", "predictor.", "encoder.pos_embed", True),
    ("encoder.", "predictor.", "encoder.head.weight", True),
    ("encoder.", "predictor.", "encoder.blocks.0.attn.qkv.scale", False),
    ("encoder.", "predictor.", "predictor.pos_embed", False),
    ("encoder.", "predictor.", "decoder.pos_embed", False),
    ("", "predictor.", "pos_embed", True),
    ("", "predictor.", "predictor.mask_tokens", False),
    ("", "", "pos_embed", True),
    ("", "", "mask_tokens", False),
    ("module.", "module.", "module.pos_embed", True),
    ("module.", "module.", "module.predictor_pos_embed", False),
])
def test_only_names_beside_the_encoders_are_passed_over(of_encoder, of_predictor, name, passes):
    encoder, predictor = (part.state_dict() for part in model.empty_networks("tiny"))
    wanted = model.flat_names(encoder, predictor)
    prefixes = {"encoder.": of_encoder, "predictor.": of_predictor}
    theirs = {ours: prefixes[part] + ours.removeprefix(part)
              for part in prefixes for ours in wanted if ours.startswith(part)}
    shapes = {theirs[ours]: tuple(tensor.shape) for ours, tensor in wanted.items()}
    # both networks have norms and blocks of other names, so prefixes may be equal
    assert weights.match_names("f", shapes, wanted, "tiny", "") == theirs
    if passes:
        assert weights.match_names("f", shapes | {name: (1,)}, wanted, "tiny", "") == theirs
    else:
        with pytest.raises(ValueError, match=f"1 unexpected .{name}"):
            weights.match_names("f", shapes | {name: (1,)}, wanted, "tiny", "")


def test_values_beyond_fp16_are_named_with_the_cure(tmp_path):
    file = released()
    file["encoder"]["module.norm.weight"][7] = 1e5
    torch.save(file, tmp_path / "base.pt")
    with pytest.raises(ValueError, match=r"tensor encoder.norm.weight has values up to 1e\+05, "
                                         "beyond the range of torch.float16; use --precision=bf16"):
        model.load(tmp_path / "base.pt", "tiny", torch.float16)
    model.load(tmp_path / "base.pt", "tiny", torch.bfloat16)
    # what is not asked for is not read
    model.load(tmp_path / "base.pt", "tiny", torch.float16, encoder=False)


# Memory

def test_a_base_that_does_not_fit_is_refused_before_it_is_built(tmp_path, monkeypatch):
    torch.save(released(), tmp_path / "base.pt")
    n_bytes = 4 * sum(p.numel() for part in odd_adapters.networks() for p in part.parameters())
    monkeypatch.setattr(weights, "free_memory", lambda device: n_bytes - 1)
    monkeypatch.setattr(model.Encoder, "init_weights", lambda self: pytest.fail("built"))
    for path in (tmp_path / "base.pt", "random"):
        with pytest.raises(ValueError, match="the base model takes .* in torch.float32 and cpu has "
                                             ".* free; --precision=bf16"):
            model.load(path, "tiny")
    model.load(tmp_path / "base.pt", "tiny", torch.bfloat16)
    model.load(tmp_path / "base.pt", "tiny", encoder=False)


def test_a_size_for_no_machine_is_refused_at_once():
    """800 GB, which a machine might promise and then be killed for."""
    size = dict(encoder_dim=16384, encoder_depth=64, encoder_heads=64, predictor_dim=16384,
                predictor_depth=2, predictor_heads=64, image_size=256)
    with pytest.raises(ValueError, match=r"the base model takes \d+\.\d GB"):
        model.load("random", size)


def test_free_memory_knows_containers_and_other_systems(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    if sys.platform.startswith("linux"):
        assert 1e7 < weights.free_memory(cpu) < 1e14
    files = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\nSwapFree: 1000 kB",
             "/sys/fs/cgroup/memory.max": "4096000", "/sys/fs/cgroup/memory.current": "1024000",
             "/sys/fs/cgroup/memory.stat": "anon 24000\nfile 1000000"}

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(weights.Path, "read_text", read_text)
    assert weights.free_memory(cpu) == 4096000 - 24000
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert weights.free_memory(cpu) == 9000 * 1024
    files.clear()
    assert weights.free_memory(cpu) is None


def test_random_weights_of_a_large_base_are_announced(monkeypatch, capsys):
    model.build("tiny")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(model, "check_memory", lambda *args: 1_317_394_944)
    model.build("tiny")
    assert "--model.size" in capsys.readouterr().err


@pytest.mark.parametrize("value", [0, -52, True, 52.0, "52", None, [52], 10 ** 30, float("nan")])
@pytest.mark.parametrize("key", ["encoder_dim", "predictor_depth", "encoder_heads", "image_size"])
def test_odd_sizes_are_refused_in_one_line(key, value):
    with pytest.raises(ValueError) as error:
        model.build(model.SIZES["tiny"] | {key: value})
    assert f"model.size: {key} is" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [None, 3, ["vitg"], {}, {1: 2, "a": 3}, "", "vitG\n", {"vitg"}])
def test_what_is_no_size_is_refused_in_one_line(size):
    with pytest.raises(ValueError) as error:
        model.resolve_size(size)
    assert "model.size" in str(error.value) and "\n" not in str(error.value)


# save-random

@pytest.mark.parametrize("ending", ["", "base.pt", "base.safetensors"])
def test_a_random_base_for_the_whole_chain(tmp_path, ending):
    path = model.save_random(tmp_path / "new" / ending, "tiny", seed=3)
    assert path == tmp_path / "new" / (ending or "base.safetensors")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    torch.manual_seed(3)
    expected = model.build("tiny")
    loaded = model.load(path, "tiny")
    for ours, theirs in zip(loaded, expected):
        assert ours.base_fingerprint == theirs.base_fingerprint
        assert ours.encoder_fingerprint == theirs.encoder_fingerprint
        assert all(torch.equal(ours.state_dict()[k], v) for k, v in theirs.state_dict().items())
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            assert file.metadata()["base_fingerprint"] == expected[0].base_fingerprint
    export.slim(path, tmp_path / "slim.safetensors", "tiny", torch.bfloat16)
    slim = model.load(tmp_path / "slim.safetensors", "tiny")
    assert slim[0].base_fingerprint == expected[0].base_fingerprint
    with pytest.raises(ValueError, match="is there already"):
        model.save_random(tmp_path / "new" / ending, "tiny")


def test_equal_seeds_give_equal_bytes(tmp_path):
    paths = [model.save_random(tmp_path / f"{i}", "tiny", seed) for i, seed in enumerate((0, 0, 1))]
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second != other


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.os, "fsync", full)
    for name in ("base.pt", "base.safetensors"):
        with pytest.raises(OSError, match=f"{name}: could not be saved .*No space left") as error:
            model.save_random(tmp_path / name, "tiny")
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path, capsys):
    for args in ([], ["--help"], ["-h"], ["save-random", "--help"]):
        model.main(args)
        assert "python model.py save-random" in capsys.readouterr().out
    model.main(["save-random", f"{tmp_path}/a b", "--model.size=tiny", "--precision=fp32"])
    line = capsys.readouterr().out
    assert f"'--model.checkpoint={tmp_path}/a b/base.safetensors' --model.size=tiny" in line
    for args, says in ((["save-random"], "save-random FOLDER"), (["x", "y"], "save-random FOLDER"),
                       (["save-random", "y", "--model.sise=tiny"], "did you mean model.size"),
                       (["save-random", "y", "--model.size=tin"], "choose from"),
                       (["save-random", f"{tmp_path}/a b", "--model.size=tiny"], "there already")):
        with pytest.raises(SystemExit) as stopped:
            model.main(args)
        assert says in stopped.value.code and "\n" not in stopped.value.code
