"""A run from start to end: plan, check, window, metrics, checkpoint, stop; the same on every rank."""

import gc
import os
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dsvlm.config import Recipe
from dsvlm.data.loader import Draft, LoadedWindow, Loader
from dsvlm.data.transforms import decoder_version
from dsvlm.schedule.digest import combine, digest, fingerprint, mark
from dsvlm.schedule.plan import SCHEDULE_VERSION
from dsvlm.train.build import Planned, hash_of, head_indexes, make_loader, manifest_record, plan_run
from dsvlm.train.checkpoint import RunState, load_optimizer, load_weights, save_checkpoint
from dsvlm.train.engine import check_zero, forget_gradients, make_engine, read_ds_config
from dsvlm.train.experts import share_experts
from dsvlm.train.guard import Guard, SharedError, code_version
from dsvlm.train.launch import find_ranks, init_distributed
from dsvlm.train.lengths import lengths_record, make_run_lengths, open_lengths
from dsvlm.train.metrics import Metrics
from dsvlm.train.optim import lr_factor, set_lr
from dsvlm.train.preempt import LAUNCHED, StopFlag, clear_stop, install_handlers, mark_requeue, stop_requested
from dsvlm.train.pretrained import begin_model
from dsvlm.train.routing import layer_names, routing_row
from dsvlm.train.rundir import lock_run, open_run, prepare_run, read_run, run_decoder
from dsvlm.train.window import WindowSums, run_window, target_weights, teaching

BAD_BEFORE_STOP = 10  # masked samples that a share above data.max_bad_share must amount to


@dataclass
class Run:
    """The objects of a training run on one rank."""

    recipe: Recipe
    planned: Planned
    guard: Guard
    loader: Loader
    engine: object
    ema: object
    metrics: Metrics
    stop: StopFlag
    state: RunState
    layers: list[str]  # of experts


def train(recipe: Recipe) -> int:
    """Trains a recipe, from its latest complete checkpoint if there is one; returns the exit code.

    A start that a signal ended saves, leaves REQUEUE in the run directory and returns 0.
    """
    stop = install_handlers()
    ranks = find_ranks(os.environ)
    planned = plan_run(recipe)
    read_ds_config(recipe)
    device = init_distributed(ranks, recipe.train.timeout)
    guard = Guard(recipe.train.timeout)
    lock = guard.first(lock_run, recipe.run_dir)
    try:
        guard.first(clear_stop, recipe.run_dir)  # meant for a start before this one
        run = build_run(planned, guard, stop, device)
        gc.collect()
        gc.freeze()  # modules and model stay: collections, which every answer of a data worker sets off, pass them over
        try:
            finished = train_steps(run)
        finally:
            run.metrics.close()
            run.loader.close()
        if ranks.rank == 0:  # while the lock is held: afterwards they may be another training's
            clear_stop(recipe.run_dir)
            clear_stop(recipe.run_dir, os.environ.get(LAUNCHED, ""))  # its launcher may have been killed
            mark_requeue(recipe.run_dir, wanted=not finished)
    finally:
        if lock is not None:
            lock.close()
    if ranks.rank == 0:
        print(ending(recipe, run.state.step, finished), flush=True)
    return 0


def ending(recipe: Recipe, step: int, finished: bool) -> str:
    if finished:
        return f"{recipe.run_dir}: all {step:,} updates are done and saved; next: dsvlm eval {recipe.run_dir}"
    done = f"{step:,} of {recipe.schedule.steps:,} updates"
    return f"{recipe.run_dir}: stopped and saved after {done}; the same command goes on"


