"""`pipo sft`: supervised fine-tuning."""

from __future__ import annotations

from pipo.cli import training


def sft(
    config: training.Config,
    overrides: training.Overrides = None,
    plan: training.Plan = False,
    resume: training.Resume = False,
    as_json: training.AsJson = False,
) -> None:
    """Fine-tune on conversations: a PIPO model, or a regular one that becomes one.

    Several processes: torchrun --nproc-per-node N -m pipo sft CONFIG.yaml. A run that was killed goes on with --resume, to the same
    losses. run.out gets run.json, metrics.jsonl, checkpoints/ and, in the end, final/.
    """
    training.refuse_contradiction(plan, resume)
    from pipo.training.config import SftConfig, load_config

    settings = load_config(SftConfig, config, overrides or ())
    if plan:
        from pipo.cli.plans import show_plan

        show_plan(settings, as_json)
        return
    training.need_packages()
    from pipo.training.sft import run_sft

    training.carry_out(lambda watch: run_sft(settings, resume=resume, watch=watch), as_json)
