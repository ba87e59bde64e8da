"""Versions of the package and of the libraries that results depend on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Version of the installed package; 0.1.0 for a source tree that is not installed."""
    return version_of("vineppo") or "0.1.0"


def version_of(package: str) -> str | None:
    """Version of an installed package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
