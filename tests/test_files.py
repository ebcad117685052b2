"""Files are written whole or not at all, and tensors in a form that the library reads."""
import io
import weakref

import numpy as np
import pytest
import torch
from safetensors import safe_open

import files


def test_write_file_keeps_the_old_one_when_it_fails(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    files.write_file(tmp_path / "x", b"old")
    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="could not be saved: No space left on device.*x"):
        files.write_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_write_npz_reads_back(tmp_path):
    files.write_npz(tmp_path / "a.npz", x=np.arange(3), name="episode")
    arrays = np.load(tmp_path / "a.npz")
    assert arrays["x"].tolist() == [0, 1, 2] and arrays["name"] == "episode"


def state(dtype):
    torch.manual_seed(0)
    matrix = torch.randn(5, 3)
    # a transposed tensor is not contiguous; 15 values of 2 bytes leave the next one unaligned to 4
    shapes = {"b": matrix.T, "a": matrix, "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4)}
    return {name: tensor.to(dtype) for name, tensor in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_opens_with_the_library(tmp_path, dtype):
    tensors = state(dtype)
    metadata = {"format": "pt", "base_fingerprint": "0123", "a": "ü"}
    with open(tmp_path / "x.safetensors", "wb") as file:
        files.write_safetensors(file, list(tensors), tensors.__getitem__, metadata)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == dtype and torch.equal(found, tensor), name


def test_safetensors_of_mixed_dtypes(tmp_path):
    tensors = {str(dtype): state(dtype)["a"]
               for dtype in (torch.float16, torch.float32, torch.bfloat16)}
    with open(tmp_path / "x.safetensors", "wb") as file:
        files.write_safetensors(file, list(tensors), tensors.__getitem__, {})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), t) for name, t in tensors.items())
    with pytest.raises(KeyError, match="int64"):
        files.write_safetensors(io.BytesIO(), ["x"], lambda _: torch.zeros(1).long(), {})


def test_equal_content_gives_equal_safetensors_bytes():
    """The library's writer orders the metadata anew in each process; this one keeps its order."""
    written = []
    for _ in range(2):
        file, tensors = io.BytesIO(), state(torch.float32)
        files.write_safetensors(file, sorted(tensors), tensors.__getitem__, {"z": "1", "a": "2"})
        written.append(file.getvalue())
    assert written[0] == written[1]
    length = int.from_bytes(written[0][:8], "little")
    assert length % 8 == 0 and written[0][8:].startswith(b'{"__metadata__": {"z": "1", "a": "2"}')


def test_safetensors_holds_one_tensor_at_a_time():
    references = []

    def read(name):
        # the previous tensor may still be bound to its variable, those before it not
        assert sum(reference() is not None for reference in references) <= 1
        tensor = torch.zeros(10)
        references.append(weakref.ref(tensor))
        return tensor

    files.write_safetensors(io.BytesIO(), [str(i) for i in range(5)], read, {})
    assert len(references) == 10
