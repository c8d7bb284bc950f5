"""Writing is whole or not at all."""

import errno

import pytest

from loralab.errors import OutputError
from loralab.files import cannot_write, replacing, write_json, write_text


def test_an_error_while_writing_leaves_the_old_file_and_no_litter(tmp_path):
    place = tmp_path / "a.txt"
    write_text(place, "old")
    with pytest.raises(RuntimeError), replacing(place) as aside:
        aside.write_text("new")
        raise RuntimeError
    assert place.read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]


def test_a_folder_takes_the_place_of_a_folder(tmp_path):
    place = tmp_path / "model"
    for content in ("one", "two"):
        with replacing(place) as aside:
            aside.mkdir()
            (aside / content).write_text(content)
    assert [f.name for f in place.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [place]


def test_a_full_disk_is_an_error_that_names_the_place(tmp_path):
    place = tmp_path / "a.txt"
    with pytest.raises(OutputError, match=r"a\.txt: the disk is full"), replacing(place):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_place_that_may_not_be_written(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_text(blocker / "below.txt", "text")
    assert "permission" in cannot_write(blocker, PermissionError(13, "denied")).next_step


def test_json_with_numbers_that_are_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
