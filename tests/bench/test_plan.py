"""Plans: arithmetic that can be done by hand, loads that do not fit, and predictions beside measurements."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from pipo.bench import machine as machines
from pipo.bench.against import compare, median_error, read_latency
from pipo.bench.cost import Machine, decode_cost
from pipo.bench.deployment import Deployment, Efficiency, StepTime
from pipo.bench.gpus import GPUS, find_gpu, gpu_machine
from pipo.bench.grid import Point, Results, Row, write_results
from pipo.bench.plan import Limits, Load, predict
from pipo.cli.main import app
from pipo.errors import ConfigError, DataError
from pipo.model.shapes import shape_config

PERFECT = Efficiency(bandwidth=1, compute=1, overhead_s=0, memory=1, link=1, exchange_s=0)
H200 = gpu_machine(GPUS["h200"], "bfloat16")


@pytest.fixture(scope="module")
def config():
    return shape_config("qwen3-0.6b")


def deployment(config, machine=H200, **settings):
    return Deployment(config, machine, **{"efficiency": PERFECT, **settings})


def test_a_perfect_machine_is_at_its_floor(config):
    """A plan that leaves out the shares, or counts a part twice, is not."""
    one = deployment(config)
    for method in ("regular", "speculative", "pipo"):
        step, num_tokens = one.decode(method, 16, 2048, 0.5)
        cost = decode_cost(config, method, 16, 2048, commit=0.5)
        assert step.seconds / num_tokens == pytest.approx(H200.token_floor_s(cost))


def test_shares_and_overheads(config):
    """Half the bandwidth doubles the time, and the overhead comes on top."""
    full, _ = deployment(config).decode("regular", 1, 1024, 0)
    half, _ = deployment(config, efficiency=Efficiency(0.5, 1, 0.25, 1)).decode("regular", 1, 1024, 0)
    assert half.seconds == pytest.approx(2 * full.seconds + 0.25)
    assert (full.limit, half.limit) == ("bandwidth", "overhead")
    assert StepTime(1, 2, 0, 0).limit == "compute"


def test_memory_by_hand(config):
    """Weights once, keys and values of 28 layers per token; PIPO's 29 layers per two tokens, and its larger weights."""
    one = deployment(config)
    weights, token = 2 * sum(one.sizes.held("regular")), 28 * 2 * 8 * 128 * 2
    assert one.cache_tokens("regular") == int((141e9 - weights) / token)
    assert one.max_requests("regular", 1000) == int((141e9 - weights) / token / 1000)
    pair = 29 * 2 * 8 * 128 * 2
    assert one.cache_tokens("pipo") == 2 * int((141e9 - 2 * sum(one.sizes.held("pipo"))) / pair)


def test_several_gpus_share_weights_and_exchange(config):
    """Four read four times as fast, but for what they send each other; eight key-value heads can't be split further than by eight."""
    alone, _ = deployment(config).decode("regular", 1, 1024, 0)
    four, _ = deployment(config, tp=4, link_bytes_per_s=1e30).decode("regular", 1, 1024, 0)
    assert four.read_s == pytest.approx(alone.read_s / 4)
    slow, _ = deployment(config, tp=4, link_bytes_per_s=1e9).decode("regular", 1, 1024, 0)
    assert slow.exchange_s == pytest.approx(2 * 28 * (1024 * 2 * 2 * 3 / 4) / 1e9)
    wide = deployment(config, tp=16, link_bytes_per_s=1e30)
    assert wide.position_bytes("regular") == deployment(config, tp=8, link_bytes_per_s=1e30).position_bytes("regular")


@pytest.mark.parametrize(("tp", "link", "named"), [(3, 1e9, "16 attention heads"), (2, 0.0, "links")])
def test_a_model_that_cannot_be_split(config, tp, link, named):
    with pytest.raises(ConfigError, match=named):
        deployment(config, tp=tp, link_bytes_per_s=link)


