"""A good base checkpoint and 50 ways to spoil it, or to write it otherwise."""
import os
import tempfile
import zipfile
from collections import OrderedDict, defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from stress.spoiled_adapters import RIGHT

import model
from parity import tiny


# a file that would be there if code of a checkpoint were run
MARKER = str(Path(tempfile.gettempdir()) / f"odd_adapters_{os.getpid()}")     # code would make it


class Code:
    """What a pickle that runs code looks like."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@lru_cache
def weights():
    return tuple(part.state_dict() for part in tiny())


def released():
    encoder, predictor = weights()
    return {"encoder": {f"module.{k}": v for k, v in encoder.items()},
            "predictor": {f"module.{k}": v for k, v in predictor.items()}, "epoch": 3}


def saved(change, **options):
    """change(the released dict) edits it in place or returns another object."""
    def make(path):
        file = released()
        changed = change(file)
        torch.save(file if changed is None else changed, path, **options)
    return make


def weight(change, part="predictor", name="module.predictor_embed.weight"):
    def edit(file):
        file[part][name] = change(file[part][name])
    return saved(edit)


def with_number(number):
    def change(tensor):
        tensor = tensor.clone()
        tensor[0, 0] = number
        return tensor
    return change


def rezipped(**changes):
    """A .pt whose zip members are compressed (data.pkl may be replaced) or renamed."""
    def make(path):
        torch.save(released(), path)
        with zipfile.ZipFile(path) as old:
            members = {info.filename: old.read(info) for info in old.infolist()}
        with zipfile.ZipFile(path, "w", changes.get("how", zipfile.ZIP_STORED)) as new:
            for name, data in members.items():
                if name.endswith("data.pkl"):
                    data = changes.get("pickle", data)
                new.writestr(name.replace("data.pkl", changes.get("name", "data.pkl")), data)
    return make


def bytes_of(data):
    return lambda path: path.write_bytes(data)


def everything_harmless(file):
    file.update(
        loss=np.float64(0.5), lr=np.float32(1e-4), step=np.int64(3), flag=np.bool_(True),
        when=np.datetime64("2026-01-01"), dtype=np.dtype("float32"), kind=np.float16,
        array=np.arange(5), names=np.array(["a", "b"]), mixed=np.array([1, "a"], dtype=object),
        record=np.zeros(2, dtype=[("a", "f4")]), torch_dtype=torch.bfloat16,
        ordered=OrderedDict(a=1), history=defaultdict(list, a=[1.0]), rng=np.random.get_state(),
        generator=np.random.default_rng(0), version=torch.__version__, path=Path("a/b"),
        torch_rng=torch.get_rng_state(), shape=torch.Size([1]), device=torch.device("cpu"),
        plain={"a": [1, (2.5, None, "x", b"y", {1, 2}, 3 + 4j)]})


def nest(*keys):
    def change(file):
        for key in keys:
            file = {key: file}
        return file
    return change


def numbered(file):
    file["encoder"] |= {1: torch.zeros(2), None: torch.zeros(2), ("a", 1): 3}
    file[7] = torch.zeros(3)


def pos_embed(file):
    file["encoder"]["module.pos_embed"] = torch.zeros(1, 4, 52)


def bases():
    """{name: (make(path), expected words or RIGHT, ending)}."""
    w = "module.predictor_embed.weight"
    marker = f"touch {MARKER}"
    return {
        "good": (saved(lambda f: None), RIGHT, ".pt"),
        "harmless values": (saved(everything_harmless), RIGHT, ".pt"),
        "vjepa2_ac_oss.pth.tar": (saved(lambda f: f.pop("epoch") and None), RIGHT, ".pth.tar"),
        "keys that are no text": (saved(numbered), RIGHT, ".pt"),
        "pos_embed": (saved(pos_embed), RIGHT, ".pt"),
        "float64": (weight(torch.Tensor.double), RIGHT, ".pt"),
        "code: os.system": (saved(lambda f: f.update(epoch=Code(os.system, marker))),
                            "posix.system", ".pt"),
        "code: eval": (saved(lambda f: f.update(epoch=Code(eval, f"open({MARKER!r}, 'w')"))),
                       "eval", ".pt"),
        "code: in the weights": (saved(lambda f: f["encoder"].update(
            x=Code(exec, f"open({MARKER!r}, 'w')"))), "exec", ".pt"),
        "code: numpy runs it": (saved(lambda f: f.update(epoch=Code(
            np.testing.rundocs, MARKER))), "Python objects", ".pt"),
        "a whole model": (saved(lambda f: tiny()[0]), "Python objects", ".pt"),
        "{'model': …}": (saved(nest("model")), "f['model']", ".pt"),
        "{'state_dict': {'net': …}}": (saved(nest("net", "state_dict")),
                                       "f['state_dict']['net']", ".pt"),
        "target_encoder only": (saved(lambda f: f.update(target_encoder=f.pop("encoder"))),
                                "f['target_encoder']", ".pt"),
        "no predictor": (saved(lambda f: f.pop("predictor") and None), "predictor_embed", ".pt"),
        "predictor is None": (saved(lambda f: f.update(predictor=None)), "predictor_embed", ".pt"),
        "empty dict": (saved(lambda f: {}), "nothing", ".pt"),
        "a list": (saved(lambda f: [1, 2]), "an object of type list", ".pt"),
        "a tensor": (saved(lambda f: torch.zeros(3)), "an object of type Tensor", ".pt"),
        "arrays": (saved(lambda f: {"encoder": {"x": np.zeros(3)}}), "0 tensors", ".pt"),
        "a further block": (saved(lambda f: f["encoder"].update(
            {"module.blocks.2.norm1.weight": torch.zeros(52)})), "1 unexpected", ".pt"),
        "other name in predictor": (saved(lambda f: f["predictor"].update(
            {"module.predictor_pos_embed": torch.zeros(5)})), "1 unexpected", ".pt"),
        "missing": (saved(lambda f: f["encoder"].pop("module.norm.bias") is None or f),
                    "1 missing (encoder.norm.bias)", ".pt"),
        "other shape": (weight(lambda t: t[:-1]), "of another shape", ".pt"),
        "integers": (weight(lambda t: t.int()), "torch.int32, expected plain", ".pt"),
        "complex": (weight(lambda t: t + 1j), "torch.complex64, expected plain", ".pt"),
        "sparse": (weight(lambda t: t.to_sparse()), "torch.sparse_coo", ".pt"),
        "quantised": (weight(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
                      "expected plain", ".pt"),
        "without values": (weight(lambda t: t.to("meta")), "without values", ".pt"),
        "NaN": (weight(with_number(float("nan"))), "predictor_embed.weight is not finite", ".pt"),
        "infinite": (weight(with_number(float("inf"))), "is not finite", ".pt"),
        "float64 beyond float32": (weight(lambda t: with_number(1e300)(t.double())),
                                   "is not finite", ".pt"),
        "empty": (bytes_of(b""), "download it again", ".pt"),
        "text": (bytes_of(b"<html>404 Not Found</html>"), "it begins with", ".pt"),
        "zeros": (bytes_of(bytes(5000)), "it begins with", ".pt"),
        "cut": (lambda p: (saved(lambda f: None)(p), os.truncate(p, 50_000)), "download", ".pt"),
        "before 1.6": (saved(lambda f: None, _use_new_zipfile_serialization=False),
                       "before 1.6", ".pt"),
        "pickle of protocol 5": (saved(everything_harmless, pickle_protocol=5), "protocol 5",
                                 ".pt"),
        "compressed": (rezipped(how=zipfile.ZIP_DEFLATED), "compressed", ".pt"),
        "zip bomb": (rezipped(how=zipfile.ZIP_DEFLATED, pickle=bytes(1 << 26)), "compressed",
                     ".pt"),
        "damaged pickle": (rezipped(pickle=b"\x80\x02}q\x00(X\xff\xff\xff\x7f"), "PyTorch", ".pt"),
        "pickle of nothing": (rezipped(pickle=b""), "PyTorch", ".pt"),
        "another zip": (rezipped(name="readme.txt"), "a zip file of another program", ".pt"),
        "TorchScript": (lambda p: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(p)),
                        "TorchScript", ".pt"),
        "a folder": (Path.mkdir, "is a folder", ".pt"),
        "a FIFO": (os.mkfifo, "pipe", ".pt"),
        "nothing": (lambda p: None, "no such checkpoint", ".pt"),
        ".pt named .safetensors": (saved(lambda f: None), "should end in .pt", ".safetensors"),
        ".safetensors named .pt": (lambda p: save_file({w: torch.zeros(3)}, p),
                                   "is a .safetensors file", ".pt"),
        "safetensors: empty": (bytes_of(b""), "cut short", ".safetensors"),
        "safetensors: integers": (lambda p: save_file(model.flat_names(*(
            {k: v.int() for k, v in state.items()} for state in weights())), p),
            "is I32", ".safetensors"),
        "safetensors: no tensors": (lambda p: save_file({}, p), "holds no tensors", ".safetensors"),
        "safetensors: a FIFO": (os.mkfifo, "pipe", ".safetensors"),
    }
