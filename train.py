"""Train: `python train.py key=value ...` (Hydra; every key with its meaning in conf/config.yaml).

Composes the config, checks it, builds the objects of the run (dpo.build), trains (dpo.trainer), and shows what changed.
"""

import os
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo.build import (
    build_objective,
    build_policy,
    build_rows,
    build_template,
    model_dir,
    predict_memory,
    starts_at_its_reference,
)
from dpo.certificate import certify
from dpo.checkpoint import find_checkpoint, load_checkpoint, save_result
from dpo.config import TrainConfig, check
from dpo.diagnostics import Facts
from dpo.evals import world_reward
from dpo.memory import amount, free_memory, give_back_at_once
from dpo.objective import Objective, to_stream
from dpo.plan import Plan, micro_batches
from dpo.preference import PreferenceObjective
from dpo.reference import Reference
from dpo.reference_cache import live_reference
from dpo.report import write_report
from dpo.run import (
    Occupied,
    RunDir,
    check_output_dir,
    check_resume,
    collect_sweep,
    is_finished,
    with_chosen_cut,
    write_results,
)
from dpo.samples import Samples, prompt_of
from dpo.sft import SFTObjective
from dpo.signals import StopRequest
from dpo.step_log import StepLog
from dpo.tokens import Rows, describe_cuts
from dpo.trainer import Probe, Trainer
from models.command import one_line_errors, prepare_command_line
from models.template import ChatTemplate
from models.transformer import Transformer
from models.weights import choose_device

ConfigStore.instance().store(name="train_schema", node=TrainConfig)


FAILED_JOBS: list[str] = []
"""Jobs of a sweep that ended in an error; the others run all the same."""


STOPPED: list[int] = []
"""The exit status of a signal that came after a job's last update: no further job begins."""


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    job = HydraConfig.get()
    # A group that was left out is no setting of the run's.
    pairs = (item.partition("=") for item in job.overrides.task if "=" in item and not item.startswith("~"))
    overrides = {key: value.strip("'") for key, _, value in pairs}  # quoted where config_file gave them
    if job.mode == RunMode.MULTIRUN:
        sweep_job(cfg, overrides, int(job.job.num))
        return
    with one_line_errors():
        write_results(Path(cfg.output_dir), overrides, train(cfg))


def sweep_job(cfg: DictConfig, overrides: dict[str, str], number: int) -> None:
    """One job of a sweep, in a directory of its own; a mistake ends the job and is a row of the sweep's results."""
    sweep_dir = Path(cfg.output_dir)
    cfg.output_dir = str(sweep_dir / str(number))
    cfg.tokenized_path = cfg.tokenized_path or str(sweep_dir / "tokenized")
    if not cfg.sync_ref_model:  # what moves cannot be shared
        cfg.ref_cache_dir = cfg.ref_cache_dir or str(sweep_dir / "reference")
    print(f"job {number}: {' '.join(f'{key}={value}' for key, value in overrides.items())}")
    try:
        write_results(Path(cfg.output_dir), overrides, train(cfg))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        FAILED_JOBS.append(str(number))
        print(f"error: job {number}: {error}", file=sys.stderr)
        if cfg.overwrite_output_dir or not (isinstance(error, Occupied) or is_finished(Path(cfg.output_dir))):
            write_results(Path(cfg.output_dir), overrides, {}, error=str(error))
    print(f"sweep: {collect_sweep(sweep_dir, last_job=number)}")
    if STOPPED:
        sys.exit(STOPPED[0])


