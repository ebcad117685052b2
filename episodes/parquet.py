"""Columns of parquet files as arrays: only the rows and columns that are asked for (pyarrow)."""
import numpy as np

from files.reading import file_size, one_line, shown


class Table:
    """An open file of data/, for one thread."""

    def __init__(self, path):
        import pyarrow.parquet as pq
        self.path = path
        file_size(path)
        with one_line(path):
            self.file = pq.ParquetFile(path, pre_buffer=False)
            self.names = set(self.file.schema_arrow.names)
            groups = range(self.file.metadata.num_row_groups)
            sizes = [self.file.metadata.row_group(i).num_rows for i in groups]
        self.begins = np.cumsum([0, *sizes])        # first row of each row group
        self.spans = {}                             # {episode: (first row, last row + 1)}
        episodes = numbers_of(self._read(["episode_index"], 0, self.begins[-1])["episode_index"],
                            "episode_index")[:, 0]
        edges = np.flatnonzero(np.diff(episodes, prepend=np.nan, append=np.nan))
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist()):
            number = int(episodes[first])
            # Rows of an episode in two places: neither is used.
            self.spans[number] = None if number in self.spans else (first, last)

    def close(self):
        self.file.close()

    def read(self, number, wanted, alone):
        """({name: column} of the rows of an episode, its first row)."""
        span = self.spans.get(number)
        if span is None or alone and len(self.spans) > 1:
            held = ", ".join(map(str, list(self.spans)[:4])) or "none"
            raise ValueError(f"{self.path}: its rows are not those of episode {number} (but of "
                             f"{held}); is it the file of another one?")
        names = sorted({*wanted, "frame_index", "timestamp"})
        return self._read(names, *span), span[0]

    def images(self, column, rows):
        """PNG or JPEG files, bytes, of some rows (ascending) of a column."""
        table = self._read([column], rows[0], rows[-1] + 1)[column]
        with one_line(self.path):
            values = table.take([row - rows[0] for row in rows]).to_pylist()
        files = [value.get("bytes") if isinstance(value, dict) else value for value in values]
        if not all(isinstance(file, bytes) for file in files):
            raise ValueError(f"{self.path}: {column} does not hold the images themselves; export "
                             "the data set with its images")
        return files

    def _read(self, names, first, last):
        """{name: column} of rows first … last - 1: only the row groups that hold them are read."""
        missing = [name for name in names if name not in self.names]
        if missing:
            raise ValueError(f"{self.path}: has no column {missing[0]}")
        groups = [i for i, begin in enumerate(self.begins[:-1].tolist())
                  if begin < last and self.begins[i + 1] > first]
        with one_line(self.path):
            table = self.file.read_row_groups(groups, columns=names, use_threads=False)
            table = table.slice(first - (self.begins[groups[0]] if groups else 0), last - first)
            if len(table) != last - first:
                raise ValueError("rows are missing")
            return {name: table.column(name) for name in names}


def read_columns(path, names, optional):
    """(lists of the numbers in columns of a parquet file of meta/episodes, table of those of the
    `optional` ones that there are)"""
    import pyarrow.parquet as pq
    file_size(path)
    with one_line(path):
        with pq.ParquetFile(path, pre_buffer=False) as file:
            held = set(file.schema_arrow.names)
            missing = [name for name in names if name not in held]
            optional = [name for name in optional if name in held]
            table = None if missing else file.read(columns=names + optional, use_threads=False)
    if missing:
        raise ValueError(f"{path}: has no column {missing[0]}")
    columns = []
    for name in names:
        values = numbers_of(table.column(name), f"{path}: {name}")
        if values.shape[1:] != (1,) or not (np.abs(values) < 2 ** 53).all():
            raise ValueError(f"{path}: {name} is not one number for each episode")
        is_time = name.endswith("timestamp")
        columns.append((values[:, 0] if is_time else values[:, 0].astype(np.int64)).tolist())
    return columns, table.select(optional)


def numbers_of(column, name):
    """A column of numbers, or of lists of equally many, as [n, A] float64. Raises ValueError."""
    import pyarrow.types as types
    with one_line(name):
        array, n = column.combine_chunks(), len(column)
        array = array.chunk(0) if hasattr(array, "chunk") else array
        kind = array.type
        is_fixed = types.is_fixed_size_list(kind)
        if is_fixed or types.is_list(kind) or types.is_large_list(kind):
            lengths = {kind.list_size} if is_fixed else set(
                array.value_lengths().unique().to_pylist())
            has_gaps, array = array.null_count, array.flatten()
        else:
            lengths, has_gaps = {1}, 0
        kind = array.type
        is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
        values = array.to_numpy(zero_copy_only=False) if is_number else None
    if not is_number or len(lengths) > 1 or has_gaps or array.null_count:
        raise ValueError(f"{name} is not the same number of numbers in each row ({column.type})")
    return values.astype(np.float64).reshape(n, -1)


def one_value(column, name):
    """The one value of a column as text. Raises ValueError if there are several."""
    with one_line(name):
        values = column.unique().to_pylist()
    if len(values) != 1 or not isinstance(values[0], (str, int)) or not str(values[0]):
        raise ValueError(f"{name} is {shown(values)}, expected the name of the episode in each row")
    return str(values[0])
