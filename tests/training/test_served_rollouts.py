"""Rollouts by `pipo serve` over a real socket: the same as by the engine on the same weights, before and after an update."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_runs import serving
from pipo import PipoForCausalLM
from pipo.errors import EndpointError
from pipo.training.endpoint import Endpoint
from pipo.training.rollout import EngineRollouts, Rollout, ServedRollouts, rollout_seed, slots_of_rollout
from rollout_cases import PROMPTS, make_student, settings

SEEDS = [rollout_seed(0, 0, index) for index in range(len(PROMPTS))]
KEY = "sk-test"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of one model."""
    root = tmp_path_factory.mktemp("students")
    for seed in (0, 1):
        make_student(seed).save_pretrained(root / str(seed))
    return [root / "0", root / "1"]


@pytest.fixture(scope="module")
def url(folders: list[Path]) -> Iterator[str]:
    """A server of the first one, in a thread."""
    with serving(folders[0], api_key=KEY) as found:
        yield found


def alike(found: list[Rollout], expected: list[Rollout]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert slots_of_rollout(one, 256) == slots_of_rollout(other, 256)
        assert (one.finish_reason, one.threshold) == (other.finish_reason, other.threshold)
        own = [(p.logprob1, p.drawn_logprob1) for p in one.pairs]
        assert own == [pytest.approx((p.logprob1, p.drawn_logprob1), abs=1e-4) for p in other.pairs]


def test_a_server_writes_what_the_engine_would_and_follows_new_weights(url: str, folders: list[Path]) -> None:
    """Ids, rejected drafts, thresholds, limits and log-probabilities all cross the wire; then the weights do."""
    how = settings(max_slots=20, threshold=(0.3, 0.7), always_share=0.2)
    served = ServedRollouts(Endpoint(url, KEY), how)
    first = [
        EngineRollouts(PipoForCausalLM.from_pretrained(folder), how).roll_out(PROMPTS, SEEDS) for folder in folders
    ]
    assert any(any(rollout.rejected) for rollout in first[0])
    alike(served.roll_out(PROMPTS, SEEDS), first[0])
    served.update_weights(folders[1])
    alike(served.roll_out(PROMPTS, SEEDS), first[1])
    served.update_weights(folders[0])
    alike(served.roll_out(PROMPTS, SEEDS), first[0])


def test_a_server_that_refuses_says_why(url: str, tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="401"):
        ServedRollouts(Endpoint(url, "wrong"), settings())
    served = ServedRollouts(Endpoint(url, KEY), settings())
    with pytest.raises(EndpointError, match="update_weights_from_disk does not answer as it should: 400"):
        served.update_weights(tmp_path)
    with pytest.raises(EndpointError, match="outside the vocabulary"):
        served.roll_out([[100000]], [0])
