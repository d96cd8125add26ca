"""From a recipe to the objects of a run, in order: manifests, plan, tokenizer, loader, model."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from dsvlm.config import Recipe, TaskConfig, nearest
from dsvlm.config_schedule import CYCLE, DRAWN, parse_points
from dsvlm.data.encode import UNFIT
from dsvlm.data.index import has_images
from dsvlm.data.loader import Loader, LoaderConfig, Source
from dsvlm.data.manifest import Manifest, check_files, join, load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.sample import Text
from dsvlm.data.tokenizer import (
    TextCodec,
    has_tokenizer,
    load_tokenizer,
    tokenizer_has_locations,
    train_tokenizer,
)
from dsvlm.data.transforms import resolve_decoder
from dsvlm.schedule import shares
from dsvlm.schedule.controller import CONTROLLERS, Controller
from dsvlm.schedule.digest import identity_bytes
from dsvlm.schedule.mixture import Phase
from dsvlm.schedule.plan import Plan, Schedule, Stream, Window
from dsvlm.schedule.strategy import deal
from dsvlm.tasks import TASK_TYPES, TaskType

TOKENIZER_TEXTS = 20_000  # per task, when a vocabulary is trained
TEXTS_AHEAD = 500  # samples


@dataclass(frozen=True)
class Planned:
    """What is known from manifests alone.

    identity: bytes that every digest of the run contains.
    """

    recipe: Recipe
    manifests: dict[str, Manifest]
    schedule: Schedule
    plan: Plan
    identity: bytes


def plan_run(recipe: Recipe) -> Planned:
    """Reads the manifests and makes the plan; no sample is read."""
    task_types(recipe)  # checks the prompts
    manifests = {name: task_manifest(recipe, name, task.shards) for name, task in recipe.tasks.items()}
    if not recipe.data.shared_shards:
        check_duplicates(manifests)
    options = recipe.schedule
    streams = tuple(
        Stream(name, manifests[name].sizes, task.samples, task.quota or task.samples)
        for name, task in recipe.tasks.items()
    )
    schedule = Schedule(
        seed=recipe.seed, strategy=options.strategy, streams=streams, rounds=options.rounds, block=options.block,
        group=options.group, samples=options.samples, chunk=options.chunk,
        phases=phase_table(recipe, [stream.size for stream in streams]),
    )  # fmt: skip
    hashes = [manifest.hash for manifest in manifests.values()]
    identity = identity_bytes(schedule, recipe.identity_hash(), hashes)
    return Planned(recipe, manifests, schedule, Plan(schedule, make_controller(recipe)), identity)


def phase_table(recipe: Recipe, sizes: Sequence[int]) -> tuple[Phase, ...]:
    """The shares of all tasks (of `sizes` samples each) over the run; none when they are the tasks' own throughout."""
    options, mixture, drawn = recipe.schedule, recipe.schedule.mixture, recipe.schedule.strategy in DRAWN
    own = tuple(task.quota or task.samples if drawn else task.samples for task in recipe.tasks.values())
    if mixture is not None:
        phases = mixture_phases(recipe, sizes, own, mixture.cycle or CYCLE if drawn else sum(own))
    else:
        phases = [Phase(phase.start, tuple(phase.shares[name] for name in recipe.tasks)) for phase in options.phases]
        if not phases or phases[0].start:
            phases = [Phase(0, own), *phases]
    phases = shares.merged(phases)
    return () if phases == (Phase(0, own),) else phases


def mixture_phases(recipe: Recipe, sizes: Sequence[int], own: Sequence[int], total: int) -> tuple[Phase, ...]:
    """The phases of schedule.mixture, whose shares add up to `total`."""
    options, mixture = recipe.schedule, recipe.schedule.mixture
    if mixture.kind == "proportional":
        if options.strategy in DRAWN and not mixture.cycle:
            return (Phase(0, shares.epoch_quotas(sizes, options.chunk or options.samples)),)
        return shares.fixed(sizes, total)
    if mixture.kind == "temperature":
        return shares.temperature(sizes, mixture.alpha, total)
    if mixture.kind == "annealed":
        return shares.annealed(sizes, mixture.alpha, total, options.steps, mixture.parts)
    curves = {name: parse_points(f"schedule.mixture.points.{name}", text) for name, text in mixture.points.items()}
    return shares.piecewise(tuple(recipe.tasks), own, curves, total, options.steps, mixture.parts)


