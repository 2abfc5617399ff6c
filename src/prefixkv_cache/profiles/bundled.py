"""Where the data files that travel with the package lie: profiles and the demo's model.

In a wheel they are folders inside the package (`prefixkv_cache/profiles/`, beside this file; `prefixkv_cache/models/`);
in a checkout, and so in an editable install, they are folders beside `src/`. This module only finds files: it opens
none, and knows nothing of what is in them.
"""

from __future__ import annotations

import re
from pathlib import Path

_KINDS = ("profiles", "models")


def bundled_dir(kind: str) -> Path:
    """Return the folder that holds the bundled data of one kind.

    Args:
        kind: `"profiles"` or `"models"`.

    Returns:
        A folder with safetensors files in it; or, where this copy of the package carries no such data, the path at
        which a wheel would have it.

    Raises:
        ValueError: `kind` is none of the kinds above. Names never become paths unchecked.
    """
    if kind not in _KINDS:
        raise ValueError(f"no bundled data of kind {kind!r}; expected one of {', '.join(_KINDS)}")
    package = Path(__file__).resolve().parent.parent
    in_wheel, root = package / kind, package.parent.parent
    # Beside `src/` counts only in a checkout of this project.
    is_checkout = package.parent.name == "src" and (root / "pyproject.toml").is_file()
    in_checkout = root / kind
    return in_checkout if is_checkout and _has_data(in_checkout) and not _has_data(in_wheel) else in_wheel


def _has_data(folder: Path) -> bool:
    return next(folder.glob("**/*.safetensors"), None) is not None


def bundled_profiles() -> dict[str, Path]:
    """Return the bundled profiles by name, sorted. A name is looked up here and never joined to a path."""
    found = {path.stem: path for path in bundled_dir("profiles").glob("*.safetensors")}
    return dict(sorted(found.items()))  # by name: of two paths, `a-b.safetensors` comes before `a.safetensors`


def names_of_model(model: str) -> list[str]:
    """Return the bundled profiles whose name is in a model's: `llava-1.5-7b` for `llava-hf/llava-1.5-7b-hf`.

    Args:
        model: folder or hub id. The profile's name must be there as whole words: `llava-1.5-7bit` is another model.
    """
    parts = re.split(r"[/\\]", model.lower())
    return [
        name
        for name in bundled_profiles()
        if any(re.search(rf"(^|[^a-z0-9.]){re.escape(name)}($|[^a-z0-9.])", part) for part in parts)
    ]
