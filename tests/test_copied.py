"""The folder of a copy: links in it are never written through."""
import os
import shutil

import pytest

import tabletop
from episodes import copying
from small import episode, flip


pytest.importorskip("tensorflow")
SHARD = "r2d2_faceblur-train.tfrecord-00000-of-00001"


@pytest.fixture
def source(tmp_path):
    tabletop.write_rlds(tmp_path / "source", [episode(name) for name in "ab"], n_shards=1)
    return tmp_path / "source"


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("to", ["source", "other"])
def test_a_linked_file_is_left_as_it_is(source, tmp_path, link, to, capsys):
    other, target = tmp_path / "other" / SHARD, tmp_path / "target"
    shutil.copytree(source, other.parent)
    flip(other, 40_000)                                     # in the middle of a record
    target.mkdir()
    linked = tmp_path / to / SHARD
    link(linked, target / SHARD)
    before = linked.read_bytes(), linked.stat().st_mtime_ns
    copying.copy(str(source), str(target), 0)
    assert f"{SHARD}: is a link to another file; fetching one of" in capsys.readouterr().err
    assert (linked.read_bytes(), linked.stat().st_mtime_ns) == before
    assert not (target / SHARD).is_symlink() and (target / SHARD).stat().st_nlink == 1
    assert (target / SHARD).read_bytes() == (source / SHARD).read_bytes()


def test_a_copied_file_may_be_moved_and_linked(source, tmp_path):
    copying.copy(str(source), str(tmp_path / "target"), 0)
    path = tmp_path / "target" / SHARD
    path.rename(tmp_path / SHARD)
    path.symlink_to(tmp_path / SHARD)
    assert "(0.00B read" in copying.copy(str(source), str(path.parent), 0)
    assert path.is_symlink()
