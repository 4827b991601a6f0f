"""The folder where things are kept between processes: compiled explainers, notes of this machine, binaries.

What is kept there is executed, so the folder and every file that is read must belong to the user and be writable by
nobody else.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import stat
import sys
from pathlib import Path

log = logging.getLogger(__name__)


def folder() -> Path:
    """Where the cache is: DLBC_CACHE_DIR, or `dlbc` in the user's cache folder of this platform."""
    stated = os.environ.get("DLBC_CACHE_DIR")
    if stated:
        return Path(stated).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "dlbc" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dlbc"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlbc"


def trusted_folder() -> Path | None:
    """The cache folder, made if need be; None, said once, when it cannot be used or others could write there."""
    path = folder()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as problem:
        say_once(log, f"the compile cache {path} cannot be used ({problem.strerror}), so nothing is cached; "
                      "set DLBC_CACHE_DIR to a folder of yours")
        return None
    if not ours(status):
        say_once(log, f"the compile cache {path} belongs to or can be written by others, so it is not used; "
                      f"`chmod go-w` it, or set DLBC_CACHE_DIR to a folder of yours")
        return None
    return path


def ours(status: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user and nobody else can write it."""
    return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & (
        stat.S_IWGRP | stat.S_IWOTH))


def write(path: Path, content: bytes) -> None:
    """Put a file in place whole, readable by the user alone; an error is said once and not raised."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as problem:
        say_once(log, f"the compile cache {path.parent} cannot be written ({problem.strerror}), so nothing new is "
                      "cached")


@functools.cache
def say_once(log: logging.Logger, text: str) -> None:
    """Log a warning that was not yet logged in this process."""
    log.warning("%s", text)
