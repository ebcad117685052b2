"""Checkpoint files of the base model: opening them without running code, matching their names,
writing them.
"""
import hashlib
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from files import say_once, write_safetensors
from files.pickled import URL, first_line, load_pickled, printable
from files.reading import file_size


HEADER_LIMIT = 16 << 20         # bytes of a .safetensors header; 784 tensors take 0.1 MB
# the dtypes of weights that are read, as safetensors names them
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# A tensor that each network has exactly once tells which prefix the file puts before its names.
LANDMARKS = {"encoder.": "patch_embed.proj.weight", "predictor.": "predictor_embed.weight"}


# Opening

@contextmanager
def open_mapped(path):
    """Yields ({name: shape}, read(name) -> tensor on the CPU backed by the file, header metadata,
    what the file holds in words).

    `export.py slim` writes the fingerprints of the weights that it rounded into the header: their
    adapters fit the rounded weights. Other files have none: {}."""
    path = Path(path)
    if path.is_dir():
        inside = sorted(str(p) for p in path.iterdir() if p.suffix in (".pt", ".safetensors"))
        raise ValueError(f"{path}: is a folder, give the file"
                         f"{': ' + ' or '.join(inside[:3]) if inside else ''}")
    try:
        file_size(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint. Download the released one (11.8 GB) with: "
                         f"wget {URL} — or try the code with --model.checkpoint=random") from None
    if path.suffix == ".safetensors":
        with open_safetensors(path) as (file, kinds):
            def read(name):
                if kinds[name][1] not in FLOATS:
                    raise ValueError(f"{path}: tensor {name} is {kinds[name][1]}, expected "
                                     "floating-point numbers")
                return file.get_tensor(name)

            shapes = {name: shape for name, (shape, _) in kinds.items()}
            names = ", ".join(map(printable, list(shapes)[:3]))
            holds = f"{len(shapes)} tensors: {names}, …" if shapes else "no tensors"
            yield shapes, read, file.metadata() or {}, holds
        return
    top = load_pickled(path)
    if isinstance(top, dict) and isinstance(top.get("encoder"), dict):
        flat = flat_names(_tensors(top["encoder"]), _tensors(top.get("predictor")))
    else:
        flat = _tensors(top)
    shapes = {name: tuple(tensor.shape) for name, tensor in flat.items()}
    yield shapes, flat.__getitem__, {}, _contents(path, top)


def _tensors(entries):
    """The tensors with a name among the entries of a .pt file, if these are a dict."""
    items = entries.items() if isinstance(entries, dict) else ()
    return {name: value for name, value in items
            if isinstance(name, str) and torch.is_tensor(value) and not value.is_nested}


@contextmanager
def open_safetensors(path):
    """Yields (the open file, {name: (shape, safetensors' name of the dtype)}).

    Raises ValueError for what is not a whole .safetensors file."""
    size = file_size(path)
    with open(path, "rb") as file:
        start = file.read(8)
    # a header may say that it has gigabytes, and all of it is parsed
    if int.from_bytes(start, "little") > HEADER_LIMIT:
        cure = ("its name should end in .pt" if start[:2] == b"PK" else
                "cut short or damaged, copy it again")
        raise ValueError(f"{path}: not a .safetensors file; {cure}")
    try:
        with safe_open(path, "pt") as file:
            slices = ((name, file.get_slice(name)) for name in file.keys())
            yield file, {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices}
    except SafetensorError as error:
        raise ValueError(f"{path}: cut short or damaged, not a whole .safetensors file of "
                         f"{size:,} bytes ({first_line(error)}); copy it again") from None


def _contents(path, top):
    """What a .pt file holds at the top level, in words, and how to get at weights inside."""
    if not isinstance(top, dict):
        return f"an object of type {type(top).__name__} instead of a dict"
    entries = [f"{printable(key)} ({_kind(value)})" for key, value in list(top.items())[:8]]
    holds = f"{', '.join(entries) or 'nothing'}{', …' if len(top) > 8 else ''}"
    if "target_encoder" in top and "predictor" in top and "encoder" not in top:
        new = "{'encoder': f['target_encoder'], 'predictor': f['predictor']}"
    elif keys := _keys_of_weights(top):
        new = "f" + "".join(f"[{key!r}]" for key in keys)
    else:
        return holds
    return (f"{holds}; re-save what is needed: python -c \"import torch; f = torch.load('{path}', "
            f"weights_only=True, mmap=True); torch.save({new}, 'base.pt')\"")


