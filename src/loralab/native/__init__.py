"""Compiled kernels: C++ sources that are built at first use, and calls into them."""

from loralab.native.building import Kernel, NoKernelError, build, find_compiler, load_kernel

__all__ = ["Kernel", "NoKernelError", "build", "find_compiler", "load_kernel"]
