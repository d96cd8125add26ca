"""One window: the forward and backward passes of an optimizer update, normalised once before the first of them."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from dsvlm.data.collate import Batch
from dsvlm.data.drafts import LoadedWindow
from dsvlm.schedule.keys import key64


def target_weights(counts: np.ndarray, weights: Sequence[float], heads: Sequence[int], normalise: str) -> np.ndarray:
    """Weight of one target of each task in the window's loss.

    counts: [tasks] int64, the window's targets over all ranks; weights: each task's loss weight; heads: -1 or the
    task's head. `token`: one count per objective (all text tasks together, all heads together); `task`: one per task.
    Returns [tasks] float64; a task without targets weighs 0.
    """
    heads = np.asarray(heads)
    if normalise == "token":
        totals = np.where(heads < 0, counts[heads < 0].sum(), counts[heads >= 0].sum())
    else:
        totals = counts
    return np.where(totals > 0, np.asarray(weights) / np.maximum(totals, 1), 0.0)


def run_window(
    engine, batches: Iterable[Batch], tasks: int, *, seed: int, step: int, groups: Sequence[int] = (0, 0)
) -> "WindowSums":
    """Runs all micro-steps of this rank's share of a window and takes the optimizer step.

    batches: one per micro-step, the same number on every rank, each weighted by `target_weights`; groups: images and
    samples that teach in the window, over all ranks, by which losses of expert routing are normalised.
    """
    sums = WindowSums(tasks, engine.device)
    accumulate(engine, batches, sums, seed=seed, step=step, groups=groups)
    engine.step()
    return sums


def accumulate(
    engine, batches: Iterable[Batch], sums: "WindowSums", *, seed: int, step: int, groups: Sequence[int] = (0, 0)
) -> None:
    """Forward and backward of every micro-step; the engine accumulates the gradients."""
    shares = [1 / count if count else 0.0 for count in groups]
    for batch in batches:
        batch = batch.to(engine.device)
        # The same in every micro-step of every rank: dropout draws its nonces here and mixes them with sample keys.
        torch.manual_seed(key64("window", seed, step) % 2**63)
        with engine.module.keyed_dropout(batch):
            out = engine(batch)
            loss = out["loss_sum"]
            if "aux" in out:
                loss = loss + (out["aux"] * out["aux"].new_tensor(shares)).sum()
            # The engine divides by the world size; a window's loss is a sum over all ranks.
            engine.backward(loss * engine.world_size, scale_wrt_gas=False)
        sums.add(batch, out)


def teaching(window: LoadedWindow, weights: Sequence[float]) -> np.ndarray:
    """[2] int64: images and samples of this rank's share that are there to teach; weights: of the tasks' losses."""
    drafts = [draft for draft in window.drafts if not draft.reason and weights[draft.task] > 0]
    return np.array([sum(bool(draft.text.images) for draft in drafts), len(drafts)], np.int64)


class WindowSums:
    """Sums per task over a window's micro-steps, kept on the device: no synchronisation before the optimizer step.

    routing: figures of expert routing (`moe_losses.Told`) added up, None in a model without experts.
    """

    def __init__(self, tasks: int, device: torch.device):
        self.total = torch.zeros(6, tasks, dtype=torch.float64, device=device)
        self.routing: torch.Tensor | None = None

    def add(self, batch: Batch, out: dict) -> None:
        live = batch.weight > 0
        columns = [out["nll"], out["count"], out["correct"], batch.lengths, out["positions"]]
        rows = torch.where(live, torch.stack(columns).to(torch.float64), 0.0)
        # what is computed for samples that do not teach, and for fillers, is as lost as padding
        self.total.index_add_(1, batch.task, torch.cat((rows, out["slots"][None])))
        if "routing" in out:
            self.routing = out["routing"] if self.routing is None else self.routing + out["routing"]

    def numpy(self) -> np.ndarray:
        """[6, tasks] float64: nll, targets, targets predicted right, text tokens; positions in rows: used, computed."""
        return self.total.cpu().numpy()
