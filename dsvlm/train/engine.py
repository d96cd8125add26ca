"""The DeepSpeed engine of a run: its JSON from ds_configs/ plus what the recipe owns."""

import json
import math
from pathlib import Path

from dsvlm.config import OptimConfig, Recipe, nearest
from dsvlm.train.optim import make_optimizer

# What the window, the recipe and the schedule decide; a JSON that sets them would contradict one of them.
OWNED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "managed_gradient_accumulation", "gradient_clipping", "optimizer", "scheduler", "fp16", "bf16", "data_types",
    "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "communication_data_type",
    "seq_parallel_communication_data_type", "torch_autocast", "amp", "zero_force_ds_cpu_optimizer",
)  # fmt: skip
KEPT = ("zero_force_ds_cpu_optimizer", False)  # what `engine_config` sets; DeepSpeed asks for it where it offloads
# Of zero_optimization: with these, what is trained is no longer what the recipe says.
INEXACT = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "zenflow")
# What is left to a JSON, for DeepSpeed passes over any other key without a word.
OPEN = (
    "zero_optimization", "zero_allow_untested_optimizer", "aio", "activation_checkpointing", "checkpoint",
    "disable_allgather", "disable_python_gc", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "log_level", "comms_logger", "flops_profiler", "tensorboard", "wandb", "comet", "csv_monitor",
)  # fmt: skip


def ds_configs() -> Path:
    """The directory ds_configs/: a wheel carries it inside the package, a checkout has it beside the package."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "ds_configs"
    return inside if inside.is_dir() else package.parent / "ds_configs"


def read_ds_config(recipe: Recipe) -> dict:
    """The DeepSpeed JSON that the recipe names, checked to leave alone what the recipe owns."""
    train = recipe.train
    path = Path(train.ds_config) if train.ds_config else ds_configs() / f"zero{train.zero}.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"train.ds_config: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"train.ds_config: {path} is not valid JSON: {error}") from None
    check_keys(path, config)
    zero = config.get("zero_optimization", {})
    if zero.get("round_robin_gradients"):
        raise ValueError(
            f"train.ds_config: {path} sets 'round_robin_gradients', with which DeepSpeed does not tell where in its "
            "optimizer a parameter is: checkpoints would be wrong; remove it from the file"
        )
    if not zero.get("compute_grad_norm", True):
        raise ValueError(
            f"train.ds_config: {path} sets 'compute_grad_norm' to false: DeepSpeed would not skip an update with "
            "a gradient that is NaN; remove it from the file"
        )
    for key in ("contiguous_gradients", "reduce_scatter"):
        if train.expert_parallel and not zero.get(key, True):
            raise ValueError(
                f"train.ds_config: {path} sets {key!r} to false, but train.expert_parallel needs it: DeepSpeed would "
                "mix the gradients of different experts; remove one of the two"
            )
    stage = zero.get("stage", 0)
    if stage != train.zero:
        raise ValueError(f"train.zero: {train.zero}, but {path} sets stage {stage}; make them agree")
    return config


def check_keys(path: Path, config) -> None:
    """That a JSON is one, and holds nothing but settings of how to compute."""
    if not isinstance(config, dict):
        raise ValueError(f"train.ds_config: {path} holds {json.dumps(config)[:40]}; expected an object: {{...}}")
    for key in config:
        if key.startswith(("_", "//")) or (key, config[key]) == KEPT:
            continue  # a comment, which DeepSpeed passes over
        if key in OWNED:
            raise ValueError(f"train.ds_config: {path} sets {key!r}, which the recipe decides; remove it from the file")
        if key not in OPEN:
            raise ValueError(
                f"train.ds_config: {path} sets {key!r}, which is no setting of how to compute{nearest(key, OPEN)}; "
                f"remove it from the file. Known: {', '.join(OPEN)}"
            )
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(
            f"train.ds_config: {path} sets 'zero_optimization' to {json.dumps(zero)[:40]}; expected an object, "
            'for example {"stage": 2}'
        )
    for key in INEXACT:
        if zero.get(key):
            raise ValueError(
                f"train.ds_config: {path} sets {key!r}, with which the same recipe would train other weights; "
                "remove it from the file"
            )


def check_zero(recipe: Recipe) -> None:
    """What DeepSpeed itself would not take of a JSON's zero_optimization: ValueError, in one line, naming the key.

    Not a part of `read_ds_config`, for DeepSpeed takes seconds to import.
    """
    from deepspeed.runtime.zero.config import get_zero_config
    from pydantic import ValidationError

    try:
        get_zero_config(read_ds_config(recipe))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *first["loc"])))
        path = recipe.train.ds_config
        raise ValueError(f"train.ds_config: {path} sets {key} to {first['input']!r:.40}: {first['msg']}") from None


def engine_config(config: dict, optim: OptimConfig, dtype: str) -> dict:
    """The whole DeepSpeed configuration: one backward call per micro-step, one step per window, sums in fp32."""
    full = dict(config) | {
        "train_micro_batch_size_per_gpu": 1,  # unused: batches are ours, and the window is normalised by its targets
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optim.clip,
        "zero_force_ds_cpu_optimizer": False,  # offload keeps torch AdamW: the same update as without it
    }
    if dtype == "bf16":
        full |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return full


def clip_and_tell(optimizer, clip: float) -> None:
    """What the engine does with ZeRO only: clips before each step, skips those without a finite norm, tells both."""
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    from dsvlm.model.moe_parallel import share_of

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def before_step(optimizer, arguments, options) -> None:
        norm = get_total_norm([p.grad for p in parameters if share_of(p) is None])
        shared = [p.grad for p in parameters if share_of(p) is not None]
        if shared:
            norm = (norm.square() + sum_over_ranks(get_total_norm(shared).square())).sqrt()
        optimizer.overflow = not norm.isfinite()
        if optimizer.overflow:
            norm.fill_(math.inf)  # as the engine's own
            for parameter in parameters:
                parameter.grad = None  # AdamW passes it over: no decay, no count
        else:
            clip_grads_with_norm_(parameters, clip or math.inf, norm)
        optimizer._global_grad_norm = norm

    optimizer.register_step_pre_hook(before_step)


def forget_gradients(engine) -> None:
    """Drops a skipped update's gradients: ZeRO-2 adds to them where it offloads in bf16 (deepspeed 0.19.8)."""
    kept = getattr(engine.optimizer, "averaged_gradients", {})
    for group in kept:
        kept[group] = None


def sum_over_ranks(value):
    import torch.distributed as dist

    dist.all_reduce(value)
    return value


def make_engine(model, recipe: Recipe):
    """Wraps the model; collective."""
    import deepspeed

    config = engine_config(read_ds_config(recipe), recipe.optim, recipe.train.dtype)
    optimizer = make_optimizer(model, recipe.optim)
    if recipe.train.zero == 0:
        config["gradient_clipping"] = 0.0
        clip_and_tell(optimizer, recipe.optim.clip)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine
