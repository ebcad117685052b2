"""A gs:// folder to which a run folder is copied, through TensorFlow's file system: no gsutil needed.

Writing needs credentials: in Colab `google.colab.auth.authenticate_user()`, elsewhere
GOOGLE_APPLICATION_CREDENTIALS or a machine on Google Cloud.
"""
import re
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from droid import tensorflow


def _files(folder):
    """Files of a run worth keeping, relative; a step's state.pt last, since it marks the step as complete."""
    files = [p for p in folder.rglob("*") if p.is_file() and not any(".tmp" in part for part in p.parts)]
    return sorted((p.relative_to(folder) for p in files), key=lambda p: (p.name == "state.pt", str(p)))


def upload(folder, url):
    """Copies what is new in the run folder to gs:// and removes nothing there. A failure is told, not raised:
    training goes on and the next upload takes up what is missing."""
    tf, folder = tensorflow(anonymous=False), Path(folder)
    try:
        for path in _files(folder):
            target = f"{url.rstrip('/')}/{path}"
            finished = path.parts[0].startswith("step_")
            if not (finished and tf.io.gfile.exists(target)):
                tf.io.gfile.copy(str(folder / path), target, overwrite=True)
    except (tf.errors.OpError, OSError) as error:
        tqdm.write(f"not uploaded to {url}: {str(error).splitlines()[0]}; will try again", file=sys.stderr)


def fetch_newest(url, folder):
    """Copies the newest complete step and the logs from gs:// into the run folder -> whether there was one.

    Raises ValueError if the bucket cannot be read."""
    tf, folder, url = tensorflow(anonymous=False), Path(folder), url.rstrip("/")
    try:
        found = (re.search(r"/step_(\d+)/state\.pt$", path) for path in tf.io.gfile.glob(f"{url}/step_*/state.pt"))
        steps = [int(match[1]) for match in found if match]
        if not steps:
            return False
        newest = f"step_{max(steps)}"
        partial = folder / f"{newest}.tmp"
        partial.mkdir(parents=True, exist_ok=True)
        for path in tf.io.gfile.glob(f"{url}/{newest}/*"):
            tf.io.gfile.copy(path, str(partial / path.split("/")[-1]), overwrite=True)
        shutil.rmtree(folder / newest, ignore_errors=True)      # incomplete, or it would not be fetched
        partial.rename(folder / newest)
        if tf.io.gfile.exists(f"{url}/metrics.jsonl"):
            tf.io.gfile.copy(f"{url}/metrics.jsonl", str(folder / "metrics.jsonl"), overwrite=True)
    except tf.errors.OpError as error:
        raise ValueError(f"gcs_dir {url}: {error.message.splitlines()[0]}") from None
    return True
