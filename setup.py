"""Builds the extension dpcomm._native with CMake and Ninja (csrc/CMakeLists.txt). All else is in pyproject.toml."""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(p) for p in Path("csrc").rglob("*") if p.is_file())


class CMakeBuild(build_ext):
    """Runs CMake in build/<ABI tag>, so that a second build compiles only what changed.

    Environment: DPCOMM_CUDA=AUTO|ON|OFF (default AUTO: CUDA where there is an nvcc), CMAKE_ARGS (added as they are).
    """

    def build_extension(self, ext: Extension) -> None:
        """Configures, builds, and puts the library where setuptools expects it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = str(Path("build", str(sysconfig.get_config_var("SOABI"))))
        settings = {
            "DPCOMM_CUDA": os.environ.get("DPCOMM_CUDA", "AUTO"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        options = [f"-D{name}={value}" for name, value in settings.items()]
        options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        # cmake and ninja of this Python's wheels come first: an environment need not be activated to be used.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        for command in (["-S", "csrc", "-B", folder, "-G", "Ninja", *options], ["--build", folder]):
            subprocess.run(["cmake", *command], check=True, env={**os.environ, "PATH": path})
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(Path(folder, target.name)), str(target))


setup(ext_modules=[Extension("dpcomm._native", [], depends=SOURCES)], cmdclass={"build_ext": CMakeBuild})
