"""Pretraining, from config to checkpoint: one loop that reads top to bottom.

    shards -> loader -> micro batches -> PretrainingModel (encoder + objectives) -> loss -> engine -> checkpoints
                                                                                     -> metrics.jsonl, loss.png, wandb

The run folder holds config.yaml (resolved), run.json (how it stands), metrics.jsonl, loss.png, checkpoints/ and, where
there are any, failed_samples-<rank>.jsonl, stacks-<rank>.txt (of ranks that hung) and wandb/. The same call runs on one
process and under torchrun. Whatever ends a run (endings.py) leaves a checkpoint from which the same call goes on.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from panfm.config import to_plain, write_config
from panfm.data.failures import FailureLog, read_failures, summarise_failures, trim_failures
from panfm.data.loader import LoaderState
from panfm.distributed import (
    all_reduce_mean,
    barrier,
    broadcast_object,
    find_device,
    get_rank,
    get_world_size,
    is_main,
    process_group,
)
from panfm.errors import UserError
from panfm.files import write_json
from panfm.objectives.pretraining import PretrainingModel
from panfm.optim import compute_lr, is_encoder_frozen
from panfm.progress import ShowRun, run_view
from panfm.shards.index import Exclusion
from panfm.tracking import append_metrics, describe_record, open_wandb, trim_metrics, write_loss_curve
from panfm.training.alarms import Alarm
from panfm.training.build import build_run
from panfm.training.checkpoint import (
    TrainingState,
    compute_folder,
    find_checkpoint,
    list_checkpoints,
    remove_checkpoints,
)
from panfm.training.endings import (
    EXIT_CODES,
    Outcome,
    catch_signals,
    end_with_parent,
    explain_lost,
    read_next,
    share_fault,
)
from panfm.training.engine import Engine, StepOutput, compute_num_threads
from panfm.training.hardware import measure_memory
from panfm.training.meters import Meters, SpeedWindow, read_energy
from panfm.training.plan import (
    PretrainConfig,
    check_config,
    describe_encoder,
    print_plan,
    say,
)
from panfm.training.runs import keep_state
from panfm.training.saver import Saver
from panfm.training.watch import SNAPSHOTS, Look, Watch, every
from panfm.training.watchdog import Watchdog


@dataclass(frozen=True)
class PretrainSummary:
    """How a run ended. `checkpoint` is the newest whole one; loss is that of the last step done (None: no step)."""

    out: Path
    checkpoint: Path | None
    outcome: Outcome
    step: int
    samples_seen: int
    loss: float | None
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 finished; 75 interrupted by a signal, saved: start the same command again; 4 diverged; 5 alarmed; 7 shards
        that cannot be read any more, saved. A rank that hangs does not return: it ends with 6."""
        return EXIT_CODES[self.outcome]


