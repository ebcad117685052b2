"""A good adapter and 140 ways to spoil it, or to write it otherwise.

ADAPTERS is {name: (spoil(folder), words that the refusal holds or RIGHT)}."""
import json
import os
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import lora
from parity import tiny


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
A0 = "base_model.model.predictor_blocks.0.attn.qkv.lora_A.weight"
B0 = A0.replace("lora_A", "lora_B")


# A good adapter, and ways to spoil it

def good_adapter(folder, **settings):
    predictor = tiny()[1]
    lora.inject(predictor, **{"rank": 4, "alpha": 8.0} | settings)
    random = torch.Generator().manual_seed(0)
    for layer in lora.adapted_layers(predictor).values():
        layer.lora_B.data.normal_(std=0.05, generator=random)
    lora.save(folder, predictor)
    return predictor


def edit(**values):
    """Sets keys of the config; `...` removes one."""
    def spoil(folder):
        config = json.loads((folder / CONFIG).read_text()) | values
        kept = {key: value for key, value in config.items() if value is not ...}
        (folder / CONFIG).write_text(json.dumps(kept))
    return spoil


def text(data):
    return lambda folder: (folder / CONFIG).write_bytes(data)


def tensors(change):
    """change({name: tensor}) edits them in place or returns others."""
    def spoil(folder):
        state = load_file(folder / TENSORS)
        save_file(change(state) or state, folder / TENSORS, {"format": "pt"})
    return spoil


def value(name, number):
    def change(state):
        state[name][0, 0] = number
    return tensors(change)


def renamed(old, new):
    return tensors(lambda state: {name.replace(old, new): t for name, t in state.items()})


def as_dtype(dtype):
    return tensors(lambda state: {name: t.to(dtype) for name, t in state.items()})


def added(name, tensor):
    return tensors(lambda state: state | {name: tensor})


def header(change):
    """change(header) edits or replaces what the header of the tensors' file says."""
    def spoil(folder):
        data = (folder / TENSORS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        head = json.loads(data[8:8 + length])
        head = json.dumps(change(head) or head).encode()
        (folder / TENSORS).write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length:])
    return spoil


def raw(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(share):
    return lambda folder: os.truncate(folder / TENSORS, int(
        (folder / TENSORS).stat().st_size * share))


def instead(name, make):
    """`make` puts something else in the place of a file."""
    def spoil(folder):
        (folder / name).unlink()
        make(folder / name)
    return spoil


def sparse(size, name=TENSORS):
    return lambda folder: os.truncate(folder / name, size)


def large_tensor(folder):
    """800 MB of a layer that fits r and no layer of the model."""
    rows = 50_000_000
    names = {A0: [4, 3], B0: [rows, 4]}
    head, at = {}, 0
    for name, shape in names.items():
        size = 4 * shape[0] * shape[1]
        head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(head).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(head)) + head)
    os.truncate(folder / TENSORS, 8 + len(head) + at)


def pickled(folder):
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


def nested(folder):
    (folder / "droid").mkdir()
    for name in (CONFIG, TENSORS):
        (folder / name).rename(folder / "droid" / name)


def wide(name, n):
    """A config that is right and has many other keys."""
    def spoil(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | {f"{name}{i}": None for i in range(n)}))
    return spoil


def both(*spoils):
    def spoil(folder):
        for one in spoils:
            one(folder)
    return spoil


RIGHT = None            # loads, with the outputs of the good one

