"""Settings as people write them, in YAML and on the command line: all scalars are text, and what
they mean, the type of their key says.

YAML 1.1 by itself guesses from the looks: it reads 0712 as 458, no as False, 1e-4 as text and 1:30
as 90. Errors are a ValueError of one line."""
import math
import os
from collections import Counter
from itertools import count

import yaml

from files.reading import read_bytes


LIMIT = 256 << 10           # bytes of a YAML file
BOOLS = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)


class _TextLoader(yaml.BaseLoader):
    """Lists, dicts and text, nothing else; no key may be there twice."""
    depth = 0

    def compose_node(self, parent, index):
        # Few lines of aliases expand to gigabytes.
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read, write the value out")
        if self.depth > 20:
            raise yaml.YAMLError("it is nested too deeply")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            [(key, _)] = Counter(key.value for key, _ in node.value).most_common(1)
            raise yaml.YAMLError(f"{key} is there twice")
        return mapping


def parse_yaml(data, where):
    """YAML (text, or bytes in UTF-8 or UTF-16) as dicts and lists of text, None if it is empty.
    `where` begins the message."""
    try:
        return yaml.load(data, _TextLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = ", ".join(filter(None, (getattr(error, "context", ""),
                                          getattr(error, "problem", "")))) or str(error)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}: not valid YAML: {line}{' '.join(problem.split())}") from None


def read_yaml(path):
    """As `parse_yaml`, of a config file."""
    try:
        return parse_yaml(read_bytes(expand_home(path), LIMIT), path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such config file (a key is set with --key=value)") from None


def expand_home(path):
    """A path with the home folder for ~ or ~user. Raises ValueError for an unknown user."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path}: no such user; a folder of that name is ./{path}")
    return expanded


def to_text(value):
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    return value


def to_float(text):
    """Also of 1_000; neither infinite nor NaN."""
    number = float(to_text(text))
    if not math.isfinite(number):
        raise ValueError
    return number


def to_int(text):
    """Also of 5_000, 5e3 and 5000.0."""
    try:
        return int(to_text(text))
    except ValueError:
        number = to_float(text)
        if number % 1:
            raise
        return int(number)


def to_bool(text):
    return BOOLS[to_text(text).strip().lower()]


def to_list(value):
    """Of a list, or text such as `a, b` or `[a, b]`: a list of text (or of what is in the list)."""
    if isinstance(value, str) and value.startswith("["):
        value = parse_yaml(value, "")
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",")] if value.strip() else []
    if not isinstance(value, list):
        raise ValueError
    return value


# type: (function that makes it of text or raises ValueError or KeyError, its name in errors)
TYPES = {str: (to_text, "text"), float: (to_float, "a finite number"),
         int: (to_int, "a whole number"), bool: (to_bool, "true or false"),
         tuple: (to_list, "a list, a,b or [a, b]")}


def unique_ends(paths, taken=()):
    """The shortest ends of different Paths that tell them apart, and from the names `taken`, as
    text."""
    for n in count(1):
        ends = ["/".join(path.parts[-n:]) for path in paths]
        if len({*ends, *taken}) == len(ends) + len(taken):
            return ends
