"""Writing files in one step: whoever reads the path finds the old content or the new one, whole."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file under another name in the same folder, and rename it.

    An existing file is replaced, a link too (not what it points to); the new one has the permissions of any new file.

    Args:
        path: where to; the folder must exist.
        data: the content; text is written as UTF-8.

    Raises:
        OSError: the file cannot be written; the error names it. The old file, if any, is then as it was, as it is after
            Ctrl-C, and nothing else is left in the folder.
    """
    target = Path(path)
    content = data.encode() if isinstance(data, str) else data
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"cannot write, as there is no folder {target.parent}", str(target))
    # Not by `tempfile`, whose files only their owner can read.
    temporary = target.parent / f".prefixkv-{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror or error}", str(target)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
