"""Odd files from outside are read right, or left out or refused in one line: those of
tests/stress/odd_files.py that are made quickly."""
import warnings

import pytest
from stress import tried_files

import energy


# Gigabytes, which take seconds to make; tests/stress/odd_files.py tries them.
SLOW = ("6.3 GB", "6 GB of states", "4 GB", "64,000,000 pixels", "9,000,000 pixels", "a strip",
        "of 100 MB", "000 members", "a bomb", "8,000²", "3,000²", "4K", "60 MB", "formulas",
        "100 MB", "1,000 scans")


def cases(family):
    return [name for name in tried_files.FAMILIES[family][0]
            if not any(word in name for word in SLOW)]


def attempt(family, name, folder):
    spoils, prepare, attempt_one = tried_files.FAMILIES[family]
    spoil, expected = spoils[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)        # zipfile's, of a name written twice
        prepared = prepare(spoil, folder)
    tried_files.check(name, attempt_one(prepared), expected)


@pytest.mark.parametrize("name", cases("episode"))
def test_episodes(tmp_path, name):
    attempt("episode", name, tmp_path)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    pytest.importorskip("tensorflow")
    return tmp_path_factory.mktemp("records")


@pytest.mark.parametrize("name", cases("image"))
def test_images(records, name):
    attempt("image", name, records)


@pytest.mark.parametrize("name", cases("store"))
def test_stores(tmp_path, name):
    attempt("store", name, tmp_path)


@pytest.mark.parametrize("name", cases("package"))
def test_packages(tmp_path, name):
    attempt("package", name, tmp_path)


@pytest.mark.parametrize("name", cases("unpacked package"))
def test_unpacked_packages(tmp_path, name):
    attempt("unpacked package", name, tmp_path)


@pytest.mark.parametrize("name", cases("landscapes"))
def test_landscapes(tmp_path, monkeypatch, name):
    # The figures of landscapes that are read take seconds each.
    monkeypatch.setattr(energy, "report", lambda arrays, folder: None)
    attempt("landscapes", name, tmp_path)
