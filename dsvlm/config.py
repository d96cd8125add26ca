"""The recipe: what a run is, as frozen dataclasses filled from YAML and dotted overrides, checked before a start."""

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path

from dsvlm.config_build import build, nearest
from dsvlm.config_yaml import read_yaml

RECIPES = Path(__file__).parent / "recipes"

# Execution settings: they change how a run is computed, never what it computes. Everything else is the run's identity.
EXECUTION = (
    "output", "data.root", "data.workers", "tasks.*.shards", "tasks.*.eval", "train.micro_batch", "train.zero",
    "train.ds_config", "train.save_every", "train.keep", "train.log_every", "train.timeout", "schedule.rounds",
    "model.loss_chunk", "model.gradient_checkpointing", "eval.samples", "eval.batch", "eval.max_new_tokens",
    "data.max_bad_share", "data.cache_mb", "data.worker_timeout", "data.remote_cache", "data.remote_cache_mb",
    "data.shared_shards", "tasks.*.pack", "train.micro_tokens", "train.buckets", "train.expert_parallel",
)  # fmt: skip
# Fields that came after the first runs: at these values they are no part of the identity, and older runs keep theirs.
LATER = {
    "data.decoder": "auto", "data.dct_scaling": False, "schedule.mixture": None, "schedule.phases": [],
    "schedule.controller": None, "model.moe": None, "model.start_from": None,
}  # fmt: skip

# Files that are part of a run by their content, which run.json has (dsvlm.train.pretrained), wherever they lie.
BY_CONTENT = ("model.vision.pretrained", "model.decoder.pretrained", "model.start_from", "text.tokenizer")
LOCAL_FILES = "local files"  # what the identity has of them

CUT = ("train.micro_batch", "train.micro_tokens", "train.buckets", "schedule.rounds", ".pack")  # of windows into units


@dataclass(frozen=True)
class DataConfig:
    root: str = "data"  # directory that tasks' shard sets are relative to
    workers: int = 0  # processes per rank that read text and decode images ahead
    max_bad_share: float = 0.01  # bad samples among those seen; above it (and above 10 of them) all ranks stop
    cache_mb: int = 256  # texts and images that a process keeps, so that a small data set is read once
    worker_timeout: int = 20  # seconds in which nothing is read, after which workers are ended and started again
    decoder: str = "auto"  # auto: simplejpeg when installed | pillow | simplejpeg; the run records which it was
    dct_scaling: bool = False  # JPEGs twice as large as needed, or more, are decoded at a half, quarter or eighth
    remote_cache: str = ""  # directory on the node for parts of remote shards; default: below the temporary directory
    remote_cache_mb: int = 10_000  # of a node; 0 = no cache: what is read again is asked for again
    shared_shards: bool = False  # lets two tasks read the same shard


@dataclass(frozen=True)
class TextConfig:
    tokenizer: str = "train"  # "train": SentencePiece on the shards' text; or a local Hugging Face tokenizer directory
    vocab_size: int = 512  # of a trained tokenizer, location tokens not counted
    bins: int = 32  # location tokens per axis, shared by x and y, input and output
    max_length: int = 256  # text tokens of a sample; longer ones are masked and journalled


@dataclass(frozen=True)
class VisionConfig:
    pretrained: str | None = None  # local directory of a CLIP checkpoint
    config: dict = field(default_factory=dict)  # CLIPVisionConfig arguments when there is no checkpoint


@dataclass(frozen=True)
class DecoderConfig:
    kind: str = "opt"  # opt | llama | mpt | t5
    pretrained: str | None = None
    config: dict = field(default_factory=dict)  # OPTConfig, LlamaConfig, MptConfig or T5Config arguments


@dataclass(frozen=True)
class LoraSettings:
    targets: tuple[str, ...]  # patterns over module names inside the decoder
    r: int = 8
    alpha: int = 32
    dropout: float = 0.0


@dataclass(frozen=True)
class MoeLosses:
    """Weights of the losses that keep routing in balance, each a mean over groups and layers."""

    importance: float = 0.0  # (std / mean)^2 over experts of their summed softmax (V-MoE)
    load: float = 0.0  # the same of the chances to be chosen (V-MoE); needs noise
    z: float = 0.0  # mean of logsumexp(logits)^2 (ST-MoE)
    local_entropy: float = 0.0  # mean of a token's softmax (LIMoE): small, when routers are sure
    global_entropy: float = 0.0  # max(0, tau - entropy of the mean softmax) (LIMoE)
    tau: float = 0.0  # nats: global_entropy asks for at least exp(tau) experts


