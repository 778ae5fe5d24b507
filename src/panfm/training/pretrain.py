"""Pretraining, from config to checkpoint: one loop that reads top to bottom.

    shards -> loader -> micro batches -> PretrainingModel (encoder + objectives) -> loss -> engine -> checkpoints
                                                                                     -> metrics.jsonl, loss.png, wandb

The run folder holds config.yaml (resolved), metrics.jsonl, loss.png, checkpoints/ and, where there are any,
failed_samples-<rank>.jsonl and wandb/. The same call runs on one process and under torchrun. SIGTERM and SIGUSR1 end
the run after the step in hand, saved.
"""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import psutil
import torch

from panfm.config import to_plain, write_config
from panfm.data.failures import FailureLog, read_failures, summarise_failures, trim_failures
from panfm.data.loader import LoaderState, build_loader
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
from panfm.encoder import facts as encoder_facts
from panfm.encoder import load_encoder
from panfm.encoder.initial import read_initial, start_from
from panfm.errors import UserError
from panfm.files import write_json
from panfm.models.vit import build_vit, get_patch_grid
from panfm.objectives.pretraining import (
    RunLength,
    build_pretraining_model,
    get_mask_config,
    get_teacher_addresses,
    get_tokenizer_config,
)
from panfm.optim import compute_lr, compute_num_steps, is_encoder_frozen
from panfm.progress import progress_bar
from panfm.shards.index import Exclusion
from panfm.tracking import append_metrics, open_wandb, trim_metrics, write_loss_curve
from panfm.training.alarms import Alarm
from panfm.training.checkpoint import (
    TrainingState,
    compute_folder,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_extra_state,
    remove_checkpoints,
    write_checkpoint,
)
from panfm.training.engine import Engine, compute_num_threads
from panfm.training.plan import (
    PretrainConfig,
    check_accumulation,
    check_config,
    check_local_size,
    describe_encoder,
    print_plan,
    say,
)
from panfm.training.watch import SNAPSHOTS, Watch, every

