"""The mirror of a run folder on gs://.

It is written through TensorFlow's file system, so no gsutil is needed. Writing needs credentials:
in Colab `google.colab.auth.authenticate_user()`, elsewhere GOOGLE_APPLICATION_CREDENTIALS or a
machine on Google Cloud.
"""
import re
import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm

from droid import tensorflow


class Mirror:
    """Uploads the run folder to cfg.gcs_dir every cfg.gcs_minutes, from rank 0."""

    def __init__(self, cfg, out, rank):
        self.url, self.out, self.interval = cfg.gcs_dir, out, 60 * cfg.gcs_minutes
        self.active, self.last = bool(cfg.gcs_dir) and rank == 0, time.monotonic()

    def upload_if_due(self, now=False):
        """-> whether it took the time to upload."""
        if not self.active or not (now or time.monotonic() - self.last > self.interval):
            return False
        upload(self.out, self.url)
        self.last = time.monotonic()
        return True


def _run_files(folder):
    """Files of a run worth keeping, relative; a step's state.pt comes last, since it marks the step
    as complete."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if not any(".tmp" in part for part in path.parts)]
    return sorted(files, key=lambda path: (path.name == "state.pt", str(path)))


def upload(folder, url):
    """Copies what is new in the run folder to gs:// and removes nothing there.

    A failure is printed, not raised: training goes on, and the next upload takes up what is
    missing."""
    tf, folder = tensorflow(anonymous=False), Path(folder)
    try:
        for path in _run_files(folder):
            target = f"{url.rstrip('/')}/{path}"
            finished = path.parts[0].startswith("step_")        # these files never change
            if not (finished and tf.io.gfile.exists(target)):
                tf.io.gfile.copy(str(folder / path), target, overwrite=True)
    except (tf.errors.OpError, OSError) as error:
        tqdm.write(f"not uploaded to {url}: {str(error).splitlines()[0]}; will try again",
                   file=sys.stderr)


def fetch_newest(url, folder):
    """Copies the newest complete step and the logs from gs:// into the run folder -> whether there
    was one. Raises ValueError if the bucket cannot be read."""
    tf, folder, url = tensorflow(anonymous=False), Path(folder), url.rstrip("/")
    try:
        found = (re.search(r"/step_(\d+)/state\.pt$", path)
                 for path in tf.io.gfile.glob(f"{url}/step_*/state.pt"))
        steps = [int(match[1]) for match in found if match]
        if not steps:
            return False
        newest = f"step_{max(steps)}"
        partial = folder / f"{newest}.tmp"
        partial.mkdir(parents=True, exist_ok=True)
        for path in tf.io.gfile.glob(f"{url}/{newest}/*"):
            tf.io.gfile.copy(path, str(partial / path.split("/")[-1]), overwrite=True)
        # Without a state.pt, or it would not be fetched: incomplete.
        shutil.rmtree(folder / newest, ignore_errors=True)
        partial.rename(folder / newest)
        if tf.io.gfile.exists(f"{url}/metrics.jsonl"):
            target = str(folder / "metrics.jsonl")
            tf.io.gfile.copy(f"{url}/metrics.jsonl", target, overwrite=True)
    except tf.errors.OpError as error:
        raise ValueError(f"gcs_dir {url}: {error.message.splitlines()[0]}") from None
    return True
