"""Tiny random checkpoints with a tokenizer of bytes, made once a session."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from byte_tokenizer import byte_config, save_tokenizer
from pipo.cli.main import app


@pytest.fixture(scope="session")
def run():
    """A function that runs `pipo` with the given arguments in this process."""
    return lambda *arguments, **settings: CliRunner().invoke(app, [str(argument) for argument in arguments], **settings)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden checkpoints, which are in the authors' layout."""
    return Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """A regular Qwen3 checkpoint with an MTP block."""
    import torch

    from pipo.model.base import BaseForCausalLM

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("checkpoints") / "base"
    folder.mkdir()
    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = byte_config(vocab_size=size, max_position_embeddings=128)
    BaseForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipo_folder(base_folder) -> Path:
    """A PIPO checkpoint made from the base."""
    from pipo.model.files import copy_tokenizer
    from pipo.model.modeling import PipoForCausalLM

    folder = base_folder.parent / "pipo"
    PipoForCausalLM.from_base(base_folder).save_pretrained(folder)
    copy_tokenizer(base_folder, folder)
    return folder


@pytest.fixture
def broken(pipo_folder, tmp_path):
    """A function that copies the PIPO checkpoint with its tensors changed by another."""
    from safetensors.torch import load_file, save_file

    def make(change) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(pipo_folder, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make