def train(cfg: DictConfig) -> dict[str, float]:
    """One run, from config to saved result; returns its final metrics."""
    say = Said()
    for warning in check(cfg):
        say(f"warning: {warning}")
    path = Path(cfg.output_dir)
    resume = str(cfg.resume_from_checkpoint or "false").lower() != "false"
    check_output_dir(path, overwrite=cfg.overwrite_output_dir, resume=resume)
    checkpoint = find_checkpoint(cfg.resume_from_checkpoint, path) if resume else None
    if checkpoint is not None:
        check_resume(checkpoint.parent, with_chosen_cut(cfg, checkpoint.parent))
    device = choose_device(cfg.device)
    template = build_template(cfg)
    rows = build_rows(cfg, template)
    for line in describe_rows(rows):
        say(line)
    if cfg.gradient_checkpointing and device.type == "cpu":
        give_back_at_once()
    free = free_memory(device)
    policy = build_policy(cfg, device)
    objective: Objective = SFTObjective()
    if cfg.stage == "sft":
        objective.check(chain(rows.train, rows.evaluation))
    else:
        objective, description = build_objective(cfg, policy, rows)
        say(f"reference: {description}")

    # Nothing is written, and nothing of an earlier run removed, before all that can be wrong has been looked at.
    with RunDir(path, overwrite=cfg.overwrite_output_dir, resume=resume) as run_dir:
        source_dir = model_dir(cfg.model_name_or_path)
        reference, facts = None, None
        if isinstance(objective, PreferenceObjective):
            reference, loss = objective.reference, objective.loss
            total = Plan.of(cfg, len(rows.train)).total_steps
            # Rows with weights or margins of their own start elsewhere, and so does a policy beside its reference.
            plain = starts_at_its_reference(cfg) and not any(row.has_numbers for row in rows.train)
            start = loss.start() if plain else None
            facts = Facts(loss.beta, loss.needs_reference, start, total, len(rows.evaluation))
        probes = probes_of(cfg, template, rows, reference, run_dir.samples)
        trainer = Trainer(
            cfg, policy, objective, rows.train, rows.evaluation, run_dir, source_dir, probes=probes, facts=facts
        )
        if cfg.do_train:
            for line in describe_memory(cfg, policy, rows, free):
                say(line)
            for warning in useless_settings(cfg, trainer):
                say(f"warning: {warning}")
            if checkpoint is None and isinstance(objective, PreferenceObjective):
                first = micro_batches(cfg, [rows.train[i] for i in trainer.plan.indices(0)])[0]
                stream = to_stream(first, device)
                same = starts_at_its_reference(cfg)
                say(certify(policy, trainer.parameters, objective, stream, first, same_weights=same))
            if checkpoint is not None:
                trainer.resume(checkpoint)
                say(f"resumed after step {trainer.step}, from {checkpoint}")
        elif checkpoint is not None:  # looked at, not continued: nothing of the run is removed
            trainer.state = load_checkpoint(checkpoint, policy, trainer.optimizer, objective.state)
            print(f"the policy after step {trainer.step}, from {checkpoint}")
        run_dir.write_config(cfg)
        run_dir.write_skipped(rows.skipped)
        if cfg.val_size and cfg.stage != "sft":
            run_dir.write_held_out([row.example for row in rows.evaluation])
        if cfg.do_train:
            try:
                with StopRequest() as stop:
                    metrics = trainer.train(stop)
                save_result(policy, path, **trainer.result)
            except BaseException as error:
                why = "stopped by a signal" if isinstance(error, SystemExit) else str(error)
                report(trainer, say, ended=f"It ended early: {why}.")
                raise
            report(trainer, say, ended=f"It came to its end; its result is of update {trainer.result_step}.")
            print_before_and_after(trainer)
            STOPPED.extend([stop.exit_status] if stop.signal else [])  # after the last update: the run is whole
        else:
            metrics = trainer.evaluate()
    print(f"run: {path}")
    return metrics


def describe_memory(cfg: DictConfig, policy: Transformer, rows: Rows, free: int | None) -> list[str]:
    """The predicted growth of the process since before the model was loaded, of which `free` bytes were free then."""
    automatic = cfg.max_tokens_per_micro_batch == "auto"
    predicted = predict_memory(cfg, policy, rows, free)
    lines = [f"max_tokens_per_micro_batch: {cfg.max_tokens_per_micro_batch}"] if automatic else []
    lines.append(f"memory: about {predicted}")
    if free is not None and predicted.peak > free:
        lines.append(
            f"warning: {amount(free)} of memory were free; lower max_tokens_per_micro_batch, or set "
            "gradient_checkpointing=true or bf16=true"
        )
    return lines


