"""`pipo fetch`: models and datasets, ahead of time, for machines without network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipo.cli.terminal import console, print_json, working
from pipo.errors import CheckpointError, ConfigError, DataError

DATASETS = "datasets/"


def fetch(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAMES...",
            help="Models (owner/name), datasets (datasets/owner/name), dapo-math or codeforces; @REVISION may follow.",
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            help="Folder to put each into, under its name, to be used by its path.",
            show_default="Hugging Face's cache, to be used by the same name",
            metavar="FOLDER",
        ),
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Of datasets, without --to.", metavar="NAME")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print where each lies as JSON.")] = False,
) -> None:
    """Bring models and datasets to this machine, so that later commands need no network.

    The files of a model are those that are ever read: safetensors, JSON and tokenizers.
    """
    places = []
    for name in names:
        with working(f"Fetching {name}"):
            places.append(_fetch(name, to, subset))
    if as_json:
        print_json(places)
        return
    for place in places:
        console(stderr=False).print(f"{place['kind']} {place['name']}: {place['path']}", markup=False)


def _fetch(name: str, to: Path | None, subset: str | None) -> dict[str, Any]:
    from pipo.data.sources import SOURCES

    name, _, revision = name.partition("@")
    named = SOURCES.get(name)
    if named is not None and named.hub_id is not None:
        name, subset = f"{DATASETS}{named.hub_id}", subset or named.subset
    repository = name.removeprefix(DATASETS)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ConfigError(f"{name!r} is no name on the hub: models are owner/name, datasets are datasets/owner/name")
    is_dataset = name.startswith(DATASETS)
    path = (_fetch_dataset if is_dataset else _fetch_model)(repository, revision or None, to, subset)
    return {
        "name": repository,
        "kind": "dataset" if is_dataset else "model",
        "revision": revision or None,
        "path": path,
    }


def _fetch_model(name: str, revision: str | None, to: Path | None, _: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from pipo.model.files import PATTERNS

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            local_dir=None if to is None else to / name,
            allow_patterns=PATTERNS,
            ignore_patterns="*/*",
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"the model {name} can't be had from the hub: {error}") from error
    return Path(folder)


def _fetch_dataset(name: str, revision: str | None, to: Path | None, subset: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        import datasets
    except ImportError as error:
        raise ConfigError("datasets need more packages: pip install 'pipo-llm[train]'") from error
    try:
        if to is not None:
            options: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "local_dir": to / name}
            return Path(huggingface_hub.snapshot_download(name, **options))
        loaded = datasets.load_dataset(name, subset, revision=revision)
        files = [file for part in loaded.values() for file in part.cache_files]
        return Path(files[0]["filename"]).parent if files else Path(datasets.config.HF_DATASETS_CACHE)
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OSError,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise DataError(f"the dataset {name} can't be had from the hub: {error}") from error
