"""Cross-field checks of a recipe: everything that can be known wrong before a file is read or a rank is started."""

import math
import re

from dsvlm.config import ModelConfig, Recipe, TaskConfig, nearest

LARGEST = 1e6  # of a learning rate, a weight decay or a gradient norm: infinity and slips of the keyboard are above
MOST = 2**31  # of steps, samples and sizes: their products stay below 2^63
LONGEST_WAIT = 10**7  # seconds
TASK_TYPES = ("caption", "vqa", "classify", "locate", "detect", "pair", "conversation")


def check_recipe(recipe: Recipe) -> None:
    """Raises one ValueError naming the path, the value found and what to change."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", recipe.name):
        raise ValueError(f"name: {recipe.name!r} must be letters, digits, '.', '_' or '-': it names a directory")
    if not 0 <= recipe.seed < 2**63:
        raise ValueError(f"seed: {recipe.seed} must be between 0 and 2^63 - 1")
    for name, task in recipe.tasks.items():
        check_task(name, task)
    if not any(task.weight for task in recipe.tasks.values()):
        raise ValueError("tasks.*.weight: 0 for every task, so nothing would be learnt; raise one of them")
    check_schedule(recipe)
    check_model(recipe.model)
    check_numbers(recipe)
    check_loading(recipe)
    check_padding(recipe)
    talks = [name for name, task in recipe.tasks.items() if task.type == "conversation"]
    if talks and recipe.model.decoder.kind == "t5":
        raise ValueError(
            f"tasks.{talks[0]}.type: conversation, but an encoder-decoder (t5) writes one answer; use another "
            "model.decoder.kind, or the type vqa for single turns"
        )
    if recipe.text.tokenizer == "train" and recipe.model.decoder.pretrained:
        raise ValueError(
            "text.tokenizer: 'train' makes a new vocabulary, but model.decoder.pretrained has learnt another one; "
            "set text.tokenizer to the checkpoint's directory"
        )


def one_of(path: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{path}: {value!r} is none of {', '.join(map(str, allowed))}{nearest(str(value), allowed)}")


def at_least(path: str, value, least) -> None:
    if not value >= least:  # also refuses NaN
        raise ValueError(f"{path}: {value} must be at least {least}")


def counted(path: str, value: int, least: int) -> None:
    at_least(path, value, least)
    if value > MOST:
        raise ValueError(f"{path}: {value} must be at most {MOST}")


def within(path: str, value, low, high) -> None:
    if not low <= value <= high:
        raise ValueError(f"{path}: {value} must be between {low} and {high}")


def check_task(name: str, task: TaskConfig) -> None:
    path = f"tasks.{name}"
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise ValueError(f"{path}: a task's name starts with a letter and has letters, digits, '_' or '-' only")
    one_of(f"{path}.type", task.type, TASK_TYPES)
    counted(f"{path}.samples", task.samples, 1)
    if task.quota is not None:
        counted(f"{path}.quota", task.quota, 1)
    within(f"{path}.weight", task.weight, 0.0, LARGEST)
    if task.type == "pair":
        at_least(f"{path}.classes", task.classes, 2)
    elif task.classes:
        raise ValueError(f"{path}.classes: only tasks of type pair have a head; remove it from this {task.type} task")


def check_schedule(recipe: Recipe) -> None:
    schedule = recipe.schedule
    one_of("schedule.strategy", schedule.strategy, ("mixed", "per_rank", "unified", "accumulate"))
    one_of("schedule.rounds", schedule.rounds, ("task", "packed"))
    one_of("schedule.normalise", schedule.normalise, ("token", "task"))
    for field, least in (("steps", 1), ("block", 1), ("group", 1), ("samples", 0), ("chunk", 0)):
        counted(f"schedule.{field}", getattr(schedule, field), least)
    if schedule.strategy in ("unified", "per_rank"):
        if schedule.samples < 1:
            raise ValueError(
                f"schedule.samples: {schedule.samples}; strategy {schedule.strategy} draws tasks, "
                "so set how many samples a window holds"
            )
    elif schedule.samples or schedule.chunk:
        raise ValueError(
            f"schedule.samples, schedule.chunk: strategy {schedule.strategy} takes each task's own samples; remove them"
        )
    if schedule.strategy == "per_rank" and (schedule.chunk < 1 or schedule.samples % schedule.chunk):
        raise ValueError(
            f"schedule.chunk: {schedule.chunk} must be a divisor of schedule.samples ({schedule.samples}): "
            "each chunk of samples draws its own task"
        )


def check_model(model: ModelConfig) -> None:
    one_of("model.decoder.kind", model.decoder.kind, ("opt", "llama", "mpt", "t5"))
    one_of("model.positions", model.positions, ("default", "sinusoidal"))
    counted("model.loss_chunk", model.loss_chunk, 1)
    for part, config in (("vision", model.vision), ("decoder", model.decoder)):
        if not config.pretrained and not config.config:
            raise ValueError(f"model.{part}: give either config (sizes of a new model) or pretrained (a directory)")
    if model.embedding_std is not None:
        within("model.embedding_std", model.embedding_std, 0.0, LARGEST)
    if model.embedding_std is not None and model.decoder.pretrained:
        raise ValueError("model.embedding_std: would destroy the embeddings of model.decoder.pretrained; remove it")
    if model.positions == "sinusoidal" and (model.decoder.pretrained or model.vision.pretrained):
        raise ValueError("model.positions: sinusoidal would overwrite a checkpoint's positions; use default")
    for path, patterns in (("freeze", model.freeze), ("train", model.train), ("lora.targets", lora_targets(model))):
        for pattern in patterns:
            check_pattern(f"model.{path}", pattern)
    if model.lora:
        at_least("model.lora.r", model.lora.r, 1)
        if not model.lora.targets:
            raise ValueError(
                "model.lora.targets: empty, so no layer would get an adapter; name linear layers of the decoder, for "
                "example ['q_proj$', 'v_proj$'], or remove model.lora"
            )
        within("model.lora.dropout", model.lora.dropout, 0.0, 0.9)
    if model.moe:
        check_moe(model)
    check_attention(model)
    check_sizes(model)


def check_moe(model: ModelConfig) -> None:
    moe = model.moe
    for part in moe.where:
        one_of("model.moe.where", part, ("vision", "connector", "decoder"))
    if not moe.where:
        raise ValueError("model.moe.where: empty; name vision, connector or decoder, or remove model.moe")
    if "decoder" in moe.where and model.decoder.kind not in ("opt", "llama"):
        raise ValueError(
            f"model.moe.where: decoders of kind {model.decoder.kind} take no experts; use opt or llama, or take it out"
        )
    if not re.fullmatch(r"(every|last) [1-9][0-9]*", moe.layers):
        raise ValueError(f"model.moe.layers: {moe.layers!r} must be 'every N' or 'last N', N at least 1")
    for part, config in (("vision", model.vision), ("decoder", model.decoder)):
        blocks = config.config.get("num_hidden_layers")
        if part in moe.where and blocks is not None and not config.pretrained:  # a checkpoint's are counted when read
            positive_integer(f"model.{part}.config.num_hidden_layers", blocks)
            picked(moe.layers, blocks, part)
    within("model.moe.experts", moe.experts, 2, 1024)
    within("model.moe.k", moe.k, 1, moe.experts)
    within("model.moe.capacity_factor", moe.capacity_factor, 0.0, LARGEST)
    within("model.moe.noise", moe.noise, 0.0, LARGEST)
    one_of("model.moe.policy", moe.policy, ("bpr", "position", "probs"))
    one_of("model.moe.group", moe.group, ("sample", "unit"))
    if moe.renormalize and moe.k == 1:
        raise ValueError("model.moe.renormalize: at k 1 every weight would be 1 and no router would learn; raise k")
    for name, losses in (("image", moe.image), ("text", moe.text)):
        for field in ("importance", "load", "z", "local_entropy", "global_entropy", "tau"):
            within(f"model.moe.{name}.{field}", getattr(losses, field), 0.0, LARGEST)
        if losses.load > 0 and moe.noise == 0:
            raise ValueError(f"model.moe.{name}.load: chances are those of noise; set model.moe.noise, or load to 0")
        if losses.global_entropy > 0 and not 0 < losses.tau <= math.log(moe.experts):
            raise ValueError(
                f"model.moe.{name}.tau: {losses.tau} asks for {math.exp(min(losses.tau, 9)):.3g} experts of "
                f"{moe.experts}; global_entropy needs 0 < tau <= log(experts) = {math.log(moe.experts):.4g}"
            )


def picked(layers: str, count: int, part: str) -> list[int]:
    """Blocks of the `count` of a part: "every n" is n - 1, 2n - 1, ...; "last n" the last n of odd index, as V-MoE.

    ValueError when there are none.
    """
    word, number = layers.split()
    found = list(range(int(number) - 1, count, int(number)))
    if word == "last":
        found = list(range(1, count, 2))[-int(number) :]
    if not found:
        raise ValueError(
            f"model.moe.layers: {layers!r} picks none of the {count} blocks that model.{part} has: \"every N\" is "
            'block N - 1, 2N - 1, ..., and "last N" counts blocks 1, 3, 5, ... only; use "every 1" for all, or take '
            f"{part} out of model.moe.where"
        )
    return found


def check_attention(model: ModelConfig) -> None:
    """How a part attends follows from its kind: recipes that name it are told what they get."""
    kind = model.decoder.kind
    facts = {
        "vision": "the tower attends by PyTorch's attention, with attention_dropout by dsvlm_git",
        "decoder": f"decoders of kind {kind} always attend by dsvlm_git",
    }
    if kind == "t5":
        facts["decoder"] = (
            "T5 attends by Hugging Face's own attention (eager): it adds a learned position bias to the scores, which "
            "dsvlm_git does not have; use opt, llama or mpt for that"
        )
    for part, config in (("vision", model.vision.config), ("decoder", model.decoder.config)):
        for key in ("attn_implementation", "_attn_implementation"):
            if key in config:
                raise ValueError(f"model.{part}.config.{key}: {config[key]!r} is no choice: {facts[part]}; remove it")


def lora_targets(model: ModelConfig) -> tuple[str, ...]:
    return model.lora.targets if model.lora else ()


def check_sizes(model: ModelConfig) -> None:
    """Sizes of a new model that cannot fit together."""
    vision = model.vision.config
    if not model.vision.pretrained:
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"):
            if key not in vision:
                raise ValueError(f"model.vision.config.{key}: missing; a new vision tower needs it")
            positive_integer(f"model.vision.config.{key}", vision[key])
        if vision["image_size"] % vision["patch_size"]:
            raise ValueError(
                f"model.vision.config.patch_size: {vision['patch_size']} does not divide "
                f"image_size {vision['image_size']}"
            )
        if vision["hidden_size"] % vision["num_attention_heads"]:
            raise ValueError(
                f"model.vision.config.num_attention_heads: {vision['num_attention_heads']} does not divide "
                f"hidden_size {vision['hidden_size']}"
            )
    decoder = model.decoder.config
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"):
        if key in decoder:
            positive_integer(f"model.decoder.config.{key}", decoder[key])
    width, heads = decoder.get("hidden_size"), decoder.get("num_attention_heads")
    if width and heads and width % heads:
        raise ValueError(f"model.decoder.config.num_attention_heads: {heads} does not divide hidden_size {width}")


def check_room(recipe: Recipe) -> None:
    """Whether the longest row, one image and text.max_length tokens, has a position for each token.

    Asked of a run that begins: earlier versions did not ask it, and their runs are evaluated and gone on with as they
    are.
    """
    vision, decoder = recipe.model.vision.config, recipe.model.decoder
    if decoder.kind not in ("opt", "llama") or decoder.pretrained or recipe.model.vision.pretrained:
        return  # other positions have no end; a checkpoint's table is checked when it is read
    tokens = tokens_of_image(vision["image_size"], vision["patch_size"])
    room = decoder.config.get("max_position_embeddings", 2048)
    if tokens + recipe.text.max_length > room:
        raise ValueError(
            f"text.max_length: {recipe.text.max_length} tokens after {tokens} image tokens are more than "
            f"model.decoder.config.max_position_embeddings ({room}); raise the latter, or lower text.max_length"
        )


def check_padding(recipe: Recipe) -> None:
    """Whether windows can be cut by length as train.micro_tokens, train.buckets and tasks.*.pack say."""
    train, vision = recipe.train, recipe.model.vision
    counted("train.micro_tokens", train.micro_tokens, 0)
    counted("train.buckets", train.buckets, 1)
    packed = [name for name, task in recipe.tasks.items() if task.pack]
    if packed and not train.micro_tokens:
        raise ValueError(
            f"tasks.{packed[0]}.pack: how long a packed row may be is train.micro_tokens; set it, or remove pack"
        )
    if packed and recipe.model.decoder.kind == "t5":
        raise ValueError(f"tasks.{packed[0]}.pack: an encoder-decoder (t5) has no packed rows; remove pack")
    if packed and recipe.schedule.mixes and len(packed) < len(recipe.tasks):
        other = next(name for name in recipe.tasks if name not in packed)
        raise ValueError(
            f"tasks.{other}.pack: false, but tasks.{packed[0]}.pack is true, and tasks share units under strategy "
            f"{recipe.schedule.strategy} with rounds {recipe.schedule.rounds}; give all tasks the same pack"
        )
    if not train.micro_tokens:
        return
    within("text.max_length", recipe.text.max_length, 4, 2**16 - 1)  # what files of lengths hold
    tokens = 0 if vision.pretrained else tokens_of_image(vision.config["image_size"], vision.config["patch_size"])
    if tokens + recipe.text.max_length > train.micro_tokens:  # a checkpoint's images are counted when it is read
        raise ValueError(
            f"train.micro_tokens: {train.micro_tokens} cannot hold a row of {tokens} image tokens and "
            f"{recipe.text.max_length} text tokens (text.max_length); raise the former to at least "
            f"{tokens + recipe.text.max_length}, or lower the latter"
        )


def tokens_of_image(image_size: int, patch_size: int) -> int:
    """Positions that an image takes in a row: one for each patch, and the class token."""
    return (image_size // patch_size) ** 2 + 1


def positive_integer(path: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: expected an integer of at least 1, found {value!r}")


def check_pattern(path: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{path}: {pattern!r} is not a regular expression: {error}") from None


def check_numbers(recipe: Recipe) -> None:
    optim, train = recipe.optim, recipe.train
    one_of("optim.schedule", optim.schedule, ("cosine", "linear", "constant"))
    one_of("train.dtype", train.dtype, ("fp32", "bf16"))
    one_of("train.zero", train.zero, (0, 1, 2, 3))
    if train.dtype == "bf16" and train.zero == 0:
        raise ValueError("train.zero: 0 has no fp32 gradients for train.dtype bf16; use train.zero 1 or more")
    if train.expert_parallel:
        check_expert_parallel(recipe)
    for index, group in enumerate(optim.groups):
        path = f"optim.groups[{index}]"
        check_pattern(f"{path}.match", group.match)
        for field in ("lr", "weight_decay"):
            if getattr(group, field) is not None:
                within(f"{path}.{field}", getattr(group, field), 0.0, LARGEST)
    if optim.warmup > recipe.schedule.steps:
        raise ValueError(
            f"optim.warmup: {optim.warmup} updates are more than schedule.steps ({recipe.schedule.steps}): "
            "the learning rate would never reach optim.lr"
        )
    if len(optim.betas) != 2:
        raise ValueError(f"optim.betas: expected two numbers, found {list(optim.betas)}")
    for index, beta in enumerate(optim.betas):
        within(f"optim.betas[{index}]", beta, 0.0, 0.999999)
    within("optim.floor", optim.floor, 0.0, 1.0)
    within("optim.ema", optim.ema, 0.0, 0.999999)
    for path, value, least in (
        ("optim.warmup", optim.warmup, 0), ("train.micro_batch", train.micro_batch, 1),
        ("train.save_every", train.save_every, 1), ("train.keep", train.keep, 1),
        ("train.log_every", train.log_every, 1),
        ("data.cache_mb", recipe.data.cache_mb, 0), ("text.vocab_size", recipe.text.vocab_size, 32),
        ("text.max_length", recipe.text.max_length, 4), ("eval.samples", recipe.eval.samples, 1),
        ("eval.batch", recipe.eval.batch, 1), ("eval.max_new_tokens", recipe.eval.max_new_tokens, 1),
    ):  # fmt: skip
        counted(path, value, least)
    within("train.timeout", train.timeout, 1, LONGEST_WAIT)
    for field in ("lr", "clip", "weight_decay"):
        within(f"optim.{field}", getattr(optim, field), 0.0, LARGEST)
    within("optim.eps", optim.eps, 1e-30, 1.0)
    within("text.bins", recipe.text.bins, 2, 4096)
    within("data.max_bad_share", recipe.data.max_bad_share, 0.0, 1.0)


def check_expert_parallel(recipe: Recipe) -> None:
    moe, path = recipe.model.moe, "train.expert_parallel"
    if moe is None:
        raise ValueError(f"{path}: the model has no experts; set model.moe, or remove this")
    if recipe.train.zero > 2:
        raise ValueError(f"{path}: train.zero 3 cuts the experts' weights up already; use train.zero 2, or remove this")
    if "decoder" in moe.where or moe.group == "unit" or moe.capacity_factor == 0:
        raise ValueError(
            f"{path}: ranks exchange as many rows as experts have room for, so model.moe needs a capacity_factor "
            "above 0, group sample, and vision or connector alone in where"
        )


def check_loading(recipe: Recipe) -> None:
    """How samples are read: the decoder, and that ranks wait long enough for one whose workers hang."""
    data = recipe.data
    one_of("data.decoder", data.decoder, ("auto", "pillow", "simplejpeg"))
    within("data.workers", data.workers, 0, 256)
    within("data.worker_timeout", data.worker_timeout, 1, LONGEST_WAIT)
    counted("data.remote_cache_mb", data.remote_cache_mb, 0)
    if data.workers and 3 * data.worker_timeout > recipe.train.timeout:
        raise ValueError(
            f"data.worker_timeout: {data.worker_timeout} seconds are more than a third of train.timeout "
            f"({recipe.train.timeout}): a sample is masked when reading it has hung twice, and the other ranks must "
            f"still wait then; lower it, or raise train.timeout to {3 * data.worker_timeout}"
        )
