"""Packaging lives in pyproject.toml; this file is where setuptools finds the build of native code."""

from setuptools import setup

setup()
