"""Every knob, with its one default; those of algorithms are in `offline_config.py` and `online_config.py`.

Frozen dataclasses are the only schema: a YAML file chooses values, dotted flags override them, and the help
text is the docstring that follows each field. `options.py` reads them; nothing here touches a device.
A section is what a part of the program takes as its argument, never the whole configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from rlhf_jax.algo_config import AlgorithmConfig, AlgorithmName
from rlhf_jax.config_types import (
    LARGEST_INT,
    AdapterTarget,
    AxisSize,
    Count,
    FiniteFloat,
    Fraction,
    Name,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Seed,
)
from rlhf_jax.online_config import OnlineConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run is written, and what is common to all its stages."""

    dir: Annotated[str, Field(min_length=1)]
    """Run directory; the same command with the same directory resumes."""
    seed: Seed = 0
    """Root of all randomness: initialisation, data order, sampling."""
    log_every: PositiveInt = 10
    """Steps between two printed lines (every step is in metrics.jsonl)."""
    num_samples: Count = 8
    """Completions written to samples/ at each evaluation on prompts."""
    max_skipped_updates: PositiveInt = 5
    """The run stops after so many steps in a row in which an update was skipped as not finite."""
    tensorboard: bool = False
    """Also write TensorBoard event files under the run directory."""
    compilation_cache: str = ""
    """Directory of compiled programs, which a run that is started again reads instead of compiling them; or
    `gs://BUCKET/PATH` (pip install gcsfs). On several hosts it has to be one that all of them share. Empty:
    that of JAX_COMPILATION_CACHE_DIR, or none."""
    profile_steps: Annotated[str, Field(pattern=r"^([1-9]\d{0,8}-[1-9]\d{0,8})?$")] = ""
    """Steps of each stage that are traced, such as `10-12`, by JAX's profiler into RUN/profile/STAGE; empty:
    none. The first two steps of a stage compile."""
    profile_stage: str = ""
    """The one stage whose steps are traced; empty: each."""
    profile_hosts: Literal["first", "all"] = "first"
    """Who writes traces: the first process alone, or a process of each host."""

    @property
    def profile_range(self) -> tuple[int, int]:
        """Returns the first and the last step of profile_steps, which is not empty."""
        first, _, last = self.profile_steps.partition("-")
        return int(first), int(last)

    def profiled_steps(self, stage: str) -> range:
        """Returns the steps of a stage that are traced."""
        if not self.profile_steps or self.profile_stage not in ("", stage):
            return range(0)
        first, last = self.profile_range
        return range(first, last + 1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder-only transformer: a checkpoint, or an architecture to train from scratch."""

    path: str = ""
    """Directory of a Hugging Face checkpoint, or `hub:OWNER/NAME[@REVISION]`; its config.json then decides
    the architecture."""
    hidden_size: PositiveInt = 64
    """Width of the residual stream (from scratch)."""
    num_layers: PositiveInt = 2
    """Number of blocks (from scratch)."""
    num_heads: PositiveInt = 4
    """Query heads (from scratch)."""
    num_kv_heads: PositiveInt = 4
    """Key/value heads; divides num_heads (from scratch)."""
    mlp_size: PositiveInt = 192
    """Width of the SwiGLU feed-forward (from scratch)."""
    context_length: PositiveInt = 256
    """Longest row, prompt and completion (from scratch)."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position frequencies (from scratch)."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm (from scratch)."""
    tie_embeddings: bool = True
    """Use the embedding matrix as LM head (from scratch)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which trained parameters are stored, in memory and in checkpoints."""
    remat: Literal["none", "dots", "full", "offload"] = "none"
    """What a block recomputes in the backward pass: nothing, all but matrix products, everything; `offload`:
    everything, from what went into the block, which waits in the host's memory."""
    unroll: Count = 0
    """Blocks that one turn of the loop over them computes. 0: all of at most 16 on a CPU, where a loop copies
    each block's weights and gradients and is slower, unless `remat` recomputes them; else one. More than one
    compile longer. All of them: num_layers, or more."""
    attention: Literal["auto", "xla", "flash"] = "auto"
    """How rows are attended to in training and scoring: `xla` holds the scores of all pairs of tokens;
    `flash` is a kernel that does not, splash attention on a TPU, cuDNN's on a GPU; `auto`: flash for rows of
    2048 tokens and more where the device has a kernel for them."""
    logprob_chunk: Count = 0
    """Tokens whose logits exist at once when log-probabilities are computed; 0: all of a microbatch."""
    sharing: Literal["separate", "trunk", "hydra"] = "separate"
    """What the roles of ppo have in common: nothing; `trunk`: the values are a head on the policy; `hydra`:
    all are adapters (section lora) and heads on one frozen model, which alone is the reference."""
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which frozen models are stored, heads and adapters excepted; auto: bfloat16 of the base of
    adapters, float32 of reference and reward models of their own and of a teacher."""
    frozen_memory: Literal["device", "host"] = "device"
    """Where reference and reward models of their own lie while they are not needed: on the devices, or in the
    host's memory, from which they are copied for each pass. A teacher is always on the devices."""

    @property
    def base_dtype(self) -> Literal["float32", "bfloat16"]:
        """Returns the type of the frozen model that adapters belong to."""
        return "bfloat16" if self.frozen_dtype == "auto" else self.frozen_dtype

    @property
    def role_dtype(self) -> Literal["float32", "bfloat16"]:
        """Returns the type of a teacher, and of reference and reward models of their own."""
        return "float32" if self.frozen_dtype == "auto" else self.frozen_dtype


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, trained in place of the weights of the model that a stage starts from."""

    rank: Count = 0
    """Width of the adapters; 0: none, all weights are trained."""
    alpha: PositiveFloat = 16.0
    """Adapters are scaled by alpha / rank."""
    targets: tuple[AdapterTarget, ...] = ()
    """Weights that have an adapter; empty: all of these that the model has, but experts."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    path: str = ""
    """Directory, or `hub:OWNER/NAME[@REVISION]`, of an adapter in PEFT's format that an sft or reward_model
    stage goes on with; it must be for the model that the stage starts from. Empty: a fresh one."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer: the model's own, another one, or one trained on the training text."""

    path: str = ""
    """Directory, or `hub:OWNER/NAME[@REVISION]`; empty: that of model.path, or a BPE trained on the spot when
    there is no model.path."""
    vocab_size: Annotated[int, Field(ge=260, le=LARGEST_INT)] = 512
    """Size of the vocabulary when a tokenizer is trained on the spot."""
    eos_token: str = ""
    """Token that ends a completion, where the tokenizer names none or another is meant."""
    pad_token: str = ""
    """Token that fills up rows, where the tokenizer names none; it may be the EOS token."""
    chat_template: str = ""
    """Template of conversations, where the tokenizer has none or another is meant: a .jinja file, or the
    template's text."""
    template_date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] = "2024-07-26"
    """Date that a chat template is given where it prints today's."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which records a stage reads."""

    train: str | dict[str, PositiveFloat] = "synthetic"
    """`synthetic` (the embedded task), a .jsonl[.gz] or .parquet file, a directory of datasets.save_to_disk,
    `hub:NAME[/CONFIG]:SPLIT`, `tfds:NAME[/CONFIG][:VERSION]:SPLIT`, or the beginning of a large set of the
    hub, `stream:NAME[/CONFIG]:SPLIT[:4000]`; a slice such as `file.jsonl[:4000]` takes a part. Several are
    mixed by weight: `{a.jsonl: 3, b.jsonl: 1}` takes three records of a.jsonl for one of b.jsonl."""
    eval: str = ""
    """Held-out records, in the notation of one source; must be given unless train is `synthetic`."""
    format: Literal[
        "auto",
        "text",
        "messages",
        "prompt_completion",
        "preference",
        "ranking",
        "rating",
        "unpaired",
        "prompt_only",
        "labelled",
    ] = "auto"
    """What the columns mean; `auto` tells it from their names. `labelled` makes preference pairs of texts
    with a 0/1 label."""
    columns: dict[str, str] = field(default_factory=dict)
    """Other names of the usual columns, such as {prompt: question, completion: answer}; `candidates.text` is
    the field text of each entry of the column candidates."""
    prompts: str = ""
    """For `labelled`: texts whose first prompt_tokens tokens stand before both texts of a pair; empty: no
    prompt."""
    detokenize: bool = False
    """For `labelled`: undo the spacing and lower case of old sentiment corpora, so that the text reads as
    prose."""
    prompt_tokens: Count = 0
    """Where a stage needs prompts and the records are plain text: the prompt is the first so many tokens."""
    prompt_template: str = ""
    """What stands around every prompt, such as "Question: {prompt}\\nAnswer:"; empty: nothing."""
    max_prompt_length: PositiveInt = 128
    """Longest prompt in tokens, BOS included, of a conversation up to the first turn that is learned."""
    prompt_truncation: Literal["drop", "left", "right"] = "drop"
    """What becomes of longer prompts: the record is dropped, or the prompt cut at its beginning (BOS stays)
    or its end. It is counted."""
    max_length: PositiveInt = 256
    """Longest row in tokens, prompt and completion, of SFT and reward training."""
    truncation: Literal["right", "left", "drop"] = "right"
    """What becomes of longer rows: cut at their end, without an EOS, cut at their beginning (BOS stays), or
    the record is dropped: of a pair or a ranking all of it, where one completion is too long. It is
    counted."""
    packing: bool = False
    """Several short records share a row of max_length tokens and do not see each other: less padding, the
    same loss. A pair stays together, in a row of twice max_length, and a ranking in one of as many times as
    the longest has completions. batch_size and microbatch_size then count
    rows, so that a step has more records than without, and their number varies a little."""
    length_buckets: PositiveInt = 1
    """Different lengths of batches: records of like length are put together, within 32 batches, and padded to
    one of so many lengths, for each of which the programs are compiled once."""
    cache_dir: str = ""
    """Where tokenised records of a million tokens and more are kept, to be used again by every run that would
    make the same, but for plain prompts that are cut (prompt_truncation) or are beginnings of texts
    (prompt_tokens); empty: rlhf_jax/tokens in $XDG_CACHE_HOME or ~/.cache; `none`: nowhere."""
    max_eval_records: PositiveInt = 512
    """At most so many held-out records are read."""

    @property
    def sources(self) -> dict[str, float]:
        """Returns the sources of the training records and their weights."""
        return {self.train: 1.0} if isinstance(self.train, str) else self.train


