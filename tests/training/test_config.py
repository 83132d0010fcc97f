"""Settings of training runs: what is read, and what is refused by name."""

import pytest

from pipo.errors import ConfigError
from pipo.training.config import OpdConfig, SftConfig, load_config

SFT = """
model: {path: somewhere}
data: {train: rows.jsonl}
run: {out: runs/x}
"""
OPD = SFT + "teacher: {path: teacher}\n"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_defaults_are_the_papers(write):
    config = load_config(OpdConfig, write(OPD))
    assert (config.tuning.rank, config.tuning.alpha, config.tuning.dropout) == (64, 128, 0.05)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (1e-4, (0.9, 0.95), 0.1)
    assert (config.optimizer.schedule, config.optimizer.warmup) == ("cosine", 0.05)
    rollout = config.rollout
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.presence_penalty) == (1, 0.95, 20, 1.5)
    assert (rollout.threshold, config.divergence.mode, config.divergence.k) == (0.95, "topk", 32)


def test_overrides_win_and_are_yaml(write):
    overrides = ["optimizer.lr=5e-5", "run.batch_size=4", "rollout.threshold=[0.3, 0.99]", "tuning.targets=[q_proj]"]
    config = load_config(OpdConfig, write(OPD), [*overrides, "optimizer.max_grad_norm=1.5"])
    assert config.optimizer.lr == 5e-5
    assert config.run.batch_size == 4
    assert config.rollout.threshold == (0.3, 0.99)
    assert config.tuning.targets == ("q_proj",)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["optimizer.rate=1"], "optimizer.rate is no setting"),
        (["run.batch_size=0"], "run.batch_size"),
        (["data.max_slots=101"], "data.max_slots: slots come in pairs"),
        (["run.strategy=fsdp1"], "run.strategy"),
        (["nonsense"], "group.key=value"),
        (["model.path.deeper=1"], "not a group"),
        (["run.out=[unclosed"], "can't be read as YAML"),
    ],
)
def test_what_is_wrong_is_named(write, overrides, named):
    with pytest.raises(ConfigError, match=named.replace("(", r"\(").replace("[", r"\[")):
        load_config(SftConfig, write(SFT), overrides)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rollout.backend=server", "url goes with backend"),
        ("teacher.backend=server", "takes url"),
        ("rollout.threshold=[0.9, 0.1]", "low, high"),
        ("divergence.beta=2", "divergence.beta"),
    ],
)
def test_what_contradicts_itself_is_named(write, override, named):
    with pytest.raises(ConfigError, match=named):
        load_config(OpdConfig, write(OPD), [override])


def test_a_missing_group_and_a_file_that_is_no_yaml(write):
    with pytest.raises(ConfigError, match="teacher is needed"):
        load_config(OpdConfig, write(SFT))
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(SftConfig, write("a: ["))
    with pytest.raises(ConfigError, match="groups of settings"):
        load_config(SftConfig, write("- 1"))
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(SftConfig, "nowhere.yaml")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.strategy=fsdp2"], "rollout.backend: engine can't run on weights that are sharded"),
        (["rollout.backend=server", "rollout.url=http://x", "rollout.sync_every=3"], "multiple of rollout.sync_every"),
        (["rollout.backend=files"], "rollout: path goes with backend: files"),
        (["divergence.mode=sampled", "divergence.beta=0.5"], "divergence.beta must be 1"),
        (["divergence.mode=full", "teacher.backend=files"], "needs the whole vocabulary"),
    ],
)
def test_settings_of_opd_that_contradict_each_other_are_named_and_not_printed_whole(write, overrides, said):
    with pytest.raises(ConfigError, match=said) as error:
        load_config(OpdConfig, write(OPD), overrides)
    assert len(str(error.value)) < 350
