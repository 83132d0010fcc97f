"""Hub ids: what is loaded from the cache without a network, and what is uploaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from families import pipo_model
from pipo import LLM, BaseForCausalLM, PipoForCausalLM, SamplingParams
from pipo.errors import CheckpointError, PipoError
from pipo.model import files

Checkpoints = Callable[..., Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Put folders into a hub cache as repositories; the options that load from it without a network."""

    def put(repo: str, source: Path, subfolder: str = ".") -> dict[str, Any]:
        root = tmp_path / "hub" / ("models--" + repo.replace("/", "--"))
        shutil.copytree(source, root / "snapshots" / COMMIT / subfolder, dirs_exist_ok=True)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(COMMIT)
        return {"cache_dir": tmp_path / "hub", "local_files_only": True}

    return put


def test_a_cached_repository_opens_without_a_network(cache: Any, checkpoints: Checkpoints) -> None:
    """Also by its subfolders, as the authors' release keeps its adapters."""
    options = cache("owner/pipo", checkpoints("nested", "qwen3_5"))
    cache("owner/pipo", checkpoints("pipo", "qwen3"), "small")
    cache("owner/base", checkpoints("base", "qwen3_5"))
    expected = pipo_model("qwen3_5").state_dict()
    model = PipoForCausalLM.from_pretrained("owner/pipo", **options)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    small = PipoForCausalLM.from_pretrained("owner/pipo", subfolder="small", revision=COMMIT, **options)
    assert small.config.text_config.model_type == "qwen3"
    assert PipoForCausalLM.from_base("owner/base", **options).config.text_config.model_type == "qwen3_5_text"
    assert BaseForCausalLM.from_pretrained("owner/base", **options).mtp is not None


def test_the_default_cache(cache: Any, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes an id as well."""
    options = cache("owner/pipo", checkpoints("pipo", "qwen3"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(options["cache_dir"]))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    output = LLM("owner/pipo").generate({"prompt_token_ids": [5, 6]}, SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(output[0].token_ids) == 3


def test_an_adapter_and_its_base_come_from_the_same_cache(cache: Any, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Breaks when the options that found the adapter are forgotten for its base model."""
    adapter, base = tmp_path / "adapter", checkpoints("base", "qwen3")
    adapter.mkdir()
    start = PipoForCausalLM.from_base(base, compressor="linear")
    whole = {
        f"base_model.model.{name}": value
        for name, value in start.state_dict().items()
        if name.startswith(("compressor.", "confidence_head."))
    }
    files.save_file(whole, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    cache("owner/base", base)
    options = cache("owner/release", adapter, "opd-4b")
    model = PipoForCausalLM.from_pretrained("owner/release", subfolder="opd-4b", **options)
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["owner/absent", "absent"])
def test_a_repository_that_can_not_be_had(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is no folder here, and can't be had from the hub"):
        PipoForCausalLM.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("name", ["a/b/c", "no such!", "/no/such/folder", "./nothing", "x.safetensors/.."])
def test_what_is_neither_folder_nor_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        PipoError, match=r"is (not a folder with a checkpoint|neither a folder nor a hub repository id)"
    ):
        PipoForCausalLM.from_pretrained(name, local_files_only=True)


def test_a_subfolder_that_is_not_there(cache: Any, checkpoints: Checkpoints) -> None:
    folder = checkpoints("pipo", "qwen3")
    options = cache("owner/pipo", folder)
    for where, more in ((folder, {}), ("owner/pipo", options)):
        with pytest.raises(CheckpointError, match="has no subfolder 'lost'"):
            PipoForCausalLM.from_pretrained(where, subfolder="lost", **more)


@pytest.mark.parametrize(("subfolder", "expected"), [(None, {"config.json"}), ("a", {"a/config.json"})])
def test_only_the_checkpoint_asked_for_is_downloaded(
    subfolder: str | None, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when all the adapters of a release, or pickles and other formats, come down with one."""
    held = ["config.json", "evil.py", "model.bin", "a/config.json", "a/b/config.json", "onnx/model.safetensors"]
    wanted: set[str] = set()

    def download(repo: str, *, allow_patterns: list[str], ignore_patterns: str) -> str:
        kept = huggingface_hub.utils.filter_repo_objects(
            held, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        wanted.update(kept)
        (tmp_path / "a").mkdir()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files.find_checkpoint("owner/name", subfolder)
    assert wanted == expected


class FakeHub:
    """What `HfApi` is asked for; the files of the upload."""

    def __init__(self, has_card: bool) -> None:
        self.has_card = has_card
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.uploaded: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create_repo", options))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", options))

    def file_exists(self, repo_id: str, filename: str, **options: Any) -> bool:
        return self.has_card

    def upload_folder(self, *, folder_path: Path, ignore_patterns: list[str] | None, **options: Any) -> Any:
        self.calls.append(("upload_folder", options))
        self.uploaded = {p.name: p.read_bytes() for p in folder_path.iterdir() if p.name not in (ignore_patterns or [])}
        return SimpleNamespace(pr_url=None, commit_url="https://hub/commit")


@pytest.mark.parametrize("has_card", [False, True])
def test_a_push_uploads_a_checkpoint_and_keeps_a_card(
    has_card: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when the card is transformers' empty form, or shards of an older upload stay beside the new weights."""
    hub = FakeHub(has_card)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: hub)
    model = pipo_model("qwen3")
    assert model.push_to_hub("mine", private=True, revision="next", max_shard_size="5GB") == "https://hub/commit"
    assert [name for name, _ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[0][1]["private"] is True
    assert (hub.calls[2][1]["repo_id"], hub.calls[2][1]["revision"]) == ("me/mine", "next")
    assert "model*.safetensors" in hub.calls[2][1]["delete_patterns"]
    assert set(hub.uploaded) == {"config.json", "model.safetensors"} | (set() if has_card else {"README.md"})
    if not has_card:
        assert b'LLM("me/mine")' in hub.uploaded["README.md"]
    for name, content in hub.uploaded.items():
        (tmp_path / name).write_bytes(content)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    PipoForCausalLM.from_pretrained(tmp_path)