def build_run(planned: Planned, guard: Guard, stop: StopFlag, device) -> Run:
    import torch.distributed as dist

    recipe, rank, world_size = planned.recipe, dist.get_rank(), dist.get_world_size()
    # Before anything is written or shared: the ranks agree on what they are about to train, and how.
    guard.same(start_record(planned))
    guard.together(check_zero, recipe)
    guard.first(prepare_run, planned, world_size)
    codec, checkpoint = guard.together(open_run, planned)
    decoder = guard.together(run_decoder, planned)
    guard.same({
        "tokenizer": codec.hash(), "latest checkpoint": str(checkpoint and checkpoint.name),
        "image decoder": decoder_version(decoder),
    })  # fmt: skip
    guard.first(make_run_lengths, planned, codec)
    guard.same(lengths_record(guard.together(open_lengths, planned, codec)))
    pretrained = guard.together(read_run, recipe.run_dir).get("pretrained")
    model = guard.together(begin_model, recipe, codec, checkpoint is None, pretrained)
    image_size = model.config.vision_settings["image_size"]
    loader = guard.together(make_loader, planned, codec, image_size, rank, world_size, decoder)
    manifests = hash_of(manifest_record(planned.manifests))
    state = RunState(0, recipe.seed, planned.identity.hex(), SCHEDULE_VERSION, manifests)
    if checkpoint is not None:
        state = guard.together(resumed_state, checkpoint, state)
        if planned.plan.control is not None:
            guard.together(planned.plan.control.restore, state.controller, state.step)
        guard.together(load_weights, model, checkpoint)
    if rank == 0:
        print(beginning(recipe, model, state.step, world_size), file=sys.stderr, flush=True)
    guard.together(share_experts, model, recipe)
    engine = make_engine(model.to(device), recipe)
    ema = None
    if recipe.optim.ema:
        from dsvlm.train.ema import Ema

        ema = Ema(engine, recipe.optim.ema)
    if checkpoint is not None:
        if not create_optimizer_state(engine, loader, recipe):
            raise SharedError(
                f"checkpoint {checkpoint}: its weights give gradients that are no numbers: the run has diverged. Begin "
                "another one with a lower optim.lr or a smaller optim.clip, or remove the checkpoint to go on from the "
                "one before it"
            )
        guard.together(load_optimizer, engine, ema, checkpoint, state.applied)
    metrics = guard.together(
        Metrics, recipe.run_dir, rank, state.step, recipe.schedule.steps, recipe.train.log_every
    )
    return Run(recipe, planned, guard, loader, engine, ema, metrics, stop, state, layer_names(model))


def beginning(recipe: Recipe, model, step: int, world_size: int) -> str:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    whole, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}, ZeRO {recipe.train.zero}, {recipe.train.dtype}"
    return f"{recipe.run_dir}: {whole:,} parameters, {trained:,} of them train; {ranks}; from update {step:,}"


def start_record(planned: Planned) -> dict:
    """What all ranks must agree on before the first collective of the engine, field by field."""
    recipe = planned.recipe
    manifests = {f"manifest of task {name}": manifest.hash for name, manifest in planned.manifests.items()}
    return {
        **recipe.identity(), "order of tasks": ", ".join(recipe.tasks), **recipe.execution(), **manifests,
        "schedule version": SCHEDULE_VERSION, "code version": code_version(),
        "DeepSpeed configuration": hash_of(read_ds_config(recipe)),
    }  # fmt: skip


def resumed_state(checkpoint: Path, fresh: RunState) -> RunState:
    from dsvlm.train.checkpoint import read_state

    saved = read_state(checkpoint)
    if saved.identity != fresh.identity:
        raise ValueError(  # `prepare_run` has told in which fields, but where run.json is gone
            f"checkpoint {checkpoint}: it is of another run than this recipe's; restore the recipe and "
            f"{checkpoint.parents[1] / 'run.json'}, or set output to another directory"
        )
    return replace(
        fresh, step=saved.step, bad=saved.bad, seen=saved.seen, controller=saved.controller, skipped=saved.skipped
    )


