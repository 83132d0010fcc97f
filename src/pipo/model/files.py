"""Checkpoint folders: finding them, reading safetensors strictly, writing them whole.

Only safetensors and JSON are read: never a pickle, never remote code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipo.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
PARTIAL = ".partial"
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    GENERATION_CONFIG,
)
HUB_OPTIONS = {"revision", "token", "cache_dir", "local_files_only", "force_download"}


def find_checkpoint(path_or_id: str | Path, subfolder: str | None = None, **hub: Any) -> Path:
    """The local folder of a checkpoint: a folder as it is, or a hub repository, downloaded or from the cache.

    Raises:
        CheckpointError: neither a folder nor a repository that can be had.
    """
    path = Path(path_or_id)
    if path.is_dir():
        folder = path / subfolder if subfolder else path
        if not folder.is_dir():
            raise CheckpointError(f"{path} has no subfolder {subfolder!r}")
        return folder
    if path.exists() or path.is_absolute() or str(path_or_id).startswith("."):
        raise CheckpointError(f"{path_or_id} is not a folder with a checkpoint")
    # A pattern's * also matches slashes: other folders of the repository are left out by name.
    inside = f"{subfolder}/" if subfolder else ""
    wanted, others = [inside + pattern for pattern in PATTERNS], f"{inside}*/*"
    try:
        root = huggingface_hub.snapshot_download(str(path_or_id), allow_patterns=wanted, ignore_patterns=others, **hub)
    except HFValidationError as error:
        raise CheckpointError(f"{path_or_id} is neither a folder nor a hub repository id (owner/name)") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{path_or_id} is no folder here, and can't be had from the hub: {error}") from error
    return find_checkpoint(root, subfolder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, unreadable or not an object; never taken for an empty one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, but holds a {type(content).__name__}")
    return content


class WeightFiles:
    """The tensors of a checkpoint by name, read on demand from one safetensors file or a sharded set.

    Raises:
        CheckpointError: no safetensors, a shard that is missing or corrupt, or an index that disagrees with its shards.
    """

    def __init__(self, folder: Path, weights: str = WEIGHTS) -> None:
        self.folder = folder
        index = folder / f"{weights}.index.json"
        if (folder / weights).is_file():
            self._file_of = dict.fromkeys(self._keys(folder / weights), folder / weights)
        elif index.is_file():
            self._file_of = self._read_index(index)
        else:
            others = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".safetensors"})
            hint = f"; it has {', '.join(others)}" if others else ""
            raise CheckpointError(f"{folder} has neither {weights} nor {index.name}{hint}. Only safetensors are read.")

    def _read_index(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        if escaping := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{index} names shards outside its folder: {', '.join(escaping)}")
        held = {name: set(self._keys(self.folder / name)) for name in names}
        lost = [key for key, name in weight_map.items() if key not in held[name]]
        extra = [key for name in names for key in sorted(held[name]) if weight_map.get(key) != name]
        if lost or extra:
            raise CheckpointError(
                f"{index} disagrees with its shards: {_some('not in its shard', lost)}{_some('not in the index', extra)}"
            )
        return {key: self.folder / name for key, name in weight_map.items()}

    @staticmethod
    def _keys(path: Path) -> list[str]:
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} can't be read as safetensors: {error}") from error

    @property
    def paths(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted(set(self._file_of.values()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, key: object) -> bool:
        return key in self._file_of

    def __len__(self) -> int:
        return len(self._file_of)

    def read(self, keys: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """`(name, tensor)` of the given names (all by default), file by file."""
        wanted = list(self._file_of) if keys is None else list(keys)
        for path in sorted({self._file_of[key] for key in wanted}):
            try:
                with safe_open(path, framework="pt") as file:
                    for key in (k for k in wanted if self._file_of[k] == path):
                        yield key, file.get_tensor(key)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} can't be read as safetensors: {error}") from error


def _some(what: str, keys: list[str], limit: int = 8) -> str:
    """`what: a, b, … (n in all); ` or nothing."""
    if not keys:
        return ""
    shown = ", ".join(sorted(keys)[:limit])
    return f"{what}: {shown}{f', … ({len(keys)} in all)' if len(keys) > limit else ''}; "


def key_error(where: object, **problems: list[str]) -> CheckpointError:
    """One error that names every kind of wrong key: `key_error(folder, missing=[…], unexpected=[…])`."""
    text = "".join(_some(kind.replace("_", " "), keys) for kind, keys in problems.items())
    return CheckpointError(f"{where} does not hold what its config says: {text.rstrip('; ')}")


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    max_shard_size: int | str = "5GB",
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write `config.json` and the tensors, as one safetensors file or as shards with an index above `max_shard_size`.

    `texts`: other files of the checkpoint, name → content.

    All weights are written aside first, then renamed, and the config comes last: a full disk leaves the checkpoint that
    was here as it was, and a kill at any moment never leaves half a checkpoint that can be loaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = huggingface_hub.split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    config_text = _json_text(config)
    for left_over in folder.glob(f".*{PARTIAL}"):
        left_over.unlink()
    try:
        for name, keys in split.filename_to_tensors.items():
            part = {key: tensors[key].detach().contiguous().cpu() for key in keys}
            save_file(part, folder / f".{name}{PARTIAL}", metadata={"format": "pt"})
        for old in [folder / "config.json", folder / INDEX, *folder.glob("model*.safetensors")]:
            old.unlink(missing_ok=True)
        for name in split.filename_to_tensors:
            os.replace(folder / f".{name}{PARTIAL}", folder / name)
    finally:
        for left_over in folder.glob(f".*{PARTIAL}"):
            left_over.unlink()
    if split.is_sharded:
        write_text(folder / INDEX, _json_text({"metadata": split.metadata, "weight_map": split.tensor_to_filename}))
    for name, text in (texts or {}).items():
        write_text(folder / name, text)
    write_text(folder / "config.json", config_text)
    for name in split.filename_to_tensors:  # safetensors makes files that only their owner can read
        shutil.copymode(folder / "config.json", folder / name)


def _json_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder brings a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer, chat template and generation defaults of a checkpoint folder; the names copied."""
    copied = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, target / name)
    return copied