def pretrain(config: PretrainConfig, *, out: Path, excluded: Exclusion, resume: str = "auto") -> PretrainSummary:
    """Train an encoder into the run folder `out`; every rank calls this with the same arguments.

    `excluded` names the groups that must never be drawn (`panfm.evaluation.splits.compute_excluded`), and the images
    that an audit lists (`panfm.evaluation.contamination_list`). With
    resume="auto" the newest whole checkpoint in `out` is continued, if there is one; "never" refuses a folder that
    holds any. Raises UserError for what the config gets wrong, before anything is trained.
    """
    started = time.monotonic()
    check_config(config, resume)
    device = find_device()
    torch.set_num_threads(compute_num_threads(config.engine))

    with ExitStack() as stack:
        stack.enter_context(process_group(device))
        stop = stack.enter_context(catch_signals())
        end_with_parent()
        plain = to_plain(config)
        batch_size = config.engine.global_batch_size

        # 1. The model, encoder and heads inside the engine, teachers outside; and the stream of samples.
        built = build_run(config, excluded, device, stack)
        model, loader, engine, num_steps = built.model, built.loader, built.engine, built.num_steps
        init_report = built.init_report

        stack.enter_context(explain_lost())
        watchdog = stack.enter_context(Watchdog(out, config.monitor.hang_seconds))
        watchdog.begin("start", slow=True)

        # 2. Where the run stands: at the beginning, or where its newest whole checkpoint left off.
        state = TrainingState(step=0, samples_seen=0)
        facts = describe_encoder(config, plain, loader.sources, excluded)
        found = list_checkpoints(out)
        if found and resume == "never":
            raise UserError(
                f"{out}: holds {found[-1].name}; with --resume never give another --out, or remove the folder"
            )
        newest, passed_over = broadcast_object(find_checkpoint(out) if is_main() else (None, []))
        for line in passed_over:
            say(line)
        # Every rank measures its peak and its energy; what the folder says of the energy is read before it is cut back.
        meters = Meters(config, device, kwh_before=read_energy(out, newest) if is_main() else 0.0)
        saver = Saver(config, plain, built, out, newest, facts=facts, meters=meters, watchdog=watchdog)
        if newest is not None:
            state = saver.load(newest)
        if is_main():
            for leftover in (out / "checkpoints").glob("step-*.tmp"):
                shutil.rmtree(leftover)
            out.mkdir(parents=True, exist_ok=True)
            write_config(config, out / "config.yaml")
            if init_report is not None:
                write_json(out / "init_report.json", init_report.to_plain())
        if init_report is not None and newest is None:
            for line in init_report.to_lines():
                say(line)

        num_failed = num_failed_before = _cut_back(out, state)
        end = stack.enter_context(keep_state(out, num_steps)) if is_main() else None
        failed = FailureLog(out, get_rank())
        print_plan(config, loader.sources, engine, num_steps, newest)
        watch = Watch(config, model, loader, excluded, facts.transform, out)
        for line in watch.describe():
            say(line)
        num_discarded = watch.resume()  # samples that rollbacks threw away
        log_wandb = stack.enter_context(open_wandb(config.tracking, out, plain)) if is_main() else None

        stack.callback(saver.wait)  # a run that ends with an error leaves no thread behind that still writes

        # 3. The loop.
        outcome: Outcome = "finished"
        loss: float | None = None
        shown: dict[str, str] = {}
        output: StepOutput | None = None  # of the last step tried
        window = SpeedWindow()
        start = LoaderState(state.step, state.salts)
        stream = loader.iterate(start, rank=get_rank(), world_size=get_world_size(), failed=failed)
        show = stack.enter_context(
            run_view("pretraining", num_steps * batch_size, done=state.samples_seen) if is_main() else _no_view()
        )
        back_to: Path | None = None  # the checkpoint from which the run goes on where it got into trouble
        is_first = True  # step of this process: it compiles, and fills the loader
        while state.step < num_steps or back_to is not None:
            watchdog.begin(f"step {state.step + 1}", slow=is_first or back_to is not None)
            if back_to is not None:  # as a resume from an earlier checkpoint, on other samples from there on
                now, state, saver.newest, back_to = state, saver.load(back_to), back_to, None
                number, of = now.salts[-1][1] + 1, config.monitor.alarm.max_rollbacks
                salts = LoaderState(now.step, now.salts).roll_back(state.step, number).salts
                state = replace(state, salts=salts)
                num_discarded += now.samples_seen - state.samples_seen
                say(f"rollback {number} of {of}: from step {now.step} back to {state.step}, then on other samples")
                if is_main():
                    remove_checkpoints(out, after=state.step)
                num_failed = num_failed_before = _cut_back(out, state)
                failed = FailureLog(out, get_rank())
                watch.resume()
                loader.close()
                start = LoaderState(state.step, state.salts)
                stream = loader.iterate(start, rank=get_rank(), world_size=get_world_size(), failed=failed)
                show(state.samples_seen - now.samples_seen, shown)

            with window.waiting():
                micro_batches, fault = read_next(stream)
            fault = share_fault(fault, device)  # a rank without its batch must not leave the others in theirs
            if fault is not None:
                outcome = "unreadable"
                break
            assert micro_batches is not None

            lr = compute_lr(config.optim, config.schedule, state.step, batch_size)
            model.begin_step(state.step)
            freeze_encoder = is_encoder_frozen(config.optim, state.step, batch_size)
            output = engine.step(micro_batches, step=state.step, lr=lr, freeze_encoder=freeze_encoder)
            skipped = not output.applied
            if skipped and not output.skipped_by_scaler:
                say(f"step {state.step + 1}: loss {output.loss}, gradient norm {output.grad_norm}; weights left alone")
                if not watch.may_skip(state.step + 1):
                    saver.finish()
                    back_to = watch.find_way_back(state.step + 1, num_rollbacks=state.salts[-1][1])
                    if back_to is not None:
                        continue
                    outcome = "diverged"
                    break
            if not skipped:
                with engine.gather(model.followed):
                    model.after_step(state.step)  # the EMA teacher follows what was applied, and nothing else
                loss = output.loss
            is_first = False
            # A skipped step has drawn its samples: the stream and the schedules go on behind it.
            state = replace(state, step=state.step + 1, samples_seen=state.samples_seen + batch_size)
            window.num_samples += batch_size

            watchdog.begin(f"look after step {state.step}", slow=True)
            alarms: list[Alarm] = []
            try:  # what rank 0 cannot write must not leave the others waiting
                with engine.whole() if watch.is_due(state.step) else nullcontext():
                    look = watch.look(state.step, micro_batches)  # features, probe, pictures: whatever is due
            except OSError as error:
                look, fault = Look(), f"{out}: {error.strerror}"
            last = state.step == num_steps
            if every(state.step, config.tracking.log_every) or look.numbers or last or skipped:
                images_per_second, data_wait_share = window.read()
                record: dict[str, Any] = {
                    **look.numbers,
                    "step": state.step,
                    "samples_seen": state.samples_seen,
                    "loss": output.loss,
                    **output.metrics,
                    "lr": lr,
                    "grad_norm": output.grad_norm,
                    "images_per_second": images_per_second,
                    "data_wait_share": data_wait_share,
                    "memory_gib": measure_memory(device),
                    **meters.read(images_per_second),
                }
                if log_wandb is not None:
                    record["failed_samples"] = num_failed
                    if state.salts[-1][1]:
                        record |= {"rollbacks": state.salts[-1][1], "discarded_samples": num_discarded}
                    record["drawn"] = loader.count_drawn(LoaderState(state.step, state.salts))
                    if skipped:
                        record["skipped"] = "loss scale" if output.skipped_by_scaler else "not finite"
                    try:
                        append_metrics(out / "metrics.jsonl", record)
                        log_wandb(record | look.pictures)
                    except OSError as error:
                        fault = f"{out / 'metrics.jsonl'}: {error.strerror}"
                    alarms = watch.judge(record)
                shown = describe_record(record)
            show(batch_size, shown)

            # One exchange a step: whether a rank was asked to stop, how many samples failed on all of them, and how
            # many alarms ring on rank 0, whether it could not write, whether each has written its part of the pending
            # checkpoint, which energy each took and what it could do at best.
            num_bad = num_failed_before + failed.num_failed
            told = (stop.requested, num_bad, len(alarms), fault is not None, saver.has_written)
            is_due = every(state.step, config.checkpoint.save_every) or last  # a checkpoint says what it cost
            numbers = (*map(float, told), *meters.measure(now=is_due))
            means = all_reduce_mean(torch.tensor(numbers, dtype=torch.float64, device=device))
            *counts, joules, peak = (means * get_world_size()).tolist()
            num_asked, num_failed, num_alarms, num_faults, num_written = map(round, counts)
            meters.set_totals(joules, peak)
            stopped = num_asked > 0
            try:
                loader.check_failures(failed, num_failed, state.samples_seen)
            except UserError:  # on all ranks alike
                saver.save(state, failed)
                raise
            if num_faults:
                saved = saver.save(state, failed)  # where that fails too, it says so itself
                raise UserError(f"{share_fault(fault, device)}; saved {saved.name}: free some space and start again")
            if num_alarms:
                alarms = broadcast_object(alarms)
                for alarm in alarms:
                    say(f"alarm at step {state.step}: {alarm.text}")
                saver.finish()
                watch.keep_snapshot(alarms, partial(saver.save_aside, state, failed))
                back_to = watch.find_way_back(min(alarm.since for alarm in alarms), num_rollbacks=state.salts[-1][1])
                if back_to is not None:
                    continue
                if config.monitor.alarm.action != "warn":
                    outcome = "alarmed"
                    break
            if num_written == get_world_size():
                saver.finish()
            if is_due or stopped:
                saver.start(state, failed)
                if is_main():
                    with suppress(OSError):  # a picture is not worth a run: what is full shows at the next write
                        write_loss_curve(out / "metrics.jsonl", out / "loss.png", title=f"{out.name}: pretraining loss")
                if not config.checkpoint.background:
                    saver.finish()
            if stopped and not last:
                outcome = "interrupted"
                break

        # 4. The end: a run that diverged keeps its last good weights, if they are still there.
        saver.finish()
        watchdog.begin("end", slow=True)
        is_worth_saving = outcome == "unreadable" or (outcome == "diverged" and _is_finite(engine, model))
        if is_worth_saving and state.step > 0 and saver.newest != compute_folder(out, state.step):
            saver.save(state, failed)
        if outcome != "finished":
            say(_explain_ending(outcome, config, out, state, saver.newest, fault, output))
        for line in loader.describe_drawn(LoaderState(state.step, state.salts)) if is_main() else ():
            say(line)
        if num_failed:
            say(
                f"{num_failed:,} samples did not decode and were replaced ({summarise_failures(read_failures(out))}); "
                f"they are listed in {out}/failed_samples-*.jsonl"
            )
        summary = PretrainSummary(
            out=out,
            checkpoint=saver.newest,
            outcome=outcome,
            step=state.step,
            samples_seen=state.samples_seen,
            loss=loss,
            seconds=time.monotonic() - started,
        )
        if meters.energy_kwh is not None:
            say(f"energy so far: {meters.energy_kwh:.4g} kWh ({meters.source})")
        if end is not None:
            end(outcome)
        if outcome == "finished":
            say(f"pretrained {state.step:,} steps, loss {_show(loss)}, {summary.seconds:.0f} s: {saver.newest}")
    return summary


