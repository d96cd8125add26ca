"""What the pools' ranks run: small trainings of the tiny recipe under one engine each."""

import contextlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dsvlm.model.moe_parallel import share_of
from dsvlm.train import build, checkpoint
from dsvlm.train.ema import Ema
from dsvlm.train.engine import check_zero, make_engine
from dsvlm.train.experts import share_experts
from dsvlm.train.fragments import STATES, fragment, gather, trainable
from dsvlm.train.guard import Guard
from dsvlm.train.loop import create_optimizer_state
from dsvlm.train.optim import lr_factor, set_lr
from dsvlm.train.window import WindowSums, accumulate, target_weights, teaching


class Tiny:
    """A planned recipe with its model, on this rank; path: of a checkpoint to begin with."""

    def __init__(self, recipe, double: bool, path: str = ""):
        self.recipe = recipe
        self.planned = build.plan_run(recipe)
        codec = build.make_tokenizer(self.planned)
        self.model = build.make_model(recipe, codec)
        if double:
            self.model.double()
        size = recipe.model.vision.config["image_size"]
        self.loader = build.make_loader(self.planned, codec, size, dist.get_rank(), dist.get_world_size())
        if path:
            checkpoint.load_weights(self.model, Path(path))
        share_experts(self.model, recipe)

    def window(self, engine, step: int) -> WindowSums:
        """This rank's share of a window, weighted by counts summed over ranks."""
        window = self.loader.window(step)
        own = [task.weight for task in self.recipe.tasks.values()]
        counts = torch.from_numpy(np.append(window.counts, teaching(window, own)))
        dist.all_reduce(counts)
        counts, groups = np.split(counts.numpy(), [len(own)])
        weights = target_weights(counts, own, build.head_indexes(self.recipe), self.recipe.schedule.normalise)
        sums = WindowSums(len(self.recipe.tasks), engine.device)
        batches = self.loader.batches(window, weights)
        accumulate(engine, batches, sums, seed=self.recipe.seed, step=step, groups=groups.tolist())
        return sums


@contextlib.contextmanager
def engine_of(tiny: Tiny, threshold: int = 0):
    """An engine whose ZeRO-3 partitions every parameter (threshold 0), destroyed at the end."""
    import dsvlm.train.engine as module

    read = module.read_ds_config

    def partition_all(recipe):
        config = read(recipe)
        if recipe.train.zero == 3:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
        return config

    module.read_ds_config = partition_all
    try:
        engine = make_engine(tiny.model, tiny.recipe)
    finally:
        module.read_ds_config = read
    try:
        yield engine
    finally:
        engine.destroy()


def gradient(recipe, step: int = 0) -> dict[str, np.ndarray]:
    """The fp64 gradient of one window, as autograd hands it to the engine, summed over ranks and micro-steps."""
    return loss_and_gradient(recipe, step)[1]


def loss_and_gradient(recipe, step: int = 0) -> tuple[list[float], dict[str, np.ndarray]]:
    """This rank's sums of a window [losses first], and its `gradient`."""
    tiny = Tiny(recipe, double=True)
    tiny.model.train()
    with engine_of(tiny) as engine:
        sums: dict[str, torch.Tensor] = {}
        for name, parameter in trainable(engine):
            share = share_of(parameter)

            def add(grad, name=name, share=share):
                sums[name] = sums.get(name, 0.0) + (grad.detach().clone() if share is None else spread(grad, share))

            parameter.register_hook(add)
        losses = tiny.window(engine, step).total.tolist()
        names = [name for name, _ in trainable(engine)]
        assert sorted(sums) == sorted(names), f"no gradient for {sorted(set(names) - set(sums))}"
        total = {}
        for name in names:
            dist.all_reduce(sums[name])
            total[name] = (sums[name] / dist.get_world_size()).numpy()
        return losses, total


def spread(grad: torch.Tensor, share) -> torch.Tensor:
    """A share's gradient in its place of the whole one's, 0 elsewhere."""
    whole = grad.new_zeros(share.whole.numel())
    whole[share.start : share.start + grad.numel()] = grad.detach().flatten()
    return whole.view(share.whole)


def by_backend(recipe, backend: str) -> tuple[int, list[float], dict[str, np.ndarray]]:
    """Calls of `git_attention` with one backend, and the loss and gradient of a window."""
    import dsvlm.model.backbone.attention as module

    plain, calls = module.git_attention, []

    def attend(*args, **kwargs):
        calls.append(args[0].shape)
        return plain(*args, **kwargs, backend=backend)

    module.git_attention = attend
    try:
        found = loss_and_gradient(recipe)
        return len(calls), *found
    finally:
        module.git_attention = plain


def loads(recipe, layer: int = 0) -> list[np.ndarray]:
    """[E] choices of each expert in every micro-step of this rank's share of a window, in one layer, of images."""
    from dsvlm.model.moe_losses import SUMS

    tiny = Tiny(recipe, double=False)
    tiny.model.train()
    experts, seen = slice(len(SUMS), len(SUMS) + recipe.model.moe.experts), []
    with engine_of(tiny) as engine:
        engine.module.register_forward_hook(lambda _, args, out: seen.append(out["routing"][layer, 0, experts].numpy()))
        tiny.window(engine, 0)
    return seen


def weights_after(recipe, steps: int, drop_dummy: bool = False) -> dict[str, np.ndarray]:
    """The fp32 weights after some updates, whole, from the engine's own reduced gradients."""
    return updates(recipe, steps, drop_dummy)["weights"]