def make_controller(recipe: Recipe) -> Controller | None:
    if recipe.schedule.controller is None:
        return None
    settings = asdict(recipe.schedule.controller)
    return CONTROLLERS[settings.pop("kind")](**settings)


def task_manifest(recipe: Recipe, name: str, shards: str) -> Manifest:
    """The manifest of one of a task's shard sets, checked against the task.

    Raises ValueError naming the task, the directory and what to change.
    """
    task: TaskConfig = recipe.tasks[name]
    directory = join(recipe.data.root, shards)
    try:
        manifest = load_manifest(directory, recipe.data.remote_cache)
    except ValueError as error:
        raise ValueError(f"task {name}: {error}") from None
    if manifest.type != task.type:
        raise ValueError(
            f"task {name}: its shards in {directory} hold samples of type {manifest.type!r}, but tasks.{name}.type is "
            f"{task.type!r}{nearest(manifest.type, TASK_TYPES)}; change one of the two"
        )
    return manifest


def check_duplicates(manifests: dict[str, Manifest]) -> None:
    """Raises ValueError when two of the tasks' shards, or two of one task's, hold the same bytes (by their sha256)."""
    seen: dict[str, tuple[str, Manifest, str]] = {}
    for task, manifest in manifests.items():
        for shard, samples, sha256 in zip(manifest.names, manifest.sizes, manifest.sha256, strict=True):
            if sha256 in seen and samples:
                other, first, name = seen[sha256]
                raise ValueError(
                    f"task {task}: shard {shard} in {manifest.path} holds the same bytes as {name} in {first.path} "
                    f"of task {other} (sha256 {sha256[:12]}...): its samples would count twice. Remove one of the two; "
                    "or, where tasks read the same shards on purpose (each in its own order), set data.shared_shards"
                )
            seen[sha256] = (task, manifest, shard)


def task_types(recipe: Recipe) -> dict[str, TaskType]:
    """Each task's template, the same object for training and evaluation."""
    types = {}
    for name, task in recipe.tasks.items():
        try:
            types[name] = TASK_TYPES[task.type](task.prompt)
        except ValueError as error:
            raise ValueError(f"tasks.{name}.prompt: {error}") from None
    return types


def head_sizes(recipe: Recipe) -> dict[str, int]:
    """Classes of each head of the bank, in the order of the tasks."""
    return {name: task.classes for name, task in recipe.tasks.items() if task.classes}


def head_indexes(recipe: Recipe) -> list[int]:
    """Head of each task, -1 for those that write text."""
    heads = list(head_sizes(recipe))
    return [heads.index(name) if name in heads else -1 for name in recipe.tasks]


def make_tokenizer(planned: Planned) -> TextCodec:
    """Loads the recipe's tokenizer, or trains one on the prompts and targets of the training shards."""
    text = planned.recipe.text
    if text.tokenizer != "train":
        return load_tokenizer(text.tokenizer, text.bins)
    return train_tokenizer(shard_texts(planned), text.vocab_size, text.bins)


def shard_texts(planned: Planned) -> Iterator[str]:
    """Every text a model will read or write, from the first samples of each task, in order."""
    for name, kind in task_types(planned.recipe).items():
        reader = make_reader(planned.recipe, planned.manifests[name])
        for sample in range(min(len(reader), TOKENIZER_TEXTS)):
            if sample % TEXTS_AHEAD == 0:  # of remote shards: a record at a time would be a request at a time
                reader.fetch(np.arange(sample, min(len(reader), sample + TEXTS_AHEAD)), when=0)
            try:
                segments = kind.sample(reader.record(sample)).segments
                texts = [segment.text for segment in segments if isinstance(segment, Text)]
                "".join(texts).encode()  # what is no text, or none in Unicode, would end the training of the vocabulary
            except UNFIT:  # BadSample among them
                continue  # the loader masks and journals it when its turn comes
            yield from (text for text in texts if text.strip())


def make_reader(recipe: Recipe, manifest: Manifest) -> ShardReader:
    return ShardReader(manifest, recipe.data.remote_cache, recipe.data.remote_cache_mb)