def _cut_back(out: Path, state: TrainingState) -> int:
    """Remove what the run folder says of steps after `state`, which come again; returns the samples failed before.

    Those failed on any rank; rank 0 knows of them, and the others count from 0.
    """
    if is_main():
        trim_metrics(out / "metrics.jsonl", state.step)
    num_kept = trim_failures(out, state.samples_seen) if is_main() else 0
    barrier()
    return num_kept


def _is_finite(engine: Engine, model: PretrainingModel) -> bool:
    """Whether all weights are numbers; every rank must call it."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in engine.copy_state(model).values())


def _explain_ending(
    outcome: Outcome,
    config: PretrainConfig,
    out: Path,
    state: TrainingState,
    newest: Path | None,
    fault: str | None,
    output: StepOutput | None,
) -> str:
    """Why the run ended before its last step, what is kept, and what to do. output: of the last step tried."""
    kept = f"saved {newest.name}" if newest is not None else "nothing to save"
    if outcome == "unreadable":
        return f"stopped after step {state.step}: {fault}; {kept}. Put it right, and the same command goes on"
    if outcome == "interrupted":
        return f"stopped by a signal after step {state.step}, saved; the same command goes on from here"
    if outcome == "alarmed":
        return (
            f"stopped by an alarm after step {state.step} and {state.salts[-1][1]} rollbacks; snapshots of before "
            f"and after: {out / SNAPSHOTS}. With monitor.alarm.action=warn the same command goes on"
        )
    assert output is not None, "a run diverges in a step"
    return (
        f"stopped at step {state.step + 1}: loss {output.loss}, gradient norm "
        f"{'not finite' if output.grad_norm is None else output.grad_norm}; {kept}. Start again with a lower "
        f"optim.base_lr ({config.optim.base_lr}) or a longer schedule.warmup_samples "
        f"({config.schedule.warmup_samples}) and another --out"
    )


@contextmanager
def _no_view() -> Iterator[ShowRun]:
    yield lambda count, numbers: None


def _show(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
