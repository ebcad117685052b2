"""Reading JSON, .zip and .npz files from outside: limits and types.

tests/test_odd_files.py has the odd files themselves."""
import ast
import json
import resource
import zipfile

import numpy as np
import pytest

from files import reading
from small import open_files_left


@pytest.mark.parametrize("value, kind, fits", [
    ("a", str, True), (1, str, False), (None, str, False),
    (1, int, True), (True, int, False), (1.0, int, False), (2 ** 63, int, False),
    (1, float, True), (0.5, float, True), (float("nan"), float, False), (True, float, False),
    (float("inf"), float, False), (10 ** 400, float, False), ("1", float, False),
    (True, bool, True), (1, bool, False), (None, None, True), (0, None, False),
    ([1, 2], [int], True), ([], [int], True), ([1, "a"], [int], False), ("ab", [str], False),
    ({"a": "b"}, {str: str}, True), ({"a": 1}, {str: str}, False), ([], {str: str}, False),
    ("a", (str, [str]), True), (["a"], (str, [str]), True), (1, (str, [str]), False),
    ([[1]], [[int]], True), ({"a": [1]}, {str: [int]}, True), ({"a": ["1"]}, {str: [int]}, False),
])
def test_fields_have_the_types_that_they_should_have(value, kind, fits):
    found = json.loads(json.dumps({"key": value, "other": []}))
    if fits:
        reading.check_fields(found, {"key": kind}, "x.json")
    else:
        with pytest.raises(ValueError, match="^x.json: key is .*, expected ") as error:
            reading.check_fields(found, {}, "x.json", optional={"key": kind})
        assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_fields_may_be_missing_only_where_that_is_said():
    reading.check_fields({}, {}, "x.json", {"key": int})
    with pytest.raises(ValueError, match="x.json: has no 'key'"):
        reading.check_fields({}, {"key": int}, "x.json")


def test_json_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, NaN]}')
    value = reading.read_json(path, limit=15)
    assert value["a"][0] == 1 and np.isnan(value["a"][1])
    with pytest.raises(ValueError, match="15 bytes, more than the 14"):
        reading.read_json(path, limit=14)
    path.write_text("[1]")
    assert reading.read_json(path, list) == [1]
    with pytest.raises(FileNotFoundError):
        reading.read_json(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError):
        reading.read_json(path / "file_as_folder.json")


def test_arrays_are_read_as_they_were_written(tmp_path):
    random = np.random.default_rng(0)
    arrays = {"a": random.normal(size=(3, 4)), "b": np.asfortranarray(random.normal(size=(3, 4))),
              "c": np.array("äé"), "d": np.arange(3, dtype=">i4"), "e": np.zeros((0, 7)),
              "f": np.array(["x", "yz"]), "g": np.array(True), "a/path": np.ones(2)}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        found = reading.read_npz(tmp_path / "a.npz")
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[name], arrays[name]) and
                   found[name].dtype == arrays[name].dtype for name in arrays)
        assert reading.read_npz(tmp_path / "a.npz", ["c", "none"]).keys() == {"c"}


def test_an_npz_may_expand_to_a_gibibyte_or_to_so_many_times_its_size(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", zeros=np.zeros(10_000))
    size = (tmp_path / "a.npz").stat().st_size
    for limit, ratio, fits in ((80_000, 1, True), (79_999, 1, False),
                               (1, 80_000 // size + 1, True)):
        monkeypatch.setattr(reading, "ZIP_LIMIT", limit)
        monkeypatch.setattr(reading, "ZIP_RATIO", ratio)
        if fits:
            reading.read_npz(tmp_path / "a.npz")
        else:
            with pytest.raises(ValueError, match="expands to 80,000 bytes, more than the 79,999"):
                reading.read_npz(tmp_path / "a.npz")


def test_marks_of_a_zip_among_its_values_are_values(tmp_path):
    """The length of the list of files is read from the last record alone."""
    values = np.frombuffer((b"PK\5\6" + b"\xf0" * 18 + b"PK\6\6" + b"\xf0" * 52) * 100, np.uint8)
    np.savez(tmp_path / "a.npz", a=values)
    assert np.array_equal(reading.read_npz(tmp_path / "a.npz")["a"], values)


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("n", [1, 3, 7, 100])
def test_an_array_in_blocks_is_the_whole_array(tmp_path, order, n):
    array = np.arange(7 * 5 * 3, dtype=np.uint8).reshape(1, 7, 5, 3)
    np.savez_compressed(tmp_path / "a.npz", a=np.asarray(array, order=order))
    with reading.open_npz(tmp_path / "a.npz") as npz:
        blocks = list(npz.blocks("a", (7, 5, 3), n))
    assert [len(block) for block in blocks[:-1]] == [n] * (len(blocks) - 1)
    assert np.array_equal(np.concatenate(blocks), array[0])
    assert all(block.flags.writeable for block in blocks)       # PyTorch warns of others


@pytest.mark.parametrize("name, inside", [
    ("a.py", True), ("a/b.py", True), ("a..b", True), (".hidden", True),
    ("../a", False), ("a/../b", False), ("/a", False), ("a//b", False), ("./a", False),
    ("a/", False), ("", False), (".", False), ("..", False), ("a\\b", False), ("a\nb", False),
    ("a\0", False), ("\ud800", False),
])
def test_names_that_stay_in_a_folder(name, inside):
    assert reading.is_inside(name) == inside


def test_a_member_gives_no_more_bytes_than_it_says(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", bytes(1000))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    at = data.index(b"PK\1\2") + 24
    data[at:at + 4] = (10).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(ValueError, match="a.zip: cut short or damaged .Bad CRC-32"):
        with reading.open_zip(tmp_path / "a.zip") as archive, \
                reading.open_member(archive, "a") as stream, reading.one_line(tmp_path / "a.zip"):
            stream.read()


def test_python_s_parser_may_fail_while_another_thread_uses_it(tmp_path, monkeypatch):
    """With SystemError, in some versions: see reading._parsed."""
    real, fails = ast.literal_eval, iter([True, True, False, True, False, True, False])

    def literal_eval(text):
        if next(fails):
            raise SystemError("AST constructor recursion depth mismatch (before=51, after=44)")
        return real(text)

    array = np.arange(300_000.0).reshape(3, -1)
    np.savez_compressed(tmp_path / "a.npz", array=array)
    monkeypatch.setattr(ast, "literal_eval", literal_eval)
    assert np.array_equal(reading.read_npz(tmp_path / "a.npz")["array"], array)
    assert next(fails, "none") == "none"


def test_that_no_more_files_can_be_opened_says_nothing_about_a_file(tmp_path):
    np.savez(tmp_path / "a.npz", array=np.arange(3))
    (tmp_path / "a.json").write_text("{}")
    with open_files_left(0):
        for name, read in (("a.npz", reading.read_npz), ("a.json", reading.read_json)):
            with pytest.raises(reading.TooManyOpenFiles, match=f"{name}: cannot.*; raise"):
                read(tmp_path / name)
    assert reading.read_json(tmp_path / "a.json") == {}


def test_the_limit_of_open_files_is_raised_as_far_as_that_may_be(monkeypatch):
    limits, wanted = {}, {(256, 4096): (4096, 4096), (1024, 10 ** 6): (8192, 10 ** 6),
                          (10 ** 5, 10 ** 6): None, (256, -1): (8192, -1), (-1, -1): None}
    for now, then in wanted.items():
        limits.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda _, now=now: now)
        monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
        reading.allow_open_files()
        assert limits.get(resource.RLIMIT_NOFILE) == then
