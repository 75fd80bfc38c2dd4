"""Which release of a package is installed, without importing it."""

from __future__ import annotations

from importlib import metadata


def installed(distribution, oldest=None, alternatives=()):
    """(version or None, why it cannot be used or None).

    Args:
        distribution: name of the package on the index.
        oldest: the first release that has what is needed, a tuple of ints. None: any.
        alternatives: other names that the same package is published under.
    """
    for name in (distribution, *alternatives):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if oldest is not None and release(version) < oldest:
            return version, f"{'.'.join(map(str, oldest))} or newer is needed"
        return version, None
    return None, f"{distribution} is not installed"


def release(version):
    """ "2.11.0+cu130" as (2, 11, 0)."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
