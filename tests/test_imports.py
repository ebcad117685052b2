"""TensorFlow and Triton in one process, in whichever order something imports them."""
import builtins
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import files.imports
import tabletop
from small import episode


def test_tensorflow_may_be_imported_and_used_first(base, tmp_path):
    """By a notebook, or TensorBoard's writer. tests/stress/import_orders.py tries other orders."""
    for package in ("tensorflow", "triton", "tensorboard", "bitsandbytes"):
        pytest.importorskip(package)
    tabletop.write_rlds(tmp_path, [episode(name) for name in "ab"], n_shards=1)
    path = Path(__file__).parent / "stress/import_orders.py"
    spec = importlib.util.spec_from_file_location("import_orders", path)
    import_orders = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(import_orders)
    in_use = "import tensorflow as tf; tf.constant(1)"
    import_orders.ORDERS["both"] = f"{in_use}; {import_orders.WRITER}"
    result = import_orders.run("both", tmp_path, base)
    assert result.returncode == 0 and result.stdout.endswith("end\n"), result.stderr[-2000:]


def test_imports_are_watched_whatever_else_watches_them():
    assert any(isinstance(finder, files.imports._Finder) for finder in sys.meta_path)
    code = ("import sys\n"
            "class _Finder:\n"                          # as virtualenv calls its own
            "    def find_spec(self, *_): pass\n"
            "sys.meta_path.insert(0, _Finder())\n"
            "import files.imports, importlib.util\n"
            "spec = importlib.util.find_spec('triton._C.libtriton')\n"
            "assert spec is None or 'create_module' in vars(spec.loader)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_comes_first(monkeypatch):
    imported, real = [], builtins.__import__
    monkeypatch.setattr(builtins, "__import__",
                        lambda name, *args: imported.append(name) or real(name, *args))
    with files.imports._around_tensorflow():
        assert "triton" in imported


def test_where_it_could_crash_it_is_refused(monkeypatch):
    """An allocator by LD_PRELOAD, as in Colab once."""
    monkeypatch.setitem(sys.modules, "tensorflow.python", ModuleType("tensorflow.python"))
    flags = sys.getdlopenflags()
    with files.imports._around_triton():
        assert sys.getdlopenflags() == os.RTLD_NOW | os.RTLD_DEEPBIND
    assert sys.getdlopenflags() == flags
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so.4")
    with pytest.raises(ImportError, match="restart Python and import droid first"):
        with files.imports._around_triton():
            pass


def test_noise_is_kept_from_stderr_and_nothing_else(capfd):
    noise = b"I0000 00:00:1795655453.854163   23345 port.cc:153] oneDNN custom operations are on.\n"
    with files.imports._without_noise():
        os.write(2, noise + b"left out: an episode\n" + noise)
    assert capfd.readouterr().err == "left out: an episode\n"
    with pytest.raises(ImportError):
        with files.imports._without_noise():
            os.write(2, noise)
            raise ImportError
    assert capfd.readouterr().err == noise.decode()


def test_looking_for_a_package_imports_nothing():
    code = ("import importlib.util, sys, files.imports\n"
            "for name in ('tensorflow', 'triton', 'absent_package'):\n"
            "    importlib.util.find_spec(name)\n"
            "assert not {'tensorflow', 'triton'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)