def create_optimizer_state(engine, loader: Loader, recipe: Recipe) -> bool:
    """Makes the engine allocate its optimizer state, which it does in its first step: one step at learning rate 0.

    Returns False, with nothing allocated, when the engine skipped the step.
    """
    filler = LoadedWindow(0, [[]], np.zeros(len(recipe.tasks), np.int64))
    set_lr(engine.optimizer, 0.0)
    run_window(engine, loader.batches(filler, [0.0] * len(recipe.tasks)), len(recipe.tasks), seed=0, step=0)
    return engine.was_step_applied()


def train_steps(run: Run) -> bool:
    """Runs the remaining updates; returns False when a signal ended them early."""
    recipe, steps = run.recipe, run.recipe.schedule.steps
    saved = run.state.step
    while run.state.step < steps:
        stopping = train_step(run)
        if stopping:
            break
        if run.state.step % recipe.train.save_every == 0 or run.state.step == steps:
            save(run)
            saved = run.state.step
    if run.state.step > saved:
        save(run)
    return run.state.step >= steps


def save(run: Run) -> None:
    run.guard.first(run.metrics.flush)
    if run.planned.plan.control is not None:
        run.state = replace(run.state, controller=run.planned.plan.control.pack())
    save_checkpoint(run.engine, run.guard, run.ema, run.recipe.run_dir, run.state, run.recipe.train.keep)


def train_step(run: Run) -> bool:
    """One update. Returns True, with nothing done, when a rank has been asked to stop."""
    recipe, step, clock = run.recipe, run.state.step, Clock()
    window, error = None, run.metrics.error
    try:
        window = run.loader.window(step)
    except (ValueError, OSError) as caught:
        error = str(caught)
    clock.waited()
    identity, planned = run.planned.identity, run.planned.plan.window(step)
    control = run.planned.plan.control
    own = [task.weight for task in recipe.tasks.values()]
    counts, stopping = run.guard.enter_window(
        {"step": step, "plan": mark(identity, planned), "controller": control and control.pack()},
        np.append(window.counts, teaching(window, own)) if window else np.zeros(len(recipe.tasks) + 2, np.int64),
        stop_requested(run.stop, recipe.run_dir, os.environ.get(LAUNCHED, "")),
        error,
    )
    if stopping:
        return True
    counts, groups = np.split(counts, [len(recipe.tasks)])
    if not counts.sum():
        raise SharedError(f"step {step}: none of the window's samples has anything to predict; see journal.jsonl")
    weights = target_weights(counts, own, head_indexes(recipe), recipe.schedule.normalise)
    lr = set_lr(run.engine.optimizer, lr_factor(step, recipe.schedule.steps, recipe.optim))
    batches = clock.timed(run.loader.batches(window, weights))
    sums = run_window(run.engine, batches, len(recipe.tasks), seed=recipe.seed, step=step, groups=groups.tolist())
    skipped = not run.engine.was_step_applied()
    if skipped:
        forget_gradients(run.engine)
        warn_of_skipped()
    elif run.ema is not None:
        run.ema.update(step)
    named = digest(identity, planned) if run.metrics.on else None  # O(blocks): only where it is written
    report(run, window, weights, sums, {"lr": lr, "skipped": int(skipped), "digest": named}, clock)
    return False