PROMPTLESS_FORMATS = ("text", "labelled")
"""Formats whose records have no prompt of their own, which data.prompt_template could stand around."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the device mesh's axes, one of which may be -1 (what is left), and what they divide."""

    slice: AxisSize = 1
    """Rows of a batch, over slices that a slower network connects; parameters are replicated."""
    data: AxisSize = -1
    """Rows of a batch; parameters are replicated."""
    fsdp: AxisSize = 1
    """Rows of a batch; parameters and optimiser state are sharded."""
    expert: AxisSize = 1
    """Rows of a batch, and the experts of a mixture."""
    sequence: AxisSize = 1
    """Tokens of a row, in training and scoring."""
    tensor: AxisSize = 1
    """Heads, feed-forward and vocabulary."""
    axes: dict[str, str | list[str]] = field(default_factory=dict)
    """Other axes for dimensions of parameters and activations, such as {embed: [fsdp, sequence]}; with
    `{vocab: none}` the vocabulary is not divided."""

    @property
    def sizes(self) -> dict[str, int]:
        """Returns the size of every axis, the outermost first."""
        return {
            "slice": self.slice,
            "data": self.data,
            "fsdp": self.fsdp,
            "expert": self.expert,
            "sequence": self.sequence,
            "tensor": self.tensor,
        }


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How many seconds processes wait for each other, and for a step."""

    initialization_timeout: PositiveInt = 300
    """Until every process of the run has come."""
    heartbeat_timeout: Annotated[int, Field(ge=10, le=LARGEST_INT)] = 60
    """Until a process that gives no sign of life counts as gone, which ends the run."""
    shutdown_timeout: PositiveInt = 60
    """Until a process that is done no longer waits for the others to be done as well."""
    step_timeout: Count = 1800
    """Until a stage in which neither a step nor the loading of its models makes progress on any process,
    compiling, saving and reading checkpoints aside, counts as hung and is ended with the stacks of all
    threads; 0: never."""
    save_timeout: PositiveInt = 1200
    """Until a checkpoint that is not written by then, on all processes, counts as failed, which ends the
    run."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser, with clipping by global norm and decoupled weight decay, and how its state is stored."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    """The optimiser. Adafactor's learning rate is relative to a matrix's root mean square. Muon is for the
    blocks' matrices and adapters; embeddings, heads, norms and biases have AdamW, at the same rate."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """What follows the warm-up: constant, a decay until the last step, or (wsd) constant and then a linear
    decay."""
    warmup_steps: Count = 0
    """Optimiser steps of linear warm-up."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of wsd: the share of the steps after the warm-up in which the rate decays."""
    end_fraction: Fraction = 0.0
    """What a decay ends at, as a share of the peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices (not of norms and biases), multiplied by the learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment (adamw, lion, muon's AdamW)."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the second moment, of Lion's momentum; 0: the optimiser's own, 0.99 for lion and 0.999
    otherwise."""
    eps: NonNegativeFloat = 0.0
    """Adam's epsilon; 0: the algorithm's own, 1e-5 for PPO and 1e-8 otherwise."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of Muon's momentum, which is Nesterov's."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which moments are stored; they are computed in float32."""
    stochastic_rounding: bool = True
    """What is stored in bfloat16 is rounded up or down by chance, right on average; to the nearest number,
    small updates would be lost."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients of a role are clipped to this global norm."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How completions are sampled."""

    max_new_tokens: PositiveInt = 64
    """Longest completion in tokens, EOS included."""
    temperature: PositiveFloat = 1.0
    """Divides the logits in sampling and in every log-probability of RL."""
    top_k: Count = 0
    """Draws from the k most likely words alone; 0: from all. Log-probabilities stay those of all words."""
    top_p: PositiveFraction = 1.0
    """Draws from the fewest words whose probabilities sum up to this, after top_k; 1: from all of them."""
    min_p: Fraction = 0.0
    """Draws no word less likely than this times the most likely one; 0: any."""
    stop_tokens: tuple[int | str, ...] = ()
    """Tokens of the vocabulary, by name or id, that end a completion as EOS does."""
    stop_strings: tuple[str, ...] = ()
    """A completion ends with the token that completes the first of these in its text. They are looked for
    whenever the program returns to the host, see steps_per_call."""
    slots: Count = 0
    """Completions that are sampled at once, over all devices, which divide them; where one ends, another
    prompt's takes its place. 0, or the batch and more: all of the batch, until the longest has ended."""
    refill_size: Count = 0
    """Prompts that a device prefills at once, before there are slots for them, as many as it has slots at
    most; 0: for a quarter of its slots."""
    devices: Count = 0
    """Devices that are set aside for rollouts; the mesh is over the others. While these update the policy,
    the next batch is sampled from what it was before: each rollout is one update old. 0: strictly on-policy,
    by turns on all devices."""
    importance: Literal["auto", "always"] = "auto"
    """Where the policy loss of a token is multiplied by its probability before the update over that when it
    was sampled: of rollouts that are one update old (auto), or always, as sampling in another type or with
    other kernels than training differs a little from it."""
    importance_cap: NonNegativeFloat = 2.0
    """The most that the loss is so multiplied by; 0: it is not."""
    steps_per_call: PositiveInt = 256
    """Decode steps, of a token of every slot, and refills after which the program returns to the host, which
    then goes on with it."""


@dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    """Where a completion's score comes from: the reward model's score and those of functions, weighted."""

    model_weight: FiniteFloat = 1.0
    """Weight of the learned reward model (the stage's reward_from)."""
    ensemble: Literal["mean", "minimum", "mean_minus_std"] = "mean"
    """Score of a reward model with several heads (reward_model.num_heads): their mean, the least one, or the
    mean less ensemble_stds of their standard deviations. Where it is not the mean, the value model starts
    from the policy and not from the reward model."""
    ensemble_stds: NonNegativeFloat = 1.0
    """See ensemble."""
    function: str | dict[str, FiniteFloat] = ""
    """Python function `package.module:name`, called as fn(prompts, completions, **columns) -> list[float]; or
    several and their weights: `{my_rewards:short: 0.5, my_rewards:polite: -1}`. Each is logged alone, as
    reward/function/short, and is no more than logged where its weight is 0."""
    function_weight: FiniteFloat = 1.0
    """Weight of the score of one function."""
    gold: str = ""
    """Python function of the same signature that only judges held-out completions; it is never trained on."""

    @property
    def functions(self) -> dict[str, float]:
        """Returns the functions and their weights."""
        if isinstance(self.function, dict):
            return self.function
        return {self.function: self.function_weight} if self.function else {}


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the train state is saved, and how many are kept."""

    every: PositiveInt = 100
    """Steps between two saves; the last step is always saved."""
    keep: PositiveInt = 2
    """Newest checkpoints kept of a stage."""


RESERVED_NAMES = ("checkpoints", "export", "profile", "samples", "tensorboard", "tokenizer")
"""Directories of a run that are not a stage's."""
PATH_OPTIONS = (
    "run.dir",
    "run.compilation_cache",
    "tokenizer.path",
    "model.path",
    "lora.path",
    "data.train",
    "data.eval",
    "data.prompts",
)
"""Options, as section.option, that may be paths; SOURCES of a stage may be paths too."""

