"""The build backend: setuptools.build_meta, and the CUDA compiler's wheels where there is no nvcc.

pip asks `get_requires_for_build_wheel` what a build needs beyond `build-system.requires`. A machine
with a toolkit answers "nothing"; a machine without one gets nvcc and its headers from the package
index (about 280 MB unpacked, in the temporary build environment only). What is built, and how, is
in setup.py, which imports this package to do it.
"""

import shutil
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from .nvcc import NVCC_WHEELS, cuda_wanted, find_nvcc

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def _compiler_wheels():
    return [] if not cuda_wanted() or find_nvcc() else list(NVCC_WHEELS)


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _compiler_wheels()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _compiler_wheels()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools packs whatever an earlier build left in build/lib*, deleted modules included.
    # Objects live in the user's cache, so starting clean costs one link.
    for folder in Path("build").glob("lib*"):
        shutil.rmtree(folder)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
