"""Our settings as transformers' `TrainingArguments`, and the trackers that a run reports to."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from pipo.errors import ConfigError
from pipo.training import distributed
from pipo.training.config import OptimizerSettings, RunSettings

PATIENCE_S = 4 * 3600
"""How long a process waits for another: for one that downloads or writes a model, or whose rollouts are the longest."""


def training_arguments(run: RunSettings, optimizer: OptimizerSettings, *, narrow: bool = False) -> TrainingArguments:
    """transformers' form of our settings, without the number of steps. Starts the process group where there are several processes."""
    on_cpu = distributed.check_device(run)
    logging.set_verbosity_error()
    arguments = TrainingArguments(
        output_dir=str(Path(run.out) / "checkpoints"),
        seed=run.seed,
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.accumulation,
        learning_rate=optimizer.lr,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        optim="adamw_torch_fused",
        save_strategy="steps",
        save_steps=run.save_every,
        logging_strategy="steps",
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,
        log_level="error",
        disable_tqdm=True,
        report_to=[tracker for tracker in run.report_to if tracker != "tensorboard"],
        run_name=Path(run.out).name,
        project="pipo",
        use_cpu=on_cpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_timeout=PATIENCE_S,
        deepspeed=zero2_config(narrow) if run.strategy == "zero2" else None,
    )
    _ = arguments.device  # sets the processes up
    # One process trains on one GPU: with several in sight transformers would copy the model to each in every forward.
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def zero2_config(narrow: bool) -> dict[str, Any]:
    """DeepSpeed's settings: ZeRO-2 over weights as they are, float32 where they are trained.

    `narrow`: compute in bfloat16. DeepSpeed turns an autocast off that it was not told of; gradients are summed in float32 all the same.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    if find_spec("deepspeed") is None:
        raise ConfigError("run.strategy: zero2 needs deepspeed: pip install 'pipo-llm[zero]'")
    return {
        "zero_optimization": {"stage": 2},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "torch_autocast": {"enabled": narrow, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }


def check_trackers(run: RunSettings) -> None:
    """Raise `ConfigError` for a tracker that is not installed."""
    if missing := [name for name in run.report_to if find_spec(name) is None]:
        raise ConfigError(f"run.report_to: {', '.join(missing)} is not installed: pip install {' '.join(missing)}")


def tensorboard(run: RunSettings, folder: Path) -> list[Any]:
    """Its callback, which has to be told where to write."""
    if "tensorboard" not in run.report_to or not distributed.is_main():
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(log_dir=str(folder / "tensorboard")))]