def warn_of_skipped() -> None:
    """On the first rank, in the same words whenever it happens: Python then shows them once."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        warnings.warn(
            "an update was skipped, for the norm of its gradient is NaN or infinite ('skipped' in metrics.jsonl is 1): "
            "weights, optimizer and averages stay as they were. If it goes on, the run has diverged: begin another one "
            "with a lower optim.lr or a smaller optim.clip",
            stacklevel=1,
        )


def report(run: Run, window: LoadedWindow, weights, sums: WindowSums, row: dict, clock: "Clock") -> None:
    """Adds up the window over ranks, writes its line and the journal; stops it above the rate of masked samples."""
    names = list(run.recipe.tasks)
    live = [draft for draft in window.drafts if not draft.reason]
    mine, routing = sums.numpy(), np.zeros(0) if sums.routing is None else sums.routing.cpu().numpy()
    total = run.guard.sum(np.concatenate((mine.ravel(), routing.ravel(), [clock.wait_share()])))
    nll, targets, right, tokens, used, slots = total[: mine.size].reshape(mine.shape)
    routing = total[mine.size : -1].reshape(routing.shape)
    events = run.loader.take_events()
    mine = [window_fingerprint(names, live), len(window.drafts) - len(live), len(window.drafts), len(events)]
    finger, bad, seen, befell = run.guard.sum(np.array(mine, np.uint64).view(np.int64)).view(np.uint64).tolist()
    state = run.state = replace(
        run.state, step=window.step + 1, bad=run.state.bad + bad, seen=run.state.seen + seen,
        skipped=run.state.skipped + row["skipped"],
    )  # fmt: skip
    seconds, world_size = clock.seconds(), run.engine.world_size
    norm = run.engine.get_global_grad_norm()
    run.metrics.write({
        "step": window.step, "loss": float((nll * weights).sum()),
        "task_loss": {n: nll[i] / targets[i] for i, n in enumerate(names) if targets[i]},
        "task_accuracy": {n: right[i] / targets[i] for i, n in enumerate(names) if targets[i]},
        "lr": row["lr"], "grad_norm": None if norm is None else float(norm), "skipped": row["skipped"], "samples": seen,
        "masked": bad, "tokens": int(tokens.sum()), "targets": int(targets.sum()),
        "useful_tokens": used.sum() / slots.sum(),
        "task_useful_tokens": {n: used[i] / slots[i] for i, n in enumerate(names) if slots[i]},
        "tokens_per_s": tokens.sum() / seconds, "seconds": seconds, "data_wait": total[-1] / world_size,
        "digest": row["digest"], "fingerprint": f"{finger:016x}", **decide(run, window.step, nll, targets),
        **routing_row(run.recipe.model.moe, run.layers, routing),
    })  # fmt: skip
    if bad or befell:
        entries = run.guard.gather(events + run.loader.journal(window))
        run.metrics.journal(entry for part in entries for entry in part)
    if state.bad >= BAD_BEFORE_STOP and state.bad > run.recipe.data.max_bad_share * state.seen:
        run.guard.first(run.metrics.flush)
        raise SharedError(
            f"step {window.step}: {state.bad} of {state.seen} samples could not be used, more than data.max_bad_share "
            f"({run.recipe.data.max_bad_share}); {run.recipe.run_dir / 'journal.jsonl'} names each with its reason. "
            "Mend the shards (dsvlm data verify), or raise the share"
        )


def decide(run: Run, step: int, nll: np.ndarray, targets: np.ndarray) -> dict:
    """Hands an update's sums over ranks to the controller; what its line in the metrics says about it."""
    control = run.planned.plan.control
    if control is None:
        return {}
    stopped = [list(run.recipe.tasks)[task] for task in control.stopped()]
    if control.observe(step, nll, targets):
        run.loader.forget()
    return {"stopped": stopped}


def window_fingerprint(names: list[str], live: list[Draft]) -> int:
    """Sum mod 2^64 over samples that teach: equal for every world size, another when one is lost or repeated."""
    parts = []
    for task, name in enumerate(names):
        numbers = [(d.epoch, d.sample, d.crc) for d in live if d.task == task]
        if numbers:
            parts.append(fingerprint(name, *np.array(numbers, np.int64).T))
    return combine(parts)


class Clock:
    """Time of one update, and how much of it was spent waiting for data."""

    def __init__(self):
        self.start = self.mark = time.perf_counter()
        self.waiting = 0.0

    def waited(self) -> None:
        self.waiting += time.perf_counter() - self.mark

    def timed(self, items):
        """Passes items on; the time until each is there counts as waiting."""
        iterator = iter(items)
        while True:
            self.mark = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited()
            yield item

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def wait_share(self) -> float:
        return self.waiting / max(self.seconds(), 1e-9)
