"""Where the data files that travel with the package lie: profiles and the demo's model.

In a wheel they are folders inside the package (`prefixkv_cache/profiles/`); in a checkout, and so in an editable
install, they are folders beside `src/`. This module only finds the folders: it opens no file, and knows nothing of
what is in them.
"""

from pathlib import Path

_KINDS = ("profiles", "models")


def bundled_dir(kind: str) -> Path:
    """Return the folder that holds the bundled data of one kind.

    Args:
        kind: `"profiles"` or `"models"`.

    Returns:
        An existing folder; or, where this copy of the package carries no such data, the path at which a wheel would
        have it, which does not exist.

    Raises:
        ValueError: `kind` is none of the kinds above. Names never become paths unchecked.
    """
    if kind not in _KINDS:
        raise ValueError(f"no bundled data of kind {kind!r}; expected one of {', '.join(_KINDS)}")
    package = Path(__file__).resolve().parent
    in_wheel, root = package / kind, package.parent.parent
    if in_wheel.is_dir():
        return in_wheel
    # A folder of that name two levels up counts only if that level is a checkout of this project.
    in_checkout = root / kind
    is_checkout = package.parent.name == "src" and (root / "pyproject.toml").is_file()
    return in_checkout if is_checkout and in_checkout.is_dir() else in_wheel
