"""The settings that a file of rollouts was made with, in `FILE.meta.json`: no file mixes two. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pipo.errors import ConfigError, DataError

META_SUFFIX = ".meta.json"


def meta_path(path: str | Path) -> Path:
    """Where the settings of a file of rollouts are kept: beside the file itself, where `path` is a link."""
    return Path(f"{Path(path).expanduser().resolve()}{META_SUFFIX}")


def read_meta(path: str | Path) -> dict[str, Any] | None:
    """The settings that a file of rollouts was made with; `None` where it has none, as the files of others.

    Raises:
        DataError: they can't be read.
    """
    try:
        meta = json.loads(meta_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{meta_path(path)} can't be read: {error}") from error
    if not isinstance(meta, dict):
        raise DataError(f"{meta_path(path)} should hold a JSON object")
    return meta


def match_settings(path: Path, settings: dict[str, Any]) -> None:
    """Keep the settings beside a new file, or compare them with those that an old one was made with.

    Raises:
        ConfigError: they differ in more than that there are more questions.
    """
    settings = json.loads(json.dumps(settings))
    before = read_meta(path)
    if before is None:
        if path.stat().st_size:
            raise ConfigError(f"{path} holds rows, but {meta_path(path).name} is missing: choose another file to write")
        _write_meta(path, settings)
        return
    settings, grown = _with_more_questions(before, settings)
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed:
        told = "; ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in sorted(changed))
        raise ConfigError(f"{path} was made with other settings: {told}. Choose another file, or the same settings")
    if grown is not None:
        _write_meta(path, {**before, "num_questions": grown})


def _with_more_questions(before: dict[str, Any], settings: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """`settings` with as many questions as `before`, and how many it shall be where that is more: a file may be gone on with."""
    was, now = before.get("num_questions"), settings.get("num_questions")
    if not isinstance(was, int) or not isinstance(now, int):
        return settings, None
    return {**settings, "num_questions": was}, now if now > was else None


def _write_meta(path: Path, settings: dict[str, Any]) -> None:
    partial = meta_path(path).with_suffix(".partial")
    partial.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, meta_path(path))