def test_the_largest_concurrency_within_limits(config):
    """The number found keeps the limit and one more breaks it; a limit that nobody keeps gives 0; none is beyond the memory."""
    one, load = deployment(config), Load(context=4096, prompt=512)
    for limit in (0.002, 0.0005):
        for found in predict(one, load, Limits(tpot_s=limit)):
            number = found.largest_concurrency
            times = [one.decode(found.method, count, 4096, 0.95) for count in (number, number + 1)]
            assert times[0][0].seconds / times[0][1] <= limit < times[1][0].seconds / times[1][1]
    assert [found.largest_concurrency for found in predict(one, load, Limits(tpot_s=1e-9))] == [0, 0, 0]
    ample = predict(one, load, Limits(ttft_s=1e9))
    assert all(found.largest_concurrency == found.max_requests > 0 for found in ample)


def test_throughput_with_and_without_prompts(config):
    """A request's life: its own steps, and the prompts of all that run beside it."""
    one = deployment(config)
    load = Load(context=2048, prompt=1024, concurrency=8, reply=100)
    for found in predict(one, load):
        assert found.tokens_per_s == pytest.approx(8 / found.tpot_s)
        prompts = 8 * one.prefill(found.method, 1, 1024, 0.95).seconds
        assert found.served_tokens_per_s == pytest.approx(800 / (100 * found.tpot_s + prompts))


def test_what_does_not_fit(config):
    """A method that does not fit says why and predicts nothing; a model that does not is an error that names the missing bytes."""
    long = predict(deployment(config), Load(context=60_000, prompt=10))
    assert [found.tpot_s is None for found in long] == [True, True, False]
    assert "positions" in long[0].reason
    crowd = predict(deployment(config), Load(context=4096, prompt=10, concurrency=400))
    assert [found.tpot_s is None for found in crowd] == [True, True, False]
    assert "400 are asked for" in crowd[0].reason
    assert crowd[2].against_regular is None
    small = Machine("small", 1e9, 1e9, 1e9)
    with pytest.raises(ConfigError, match=r"0\.2 GB more than the 100%"):
        predict(deployment(config, small), Load(context=10, prompt=10))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Load(context=0, prompt=1), "context"),
        (lambda: Load(context=1, prompt=1, commit=1.5), "commit"),
        (lambda: Limits(tpot_s=0), "tpot"),
        (lambda: Efficiency(bandwidth=1.2), "bandwidth"),
        (lambda: Efficiency(overhead_s=-1), "overhead_s"),
        (lambda: find_gpu("h300"), "h100, h200"),
        (lambda: gpu_machine(GPUS["a10g"], "fp8"), "but of bfloat16"),
    ],
)
def test_bad_values_are_named(make, named):
    with pytest.raises(ConfigError, match=named):
        make()


def test_the_table_of_gpus():
    """Plausible figures: a slip by a factor of ten, or a rate with sparsity, breaks these."""
    assert find_gpu("RTX 4090") is GPUS["rtx4090"]
    for gpu in GPUS.values():
        assert 100 < gpu.bf16_flops_per_s / gpu.bytes_per_s < 450
        assert gpu.fp8_flops_per_s is None or 1.9 < gpu.fp8_flops_per_s / gpu.bf16_flops_per_s < 2.1


# --- against measurements ------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path, config):
    """A machine that does what the model says, but for PIPO's steps, which take a quarter longer; its first measurement was disturbed."""
    machine = Machine("here", 30e9, 3e11, 16e9)
    one = deployment(config, machine)
    rows = []
    for method, commit in (("regular", None), ("pipo", 1.0)):
        step, num_tokens = one.decode(method, 1, 700, commit or 0)
        first = one.prefill(method, 1, 512, commit or 0)
        slower = 1.25 if method == "pipo" else 1
        times = [first.seconds], [step.seconds / num_tokens * slower]
        rows.append(Row.from_rounds(method, Point(1, 512), *times, commit=commit, num_steps=8, middle=700))
    rows += [Row(method="vllm", batch=1, context=512, error="not installed"), Row(method="mtp", batch=1, context=512)]
    settings = {"kind": "latency", "shape": "qwen3-0.6b", "device": "cpu", "dtype": "bfloat16"}
    path = tmp_path / "latency.json"
    slower_before = asdict(Machine("here", 20e9, 3e11, 16e9))
    write_results(path, Results(**settings, rows=tuple(rows), machine=slower_before, machine_after=asdict(machine)))
    return path