def _kind(value):
    if torch.is_tensor(value):
        return "tensor"
    return f"{len(value)} entries" if isinstance(value, dict) else type(value).__name__.lstrip("_")


def _keys_of_weights(value, depth=3):
    """[key, key …] of the dict inside `value` that holds both networks, or []."""
    for key, inside in value.items():
        if isinstance(inside, dict):
            names = [name for name in inside if isinstance(name, str)]
            whole = {"encoder", "predictor"} <= set(names) or all(
                any(name.endswith(landmark) for name in names) for landmark in LANDMARKS.values())
            if whole:
                return [key]
            if depth > 1 and (keys := _keys_of_weights(inside, depth - 1)):
                return [key, *keys]
    return []


# Names

@contextmanager
def open_matched(path, wanted, size):
    """Yields (our names, read(name) -> tensor, fingerprints) of a checkpoint that has all `wanted`,
    {our name: tensor of the shape}. size: --model.size, for messages."""
    with open_mapped(path) as (shapes, tensor, header, holds):
        theirs = match_names(path, shapes, wanted, size, holds)        # our name -> the file's name

        def read(name):
            return check_kind(path, name, tensor(theirs[name]))

        keys = ("base_fingerprint", "encoder_fingerprint")
        if all(key in header for key in keys):
            prints = {key: header[key] for key in keys}
        else:
            prints = fingerprints({name: read(name) for name in theirs})
        yield list(theirs), read, prints


def match_names(path, shapes, wanted, size, holds):
    """{our name: the file's name}, after stripping each network's prefix. Raises ValueError for
    names that are missing, of another shape, or not ours.

    Names beside ours in the encoder, such as the pos_embed of other V-JEPA 2 files, are said and
    passed over, as the official loader does; those that would belong into one of our modules, such
    as a further block, are not."""
    names, prefix = {}, {}
    for network, landmark in LANDMARKS.items():
        prefixes = [name.removesuffix(landmark) for name in shapes
                    if name == landmark or name.endswith(f".{landmark}")]
        if len(prefixes) != 1:
            raise ValueError(f"{path}: {len(prefixes)} tensors are named …{landmark}, expected 1: "
                             "not a V-JEPA 2-AC checkpoint with encoder and predictor (it holds "
                             f"{holds})")
        prefix[network] = prefixes[0]
        for ours in wanted:
            if ours.startswith(network):
                names[ours] = prefixes[0] + ours.removeprefix(network)
    of_encoder, of_predictor = prefix.values()
    modules = {name.split(".")[1] for name in wanted if name.startswith("encoder.")}
    missing = [ours for ours, theirs in names.items() if theirs not in shapes]
    unexpected, passed_over = [], []
    for name in sorted(shapes.keys() - names.values()):
        rest = name.removeprefix(of_encoder)
        ours = (name.startswith(of_predictor) and len(of_predictor) >= len(of_encoder)
                and rest != "pos_embed")
        beside = name.startswith(of_encoder) and not ours and rest.split(".")[0] not in modules
        (passed_over if beside else unexpected).append(printable(name))
    misshaped = [f"{ours} {list(shapes[theirs])} instead of {list(wanted[ours].shape)}"
                 for ours, theirs in names.items()
                 if theirs in shapes and shapes[theirs] != tuple(wanted[ours].shape)]
    problems = []
    for found, what in ((missing, "missing"), (unexpected, "unexpected"),
                        (misshaped, "of another shape")):
        if found:
            more = ", …" if len(found) > 3 else ""
            problems.append(f"{len(found)} {what} ({', '.join(found[:3])}{more})")
    if "predictor.action_encoder.weight" in missing:
        problems.append("its predictor takes no actions: a plain V-JEPA 2 file?")
    if problems:
        raise ValueError(f"{path}: does not fit --model.size={size}: tensors "
                         + "; ".join(problems))
    if passed_over:
        more = ", …" if len(passed_over) > 3 else ""
        say_once(f"{path}: passed over what this encoder has no use for: "
                 f"{', '.join(passed_over[:3])}{more}")
    return names


def flat_names(encoder_state, predictor_state):
    """Two state dicts as one, {encoder.…: tensor, predictor.…: tensor}."""
    return ({f"encoder.{name}": tensor for name, tensor in encoder_state.items()}
            | {f"predictor.{name}": tensor for name, tensor in predictor_state.items()})