# What a file may hold beside `stages`. The run has one of each of the first; the others a stage may override.
RUN_SECTIONS = {
    "run": RunConfig,
    "tokenizer": TokenizerConfig,
    "mesh": MeshConfig,
    "distributed": DistributedConfig,
}
STAGE_SECTIONS = {
    "model": ModelConfig,
    "lora": LoraConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "rollout": RolloutConfig,
    "rewards": RewardsConfig,
    "checkpoint": CheckpointConfig,
}


SOURCES = {"from": "start_from", "reward_from": "reward_from", "teacher_from": "teacher_from"}
"""Keys of a stage in a file that name a stage, a directory or a model of the hub, and their fields."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage, all its sections resolved: what the program is run with."""

    name: Name
    algorithm: AlgorithmName
    start_from: str
    """Stage, directory or `hub:OWNER/NAME` whose policy or trunk this stage starts from; empty: the model
    section."""
    reward_from: str
    """Stage, directory or `hub:OWNER/NAME` of the reward model; empty: none."""
    teacher_from: str = ""
    """Stage, directory or `hub:OWNER/NAME` whose policy a distill stage learns from; empty: none."""
    settings: AlgorithmConfig
    model: ModelConfig
    lora: LoraConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    mesh: MeshConfig
    distributed: DistributedConfig
    optimizer: OptimizerConfig
    rollout: RolloutConfig
    rewards: RewardsConfig
    checkpoint: CheckpointConfig
    run: RunConfig

    @property
    def is_online(self) -> bool:
        """Returns whether the stage learns from completions that its policy samples."""
        return isinstance(self.settings, OnlineConfig)

    @property
    def has_judge(self) -> bool:
        """Returns whether a reward model or a function gives its completions a score."""
        return bool(self.reward_from or self.rewards.functions)

    @property
    def sources(self) -> dict[str, str]:
        """Returns what stands in a file as from, reward_from and teacher_from, empty ones too."""
        return {key: getattr(self, field) for key, field in SOURCES.items()}

    @property
    def rests_on(self) -> set[str]:
        """Returns the stages, directories and names of the hub that this stage takes something of."""
        return {*self.sources.values(), getattr(self.settings, "ptx_from", "")} - {""}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A chain of stages, resolved."""

    run: RunConfig
    stages: tuple[StageConfig, ...]
