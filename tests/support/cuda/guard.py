"""Autograd over fake tensors of device cuda in a build of torch without CUDA. Import this before torch.

Compiles guard.cpp once (some seconds): a device guard that does nothing, and hooks that say that there is one device.
`torch.cuda.is_available()` stays False. Raises Unavailable where that is not possible here.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
VERSION = "2.13."  # of torch, for which this was made


class Unavailable(Exception):
    """Why a GPU cannot be pretended here."""


def reason() -> str | None:
    """Why this is not possible here, or None."""
    version = importlib.metadata.version("torch")
    if not version.startswith(VERSION) or "+cpu" not in version:
        return f"torch {version}: the pretended GPU is made for the CPU build of torch {VERSION}x"
    return None if shutil.which("g++") else "g++ is missing"


def load() -> None:
    """Make it so, in this process."""
    assert "torch" not in sys.modules, "load the guard before torch"
    if (problem := reason()) is not None:
        raise Unavailable(problem)
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    digest = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"cuda-guard-{os.getuid()}-{digest}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-shared", "-fPIC", "-O0", "-std=c++20", f"-I{torch}/include", SOURCE, f"-L{torch}/lib"]
        command += ["-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib", "-o", partial]
        subprocess.run(command, check=True)
        partial.rename(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import torch

    if ctypes.CDLL(str(library)).has_cuda() != 1:
        raise Unavailable("torch has asked for its hooks before the guard was loaded")