Outcome = Literal["finished", "interrupted", "diverged", "alarmed"]
# 75 is sysexits.h's EX_TEMPFAIL, "try again": what a scheduler requeues on. Under torchrun the agent reports its own.
EXIT_CODES: dict[Outcome, int] = {"finished": 0, "interrupted": 75, "diverged": 4, "alarmed": 5}


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
        """0 finished; 75 interrupted by a signal, saved: start the same command again; 4 diverged; 5 alarmed."""
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
        stop = stack.enter_context(_catch_signals())
        check_accumulation(config, get_world_size())
        plain = to_plain(config)
        objectives = config.objectives
        encoder_config, batch_size, seed = config.encoder, config.engine.global_batch_size, config.engine.seed
        num_steps = compute_num_steps(config.schedule, batch_size)

        # 1. The model: encoder and heads inside the engine, teachers outside.
        vit = build_vit(encoder_config, seed)
        initial = None if encoder_config.init is None else read_initial(encoder_config.init)
        init_report = None if initial is None else start_from(vit, initial, encoder_config.init_random)
        check_local_size(config, vit.patch_embed.patch_size[0])
        teachers = {address: load_encoder(address, device=str(device)) for address in get_teacher_addresses(objectives)}
        learned_from = [(encoder.address, encoder.facts) for encoder in teachers.values()]
        if initial is not None:
            learned_from.append((initial.source, initial.facts))
        for name, known in learned_from:
            if known is not None:  # what an encoder learned from, its pupils learn from too
                encoder_facts.check_use(known, config.data.use, f"data.use ({config.data.use}): {name}")
        model = build_pretraining_model(
            vit,
            objectives,
            image_size=encoder_config.image_size,
            mean=config.augment.mean,
            std=config.augment.std,
            teachers=teachers,
            local_views=range(config.augment.views, config.augment.num_views),
            length=RunLength(num_steps, batch_size),
            seed=seed,
        ).to(device)
        if config.engine.compile:
            for block in model.encoder.blocks:
                block.compile()

        # 2. The stream of samples: a pure function of (config, seed, salts, step); the state is a few numbers.
        loader = stack.enter_context(
            build_loader(
                config.data,
                config.mixture,
                config.augment,
                mask=get_mask_config(objectives),
                mask_grid=get_patch_grid(model.encoder),
                seed=seed,
                global_batch_size=batch_size,
                micro_batch_size=config.engine.micro_batch_size,
                excluded=excluded.groups,
                excluded_keys=excluded.keys,
                tokenizer=get_tokenizer_config(objectives),
            )
        )

        engine = Engine(model, model.encoder, config.engine, config.optim, config.deepspeed)
        stack.callback(engine.close)

        # 3. Where the run stands: at the beginning, or where its newest whole checkpoint left off.
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

        def load(checkpoint: Path) -> TrainingState:
            loaded = load_checkpoint(checkpoint, engine, plain, facts)
            model.load_extra_state(read_extra_state(checkpoint), str(checkpoint))
            return loaded

        if newest is not None:
            state = load(newest)
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

        def cut_back() -> int:
            """Remove what the run folder says of steps after `state`, which come again; samples failed before."""
            if is_main():
                trim_metrics(out / "metrics.jsonl", state.step)
            # Samples that failed before, on any rank, count on; rank 0 knows of them.
            num_kept = trim_failures(out, state.samples_seen) if is_main() else 0
            barrier()
            return num_kept

        num_failed = num_failed_before = cut_back()
        failed = FailureLog(out, get_rank())
        print_plan(config, loader.sources, engine, num_steps, newest)
        watch = Watch(config, model, loader, excluded, facts.transform, out)
        for line in watch.describe():
            say(line)
        num_discarded = watch.resume()  # samples that rollbacks threw away
        log_wandb = stack.enter_context(open_wandb(config.tracking, out, plain)) if is_main() else None

        def save(run: Path = out, keep_last: int = config.checkpoint.keep_last) -> Path:
            now = facts.model_copy(update={"step": state.step, "samples_seen": state.samples_seen})
            failed.sync()
            extra, text = (model.copy_extra_state(), model.copy_text_state()) if is_main() else (None, None)
            return write_checkpoint(
                run,
                engine,
                state,
                config=plain,
                facts=now,
                keep_last=keep_last,
                extra=extra,
                text=text,
                encoder=model.exported_encoder,
            )

        # 4. The loop.
        outcome: Outcome = "finished"
        loss: float | None = None
        note = ""
        window_started, window_wait, window_steps = time.monotonic(), 0.0, 0
        start = LoaderState(state.step, state.salts)
        stream = loader.iterate(start, rank=get_rank(), world_size=get_world_size(), failed=failed)
        advance = stack.enter_context(
            progress_bar("pretraining", num_steps * batch_size, done=state.samples_seen)
            if is_main()
            else _no_progress()
        )
        back_to: Path | None = None  # the checkpoint from which the run goes on where it got into trouble
        while state.step < num_steps or back_to is not None:
            if back_to is not None:  # as a resume from an earlier checkpoint, on other samples from there on
                now, state, newest, back_to = state, load(back_to), back_to, None
                number, of = now.salts[-1][1] + 1, config.monitor.alarm.max_rollbacks
                salts = LoaderState(now.step, now.salts).roll_back(state.step, number).salts
                state = replace(state, salts=salts)
                num_discarded += now.samples_seen - state.samples_seen
                say(f"rollback {number} of {of}: from step {now.step} back to {state.step}, then on other samples")
                if is_main():
                    remove_checkpoints(out, after=state.step)
                num_failed = num_failed_before = cut_back()
                failed = FailureLog(out, get_rank())
                watch.resume()
                loader.close()
                start = LoaderState(state.step, state.salts)
                stream = loader.iterate(start, rank=get_rank(), world_size=get_world_size(), failed=failed)
                advance(state.samples_seen - now.samples_seen, note)

            asked = time.monotonic()
            micro_batches = next(stream)
            window_wait += time.monotonic() - asked

            lr = compute_lr(config.optim, config.schedule, state.step, batch_size)
            model.begin_step(state.step)
            freeze_encoder = is_encoder_frozen(config.optim, state.step, batch_size)
            output = engine.step(micro_batches, step=state.step, lr=lr, freeze_encoder=freeze_encoder)
            if not output.applied or output.grad_norm is None:
                back_to = watch.find_way_back(state.step + 1, num_rollbacks=state.salts[-1][1])
                if back_to is not None:
                    say(f"step {state.step + 1}: loss {output.loss}, gradient norm {output.grad_norm}")
                    continue
                outcome = "diverged"
                break
            model.after_step(state.step)  # the EMA teacher follows what was applied, and nothing else
            loss = output.loss
            state = replace(state, step=state.step + 1, samples_seen=state.samples_seen + batch_size)
            window_steps += 1

            look = watch.look(state.step, micro_batches)  # features, probe, pictures: whatever is due
            alarms: list[Alarm] = []
            last = state.step == num_steps
            if every(state.step, config.tracking.log_every) or look.numbers or last:
                seconds = time.monotonic() - window_started
                record: dict[str, Any] = {
                    **look.numbers,
                    "step": state.step,
                    "samples_seen": state.samples_seen,
                    "loss": output.loss,
                    **output.metrics,
                    "lr": lr,
                    "grad_norm": output.grad_norm,
                    "images_per_second": window_steps * batch_size / seconds,
                    "data_wait_share": window_wait / seconds,
                    "memory_gib": measure_memory(device),
                }
                window_started, window_wait, window_steps = time.monotonic(), 0.0, 0
                if log_wandb is not None:
                    record["failed_samples"] = num_failed
                    if state.salts[-1][1]:
                        record |= {"rollbacks": state.salts[-1][1], "discarded_samples": num_discarded}
                    record["drawn"] = loader.count_drawn(LoaderState(state.step, state.salts))
                    append_metrics(out / "metrics.jsonl", record)
                    log_wandb(record | look.pictures)
                    alarms = watch.judge(record)
                note = f"loss {loss:.4f} lr {lr:.2e} data wait {record['data_wait_share']:.0%}"
            advance(batch_size, note)

            # One exchange a step: whether a rank was asked to stop, how many samples failed on all of them, and how
            # many alarms ring on rank 0.
            told = (float(stop.requested), float(num_failed_before + failed.num_failed), float(len(alarms)))
            means = all_reduce_mean(torch.tensor(told, dtype=torch.float64, device=device))
            num_asked, num_failed, num_alarms = (round(total) for total in (means * get_world_size()).tolist())
            stopped = num_asked > 0
            loader.check_failures(failed, num_failed, state.samples_seen)
            if num_alarms:
                alarms = broadcast_object(alarms)
                for alarm in alarms:
                    say(f"alarm at step {state.step}: {alarm.text}")
                watch.keep_snapshot(alarms, save)
                back_to = watch.find_way_back(min(alarm.since for alarm in alarms), num_rollbacks=state.salts[-1][1])
                if back_to is not None:
                    continue
                if config.monitor.alarm.action != "warn":
                    outcome = "alarmed"
                    break
            if every(state.step, config.checkpoint.save_every) or stopped or last:
                newest = save()
                if is_main():
                    write_loss_curve(out / "metrics.jsonl", out / "loss.png", title=f"{out.name}: pretraining loss")
            if stopped and not last:
                outcome = "interrupted"
                break

        # 5. The end: a run that diverged keeps its last good weights, if they are still there.
        if outcome == "diverged":
            good = all(bool(torch.isfinite(tensor).all()) for tensor in engine.copy_state(model).values())
            if good and state.step > 0 and newest != compute_folder(out, state.step):
                newest = save()
            kept = f"saved {newest.name}" if newest is not None else "nothing to save"
            say(
                f"stopped at step {state.step + 1}: loss {output.loss}, gradient norm "
                f"{'not finite' if output.grad_norm is None else output.grad_norm}; {kept}. Start again with a lower "
                f"optim.base_lr ({config.optim.base_lr}) or a longer schedule.warmup_samples "
                f"({config.schedule.warmup_samples}) and another --out"
            )
        if outcome == "alarmed":
            say(
                f"stopped by an alarm after step {state.step} and {state.salts[-1][1]} rollbacks; snapshots of before "
                f"and after: {out / SNAPSHOTS}. With monitor.alarm.action=warn the same command goes on"
            )
        if outcome == "interrupted":
            say(f"stopped by a signal after step {state.step}, saved; the same command goes on from here")
        for line in loader.describe_drawn(LoaderState(state.step, state.salts)) if is_main() else ():
            say(line)
        if num_failed:
            say(
                f"{num_failed:,} samples did not decode and were replaced ({summarise_failures(read_failures(out))}); "
                f"they are listed in {out}/failed_samples-*.jsonl"
            )
        summary = PretrainSummary(
            out=out,
            checkpoint=newest,
            outcome=outcome,
            step=state.step,
            samples_seen=state.samples_seen,
            loss=loss,
            seconds=time.monotonic() - started,
        )
        if outcome == "finished":
            say(f"pretrained {state.step:,} steps, loss {_show(loss)}, {summary.seconds:.0f} s: {newest}")
    return summary


def measure_memory(device: torch.device) -> float:
    """Memory of this rank in GiB: the most that tensors took on a GPU, else what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


class _StopRequest:
    """Whether a signal asked the run to end."""

    requested = False


@contextmanager
def _catch_signals() -> Iterator[_StopRequest]:
    """SIGTERM and SIGUSR1 ask the loop to save and end; a second one has its usual effect and ends at once."""
    stop = _StopRequest()
    caught = (signal.SIGTERM, signal.SIGUSR1)

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        for name in caught:
            signal.signal(name, signal.SIG_DFL)

    before = {name: signal.signal(name, request) for name in caught}
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def _no_progress() -> Iterator[Callable[..., None]]:
    yield lambda count=1, note="": None


def _show(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