ADAPTERS = {
    "good": (lambda folder: None, RIGHT),
    # what the config means
    **{f"init {start}": (edit(init_lora_weights=start), "path_initial_model_for_weight_conversion")
       for start in ("pissa", "pissa_niter_16", "PiSSA", "olora", "OLoRA", "corda", "lora_ga")},
    **{f"init {start}": (edit(init_lora_weights=start), "init_lora_weights")
       for start in ("loftq", "next_year", "", 3, [], {"a": 1})},
    **{f"init {start}": (edit(init_lora_weights=start), RIGHT)
       for start in (True, False, None, "gaussian", "orthogonal", "eva", "mica")},
    "loftq_config": (edit(loftq_config={"loftq_bits": 4}), "loftq_config"),
    "converted: corda_config stays": (edit(corda_config={"corda_method": "kpm"}), RIGHT),
    "aLoRA": (edit(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens: [1, 2]"),
    "DoRA": (edit(use_dora=True), "use_dora: True; PEFT's save_as_lora"),
    "lora_bias": (edit(lora_bias=True), "lora_bias"),
    "bias all": (edit(bias="all"), "bias: 'all'"),
    "bias lora_only": (edit(bias="lora_only"), "bias='none'"),
    "bias null": (edit(bias=None), RIGHT),
    "rank_pattern": (edit(rank_pattern={"fc1": 8}), "rank_pattern"),
    "alpha_pattern": (edit(alpha_pattern={"fc1": 8}), "alpha_pattern"),
    "empty patterns": (edit(rank_pattern={}, alpha_pattern={}, loftq_config={}), RIGHT),
    "modules_to_save": (edit(modules_to_save=["predictor_proj"]), "modules_to_save"),
    "trainable_token_indices": (edit(trainable_token_indices=[1]), "trainable_token_indices"),
    "target_parameters": (edit(target_parameters=["a.weight"]), "target_parameters"),
    "layer_replication": (edit(layer_replication=[[0, 2], [1, 3]]), "layer_replication"),
    "megatron_config": (edit(megatron_config={"a": 1}), "megatron_config"),
    "kasa_config {}": (edit(kasa_config={}), "kasa_config: {}"),
    "velora_config": (edit(velora_config={"scale": 1.0}), "velora_config"),
    "QALoRA": (edit(use_qalora=True), "use_qalora"),
    "fan_in_fan_out": (edit(fan_in_fan_out=True), "fan_in_fan_out"),
    "a key of a later PEFT": (edit(use_xlora=True), "use_xlora: True"),
    "a number of a later PEFT": (edit(magnitude=0.5), "magnitude: 0.5"),
    "a later PEFT, off": (edit(use_xlora=False, x_config=None, x_pattern={}), RIGHT),
    "a key with a line break": (edit(**{"a\nb": "c\nd" * 500}), "only plain LoRA"),
    "IA3": (edit(peft_type="IA3"), "peft_type: 'IA3'"),
    "no peft_type": (edit(peft_type=...), "peft_type: None"),
    "exclude_modules": (edit(exclude_modules=["x"], layers_to_transform=None, revision="v2",
                             auto_mapping={"a": "b"}, peft_version="9", task_type="X"), RIGHT),
    "all-linear": (edit(target_modules="all-linear"), RIGHT),
    "regex": (edit(target_modules=r"(a+)+$.*"), RIGHT),
    "targets are others": (edit(target_modules=["attn.qkv"]), "do not name"),
    "targets are odd": (edit(target_modules=[1, None]), "do not name"),
    # numbers
    **{f"r {r!r}": (edit(r=r), "r in adapter_config.json is")
       for r in (..., None, 0, -4, True, 4.0, "4", [4], {}, 10 ** 30, float("nan"))},
    "r 8": (edit(r=8), "does not fit r = 8"),
    **{f"lora_alpha {a!r}": (edit(lora_alpha=a), "lora_alpha in adapter_config.json is")
       for a in (..., None, 0, -8, True, "8", [], 1e300, float("nan"), float("inf"))},
    "lora_alpha int": (edit(lora_alpha=8), RIGHT),
    **{f"lora_dropout {p!r}": (edit(lora_dropout=p), "lora_dropout in adapter_config.json is")
       for p in (1, 1.5, -0.1, "0", True, [0.1], float("nan"))},
    "lora_dropout null": (edit(lora_dropout=None), RIGHT),
    **{f"use_rslora {v!r}": (edit(use_rslora=v), "use_rslora") for v in ("yes", 1, [1])},
    # the config's file
    "config: {": (text(b"{"), "cut short or damaged"),
    "config: empty": (text(b""), "cut short or damaged"),
    "config: zeros": (text(bytes(100)), "cut short or damaged"),
    "config: a list": (text(b"[]"), "expected an object"),
    "config: null": (text(b"null"), "expected an object"),
    "config: not UTF-8": (text(b'{"peft_type": "\xff"}'), "UTF-8"),
    "config: UTF-16": (text('{"r": 4}'.encode("utf-16")), "UTF-8"),
    "config: with a BOM": (lambda folder: text(
        b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())(folder), RIGHT),
    "config: nested deeply": (text(b'{"a":' + b"[" * 200_000), "damaged"),
    "config: a long number": (text(b'{"r": ' + b"9" * 10_000 + b"}"), "damaged"),
    "config: 300 MB": (sparse(300_000_000, CONFIG), "bytes"),
    "config: 10,000 keys": (wide("k", 10_000), RIGHT),
    "config: a folder": (instead(CONFIG, Path.mkdir), "is a folder"),
    "config: a FIFO": (instead(CONFIG, os.mkfifo), "pipe"),
    "config: a loop of links": (instead(CONFIG, lambda path: path.symlink_to(path)), "read"),
    "config: missing": (instead(CONFIG, lambda path: None), "must be in it"),
    # tensors
    "NaN": (value(A0, float("nan")), f"{A0} is not finite"),
    "infinite": (value(B0, float("-inf")), f"{B0} is not finite"),
    "float64 beyond float32": (both(as_dtype(torch.float64), value(A0, 1e300)), "not finite"),
    "integers": (as_dtype(torch.int32), "I32, expected floating point"),
    "bool": (as_dtype(torch.bool), "BOOL, expected floating point"),
    "complex": (as_dtype(torch.complex64), "C64, expected floating point"),
    "float64": (as_dtype(torch.float64), RIGHT),
    "rank 3": (tensors(lambda s: s | {A0: s[A0][None]}), "does not fit"),
    "rank 0": (tensors(lambda s: s | {A0: torch.tensor(1.0)}), "does not fit"),
    "no rows": (tensors(lambda s: s | {A0: s[A0][:0]}), "does not fit"),
    "transposed": (tensors(lambda s: {n: t.T.contiguous() for n, t in s.items()}), "does not fit"),
    "A without B": (tensors(lambda s: s.pop(B0)[:0] is None or s), "has no lora_B"),
    "B without A": (tensors(lambda s: s.pop(A0)[:0] is None or s), "has no lora_A"),
    "no tensors": (tensors(lambda s: s.clear()), "holds no tensors"),
    "another width": (tensors(lambda s: s | {A0: s[A0][:, :-1].clone()}), "does not fit"),
    "layers that are not there": (renamed("blocks.0", "blocks.9"), "does not have"),
    "other prefix": (renamed("base_model.model", "base_model.model.predictor"), "does not have"),
    "no prefix": (renamed("base_model.model.", ""), "is not named"),
    "adapter's name inside": (renamed(".weight", ".default.weight"), "is not named"),
    "lora_embedding": (added("base_model.model.a.lora_embedding_A", torch.zeros(4, 3)),
                       "is not named"),
    "magnitude": (added(A0.replace("lora_A.weight", "lora_magnitude_vector.weight"),
                        torch.zeros(3)), "is not named"),
    "trained bias": (added(B0.replace("weight", "bias"), torch.zeros(3)), "is not named"),
    "modules_to_save's weights": (added("base_model.model.predictor_proj.weight",
                                        torch.zeros(52, 60)), "is not named"),
    "a name with a line break": (added("a\nb", torch.zeros(3)), "is not named"),
    # the tensors' file
    "file: empty": (raw(TENSORS, b""), "cut short"),
    "file: 7 bytes": (raw(TENSORS, b"1234567"), "cut short"),
    "file: text": (raw(TENSORS, b"<html>404 Not Found</html>" * 50), "not a .safetensors file"),
    "file: a Git LFS pointer": (raw(TENSORS, b"version https://git-lfs.github.com/spec/v1\n"),
                                "not a .safetensors file"),
    **{f"file: {share:.0%} of it": (cut(share), "cut short") for share in (0.99, 0.5, 0.01)},
    "file: header of 10¹⁸ bytes": (lambda folder: raw(TENSORS, struct.pack("<Q", 10 ** 18)
                                   + (folder / TENSORS).read_bytes()[8:])(folder), "damaged"),
    "file: header is no JSON": (raw(TENSORS, struct.pack("<Q", 8) + b"notjson!"), "damaged"),
    "file: header is nested deeply": (raw(TENSORS, struct.pack("<Q", 10 ** 6) + b"[" * 10 ** 6),
                                      "damaged"),
    "file: sizes beyond the file": (header(lambda h: h[A0].update(
        shape=[10 ** 6, 10 ** 6], data_offsets=[0, 4 * 10 ** 12])), "cut short"),
    "file: overlapping tensors": (header(lambda h: h[A0].update(h[B0])), "cut short"),
    "file: unknown dtype": (header(lambda h: h[A0].update(dtype="F1")), "cut short"),
    "file: negative shape": (header(lambda h: h[A0].update(shape=[-4, 60])), "cut short"),
    "file: metadata is a list": (header(lambda h: h.update(__metadata__=[])), "cut short"),
    "file: metadata is no text": (header(lambda h: h.update(__metadata__={"a": 1})), "cut short"),
    "file: no metadata": (header(lambda h: h.pop("__metadata__") and None), RIGHT),
    "file: another base": (header(lambda h: h["__metadata__"].update(
        base_fingerprint="a\nb" * 999)), "trained on another base"),
    "file: 2 GB of nothing": (sparse(2 << 30), "bytes"),
    "file: a tensor of 800 MB": (large_tensor, "does not fit the model's layers"),
    "file: a folder": (instead(TENSORS, Path.mkdir), "is a folder"),
    "file: a FIFO": (instead(TENSORS, os.mkfifo), "pipe"),
    "file: missing": (instead(TENSORS, lambda path: None), "there is no adapter_model"),
    "adapter_model.bin": (pickled, "older form, convert it with: python -c"),
    "one folder down": (nested, "/droid"),
}