def make_sources(planned: Planned) -> list[Source]:
    heads = head_indexes(planned.recipe)
    sources = []
    for (name, kind), head in zip(task_types(planned.recipe).items(), heads, strict=True):
        manifest = planned.manifests[name]
        classes = planned.recipe.tasks[name].classes
        reader = make_reader(planned.recipe, manifest)
        sources.append(Source(name, reader, kind.sample, head, has_images(manifest), classes))
    return sources


def make_loader(
    planned: Planned, codec: TextCodec, image_size: int, rank: int, world_size: int, decoder: str = ""
) -> Loader:
    """The loader of one rank; checks first that every shard is there in its full size.

    decoder: the one that the run has recorded; default: what the recipe's stands for here.
    """
    recipe = planned.recipe
    for name, manifest in planned.manifests.items():
        try:
            check_files(manifest, remote=rank == 0)
        except ValueError as error:
            raise ValueError(f"task {name}: {error}") from None
    config = loader_config(recipe, image_size, rank, world_size, decoder)
    return Loader(planned.plan, make_deal(planned, codec, world_size), make_sources(planned), codec, config)


def loader_config(recipe: Recipe, image_size: int, rank: int, world_size: int, decoder: str = "") -> LoaderConfig:
    return LoaderConfig(
        seed=recipe.seed, rank=rank, world_size=world_size, micro_batch=recipe.train.micro_batch,
        image_size=image_size, max_length=recipe.text.max_length,
        encoder_decoder=recipe.model.decoder.kind == "t5", workers=recipe.data.workers, cache_mb=recipe.data.cache_mb,
        worker_timeout=recipe.data.worker_timeout, decoder=decoder or resolve_decoder(recipe.data.decoder),
        dct_scaling=recipe.data.dct_scaling,
    )  # fmt: skip


def make_deal(planned: Planned, codec: TextCodec, world_size: int) -> Callable[[Window], Sequence]:
    """How windows are dealt to ranks: by samples (train.micro_batch), or by length where train.micro_tokens is set."""
    train = planned.recipe.train
    if not train.micro_tokens:
        return partial(deal, schedule=planned.schedule, world_size=world_size, micro_batch=train.micro_batch)
    from dsvlm.train.lengths import make_dealer, open_lengths

    return make_dealer(planned, open_lengths(planned, codec), world_size)


def make_model(recipe: Recipe, codec: TextCodec, trains: bool = True, begun: Collection[str] = ()):
    """The model with the recipe's sizes, frozen parts and adapters, in the recipe's dtype, on the CPU.

    trains: whether to refuse a recipe that could not learn its tasks; what has been trained is taken as it is; begun:
    names of parameters that will have the values of an earlier run.
    """
    import torch

    from dsvlm.model.build import build_model

    boxes = [name for name, kind in task_types(recipe).items() if kind.has_boxes] if trains else []
    model = build_model(
        recipe.model, vocab_size=codec.size, pad_id=codec.pad_id, bos_id=codec.bos_id, eos_id=codec.eos_id,
        heads=head_sizes(recipe), seed=recipe.seed, boxes=boxes, begun=begun,
        learnt=not boxes or has_learnt_locations(recipe),
    )  # fmt: skip
    if trains:
        check_positions(model.decoder.config, model.vision.tokens, recipe.text.max_length)
    return model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.train.dtype])


def check_positions(decoder, image: int, text: int) -> None:
    """ValueError when the longest row has no positions in a table whose size, or that of images, a checkpoint tells.

    One such sample would end the run in its midst. Positions that are no table have no end.
    """
    if decoder.model_type == "opt" and image + text > (room := decoder.max_position_embeddings):
        raise ValueError(
            f"text.max_length: {text} tokens after {image} image tokens are more than the decoder's "
            f"max_position_embeddings ({room}); lower text.max_length to {max(room - image, 0)}"
        )


def has_learnt_locations(recipe: Recipe) -> bool:
    """Whether the decoder's checkpoint was trained with location tokens: its tokenizer has them.

    A checkpoint without a tokenizer beside it is taken to be that of text.tokenizer.
    """
    decoder = recipe.model.decoder.pretrained
    if decoder is None:
        return True
    return tokenizer_has_locations(decoder if has_tokenizer(decoder) else recipe.text.tokenizer, recipe.text.bins)


def manifest_record(manifests: dict[str, Manifest]) -> dict[str, str]:
    return {name: manifest.hash for name, manifest in manifests.items()}


def hash_of(value) -> str:
    """Short sha256 of a JSON value, for records that ranks compare."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
