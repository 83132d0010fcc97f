"""`pipo draft-vocab`: from conversations to a file that the engine uses; what it says when it can't."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipo.data.written_tokens import coverage, most_frequent
from pipo.model.draft_vocab import DRAFT_VOCAB, read_draft_ids

EOS = 258
"""`<|im_end|>` of the tokenizer of bytes."""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Forty conversations whose assistant writes few letters; their users write others."""
    path = tmp_path / "rows.jsonl"
    texts = ["abab" + "ba" * (i % 3) + "c" * (i % 2) for i in range(40)]
    chats = [[{"role": "user", "content": "XYZ"}, {"role": "assistant", "content": text}] for text in texts]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


@pytest.fixture
def folder(pipo_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipo_folder, tmp_path / "pipo"))


def ids_of(text: str) -> set[int]:
    from byte_tokenizer import byte_tokenizer

    return set(byte_tokenizer()(text, add_special_tokens=False)["input_ids"])


def test_what_is_written_may_be_drafted(run: Any, folder: Path, rows: Path) -> None:
    """Breaks when prompts are counted, ends of texts are left out, or the file is not what the engine reads."""
    result = run("draft-vocab", folder, "--data", rows, "--size", 4, "--drafts", 64)
    assert result.exit_code == 0, result.output
    assert "100.00%" in result.stdout
    assert "mean error" in result.stdout
    found = read_draft_ids(folder / DRAFT_VOCAB)
    assert set(found.ids) == ids_of("abc") | {EOS}
    assert len(found.elsewhere or ()) == 33
    assert found.about["num_rows"] == 40
    generate = ("generate", folder, "--prompt", "a", "--threshold", "0", "--max-tokens", "12", "--seed", "1", "--json")
    limited, full = run(*generate), run(*generate, "--draft-vocab", "off")
    assert limited.exit_code == full.exit_code == 0, limited.output
    assert limited.stdout != full.stdout
    assert run(*generate, "--draft-vocab", folder / DRAFT_VOCAB).stdout.count('"') == limited.stdout.count('"')


def test_the_row_says_what_lies_outside(run: Any, folder: Path, rows: Path) -> None:
    """Breaks when the row is fitted to something else than the second head's mass outside, which is spread in a random model."""
    report = json.loads(run("draft-vocab", folder, "--data", rows, "--size", 200, "--drafts", 64, "--json").stdout)
    found = report["elsewhere"]
    assert 0.1 < found["mass"] < 0.4
    assert abs(found["estimated"] - found["mass"]) < 0.05
    assert found["error"] < 0.1
    assert report["coverage"]["200"] == 1.0


def test_a_base_checkpoint_gets_ids_alone(run: Any, base_folder: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "ids.json"
    assert run("draft-vocab", base_folder, "--data", rows, "--size", 5, "--out", out).exit_code == 0
    found = read_draft_ids(out)
    assert (len(found.ids), found.elsewhere) == (5, None)
    options = ("--method", "speculative", "--prompt", "a", "--max-tokens", "8", "--temperature", "0", "--json")
    texts = [json.loads(run("generate", base_folder, *options, "--draft-vocab", v).stdout) for v in (out, "off", "5")]
    assert len({text[0]["text"] for text in texts}) == 1


def test_the_most_frequent_then_the_lowest() -> None:
    """Breaks when ids that never occurred push out ones that did, or ids that end texts are missing."""
    counts = np.array([0, 3, 0, 9, 1, 0, 2])
    assert most_frequent(counts, 3, [5]) == (1, 3, 5)
    assert most_frequent(counts, 6, []) == (0, 1, 2, 3, 4, 6)
    assert coverage(counts, (1, 3, 5)) == 12 / 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "259"), "--size is from 1"),
        ((), "--size is from 1"),
        (("--size", "4", "--out", "/nowhere/at/all.json"), "no folder"),
        (("--size", "4", "--data", "nothing.jsonl"), "nothing.jsonl"),
    ],
)
def test_what_can_not_be_is_told(run: Any, folder: Path, rows: Path, options: tuple[str, ...], message: str) -> None:
    result = run("draft-vocab", folder, "--data", rows, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (folder / DRAFT_VOCAB).exists()


def test_too_few_rows_are_told(run: Any, folder: Path, rows: Path) -> None:
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:3]))
    result = run("draft-vocab", folder, "--data", rows, "--size", 4)
    assert result.exit_code == 2
    assert "too few" in result.stderr