class Said(list[str]):
    """Lines that were printed, for the report."""

    def __call__(self, line: str) -> None:
        self.append(line)
        print(line, flush=True)


def useless_settings(cfg: DictConfig, trainer: Trainer) -> list[str]:
    """What the length of the run makes useless, a line each."""
    total, useless = trainer.plan.total_steps, []
    if trainer.warmup_steps >= total:
        useless.append(
            f"{trainer.warmup_steps} steps of warm-up in a run of {total}: learning_rate is never reached; "
            "lower warmup_steps or warmup_ratio"
        )
    if cfg.sync_ref_model and cfg.ref_model_sync_steps >= total:
        useless.append(
            f"ref_model_sync_steps={cfg.ref_model_sync_steps} in a run of {total}: the reference does not "
            "move before the last update; lower it"
        )
    return useless


def describe_rows(rows: Rows) -> list[str]:
    """What the data came to: rows, tokens, and everything that was cut, dropped or skipped."""
    tokens = sum(row.tokens for row in rows.train)
    return [
        f"rows: {len(rows.train)} to train on ({tokens} tokens), {len(rows.evaluation)} held out, "
        f"{len(rows.skipped)} skipped",
        *describe_cuts(chain(rows.train, rows.evaluation)),
        *(f"warning: {warning}" for warning in rows.warnings),
    ]


def probes_of(
    cfg: DictConfig, template: ChatTemplate, rows: Rows, reference: Reference | None, log: StepLog
) -> list[Probe]:
    """What is measured of the policy beside the held-out rows: its answers and, on the built-in world, its gold reward.

    Of its prompts every third: enough for two digits, and a third of the time of enumerating every grammar.
    """
    probes: list[Probe] = []
    asked = rows.evaluation or rows.train
    if cfg.num_samples:
        probes.append(
            Samples(
                asked, template, live_reference(reference), log, number=cfg.num_samples,
                max_new_tokens=cfg.max_new_tokens, seed=cfg.seed,
            )
        )  # fmt: skip
    if cfg.eval_dataset == "world":
        probes.append(world_reward.probe(template, list({prompt_of(row): None for row in asked})[::3]))
    return probes


def report(trainer: Trainer, said: Sequence[str], ended: str) -> None:
    """Write report.md; that it cannot be written is no reason to lose a run."""
    step, total = trainer.step, trainer.plan.total_steps
    ended += f" {step} of {total} updates were made."
    alarms = trainer.watch.diagnosis.alarms.values() if trainer.watch.diagnosis else ()
    notes = {"Start": "\n".join(said)}
    try:
        path = write_report(trainer.run_dir, notes, alarms, ended, draw=trainer.cfg.plot_loss)
        print(f"report: {path}")
    except OSError as error:
        print(f"warning: report.md could not be written ({error})")


def print_before_and_after(trainer: Trainer) -> None:
    """The first answers and the gold reward, before the first update and of the result."""
    for probe in trainer.probes:
        if isinstance(probe, Samples):
            probe.print_before_and_after(trainer.result_step)
    golds = [row for row in trainer.run_dir.logged() if "eval_gold_reward" in row]
    before, after = ([row for row in golds if row["step"] == step][-1:] for step in (0, trainer.result_step))
    if before and after:
        print("expected gold reward on held-out prompts, exact by enumeration")
        for name, (row,) in (("before:", before), ("after: ", after)):
            outside = row["eval_mass_outside"]
            print(f"  {name} {row['eval_gold_reward']:.3f} (probability outside the grammar {outside:.3f})")


if __name__ == "__main__":
    with one_line_errors():
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}: one process trains; several are not supported yet"
            )
    prepare_command_line(TrainConfig)
    main()
    sys.exit(2 if FAILED_JOBS else 0)
