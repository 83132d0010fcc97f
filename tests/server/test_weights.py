"""`POST /update_weights_from_disk`: other weights in a running server, or none at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipo import LLM, PipoConfig, PipoForCausalLM
from pipo.errors import CheckpointError, RequestError
from pipo.server.app import create_app
from pipo.server.settings import ServerSettings
from server_client import client_of, ok, post
from tiny_checkpoints import make_checkpoints

ASK = {
    "model": "pipo",
    "prompt": [65, 66, 67],
    "max_tokens": 8,
    "temperature": 0,
    "threshold": 0.5,
    "return_pairs": True,
}
UPDATE = "/update_weights_from_disk"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and another of the same model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    _, first = make_checkpoints(folder)
    model = PipoForCausalLM.from_pretrained(first)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "other")
    return first, folder / "other"


def written(llm: LLM, settings: ServerSettings, path: Path) -> tuple[Any, Any, Any]:
    client = client_of(create_app(llm, settings))
    before = ok(post(client, ASK, "/v1/completions"))["choices"][0]
    answer = post(client, {"model_path": str(path)}, UPDATE)
    return before, answer, ok(post(client, ASK, "/v1/completions"))["choices"][0]


def test_an_update_changes_what_is_written_and_forgets_kept_prefixes(folders: tuple[Path, Path]) -> None:
    """A prefix of the old weights that is gone on from would show: the same prompt is asked before and after."""
    llm = LLM(folders[0], device="cpu", prefix_cache_bytes=2**22)
    pointers = [parameter.data_ptr() for parameter in llm.model.parameters()]
    before, answer, after = written(llm, ServerSettings(allow_weight_updates=True), folders[1])
    assert ok(answer)["success"] is True
    (expected,) = LLM(folders[1], device="cpu").generate({"prompt_token_ids": ASK["prompt"]}, llm_params())
    assert [pair["token1_id"] for pair in after["pairs"]] == [pair.token1 for pair in expected.pairs or []]
    assert [pair["logprob1"] for pair in after["pairs"]] == pytest.approx([p.logprob1 for p in expected.pairs or []])
    assert before["pairs"] != after["pairs"]
    assert pointers == [parameter.data_ptr() for parameter in llm.model.parameters()]


def llm_params() -> Any:
    from pipo import SamplingParams

    return SamplingParams(max_tokens=8, temperature=0, threshold=0.5, record_pairs=True)


def test_pairs_bring_ids_and_log_probabilities(folders: tuple[Path, Path]) -> None:
    """They are what distillation reads: a draft's id, and the probability with which it was drawn."""
    llm = LLM(folders[0], device="cpu")
    ask = {**ASK, "temperature": 1.0, "top_k": 5, "seed": 3, "max_pairs": 6, "max_tokens": 100}
    pairs = ok(post(client_of(create_app(llm, ServerSettings())), ask, "/v1/completions"))["choices"][0]["pairs"]
    params = vars(llm_params()) | {"temperature": 1.0, "top_k": 5, "seed": 3, "max_pairs": 6, "max_tokens": 100}
    (expected,) = llm.generate({"prompt_token_ids": ASK["prompt"]}, type(llm_params())(**params))
    assert len(pairs) == 6
    for pair, record in zip(pairs[:-1], expected.pairs or [], strict=False):
        assert (pair["token1_id"], pair["draft_id"]) == (record.token1, record.draft)
        for name in ("logprob1", "logprob2", "drawn_logprob1", "drawn_logprob2"):
            assert pair[name] == pytest.approx(getattr(record, name), abs=1e-5)
    assert any(pair["draft_id"] is not None and not pair["committed"] for pair in pairs)


def test_without_the_flag_there_is_no_such_path(folders: tuple[Path, Path]) -> None:
    before, answer, after = written(LLM(folders[0], device="cpu"), ServerSettings(), folders[1])
    assert answer.status_code == 404
    assert before["text"] == after["text"]


def test_the_key_is_needed(folders: tuple[Path, Path]) -> None:
    settings = ServerSettings(allow_weight_updates=True, api_key="sk-test")
    client = client_of(create_app(LLM(folders[0], device="cpu"), settings))
    assert post(client, {"model_path": str(folders[1])}, UPDATE).status_code == 401


def test_another_model_or_no_folder_changes_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    small = PipoForCausalLM.from_pretrained(folders[0])
    text_config = type(small.config.text_config)(
        **{**small.config.text_config.to_dict(), "num_hidden_layers": 1, "layer_types": None}
    )
    PipoForCausalLM(PipoConfig(text_config)).save_pretrained(tmp_path / "small")
    llm = LLM(folders[0], device="cpu")
    for path, named in ((tmp_path / "small", "of another model"), (tmp_path / "nothing", "no folder")):
        before, answer, after = written(llm, ServerSettings(allow_weight_updates=True), path)
        assert answer.status_code == 400
        assert named in answer.json()["error"]["message"]
        assert before["text"] == after["text"]


def test_samples_that_run_keep_their_model(folders: tuple[Path, Path]) -> None:
    llm = LLM(folders[0], device="cpu")
    stream = llm.stream({"prompt_token_ids": [1, 2, 3]}, llm_params())
    next(stream)
    with pytest.raises(RequestError, match="1 samples wait or run"):
        llm.load_weights(folders[1])
    stream.close()
    llm.load_weights(folders[1])
    with pytest.raises(CheckpointError):
        llm.load_weights(folders[0] / "config.json")