@dataclass(frozen=True)
class MoeConfig:
    """Experts instead of feed-forward networks, each of which starts as a copy of the network it replaces."""

    where: tuple[str, ...]  # vision | connector | decoder
    layers: str = "every 2"  # blocks: every n is n - 1, 2n - 1, ...; last n of 1, 3, 5, ... (V-MoE)
    experts: int = 8
    k: int = 1  # experts of a token
    capacity_factor: float = 1.05  # room of a group's experts for image tokens, 0 = no limit; text never has one
    policy: str = "bpr"  # who gets the room: bpr (Batch Priority Routing) | position | probs
    group: str = "sample"  # who competes: sample (the tokens of an image) | unit (all images of a unit: ranks count)
    noise: float = 0.0  # on logits in training, of standard deviation noise / experts (V-MoE: 1)
    renormalize: bool = False  # a token's weights add up to 1
    image: MoeLosses = MoeLosses(importance=0.005)
    text: MoeLosses = MoeLosses(importance=0.005)


@dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig
    decoder: DecoderConfig
    start_from: str | None = None  # an earlier run, whose trained weights this one begins with
    freeze: tuple[str, ...] = ()  # patterns over parameter names; one that matches nothing is an error
    train: tuple[str, ...] = ()  # patterns that make trainable again what freeze or lora froze
    lora: LoraSettings | None = None
    moe: MoeConfig | None = None
    embedding_std: float | None = None  # re-draws token embeddings of models trained from scratch
    positions: str = "default"  # "sinusoidal": learned position tables start as sinusoids
    loss_chunk: int = 1024  # targets per slice of the vocabulary projection
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class TaskConfig:
    type: str  # caption | vqa | classify | locate | detect | pair | conversation
    shards: str  # shard set of the training split, relative to data.root
    samples: int  # of this task in one window
    eval: str | None = None  # shard set of the validation split
    quota: int | None = None  # share in a cycle of drawn strategies (unified, per_rank); default: samples
    weight: float = 1.0  # of the task's loss
    prompt: str | None = None  # replaces the task type's own prompt template
    classes: int = 0  # of a head-bank task (type pair)
    pack: bool = False  # several samples in one row; needs train.micro_tokens


@dataclass(frozen=True)
class MixtureConfig:
    """Shares of the tasks: of each window's samples (accumulate, mixed), or quotas of a cycle (unified, per_rank)."""

    kind: str  # proportional (to samples) | temperature (samples^alpha) | annealed (alpha falls from 1) | piecewise
    alpha: float = 0.5  # exponent of temperature; last one of annealed
    parts: int = 10  # of the run, each with shares of its own (annealed, piecewise)
    points: dict = field(default_factory=dict)  # piecewise: task -> "step:factor,..." of its own share, linear between
    cycle: int = 0  # sum of the quotas; default: one epoch of all tasks (proportional), 100 (others)


@dataclass(frozen=True)
class PhaseConfig:
    """Shares from one step on: samples per window (accumulate, mixed) or quotas (unified, per_rank)."""

    start: int
    shares: dict[str, int]  # of every task; 0 = pauses


@dataclass(frozen=True)
class ControllerConfig:
    kind: str  # stop_and_go (12-in-1, Lu et al. 2020)
    every: int = 100  # updates between two decisions
    gap: int = 4  # a stopped task takes part in every gap-th update
    patience: int = 1  # decisions
    gain: float = 0.001  # relative; less, more than `patience` times: converged, so it stops
    loss: float = 0.005  # relative; more, when stopped: diverged, so it goes
    cooldown: int = 1  # decisions after a change, in which a task stays as it is


@dataclass(frozen=True)
class ScheduleConfig:
    steps: int
    strategy: str = "accumulate"  # mixed | per_rank | unified | accumulate
    rounds: str = "task"  # task: all ranks of a micro-step at one task | packed: at the end of one, the next one begins
    block: int = 1  # consecutive samples kept together by the permutation (64 on object storage)
    group: int = 16  # shards that are read side by side
    samples: int = 0  # per window, for drawn strategies
    chunk: int = 0  # samples that draw one task together, for per_rank
    normalise: str = "token"  # token: one target count per objective; task: one per task
    mixture: MixtureConfig | None = None  # default: tasks' own samples and quotas
    phases: tuple[PhaseConfig, ...] = ()
    controller: ControllerConfig | None = None

    @property
    def mixes(self) -> bool:
        """Whether a round may hold several tasks."""
        return self.rounds == "packed" or self.strategy in ("mixed", "per_rank")


