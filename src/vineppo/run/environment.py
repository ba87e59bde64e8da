"""Determine the versions of this package and of other installed packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Return the version of vineppo, or 0.1.0 if it runs from a source tree without being installed."""
    return version_of("vineppo") or "0.1.0"


def version_of(package: str) -> str | None:
    """Return the version of a package, or None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
