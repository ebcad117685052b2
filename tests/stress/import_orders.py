"""Orders of imports, as notebooks and other packages have them: each reads records, loads Triton
and computes landscapes, in a process of its own. None may abort it.

    python tests/stress/import_orders.py
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
WRITER = "from torch.utils.tensorboard import SummaryWriter; SummaryWriter(sys.argv[2] + '/logs')"
ORDERS = {
    "TensorFlow": "import tensorflow as tf",
    "TensorFlow, in use": "import tensorflow as tf; tf.constant(1)",
    "TensorFlow, PyTorch": "import tensorflow, torch",
    "TensorBoard's writer": WRITER,
    "TensorBoard": "import tensorboard",
    "Triton": "import triton",
    "Triton, TensorFlow": "import triton, tensorflow",
    "torch._dynamo": "import torch._dynamo",
    "bitsandbytes": "import bitsandbytes",
    "droid": "import droid",
    "droid, TensorBoard's writer": f"import droid; {WRITER}",
    "droid, TensorFlow": "import droid, tensorflow",
    "droid, Triton": "import droid, triton",
    "energy, TensorFlow, bitsandbytes": "import energy, tensorflow, bitsandbytes",
}
THEN = """
import torch, droid, energy, small
batch = next(iter(droid.create_dataloader(small.data_recipe(sys.argv[1]))))
assert batch["frames"].shape == (1, 3, 4, 64, 64)
import triton, bitsandbytes, torch._dynamo
from triton._C import libtriton
libtriton.ir.context()
cfg = small.recipe(sys.argv[2], sys.argv[2], "--energy.pairs=1", "--energy.planes=[xy]",
                   "--energy.grid=5", "--energy.planners=[]")
assert len(energy.analyse(cfg, [], sys.argv[2] + "/landscapes.npz"))
print("end")
"""


def run(first, records, folder):
    """-> CompletedProcess of a script that imports `first` and then uses everything.

    records: TFRecords; folder: what `small.write` has written."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}/tests:{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{ORDERS[first]}\n{THEN}", str(records), str(folder)],
        capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)


def main():
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import small
    with tempfile.TemporaryDirectory() as folder:
        records, base = Path(folder) / "records", Path(folder) / "base"
        base.mkdir()
        small.write_records(records)
        small.write(base)
        failed = 0
        for first in ORDERS:
            result = run(first, records, base)
            good = result.returncode == 0 and result.stdout.endswith("end\n")
            failed += not good
            print(f"{first:36} {'ends well' if good else f'exit {result.returncode}'}", flush=True)
            if not good:
                print(result.stderr[-2000:])
    sys.exit(f"{failed} of {len(ORDERS)} orders fail" if failed else 0)


if __name__ == "__main__":
    main()
