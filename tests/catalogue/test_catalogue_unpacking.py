"""Hostile archives: only wanted plain files come out, and only into the folder."""

import io
import tarfile

import pytest

from loralab.catalogue.entries import Archive, File
from loralab.catalogue.unpacking import unpack


def archive_of(*files: File, nested: str | None = None) -> Archive:
    return Archive("package", "1", "", 0, True, files, nested)


def tar_of(path, *members: tuple[tarfile.TarInfo, bytes]):
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_members_that_are_not_wanted_stay_inside(tmp_path):
    packed = tar_of(
        tmp_path / "a.tar.gz",
        (tarfile.TarInfo("wanted"), b"good"),
        (tarfile.TarInfo("../escaped"), b"bad"),
        (tarfile.TarInfo(str(tmp_path / "absolute")), b"bad"),
    )
    folder = tmp_path / "out"
    folder.mkdir()
    unpack(packed, archive_of(File("wanted", "sub/wanted", 4, "")), folder)
    assert (folder / "sub" / "wanted").read_bytes() == b"good"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "out"]


def test_links_are_not_followed(tmp_path):
    (tmp_path / "secret").write_text("secret")
    link = tarfile.TarInfo("wanted")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
    packed = tar_of(tmp_path / "a.tar.gz", (link, b""))
    with pytest.raises(KeyError, match="no plain file"):
        unpack(packed, archive_of(File("wanted", "wanted", 0, "")), tmp_path / "out")


def test_a_name_cannot_leave_the_folder(tmp_path):
    packed = tar_of(tmp_path / "a.tar.gz", (tarfile.TarInfo("wanted"), b""))
    with pytest.raises(KeyError, match="outside"):
        unpack(packed, archive_of(File("wanted", "../wanted", 0, "")), tmp_path / "out")


def test_an_archive_inside_the_archive(tmp_path):
    inner = tar_of(tmp_path / "inner.tar.gz", (tarfile.TarInfo("folder/file"), b"deep"))
    packed = tar_of(
        tmp_path / "outer.tar.gz",
        (tarfile.TarInfo("inner.tar.gz"), inner.read_bytes()),
        (tarfile.TarInfo("licence"), b"free"),
    )
    files = (File("inner.tar.gz/folder/file", "file", 4, ""), File("licence", "licence", 4, ""))
    (tmp_path / "out").mkdir()
    unpack(packed, archive_of(*files, nested="inner.tar.gz"), tmp_path / "out")
    assert (tmp_path / "out" / "file").read_bytes() == b"deep"
    assert (tmp_path / "out" / "licence").read_bytes() == b"free"
