"""Kernels as shared libraries: compiled at first use, kept by the hash of all that made them.

A library lies in the user's cache, in a folder that nobody else may write to. Any failure leaves
torch's operations, with one line in the log that says why.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from loralab.files import cache_folder

log = logging.getLogger("loralab")

_FLAGS = ("-O3", "-std=c++17", "-march=native", "-fPIC", "-shared")
_COMPILERS = ("g++", "clang++", "c++")
_COMPILE_SECONDS = 300


class NoKernelError(Exception):
    """There is no kernel here; the message says why."""


@dataclass(frozen=True)
class Kernel:
    """A kernel's source: that name with `.cpp` in `folder`, and all that lies beside it."""

    name: str
    folder: Path
    flags: tuple[str, ...] = ()

    @property
    def source(self) -> Path:
        """The file to compile."""
        return self.folder / f"{self.name}.cpp"


def are_wanted() -> bool:
    """Whether kernels may run: not where `LORALAB_KERNELS=off`."""
    return os.environ.get("LORALAB_KERNELS", "").lower() not in ("off", "0", "no")


@functools.cache
def load_kernel(kernel: Kernel) -> ctypes.CDLL | None:
    """The kernel's library; None where `LORALAB_KERNELS=off` or none can be made (logged once)."""
    if not are_wanted():
        return None
    try:
        return ctypes.CDLL(str(build(kernel)))
    except (NoKernelError, OSError) as error:
        log.warning("%s runs on torch's operations: %s", kernel.name, error)
        return None


def build(kernel: Kernel, extra_flags: tuple[str, ...] = ()) -> Path:
    """The library's file, compiled where it is not there yet. Raises `NoKernelError`."""
    compiler = find_compiler()
    flags = (*_FLAGS, *kernel.flags, *extra_flags)
    folder = _own_folder(cache_folder() / "kernels")
    library = folder / f"{kernel.name}-{_identity(kernel, compiler, flags)}.so"
    if not library.exists():
        _compile(kernel, compiler, flags, library)
    return library


def find_compiler() -> str:
    """The C++ compiler: `CXX`, else the first known one. Raises `NoKernelError`."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise NoKernelError(f"no C++ compiler ({wanted or ', '.join(_COMPILERS)}) is installed")


def _compile(kernel: Kernel, compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """Compiles aside, then renames: another process never sees half a library."""
    handle, aside = tempfile.mkstemp(prefix=".building-", suffix=".so", dir=library.parent)
    os.close(handle)
    command = [compiler, *flags, "-o", aside, str(kernel.source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
        if done.returncode:
            raise NoKernelError(f"{compiler} failed: {done.stderr.strip()[-400:]}")
        Path(aside).replace(library)
    except subprocess.TimeoutExpired as error:
        raise NoKernelError(f"{compiler} took more than {_COMPILE_SECONDS} s") from error
    finally:
        Path(aside).unlink(missing_ok=True)


def _own_folder(folder: Path) -> Path:
    """The folder, which only this user may write to: what lies there is run."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise NoKernelError(f"{folder} cannot be made: {error.strerror}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise NoKernelError(f"{folder} may be written to by other users")
    return folder


def _identity(kernel: Kernel, compiler: str, flags: tuple[str, ...]) -> str:
    """A hash of the sources, the compiler, its flags and the processor they are meant for."""
    digest = hashlib.sha256()
    for source in sorted(kernel.folder.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    for part in (version.stdout, *flags, _processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(told[:2]) or platform.processor() + platform.machine()
