"""`pipo generate`: text for people, JSON for machines."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest

from pipo.cli.options import SAMPLING_OPTIONS
from pipo.engine.request import SamplingParams

GREEDY = ("--temperature", "0", "--max-tokens", "7", "--ignore-eos")


def test_every_sampling_parameter_is_an_option(run):
    own = {"n", "logprobs", "record_pairs"}
    assert {option.name for option in SAMPLING_OPTIONS} | own == {field.name for field in fields(SamplingParams)}
    for option in SAMPLING_OPTIONS:
        assert option.default == getattr(SamplingParams(), option.name)


def test_structured_output_from_a_file(run, pipo_folder, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "boolean"}')
    result = run("generate", pipo_folder, "--prompt", "ab", "--json-schema", f"@{schema}", "--seed", "1")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) in (True, False)
    missing = run("generate", pipo_folder, "--prompt", "ab", "--json-schema", "@/nowhere.json")
    assert missing.exit_code == 2
    assert "nowhere" in missing.stderr


def test_json_is_a_row_a_sample(run, pipo_folder):
    result = run("generate", pipo_folder, "--prompt", "ab", "--prompt", "c", "--n", "2", *GREEDY, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(len(row["prompt_token_ids"]), row["index"]) for row in rows] == [(2, 0), (2, 1), (1, 0), (1, 1)]
    for row in rows:
        assert row["num_tokens"] == len(row["token_ids"]) == 7
        assert row["finish_reason"] == "length"
        assert row["tokens_per_step"] == pytest.approx(7 / row["num_pairs"])
        assert {"text", "num_pairs", "num_committed", "num_rejected", "ttft_s", "tpot_s", "commit_rate"} <= set(row)
        assert row["pairs"] is None


def test_it_is_what_the_engine_gives(run, pipo_folder):
    from pipo.engine.llm import LLM

    params = SamplingParams(
        temperature=0, max_tokens=7, ignore_eos=True, threshold=0, logit_bias={65: 3.5}, logprobs=1, record_pairs=True
    )
    expected = LLM(pipo_folder).generate(["ab"], params)[0]
    options = ["--threshold", "0", "--logit-bias", "65=3.5", "--logprobs", "1", "--record-pairs"]
    row = json.loads(run("generate", pipo_folder, "--prompt", "ab", *GREEDY, *options, "--json").stdout)[0]
    assert row["token_ids"] == expected.token_ids
    assert row["text"] == expected.text
    assert [pair["draft"] for pair in row["pairs"]] == [pair.draft for pair in expected.pairs]
    assert row["logprobs"][0]["logprob"] == pytest.approx(expected.logprobs[0].logprob)


def test_one_prompt_is_streamed_as_text(run, pipo_folder):
    row = json.loads(run("generate", pipo_folder, "--prompt", "ab", *GREEDY, "--json").stdout)[0]
    result = run("generate", pipo_folder, "--prompt", "-", *GREEDY, input="ab")
    assert result.stdout == row["text"] + "\n"
    assert "7 tokens in" in result.stderr


def test_many_samples_are_told_apart(run, pipo_folder):
    result = run("generate", pipo_folder, "--prompt", "ab", "--n", "2", *GREEDY)
    assert "prompt 1, sample 2" in result.stderr
    assert result.stderr.count("7 tokens in") == 2


def test_chat_goes_through_the_template(run, pipo_folder):
    row = json.loads(run("generate", pipo_folder, "--chat", "--prompt", "ab", *GREEDY, "--json").stdout)[0]
    assert row["prompt_token_ids"].count(257) == 2


@pytest.mark.parametrize("method", ["regular", "mtp", "speculative"])
def test_other_methods_run_a_base_model(run, base_folder, pipo_folder, method):
    options = ("--prompt", "ab", *GREEDY, "--json", "--method", method)
    assert len(json.loads(run("generate", base_folder, *options).stdout)[0]["token_ids"]) == 7
    refused = run("generate", pipo_folder, *options)
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["/no/such/folder", "--prompt", "x"],
        ["PIPO", "--prompt", "x" * 1000],
        ["PIPO", "--prompt", "x", "--stop-token-id", "9999"],
        ["PIPO", "--prompt", ""],
        ["BASE", "--prompt", "x"],
    ],
    ids=["no-checkpoint", "too-long", "unknown-token", "empty", "not-pipo"],
)
def test_refused_with_one_line(run, pipo_folder, base_folder, arguments):
    folders = {"PIPO": pipo_folder, "BASE": base_folder}
    result = run("generate", *(folders.get(argument, argument) for argument in arguments), "--json")
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1


def test_in_a_process_of_its_own_stdout_is_pure_json(pipo_folder):
    command = [sys.executable, "-m", "pipo", "generate", str(pipo_folder), "--prompt", "ab", *GREEDY, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(json.loads(result.stdout)) == 1


@pytest.mark.parametrize("options", [(), ("--json",), ("--n", "2")], ids=["stream", "json", "many"])
def test_a_sample_that_fails_is_reported(run, broken, options):
    folder = broken(lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    result = run("generate", folder, "--prompt", "ab", *GREEDY, *options)
    assert result.exit_code == 1
    assert "samples ended with an error" in result.stderr
    if "--json" in options:
        assert json.loads(result.stdout)[0]["finish_reason"] == "error"