@dataclass(frozen=True)
class GroupConfig:
    match: str  # pattern over parameter names
    lr: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "cosine"  # cosine | linear | constant
    warmup: int = 0  # updates
    floor: float = 0.0  # share of lr at the last update (cosine, linear)
    clip: float = 1.0  # gradient norm; 0 = no clipping
    ema: float = 0.0  # decay of averaged weights; 0 = none
    groups: tuple[GroupConfig, ...] = ()  # first match wins


@dataclass(frozen=True)
class TrainConfig:
    micro_batch: int = 8  # samples per rank and forward pass
    micro_tokens: int = 0  # instead: padded tokens, images and text; units then hold samples of like length
    buckets: int = 16  # row lengths that such units are padded to
    zero: int = 3
    expert_parallel: bool = False  # each rank holds some of the experts (all-to-all); zero 2 at most
    ds_config: str | None = None  # DeepSpeed JSON that replaces ds_configs/zero<N>.json
    dtype: str = "fp32"  # fp32 | bf16
    save_every: int = 500
    keep: int = 2  # complete checkpoints
    log_every: int = 10
    timeout: int = 60  # seconds a rank waits for the others at a window before it ends with an error


@dataclass(frozen=True)
class EvalConfig:
    samples: int = 200  # per task
    batch: int = 32
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Recipe:
    name: str
    model: ModelConfig
    tasks: dict[str, TaskConfig]
    schedule: ScheduleConfig
    seed: int = 0
    output: str = ""  # run directory; default runs/<name>
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.output or f"runs/{self.name}")

    def to_dict(self) -> dict:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def identity(self) -> dict:
        """What the run is, as flat `path -> value`: every field but the execution settings."""
        flat = flatten(self.to_dict())
        # experts with room for a whole unit: how the window is cut is part of what the run is
        cut = CUT if self.model.moe and self.model.moe.group == "unit" else ()
        kept = {path: value for path, value in flat.items() if not is_execution(path) or path.endswith(cut)}
        kept |= {path: LOCAL_FILES for path in BY_CONTENT if kept[path] not in (None, "train")}
        return {path: value for path, value in kept.items() if path not in LATER or value != LATER[path]}

    def identity_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def execution(self) -> dict:
        """How the run is computed: must agree between ranks, may differ between starts of one run."""
        local = ("output", "data.root")  # nodes may mount the same files at other places
        flat = flatten(self.to_dict())
        return {path: value for path, value in flat.items() if is_execution(path) and path not in local}


def is_execution(path: str) -> bool:
    parts = path.split(".")
    for pattern in EXECUTION:
        wanted = pattern.split(".")
        if len(wanted) <= len(parts) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=False)):
            return True
    return False


def flatten(tree: dict, prefix: str = "") -> dict:
    """Nested dicts as one dict with dotted paths; empty dicts and lists are leaves."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, path + ".") if isinstance(value, dict) and value else {path: value}
    return flat


def load_recipe(name: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Reads a recipe by name (shipped with the package) or path, applies `a.b=value` overrides and checks it whole."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        if str(name) not in known:
            raise ValueError(
                f"recipe: no recipe {str(name)!r}{nearest(str(name), known)}; give one of {', '.join(known)} "
                "or a path that ends in .yaml"
            )
        path = RECIPES / f"{name}.yaml"
    raw = read_raw(path)
    for override in overrides:
        apply_override(raw, override)
    return parse_recipe(raw)


def read_raw(path: Path) -> dict:
    """A recipe's file as it stands there, unchecked."""
    try:
        raw = read_yaml(path.read_bytes())
    except OSError as error:
        raise ValueError(f"recipe {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"recipe {path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"recipe {path}: expected a mapping, found {type(raw).__name__}")
    return raw


def parse_recipe(raw: dict) -> Recipe:
    from dsvlm.config_checks import check_recipe
    from dsvlm.config_schedule import check_shares

    recipe = build(Recipe, raw, "")
    check_recipe(recipe)
    check_shares(recipe)
    return recipe


def apply_override(raw: dict, override: str) -> None:
    """Sets one dotted path of the raw recipe: `tasks.vqa.weight=0.5`."""
    path, sign, text = override.partition("=")
    if not sign:
        raise ValueError(f"--set {override}: expected path=value, for example tasks.vqa.weight=0.5")
    parts = path.strip().split(".")
    node = raw
    for depth, part in enumerate(parts[:-1]):
        if depth == 1 and parts[0] == "tasks" and part not in node:
            raise ValueError(f"--set {path}: no task {part!r}{nearest(part, node)}; tasks: {', '.join(node)}")
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    try:
        node[parts[-1]] = read_yaml(text)
    except ValueError as error:
        raise ValueError(f"--set {path}: value {text!r:.80} is not valid YAML: {error}") from None
