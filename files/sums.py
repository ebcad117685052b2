"""SHA256SUMS: the sums of the files in a step's folder, in the form of `sha256sum`."""
import hashlib

from files.reading import read_bytes


SUMS = "SHA256SUMS"


def read_sums(folder, limit=10_000):
    """{name: SHA-256} of the files in a folder (a Path); {} for a step of an older version, or an
    adapter from elsewhere, which has no sums. limit: of bytes. Raises ValueError."""
    try:
        lines = read_bytes(folder / SUMS, limit).decode().splitlines()
        return {line[66:]: line[:64] for line in lines}
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder}/{SUMS}: damaged ({error})") from None


def check_sums(folder, sums):
    """Raises ValueError for the first file of `sums`, {name: SHA-256}, that is another one."""
    for name, digest in sums.items():
        if _sha256(folder / name) != digest:
            raise ValueError(f"{folder}/{name}: damaged (its SHA-256 is not that of {SUMS})")


def _sha256(path):
    """The digest of a regular file of any size, "" for anything else."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
