"""A shim for tools that need a setup.py: the metadata is in pyproject.toml."""

from setuptools import find_packages, setup

found = find_packages(include=["resnext_det", "resnext_det.*", "resnext_det_cli"])
setup(packages=[*found, "resnext_det.configs"])
