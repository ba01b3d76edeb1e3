"""A shim for tools that need a setup.py: the metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["resnext_det", "resnext_det.*"]), "resnext_det.configs"])
