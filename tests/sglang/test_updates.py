"""New weights for a running server, and its own threshold."""

import json

import pytest
import requests
from safetensors.torch import load_file, save_file

from checkpoints import expected, prompt, save_pipo
from servers import serving

SERVERS_THRESHOLD = 0.5
PROMPTS = [prompt(7, seed=2), prompt(40, seed=3)]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A server with a threshold of its own, its folder, and the model that it serves."""
    folder = tmp_path_factory.mktemp("updates")
    model = save_pipo(folder / "old", "qwen3")
    with serving(folder / "old", json_model_override_args=json.dumps({"threshold": SERVERS_THRESHOLD})) as server:
        yield server, folder, model


def written(server):
    """Greedy, at the server's threshold."""
    return [reply.token_ids for reply in server.greedy(PROMPTS, 16)]


def wanted(model):
    return [expected(model, ids, 16, SERVERS_THRESHOLD) for ids in PROMPTS]


def update(server, folder):
    answer = requests.post(
        f"{server.url}/update_weights_from_disk", json={"model_path": str(folder)}, timeout=240
    ).json()
    return answer["success"], answer["message"]


def test_the_server_s_threshold_is_that_of_requests_that_name_none(running):
    server, _, model = running
    assert wanted(model) != [expected(model, ids, 16, 0.95) for ids in PROMPTS], "this would prove nothing"
    assert written(server) == wanted(model)


def test_a_checkpoint_that_does_not_fit_is_turned_down_and_the_server_goes_on(running):
    """SGLang itself overwrites the old weights first, and ends when the new ones can't be read to their end."""
    server, folder, model = running
    save_pipo(folder / "torn", "qwen3")
    tensors = load_file(folder / "torn" / "model.safetensors")
    gone = tensors.pop("mtp.fc.weight")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:8].clone()
    save_file(tensors | {"mtp.fc2.weight": gone}, folder / "torn" / "model.safetensors", metadata={"format": "pt"})
    success, message = update(server, folder / "torn")
    assert not success
    for part in (
        "missing: mtp.fc.weight",
        "unexpected: mtp.fc2.weight",
        "misshapen: model.layers.0.mlp.up_proj.weight",
    ):
        assert part in message
    assert written(server) == wanted(model)


def test_a_checkpoint_of_another_kind_is_turned_down(running):
    """Its gate is calibrated otherwise: with the server's settings, its thresholds would mean something else."""
    server, folder, model = running
    save_pipo(folder / "other", "qwen3")
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps(config | {"confidence_scale": 2.0}))
    success, message = update(server, folder / "other")
    assert not success
    assert "confidence_scale is 2.0, not 1.0" in message
    assert written(server) == wanted(model)


def test_new_weights_are_used_and_nothing_of_the_old_is_left_in_the_cache(running):
    server, folder, model = running
    written(server)
    new = save_pipo(folder / "new", "qwen3", seed=1)
    assert wanted(new) != wanted(model)
    assert update(server, folder / "new")[0]
    assert written(server) == wanted(new)