def test_predictions_beside_measurements(measured, config):
    """The error is the model's, of its sign; rows of methods whose cost is not known, and of failures, are left out."""
    rows = compare(read_latency(measured), config, PERFECT)
    assert [row.method for row in rows] == ["regular", "pipo"]
    assert rows[0].tpot.error == pytest.approx(0)
    assert rows[1].tpot.error == pytest.approx(1 / 1.25 - 1)
    assert rows[1].ttft.error == pytest.approx(0)
    assert rows[1].against_regular.error == pytest.approx(0.25)
    assert median_error([row.tpot for row in rows]) == pytest.approx(0.1)
    assert median_error([None]) is None


def test_results_that_cannot_be_compared(measured, config):
    content = json.loads(measured.read_text())
    measured.write_text(json.dumps(content | {"machine": None}))
    with pytest.raises(DataError, match="measured to do"):
        read_latency(measured)
    measured.write_text(json.dumps(content | {"rows": content["rows"][2:3]}))
    with pytest.raises(DataError, match="nothing to compare"):
        compare(read_latency(measured), config)


# --- the command --------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "250"})


def test_the_command_prints_each_method():
    result = run("--shape", "tiny", "--gpu", "h200", "--context", "64", "--tpot-limit", "0.1", "--reply", "10")
    assert result.exit_code == 0, result.output
    assert all(
        word in result.stdout for word in ("NVIDIA H200", "80% of the memory's rate", "speculative", "within limits")
    )


def test_the_command_as_json():
    result = run(
        "--shape", "tiny", "--gpu", "h200", "--context", "64", "--commit", "0.5", "--overhead-ms", "2", "--json"
    )
    found = json.loads(result.stdout)
    assert [one["method"] for one in found["predictions"]] == ["regular", "speculative", "pipo"]
    assert found["load"]["acceptance"] == 0.5
    assert found["efficiency"] == asdict(Efficiency(overhead_s=0.002))
    assert found["predictions"][2]["tpot_limit"] == "overhead"


def test_the_command_on_this_machine(monkeypatch):
    """Measured limits, of the number format that products run in."""
    monkeypatch.setattr(machines, "measure_machine", lambda device, dtype: Machine(f"{device} {dtype}", 1e9, 1e9, 1e12))
    found = json.loads(run("--shape", "tiny", "--gpu", "this", "--context", "64", "--dtype", "int8", "--json").stdout)
    assert found["machine"]["name"].endswith("torch.bfloat16")
    assert found["efficiency"] == asdict(Efficiency())


def test_the_command_on_a_checkpoint(tmp_path):
    """Sizes come from its config alone."""
    shape_config("tiny").save_pretrained(tmp_path)
    result = run("--model", str(tmp_path), "--gpu", "l4", "--context", "64")
    assert result.exit_code == 0, result.output
    assert "NVIDIA L4" in result.stdout


def test_the_command_against_measurements(measured):
    result = run("--against", str(measured), "--bandwidth-share", "1", "--compute-share", "1", "--overhead-ms", "0")
    assert result.exit_code == 0, result.output
    assert all(word in result.stdout for word in ("here: 30 GB/s", "-20.0%", "of TPOT 10.0%", "against regular 25.0%"))
    found = json.loads(run("--against", str(measured), "--bandwidth-share", "1", "--json").stdout)
    assert found["rows"][1]["tpot"]["error"] < 0
    assert set(found["median_error"]) == {"ttft", "tpot", "against_regular"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shape", "tiny"], "--gpu"),
        (["--gpu", "h200"], "--shape"),
        (["--shape", "tiny", "--model", "x", "--gpu", "h200"], "one of --shape"),
        (["--model", "/nowhere", "--gpu", "h200"], "/nowhere"),
        (["--shape", "tiny", "--gpu", "this", "--dtype", "fp8"], "fp8"),
        (["--against", "x.json", "--gpu", "h200"], "--gpu"),
    ],
)
def test_bad_options_are_named(arguments, named):
    result = run(*arguments)
    assert result.exit_code == 2
    assert named in result.output