def updates(recipe, steps: int, drop_dummy: bool = False) -> dict:
    """`weights_after`, with the gradients' norms before each, and how many numbers of experts this rank keeps."""
    tiny = Tiny(recipe, double=False)
    tiny.model.train()
    if drop_dummy:
        skip_vision_without_images(tiny.model)
    with engine_of(tiny) as engine:
        norms = []
        for step in range(steps):
            set_lr(engine.optimizer, lr_factor(step, recipe.schedule.steps, recipe.optim))
            tiny.window(engine, step)
            engine.step()
            norms.append(float(engine.get_global_grad_norm() or 0.0))
        weights = {name: gather(engine, p).detach().clone().numpy() for name, p in trainable(engine)}
        experts = [p for name, p in trainable(engine) if ".experts." in name]
        kept = {"parameters": sum(p.numel() for p in experts)}
        if recipe.train.zero < 3:
            kept |= {key or "master": sum(held(fragment(engine, p, key)) for p in experts) for key in (None, *STATES)}
        return {"weights": weights, "norms": norms, "kept": kept}


def held(piece) -> int:
    return 0 if piece is None else piece[1].numel()


def skip_vision_without_images(model) -> None:
    """What a model without the constant module signature does: no image, no tower and no connector."""
    embeds = model._embeds

    def without(layout, pixels, tokens):
        if layout.is_image.any():
            return embeds(layout, pixels, tokens)
        from dsvlm.model.rows import assemble

        embed = model.get_input_embeddings()
        return assemble(layout, torch.zeros(1, 5, embed.embedding_dim), tokens, embed)

    model._embeds = without


def go_straight(recipe, directory: str, steps: int, then: int) -> tuple[str, list, dict]:
    """Saves after some updates and goes on: the checkpoint, the later losses and the averaged weights at the end."""
    tiny = Tiny(recipe, double=False)
    with engine_of(tiny) as engine:
        ema = Ema(engine, 0.9)
        for step in range(steps):
            update(tiny, engine, ema, step)
        state = checkpoint.RunState(steps, recipe.seed, "", 1, "")
        path = checkpoint.save_checkpoint(engine, Guard(60), ema, Path(directory), state, keep=1)
        losses = [update(tiny, engine, ema, step) for step in range(steps, steps + then)]
        return str(path), losses, {name: ema.gather(name, p).clone().numpy() for name, p in trainable(engine)}


def go_on(recipe, path: str, steps: int, then: int) -> tuple[list, dict]:
    """The same later losses and averages, from the checkpoint in a new engine."""
    tiny = Tiny(recipe, double=False, path=path)
    with engine_of(tiny) as engine:
        ema = Ema(engine, 0.9)
        create_optimizer_state(engine, tiny.loader, recipe)
        checkpoint.load_optimizer(engine, ema, Path(path), steps)
        losses = [update(tiny, engine, ema, step) for step in range(steps, steps + then)]
        return losses, {name: ema.gather(name, p).clone().numpy() for name, p in trainable(engine)}


def update(tiny: Tiny, engine, ema, step: int) -> list[float]:
    set_lr(engine.optimizer, lr_factor(step, tiny.recipe.schedule.steps, tiny.recipe.optim))
    sums = tiny.window(engine, step)
    engine.step()
    ema.update(step)
    total = sums.total.clone()
    dist.all_reduce(total)
    return total[0].tolist()


def disagree(record: dict, other: dict, rank: int, hosts: tuple[str, ...] = ()) -> str:
    """The error that every rank gets when one of them holds another record; hosts: of the ranks (default: this one)."""
    guard = Guard(20, host=hosts[dist.get_rank()] if hosts else "")
    try:
        guard.same(other if dist.get_rank() == rank else record)
    except ValueError as error:
        return str(error)
    return ""


def error_of_settings(recipe) -> str:
    """What is said of a JSON that DeepSpeed would not take."""
    try:
        check_zero(recipe)
    except ValueError as error:
        return str(error)
    return ""


def teller(rank: int) -> bool:
    """Whether this rank is the one that tells the error of one of them."""

    def fail():
        if dist.get_rank() == rank:
            raise OSError("broken")

    try:
        Guard(20).together(fail)
    except ValueError as error:
        assert str(error) == f"rank {rank}: broken"
        return not error.told
    return False


def enter_window_error(rank: int, hosts: tuple[str, ...] = ()) -> str:
    """The error that every rank gets when one of them cannot read its share of a window."""
    guard = Guard(20, host=hosts[dist.get_rank()] if hosts else "")
    error = "task a: shard-000001.tar is gone" if dist.get_rank() == rank else None
    try:
        guard.enter_window({"step": 3, "plan": "x"}, np.zeros(2, np.int64), False, error)
    except ValueError as caught:
        return str(caught)
    return ""


def enter_window_differs(record: dict, other: dict, rank: int) -> str:
    """The error that every rank gets at a window of which one of them has another plan."""
    guard = Guard(20)
    try:
        guard.enter_window(other if dist.get_rank() == rank else record, np.zeros(2, np.int64), False, None)
    except ValueError as error:
        return str(error)
    return ""


def exchange(hosts: tuple[str, ...]) -> dict:
    """What the guard's collectives give this rank, with the ranks on the given hosts."""
    rank = dist.get_rank()
    guard = Guard(20, host=hosts[rank])
    counts, stop = guard.enter_window({"step": 3}, np.array([rank + 1, 10]), rank == 1, None)
    return {
        "counts": counts.tolist(), "stop": stop, "share": guard.sum(np.array([0.5 * rank])).tolist(),
        "gathered": guard.gather({"rank": rank}), "first": guard.first(str, "done"),
    }  # fmt: skip
