"""Frames of mp4 files by their time stamps: only those that are asked for are decoded (PyAV)."""
import os
import threading
from collections import OrderedDict
from functools import cached_property, partial

import numpy as np

from episodes.crops import MAX_PIXELS
from files.reading import file_size, one_line


MAX_FRAMES = 2_000_000      # in one file: 11 hours at 50 fps
OPEN_FILES = 8              # that a thread keeps
SEEK_COST = 2               # frames that could be decoded in the time in which a seek is done
MORE_KEYFRAMES = 3          # that are tried if a frame cannot be decoded from the one before it


class PerThread(threading.local):
    """The files that a thread has open, the least recently used of which are closed: FFmpeg's and
    Arrow's readers must not be shared. They are closed with the thread as well."""

    def __init__(self, open_file, n=OPEN_FILES):
        self.open_file, self.n, self.files = open_file, n, OrderedDict()

    def get(self, path):
        """open_file(path), or what it returned before."""
        if path not in self.files:
            while len(self.files) >= self.n:
                self.files.popitem(last=False)[1].close()
            self.files[path] = self.open_file(path)
        self.files.move_to_end(path)
        return self.files[path]

    def drop(self, path):
        """Closes a file that may be in an odd state, such as after an error."""
        if path in self.files:
            self.files.pop(path).close()


class Video:
    """An open mp4 file, for one thread.

    height, width: of its frames; start: time of the first one, in seconds."""

    def __init__(self, path):
        """Raises FileNotFoundError, or ValueError for anything but a whole mp4 with a video."""
        import av
        from av.video.reformatter import VideoReformatter
        self.path, self.frame, self.packets = path, None, None
        file_size(path)                             # no folder, pipe or device
        # Not by its content, which could be a list of other files or addresses to open.
        with one_line(path):
            self.container = av.open(f"file:{os.path.abspath(path)}", format="mp4")
        with one_line(path):
            streams = self.container.streams.video
            self.stream = streams[0] if streams else None
        context = self.stream and self.stream.codec_context
        if not context:
            self.close()
            raise ValueError(f"{path}: holds no video, or one of an unknown codec")
        self.height, self.width = context.height, context.width
        if not 0 < self.height * self.width <= MAX_PIXELS:
            self.close()
            raise ValueError(f"{path}: frames of {self.height} × {self.width} pixels")
        # One thread: decoders with several hold frames back, which costs more after each seek.
        context.thread_count, context.thread_type = 1, "NONE"
        # Damage is to be an error, not to be painted over with what was there before.
        context.options = {"err_detect": "explode", "ec": "0", "max_pixels": str(MAX_PIXELS),
                           "strict": "1"}
        self.index, self.unit = self.stream.index_entries, self.stream.time_base
        n = len(self.index)
        if not 0 < n <= MAX_FRAMES or not self.unit or self.unit <= 0:
            self.close()
            raise ValueError(f"{path}: lists {n:,} frames")
        self.start = float((self.stream.start_time or 0) * self.unit)
        self._to_rgb = partial(VideoReformatter().reformat, format="rgb24")

    def close(self):
        self.frame = self.packets = None
        self.container.close()

    def __del__(self):
        # With its thread, at once: PyAV's objects wait for the garbage collector.
        if "container" in vars(self):
            self.close()

    @cached_property
    def times(self):
        """Of its frames, ascending, in seconds [n], by its list of frames."""
        # Each in the order in which they are stored: shown they are by a constant later.
        stamps = sorted(entry.timestamp for entry in self.index if not entry.is_discard)
        stamps = np.array(stamps, np.float64)
        return (stamps - stamps[:1]) * float(self.unit) + self.start

    def read(self, seconds, tolerance):
        """Yields the frame at each of `seconds` (ascending), [H, W, 3] uint8 RGB: that whose time
        stamp is within `tolerance` s.

        Raises ValueError if there is none, or if it cannot be decoded."""
        for second in seconds:
            frame = self._find(round(second / self.unit), float(tolerance / self.unit), second)
            if frame.is_corrupt or (frame.height, frame.width) != (self.height, self.width):
                raise ValueError(f"{self.path}: the frame at {second:.3f} s is damaged")
            with one_line(self.path):
                pixels = self._to_rgb(frame).to_ndarray()
            yield pixels

    def _find(self, wanted, tolerance, second):
        key = self._keyframe(wanted)
        # Decoding on is right as long as no later keyframe is so much nearer that a seek pays.
        if self.frame is None or self.frame.pts > wanted + tolerance or (
                key - self._position(self.frame.pts) > SEEK_COST):
            self._seek_before(wanted + tolerance, key)
        while self.frame is not None and self.frame.pts < wanted - tolerance:
            self._next()
        if self.frame is None or self.frame.pts > wanted + tolerance:
            raise ValueError(f"{self.path}: has no frame at {second:.3f} s")
        return self.frame

    def _seek_before(self, latest, key):
        """Decodes the first frame from a keyframe on: from `key`, or from one before it.

        With frames that are shown in another order than they are stored, a keyframe may be shown
        after `latest`, and the first frames behind it may need those before it."""
        for left in reversed(range(1 + MORE_KEYFRAMES)):
            try:
                self._seek(key)
                if self.frame is not None and self.frame.pts <= latest:
                    return
            except ValueError:
                if not left or not key:
                    raise
            if not key:
                return
            key = self._keyframe(self.index[key].timestamp - 1)

    def _position(self, timestamp):
        return self.index.search_timestamp(timestamp, backward=True, any_frame=True)

    def _keyframe(self, timestamp):
        """Number of the last keyframe up to there, 0 if there is none."""
        return max(0, self.index.search_timestamp(timestamp, backward=True))

    def _seek(self, key):
        self.frame = None
        with one_line(self.path):
            self.container.seek(self.index[key].timestamp, stream=self.stream, backward=True)
        self.packets = _decoded(self.container, self.stream)
        self._next()

    def _next(self):
        """Decodes the next frame; None at the end."""
        self.frame = None
        with one_line(self.path):
            self.frame = next(self.packets, None)


def _decoded(container, stream):
    """Yields the frames from where the container stands on. Not a method: a Video that refers to
    itself would not be closed with its thread."""
    for packet in container.demux(stream):
        yield from (frame for frame in packet.decode() if frame.pts is not None)