# Values

def check_kind(path, name, tensor):
    """`tensor`. Raises ValueError unless its values are plain floating-point numbers."""
    if (tensor.layout != torch.strided or tensor.dtype not in FLOATS.values() or tensor.is_meta
            or tensor.is_quantized):
        layout = "" if tensor.layout == torch.strided else f"{tensor.layout}, "
        raise ValueError(f"{path}: tensor {name} is {layout}{tensor.dtype}"
                         f"{' without values' if tensor.is_meta else ''}, expected plain "
                         "floating-point numbers; take the file that it was made from")
    return tensor


def is_finite(tensor):
    """Whether no value is NaN or infinite. One pass without a copy, a tenth of isfinite().all()."""
    if tensor.numel() == 0:
        return True
    # NaN is carried on by both
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def convert(path, name, source, dtype, device):
    """`source` as `dtype` on `device`, in memory of its own. Raises ValueError, naming the tensor,
    if a value is not finite there."""
    converted = source.to(device=device, dtype=dtype, copy=True)
    if is_finite(converted):
        return converted
    if is_finite(source.float()):
        largest = source.float().abs().max().item()
        raise ValueError(f"{path}: tensor {name} has values up to {largest:.3g}, beyond the range "
                         f"of {dtype}; use --precision=bf16 or fp32")
    raise ValueError(f"{path}: tensor {name} is not finite (NaN or infinite): the file is damaged "
                     "or its training went wrong; download or make it again")


def fingerprints(tensors):
    """{encoder.…, predictor.…: tensor} -> base_fingerprint of all, which adapters carry, and
    encoder_fingerprint, which stored latents carry."""
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    return {"base_fingerprint": fingerprint(tensors), "encoder_fingerprint": fingerprint(encoder)}


def fingerprint(tensors):
    """Identifies base weights, whatever their dtype: a hash of names, shapes and 64 values of each
    tensor rounded to bf16. {name: tensor} -> 16 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].flatten()
        sample = flat[::max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16)
        digest.update(f"{name}{list(tensors[name].shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


# Writing

def save(path, encoder_state, predictor_state):
    """Writes two state dicts as a checkpoint, atomically: .pt in the released layout, or
    .safetensors as `export.py slim` does, with fingerprints. Raises OSError naming the path."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    tensors = flat_names(encoder_state, predictor_state)
    header = {"format": "pt"} | fingerprints(tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if path.suffix == ".safetensors":
                write_safetensors(file, list(tensors), tensors.get, header)
            else:
                torch.save({"encoder": encoder_state, "predictor": predictor_state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:        # torch.save says RuntimeError for a full disk
        with suppress(OSError):
            temporary.unlink()
        raise OSError(f"{path}: could not be saved ({first_line(error)})") from None


# Memory

def check_memory(networks, dtype, device):
    """Raises ValueError if the weights of `networks`, as `dtype`, do not fit on `device` -> their
    number."""
    n_weights = sum(p.numel() for network in networks for p in network.parameters())
    needed, free = n_weights * dtype.itemsize, free_memory(torch.device(device))
    if free is not None and needed > free:
        half = "--precision=bf16 takes half, " if dtype == torch.float32 else ""
        raise ValueError(f"the base model takes {needed / 1e9:.1f} GB in {dtype} and {device} has "
                         f"{free / 1e9:.1f} GB free; {half}--model.size=tiny is for trying the "
                         "code; else use another --device or end other programs")
    return n_weights


def free_memory(device):
    """Bytes that a program can still get on a device; None where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = [1024 * sum(int(lines[key].split()[0]) for key in ("MemAvailable", "SwapFree"))]
    except (OSError, KeyError, ValueError):
        return None
    # a container may have less than its machine; what its files take up in the cache can go
    for folder, limit, used, cache in (
            ("/sys/fs/cgroup", "memory.max", "memory.current", "file"),
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "cache")):
        with suppress(OSError, ValueError, KeyError):           # absent, or no limit: "max"
            read = {name: Path(folder, name).read_text() for name in (limit, used, "memory.stat")}
            cached = dict(line.split() for line in read["memory.stat"].splitlines())[cache]
            free.append(int(read[limit]) - int(read[used]) + int(cached))
    return min(free)

