"""The authors' layout, and their own outputs: the golden checkpoints write what their reference code recorded for them."""

import json
import shutil
from pathlib import Path

import pytest

from servers import KEEPING_STATES, serving

GOLDEN = Path(__file__).parent.parent / "golden"
TRACES = json.loads((GOLDEN / "traces.json").read_text())
MARGIN = 2e-3
"""Below it, float32 noise may decide: see the golden checkpoints' README."""


@pytest.mark.parametrize("name", sorted(TRACES))
def test_golden_checkpoints_write_what_was_recorded(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):  # SGLang reads every safetensors file of a folder
        shutil.copy(GOLDEN / name / file, folder)
    traces = [trace for trace in TRACES[name] if trace["margin"] > MARGIN]
    assert len(traces) > len(TRACES[name]) // 2
    with serving(folder, **KEEPING_STATES, skip_tokenizer_init=True) as server:
        for count in {len(trace["token_ids"]) for trace in traces}:
            group = [trace for trace in traces if len(trace["token_ids"]) == count]
            replies = server.greedy([t["prompt"] for t in group], count, [t["threshold"] for t in group])
            assert [r.token_ids for r in replies] == [t["token_ids"] for t in group]
