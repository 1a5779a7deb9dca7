"""Every key of a run's configuration: type, default, meaning, choices, range and unit. The documentation prints it."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from pipeline.config.key import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Form, Range, key
from pipeline.registry import names

ADVANTAGES = names("pipeline.objectives.advantages")
LOSSES = names("pipeline.objectives.losses")
SHAPINGS = names("pipeline.objectives.shaping")
CONTROLLERS = names("pipeline.entropy.controllers")
ACTUATORS = names("pipeline.entropy.actuators")
VERIFIERS = ("auto", *names("pipeline.rewards.verifiers"))
ENVIRONMENTS = names("pipeline.rollout.environments")
# Positions of a context, or of the KV cache, that no sample may count on. SGLang ends an answer 2 before the end and
# says "length" (Scheduler.init_req_max_new_tokens). It refuses to read, as for an answer that was held, what
# reaches into the last 6 (max_req_input_len of TpModelWorker.get_worker_info).
SGLANG_KEEPS_FREE = 6
EVALUATIONS_FOR_A_BAND = 5  # at least: entropy.band.schedule=auto, `isentrope entropy target`
# Each with the library that it needs.
SINKS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "prometheus": "prometheus_client"}

FOLDER_NAME = Form(r"[\w.+-][\w.+ -]*", "cannot be part of a folder name", "use letters, digits, '_', '-', '.' and '+'")
MODULE_FUNCTION = Form(
    r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*",
    "nor module:function",
    "name your own as module:function, e.g. my_package.rewards:score, with the module beside the configuration file",
)


@dataclass
class ModelConfig:
    """The policy that is trained."""

    hf_path: str = key(
        MISSING,
        "Hugging Face folder (config.json, *.safetensors, tokenizer.json)",
        path="read",
    )
    dtype: str = key("fp32", "parameter type of the learner", choices=("fp32", "bf16"))


@dataclass
class OptimizerConfig:
    """Adam as megatron-core implements it (decoupled weight decay)."""

    lr: float = key(1e-6, "peak learning rate", range=POSITIVE)
    min_lr: float = key(0.0, "learning rate at the end of a linear or cosine schedule", range=NOT_NEGATIVE)
    lr_schedule: str = key("constant", "learning rate after the warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: int = key(0, "linear warm-up from 0", range=NOT_NEGATIVE, unit="steps")
    betas: list[float] = key([0.9, 0.95], "Adam's beta1 and beta2", range=SHARE)
    eps: float = key(1e-8, "Adam's epsilon", range=POSITIVE)
    weight_decay: float = key(0.0, "decoupled weight decay", range=NOT_NEGATIVE)
    clip_grad: float = key(
        1.0, "global gradient norm above which gradients are scaled down; 0: never", range=NOT_NEGATIVE
    )
    distributed: bool = key(False, "shard optimizer state over data-parallel ranks (Megatron's distributed optimizer)")
    overlap_grad_reduce: bool = key(False, "reduce gradients over DP while the backward pass goes on")
    overlap_param_gather: bool = key(
        False,
        "gather parameters over DP while the forward pass of the next mini-batch goes on (distributed, "
        "with overlap_grad_reduce)",
    )


@dataclass
class PrecisionConfig:
    """FP8 in the learner's linear layers. Names as megatron-core's."""

    fp8: str = key(
        "none", "number format of the linear layers", choices={"none": "", "e4m3": "", "hybrid": "gradients in e5m2"}
    )
    fp8_recipe: str = key(
        "blockwise",
        "how FP8 scales are chosen",
        choices={"delayed": "", "tensorwise": "current scaling", "blockwise": "", "mxfp8": "Blackwell"},
    )
    fp8_param: bool = key(
        False, "keep the linear layers' parameters in FP8; the distributed optimizer holds them in float32"
    )
    fp8_margin: int = key(0, "delayed: scales leave this many powers of two unused", range=NOT_NEGATIVE)
    fp8_amax_history_len: int = key(
        1024, "delayed: micro-batches whose largest entries are remembered", range=COUNT, unit="micro-batches"
    )
    fp8_amax_compute_algo: str = key(
        "max", "delayed: which of that history sets the scale", choices=("max", "most_recent")
    )
    first_last_layers_bf16: bool = key(False, "leave the first and last layers in bf16 (not with delayed)")
    num_layers_at_start_in_bf16: int = key(
        1, "first_last_layers_bf16: layers at the start", range=NOT_NEGATIVE, unit="layers"
    )
    num_layers_at_end_in_bf16: int = key(
        1, "first_last_layers_bf16: layers at the end", range=NOT_NEGATIVE, unit="layers"
    )
    fp8_dot_product_attention: bool = key(False, "attention in FP8 too (delayed and tensorwise)")
    emulate: bool = key(
        False, "round as the recipe does, in torch, on any device: to measure FP8's effect, not for speed"
    )

    def in_bf16(self, layer: int, layers: int) -> bool:
        """Whether layer ``layer`` of ``layers`` (numbers of the whole model) is left out of FP8."""
        start, end = self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16
        return self.first_last_layers_bf16 and not start <= layer < layers - end


# Hugging Face names of the linear layers that can have an adapter.
LORA_MODULES = (
    *("q_proj", "k_proj", "v_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),  # latent attention
    "o_proj",
    *("in_proj_qkvz", "in_proj_ba"),  # delta nets: Qwen3-Next's,
    *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),  # and Qwen3.5's
    "out_proj",
    *("gate_proj", "up_proj", "down_proj"),  # of dense layers, and of routed and shared experts
    *("w1", "w3", "w2"),  # Mixtral's names of these
)
ALL_LINEAR = "all-linear"


@dataclass
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): they are trained, and the model's own weights are not."""

    rank: int = key(0, "columns of each adapter; 0: no adapters, all weights are trained", range=NOT_NEGATIVE)
    alpha: float = key(32.0, "adapters are multiplied by alpha / rank", range=POSITIVE)
    targets: list[str] = key(
        [ALL_LINEAR],
        "Hugging Face names of the linear layers that get one",
        choices={ALL_LINEAR: "those of the following that the model has", **dict.fromkeys(LORA_MODULES, "")},
    )

    @property
    def scale(self) -> float:
        """What the product of an adapter's matrices is multiplied by."""
        return self.alpha / self.rank


@dataclass
class LearnerConfig:
    """Megatron learner: layout, batching, optimizer. Names as megatron-core's."""

    tensor_model_parallel_size: int = key(1, "TP: ranks that share each layer's matrices", range=COUNT)
    pipeline_model_parallel_size: int = key(1, "PP: stages of layers", range=COUNT)
    data_parallel_size: int = key(1, "DP: replicas; learner processes = TP x CP x PP x DP", range=COUNT)
    context_parallel_size: int = key(1, "CP: ranks that share each sequence, two chunks of it each", range=COUNT)
    expert_model_parallel_size: int = key(
        1, "EP: groups of ranks that the experts are dealt to; EP x ETP divides TP x CP x DP", range=COUNT
    )
    expert_tensor_parallel_size: int = key(
        0, "ETP: ranks that share each expert's matrices; 0: as TP", range=NOT_NEGATIVE
    )
    sequence_parallel: bool = key(
        False,
        "divide norms and residuals over the TP ranks along the sequence (needs TP > 1; models with "
        "experts need it there)",
    )
    virtual_pipeline_model_parallel_size: int = key(
        1, "VPP: model chunks per stage, interleaved for a smaller pipeline bubble (needs PP > 1)", range=COUNT
    )
    num_layers_in_first_pipeline_stage: int = key(
        0, "layers of the first stage; 0: as the others", range=NOT_NEGATIVE, unit="layers"
    )
    num_layers_in_last_pipeline_stage: int = key(
        0, "layers of the last stage; 0: as the others", range=NOT_NEGATIVE, unit="layers"
    )
    recompute_granularity: str = key(
        "none",
        "activations that are computed again in the backward pass",
        choices={"none": "", "selective": "attention", "full": "whole layers"},
    )
    recompute_method: str = key(
        "uniform",
        "full: which layers",
        choices={"uniform": "groups of recompute_num_layers", "block": "only the first so many"},
    )
    recompute_num_layers: int = key(
        1, "full: layers per group (uniform), or recomputed layers of a stage (block)", range=COUNT, unit="layers"
    )
    transformer_impl: str = key(
        "auto",
        "whose transformer layers",
        choices={
            "auto": "transformer_engine where it is installed and a GPU is there",
            "local": "megatron-core's own",
            "transformer_engine": "",
        },
    )
    precision: PrecisionConfig = key(PrecisionConfig(), "FP8")
    lora: LoraConfig = key(LoraConfig(), "low-rank adapters")
    routing_replay: str = key(
        "off",
        "experts of the tokens of samples, in models that have experts",
        choices={
            "off": "the learner's router chooses",
            "routes": "those that the engine chose when it drew the sample (R3, arXiv 2510.11370); the router is "
            "trained all the same",
        },
    )
    moe_router_bias_update_rate: float = key(
        0.0,
        "what a step adds to, or takes from, each expert's bias toward equal use of all experts (auxiliary-loss-free "
        "balance, arXiv 2408.15664: 0.001); 0: biases stay as loaded; for routers that have them",
        range=NOT_NEGATIVE,
    )
    moe_z_loss_coeff: float = key(
        0.0,
        "coefficient of the routers' z-loss (ST-MoE, arXiv 2202.08906: 0.001), the mean square of the logarithm of the "
        "sum of a token's exponentials; padding counts",
        range=NOT_NEGATIVE,
    )
    log_prob_kernel: str = key(
        "auto",
        "how log-probs and entropies come from hidden states",
        choices={
            "auto": "fused",
            "torch": "logits of all targets kept whole: a quarter less projection work",
            "fused": "output projection and log-probs block by block: logits never whole, computed again backward; "
            "Triton on a GPU, else torch",
            "triton": "the same on a GPU",
        },
    )
    micro_batch_size: int = key(
        32,
        "rows per forward-backward pass and DP rank; changes memory and speed, never results",
        range=COUNT,
        unit="rows",
    )
    max_tokens_per_micro_batch: int = key(
        0,
        "tokens computed per forward-backward pass and DP rank, padding included: micro-batches of equal"
        " work, not equal rows; changes memory and speed, never results; 0: micro_batch_size rows",
        range=NOT_NEGATIVE,
        unit="tokens",
    )
    packing: bool = key(
        False,
        "join the rows of a micro-batch into one sequence without padding (needs max_tokens_per_micro_batch)",
    )
    updates_per_step: int = key(
        1,
        "optimizer steps per rollout batch (mini-batches); 1 is strictly on-policy",
        range=Range(1, 2**16),
        unit="updates",
    )
    bucket_mib: int = key(
        512, "what a process sends and receives at once in a weight update, at most", range=COUNT, unit="MiB"
    )
    optimizer: OptimizerConfig = key(OptimizerConfig(), "optimizer and schedule")

    @property
    def bucket_bytes(self) -> int:
        """``bucket_mib`` in bytes."""
        return self.bucket_mib * 2**20

    @property
    def world_size(self) -> int:
        """Learner processes: TP x CP x PP x DP."""
        replica = self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size
        return replica * self.data_parallel_size


@dataclass
class SglangConfig:
    """The SGLang server that an engine launches and supervises."""

    dtype: str = key(
        "auto", "type of weights and KV cache", choices={"auto": "the model's", "float32": "", "bfloat16": ""}
    )
    attention_backend: str = key("auto", "auto: torch_native on CPU, SGLang's own choice on GPU")
    mem_fraction_static: float = key(
        0.1,
        "share of memory for weights and KV cache; raise to 0.6-0.8 on a GPU of its own",
        range=Range(0, 1, open_low=True, open_high=True),
    )
    max_total_tokens: int = key(65536, "size of the KV cache; 0: let SGLang decide", range=NOT_NEGATIVE, unit="tokens")
    startup_timeout_s: float = key(
        300.0,
        "longest wait for a server's first answer to /health, without the time to read the weights: 1 s more per 0.1 "
        "GB",
        range=POSITIVE,
        unit="seconds",
    )
    liveness_timeout_s: float = key(
        300.0,
        "longest silence of a server that owes answers (none to /health, or requests to run and nothing generated);"
        " then it is started again. Generating itself has no deadline",
        range=Range(60),  # SGLang's own /health gives up after 20 s
        unit="seconds",
    )
    extra_args: list[str] = key([], "further arguments of sglang.launch_server, e.g. ['--log-level', 'info']")

    @property
    def expert_groups(self) -> int:
        """Into how many groups of ranks a server divides experts, by its own arguments."""
        parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--ep-size", "--expert-parallel-size", "--ep", dest="ep", type=int, default=1)
        return parser.parse_known_args(self.extra_args)[0].ep


@dataclass
class CutsConfig:
    """Main samples drawn uniformly among the likeliest tokens (CUTS; native engine)."""

    share: float = key(
        0.0, "of each group that is drawn so, its last samples; 0: none, 0.5 is Mixed-CUTS", range=Range(0, 1)
    )
    top: int = key(5, "likeliest tokens among which is drawn", range=COUNT, unit="tokens")
    floor: float = key(0.03, "least probability of such a token", range=Range(0, 1, open_high=True))
    warmup_tokens: int = key(5, "first tokens of a response that are drawn as usual", range=NOT_NEGATIVE, unit="tokens")


@dataclass
class RolloutConfig:
    """How responses are drawn. Main rows are always drawn at T=1 from the untruncated policy."""

    engine: str = key(
        "native", "what draws responses", choices={"native": "in process, torch", "sglang": "real server over HTTP"}
    )
    engines: int = key(1, "number of engines; seeds, hence samples, do not depend on it (native)", range=COUNT)
    tensor_parallel_size: int = key(1, "TP of each SGLang engine", range=COUNT)
    placement: str = key(
        "disaggregated",
        "where engines live",
        choices={
            "disaggregated": "engines on GPUs of their own",
            "colocated": "on the learner's, whose memory they leave while it trains; SGLang on CUDA",
        },
    )
    prompts_per_step: int = key(16, "distinct prompts per step", range=Range(1, 2**20), unit="prompts")
    samples_per_prompt: int = key(
        16, "main samples per prompt (the group of GRPO)", range=Range(2, 2**16), unit="samples"
    )
    sampling_rounds: int = key(
        1,
        "dynamic sampling (DAPO): draw further prompts, in at most so many rounds, until "
        "prompts_per_step groups hold different rewards; 1: take the first",
        range=COUNT,
        unit="rounds",
    )
    cuts: CutsConfig = key(CutsConfig(), "samples drawn uniformly among the likeliest tokens")
    staleness: int = key(
        0,
        "updates between drawing a step's samples, beside the training, and training on them; 0: strictly on-policy; "
        "docs/rollouts.md",
        range=Range(0, 16),
        unit="updates",
    )
    partial: bool = key(
        False,
        "hold responses at a weight update and go on with the new weights; false: the weights wait until they have "
        "ended; docs/rollouts.md",
    )
    deterministic: bool = key(
        False, "partial: hold responses after a number of tokens, not by the clock, so that runs repeat bit for bit"
    )
    max_prompt_tokens: int = key(
        1024, "prompts longer than this are dropped when the data is read, and counted", range=COUNT, unit="tokens"
    )
    max_new_tokens: int = key(
        1024, "length limit of a response, in episodes of each answer", range=COUNT, unit="tokens"
    )
    stop: list[str] = key([], "texts that end a response, beside the model's own end; they stay in it")
    stop_token_ids: list[int] = key(
        [], "token ids that end a response, beside the model's own; they stay in it", range=NOT_NEGATIVE
    )
    weight_transport: str = key(
        "plan",
        "how weights reach an SGLang server",
        choices={
            "plan": "each rank's slices, straight from the learner's ranks",
            "disk": "a Hugging Face folder",
        },
    )
    weight_dtype: str = key(
        "auto",
        "what weights are sent in each step",
        choices={
            "auto": "the model's type",
            "fp8": "matrices of attention, feed-forward and experts in 128x128 blocks",
        },
    )
    weight_sync_timeout_s: float = key(
        600.0,
        "longest phase of a weight update on an engine; one that is stuck longer is started again",
        range=POSITIVE,
        unit="seconds",
    )
    sglang: SglangConfig = key(SglangConfig(), "settings of engine=sglang")

    @property
    def colocated(self) -> bool:
        """Whether engines share the learner's GPUs."""
        return self.placement == "colocated"


@dataclass
class SourceConfig:
    """Where prompts come from."""

    kind: str = key(
        "countdown",
        "where prompts come from",
        choices={
            "countdown": "built in",
            "reasoning_gym": "",
            "jsonl": "a file",
            "environment": "the problems that a verifiers or openenv environment brings",
        },
    )
    task: str = key(
        "pm4", "countdown: pm<n> (+,-) or cd<n> (+,-,*) with 2 to 5 digits; reasoning_gym: dataset name, e.g. chain_sum"
    )
    path: str = key(
        "", "jsonl: file with one object a line: id, prompt or messages, answer, verifier, meta", path="read"
    )
    size: int = key(1000, "reasoning_gym: items to generate; openenv: seeds of its resets", range=COUNT, unit="prompts")
    seed: int = key(
        0,
        "reasoning_gym: seed of the items, openenv: the first seed; not the run's, so that every run is asked the same",
        range=SEED,
    )
    params: dict[str, Any] = key({}, "reasoning_gym: dataset parameters, e.g. {min_terms: 2, max_terms: 3}")


@dataclass
class EnvironmentConfig:
    """What the model's answers meet: nothing, or an environment with tools and several turns; docs/environments.md."""

    name: str = key("single", "the environment; single: one answer to a prompt, no environment", choices=ENVIRONMENTS)
    id: str = key(
        "", "function: your own, as module:function; verifiers: the environment's name; openenv: its server's address"
    )
    params: dict[str, Any] = key(
        {},
        "tools: reply, the text that follows a wrong answer of a model without a template; verifiers: arguments of its "
        "load_environment; openenv: answer and observation, fields of its actions (message) and observations (all)",
    )
    max_turns: int = key(8, "answers of the model in an episode, at most", range=COUNT, unit="turns")
    max_tokens: int = key(
        0,
        "longest conversation, prompt, tools and template included; 0: rollout.max_prompt_tokens + max_turns x "
        "rollout.max_new_tokens",
        range=NOT_NEGATIVE,
        unit="tokens",
    )
    turn_timeout_s: float = key(
        60.0, "longest time of the environment's own code between two answers", range=POSITIVE, unit="seconds"
    )
    timeout_s: float = key(
        600.0,
        "longest time of the environment's own code in an episode; the model's answers do not count",
        range=POSITIVE,
        unit="seconds",
    )
    concurrency: int = key(
        32,
        "episodes at a time of an environment that runs a user's code, each in a process of its own",
        range=Range(1, 4096),
        unit="episodes",
    )


@dataclass
class DataConfig:
    """Training and held-out prompts."""

    source: SourceConfig = key(SourceConfig(), "prompt source")
    environment: EnvironmentConfig = key(EnvironmentConfig(), "tools and several turns; docs/environments.md")
    held_out: float = key(0.1, "share of the source kept for evaluation, chosen by prompt id", range=SHARE)
    order: str = key(
        "shuffled",
        "order of the training prompts",
        choices={
            "shuffled": "anew in every epoch, by the run's seed",
            "source": "the source's, e.g. easy ones first; countdown: problems of few different digits first",
        },
    )
    chat_template: bool = key(False, "render prompts with the tokenizer's chat template")
    chat_template_file: str = key(
        "", "Jinja file used in place of the model's own chat template; needs chat_template", path="read"
    )
    chat_template_kwargs: dict[str, Any] = key(
        {}, "variables for the chat template, e.g. {enable_thinking: false}; needs chat_template"
    )
    system_prompt: str = key("", "system message put before every prompt when chat_template is on")
    examples: list[list[str]] = key(
        [], "[[question, answer], ...] put before every prompt as earlier turns (few-shot); needs chat_template"
    )
    verifier: str = key(
        "auto",
        "what grades an answer; auto: the source's own; module:function: your own",
        choices=VERIFIERS,
        form=MODULE_FUNCTION,
    )
    verifier_folder: str = key(
        "",
        "where modules of your own verifiers and environments are looked for, before the working directory; empty: the "
        "folder of the configuration file that names them, else of the configuration file",
        path="read",
    )
    verifier_timeout_s: float = key(
        5.0, "longest verification; then the sample is marked and gets reward 0", range=POSITIVE, unit="seconds"
    )
    verifier_budget_s: float = key(
        0.0,
        "longest verification of all that is judged at once (a step's responses) by one verifier; the rest is marked "
        "and gets reward 0; 0: verifier_timeout_s x (6 + a twentieth of the responses per process)",
        range=NOT_NEGATIVE,
        unit="seconds",
    )
    verifier_workers: int = key(
        0,
        "processes for verifiers that run outside the driver (math, reasoning_gym); 0: as many as CPUs",
        range=NOT_NEGATIVE,
        unit="processes",
    )
    on_verifier_error: str = key(
        "stop",
        "what happens when no response of a step could be judged (the verifier raises, hangs, or gives no reward in "
        "[0, 1])",
        choices={"stop": "end the run, exit code 2", "mark": "go on: such samples get reward 0 and are counted"},
    )


@dataclass
class CorrectionConfig:
    """Importance weights against the mismatch of engine and learner at equal weights; docs/methods.md."""

    kind: str = key(
        "none",
        "what is done to the weight",
        choices={
            "none": "",
            "tis": "truncate the weight pi_learner / pi_engine at high",
            "mis": "0 outside low to high",
        },
    )
    level: str = key(
        "token", "what the weight belongs to", choices={"token": "", "sequence": "the product over the response"}
    )
    high: float = key(2.0, "largest weight", range=Range(1))
    low: float = key(0.0, "mis: smallest weight that is not masked", range=Range(0, 1))


@dataclass
class OverlongConfig:
    """Responses near or at the length limit (DAPO)."""

    filter: bool = key(False, "responses cut off at max_new_tokens carry no loss and count in no denominator")
    buffer: int = key(
        0,
        "last tokens before max_new_tokens over which the reward falls; 0: no punishment",
        range=NOT_NEGATIVE,
        unit="tokens",
    )
    penalty: float = key(1.0, "what the reward has lost at max_new_tokens", range=POSITIVE)


@dataclass
class PassAtKConfig:
    """advantage=pass_at_k."""

    samples: int = key(4, "k: samples of which one must be right", range=COUNT)
    share: float = key(0.5, "of the pass@k advantage in the sum with GRPO's; 1: pass@k alone", range=FRACTION)


@dataclass
class AvspoConfig:
    """advantage=avspo."""

    variant: str = key(
        "paper",
        "where virtual rewards are added",
        choices={
            "paper": "beside every group of equal rewards",
            "code": "the public code's: one beside each group, where a whole step's rewards are all 0 or all 1",
        },
    )
    virtual: int = key(1, "K: virtual rewards beside a group; variant=paper", range=COUNT)


@dataclass
class McpoConfig:
    """loss=mcpo."""

    delta: float = key(0.01, "k3 below which a mastered prompt's token costs nothing", range=NOT_NEGATIVE, unit="nats")
    beta: float = key(1.0, "weight of the hinge", range=NOT_NEGATIVE)


@dataclass
class CeGppoConfig:
    """loss=ce_gppo: gradient that a clipped token keeps, as a multiple of the one at the bound."""

    beta_low: float = key(0.5, "of tokens below the range with a negative advantage", range=NOT_NEGATIVE)
    beta_high: float = key(1.0, "of tokens above the range with a positive advantage", range=NOT_NEGATIVE)


@dataclass
class KlCovConfig:
    """loss=kl_cov."""

    fraction: float = key(2e-3, "share of tokens, those of highest covariance, that are penalised", range=FRACTION)
    coef: float = key(1.0, "weight of |log pi - log pi_old| on them", range=POSITIVE)


@dataclass
class HtpoConfig:
    """loss=htpo."""

    difficulty: float = key(0.6, "accuracy below which a prompt is hard", range=Range(0, 1))
    high_entropy: float = key(0.2, "share of a response's tokens that are its high-entropy ones", range=FRACTION)
    skip_low: float = key(
        0.006, "hard prompt, correct: share of the low-entropy tokens, the lowest, that carry no loss", range=FRACTION
    )
    skip_high: float = key(
        0.02, "easy prompt, correct: share of the high-entropy tokens, the highest, that carry no loss", range=FRACTION
    )


@dataclass
class ClipCovConfig:
    """token_shaping clip_cov."""

    fraction: float = key(2e-4, "share of tokens that carry no loss", range=FRACTION)
    low: float = key(1.0, "covariance above which a token may be drawn", range=NOT_NEGATIVE)
    high: float = key(5.0, "covariance below which a token may be drawn", range=POSITIVE)


@dataclass
class EntropyAdvConfig:
    """token_shaping entropy_adv."""

    scale: float = key(0.4, "advantage per nat of the token's entropy", range=POSITIVE, unit="per nat")
    divisor: float = key(2.0, "the addition is at most |A| / divisor", range=Range(1, open_low=True))


@dataclass
class HighEntropyConfig:
    """token_shaping high_entropy."""

    fraction: float = key(0.2, "share of tokens, those of highest entropy, that carry the loss", range=FRACTION)


@dataclass
class StareConfig:
    """token_shaping stare."""

    target: float = key(0.3, "mean entropy below which it acts", range=POSITIVE, unit="nats per token")
    fraction: float = key(
        0.1, "share of the tokens of either sign of the advantage, the most surprising", range=FRACTION
    )
    positive: float = key(1.1, "weight of those with a positive advantage", range=Range(1))
    negative: float = key(1.0, "weight of those with a negative one; the paper's variant C2 has 0.9", range=Range(0, 1))


@dataclass
class RlrtConfig:
    """token_shaping rlrt."""

    mix: float = key(0.5, "share of the advantage that the teacher modulates", range=FRACTION)
    clip: float = key(0.2, "furthest that the modulation goes from 1", range=FRACTION)


@dataclass
class ObjectiveConfig:
    """The policy loss on the main rows."""

    advantage: str = key("grpo", "how a group's rewards become advantages; docs/methods.md", choices=ADVANTAGES)
    aggregation: str = key(
        "token_mean",
        "how token losses become one number",
        choices={
            "token_mean": "",
            "sequence_mean": "mean over tokens, then over sequences",
            "dr_grpo": "sum / max_new_tokens",
        },
    )
    loss: str = key("ppo", "policy loss; docs/methods.md", choices=LOSSES)
    token_shaping: list[str] = key(
        [], "what changes single tokens' advantages and weights, in this order; docs/methods.md", choices=SHAPINGS
    )
    clip_low: float = key(0.2, "lower clip range of the ratio", range=Range(0, 1, open_low=True))
    clip_high: float = key(0.2, "upper clip range; 0.28 is DAPO's clip-higher", range=POSITIVE)
    dual_clip: float = key(
        0.0, "upper bound c of -A*r for negative advantages (0: off; DAPO uses 10)", range=NOT_NEGATIVE
    )
    kl_coef: float = key(
        0.0,
        "weight of KL(policy || reference), k3 estimator, main rows only; reference = the starting weights",
        range=NOT_NEGATIVE,
    )
    old_log_probs: str = key(
        "engine",
        "of rows that older weights drew: what the ratio is taken to",
        choices={
            "engine": "the policy that drew each token, as the engines tell it",
            "learner": "the policy that the update starts from; objective.correction makes up for the rest (decoupled "
            "PPO)",
        },
    )
    max_age: int = key(
        0,
        "with rollout.partial: tokens drawn by weights more than so many updates old carry no policy loss; 0: all do",
        range=NOT_NEGATIVE,
        unit="updates",
    )
    correction: CorrectionConfig = key(CorrectionConfig(), "correction of the train-inference mismatch")
    overlong: OverlongConfig = key(OverlongConfig(), "responses near or at the length limit")
    pass_at_k: PassAtKConfig = key(PassAtKConfig(), "advantage=pass_at_k")
    avspo: AvspoConfig = key(AvspoConfig(), "advantage=avspo")
    mcpo: McpoConfig = key(McpoConfig(), "loss=mcpo")
    ce_gppo: CeGppoConfig = key(CeGppoConfig(), "loss=ce_gppo")
    kl_cov: KlCovConfig = key(KlCovConfig(), "loss=kl_cov")
    htpo: HtpoConfig = key(HtpoConfig(), "loss=htpo")
    clip_cov: ClipCovConfig = key(ClipCovConfig(), "token_shaping clip_cov")
    entropy_adv: EntropyAdvConfig = key(EntropyAdvConfig(), "token_shaping entropy_adv")
    high_entropy: HighEntropyConfig = key(HighEntropyConfig(), "token_shaping high_entropy")
    stare: StareConfig = key(StareConfig(), "token_shaping stare")
    rlrt: RlrtConfig = key(RlrtConfig(), "token_shaping rlrt")


@dataclass
class BandConfig:
    """Target band of policy entropy, nats per token."""

    low: float = key(0.27, "lower edge at step 0", range=POSITIVE, unit="nats per token")
    high: float = key(0.33, "upper edge at step 0", range=POSITIVE, unit="nats per token")
    schedule: str = key(
        "constant",
        "how the band moves",
        choices={
            "constant": "",
            "linear": "",
            "cosine": "",
            "piecewise": "",
            "auto": "at the lowest entropy that still kept pass@auto_k on held-out prompts, once that is known; "
            "until then low and high are the lowest band there can be, and above it nothing acts",
        },
    )
    end_low: float = key(
        0.0, "linear and cosine: lower edge at schedule_steps", range=NOT_NEGATIVE, unit="nats per token"
    )
    end_high: float = key(
        0.0, "linear and cosine: upper edge at schedule_steps", range=NOT_NEGATIVE, unit="nats per token"
    )
    hold_steps: int = key(
        0, "linear and cosine: steps at the first edges before the move begins", range=NOT_NEGATIVE, unit="steps"
    )
    schedule_steps: int = key(
        0,
        "linear and cosine: steps from the first edges to the last; 0: the rest of the run",
        range=NOT_NEGATIVE,
        unit="steps",
    )
    points: list[list[float]] = key([], "piecewise: [[step, low, high], ...], each in force from its step on")
    auto_k: int = key(16, "auto: the k of pass@k, one of evaluation.k", range=COUNT, unit="samples")


@dataclass
class PiConfig:
    """The default controller: PI on ln H with anti-windup. 0 for kp means: the actuator's measured default."""

    kp: float = key(
        0.0, "proportional gain, actuator units per unit of ln H; 0: default of the actuator", range=NOT_NEGATIVE
    )
    ki: float = key(0.0, "integral gain per step; used when kp is set", range=NOT_NEGATIVE)
    adapt: bool = key(
        True,
        "learn while running how strongly the command acts, from an eighth to eight times what kp is "
        "made for; false: kp as it is",
    )
    ema: float = key(0.7, "weight of the past in the filtered entropy (0: no filter)", range=SHARE)
    slew: float = key(0.0, "largest change of the command per step in actuator units; 0: unlimited", range=NOT_NEGATIVE)
    setpoint_ramp: float = key(
        0.0,
        "largest change of the set-point per step, in ln H, starting at the first reading; 0: no ramp",
        range=NOT_NEGATIVE,
        unit="ln H per step",
    )
    dead_band: float = key(0.0, "|ln(H*/H)| below which the error counts as 0", range=NOT_NEGATIVE, unit="ln H")
    saturation_steps: int = key(
        5, "steps at a limit, in the error's direction, before the state is 'saturated'", range=COUNT, unit="steps"
    )
    split_range: bool = key(False, "take more auxiliary prompts while saturated (resample only)")


@dataclass
class SkyworkConfig:
    """controller=skywork."""

    step: float = key(1e-4, "change of the coefficient per step", range=POSITIVE, unit="per step")
    upper: float = key(0.005, "largest coefficient", range=POSITIVE)


@dataclass
class AentConfig:
    """controller=aent."""

    rate: float = key(
        1e-3, "change of the coefficient per step and nat outside the band", range=POSITIVE, unit="per nat and step"
    )
    least: float = key(1e-5, "smallest coefficient", range=NOT_NEGATIVE)
    most: float = key(0.01, "largest coefficient", range=POSITIVE)


@dataclass
class EntropicConfig:
    """controller=entropic."""

    kp: float = key(1.0, "coefficient per nat of error", range=NOT_NEGATIVE, unit="per nat")
    ki: float = key(0.01, "coefficient per nat of error and step", range=NOT_NEGATIVE, unit="per nat and step")


@dataclass
class EntropyConfig:
    """Entropy control: which law, acting through what, toward which band."""

    controller: str = key(
        "pi",
        "law that sets the command; constant: entropy.command; none: plain GRPO; docs/methods.md",
        choices=CONTROLLERS,
    )
    actuator: str = key("reweight", "what the command acts through; METHODS in docs/methods.md", choices=ACTUATORS)
    band: BandConfig = key(BandConfig(), "target band")
    alpha: float = key(
        1.0,
        "weight of the positive term (resample, reweight, fc, dcpo); 0 reproduces GRPO bit for bit",
        range=NOT_NEGATIVE,
    )
    positive_mean: str = key(
        "positives",
        "what the positive term is averaged over",
        choices={
            "positives": "tokens of correct rows",
            "samples": "all rows drawn, the paper's G'",
            "main": "alpha times what a main row weighs",
        },
    )
    command: float = key(0.0, "controller=constant: the actuator's command, in its own unit", range=NOT_NEGATIVE)
    command_min: float = key(
        0.0,
        "lower limit of the command, below 0 for high_prob and surprisal only; 0: the law's or the actuator's own "
        "(for those two: only if command_max is 0 too, else 0 is the limit)",
        range=Range(-1),
    )
    command_max: float = key(0.0, "upper limit of the command; 0: as for command_min", range=NOT_NEGATIVE)
    repeated_prompts: int = key(
        0,
        "held-out prompts answered once at every step with the same seeds: their entropy varies by 1 % "
        "where a step's own varies by 5 to 9 %, and the controller acts on it; 0: none; e.g. 32",
        range=NOT_NEGATIVE,
        unit="prompts",
    )
    band_of: str = key(
        "step",
        "whose entropy the controller holds in the band",
        choices={
            "step": "the rows of each step",
            "repeated": "repeated_prompts, the same at every step: the policy alone moves it, not a mix of prompts "
            "that grows harder or easier; entropy/mean may then leave the band",
        },
    )
    auxiliary_prompts: int = key(4, "resample: prompts drawn again at T+ each step", range=COUNT, unit="prompts")
    auxiliary_samples: int = key(16, "resample: samples per auxiliary prompt", range=COUNT, unit="samples")
    auxiliary_replaces: bool = key(
        False, "resample: as many main rows as there are positives carry no loss, evenly spread (AEPO)"
    )
    auxiliary_max_prompts: int = key(
        0,
        "resample with split_range: most auxiliary prompts; 0: all prompts of the step",
        range=NOT_NEGATIVE,
        unit="prompts",
    )
    pi: PiConfig = key(PiConfig(), "gains of controller=pi")
    skywork: SkyworkConfig = key(SkyworkConfig(), "controller=skywork")
    aent: AentConfig = key(AentConfig(), "controller=aent")
    entropic: EntropicConfig = key(EntropicConfig(), "controller=entropic")


@dataclass
class EvaluationConfig:
    """pass@k and friends on held-out prompts, at T=1."""

    every: int = key(0, "steps between evaluations; 0: only at the start and the end", range=NOT_NEGATIVE, unit="steps")
    at_start: bool = key(True, "evaluate before the first step")
    at_end: bool = key(True, "evaluate after the last step")
    beside_training: bool = key(
        False,
        "draw an evaluation while the learner trains on the next step, whose weights wait for it; false: it waits",
    )
    prompts: int = key(256, "held-out prompts to use at most", range=COUNT, unit="prompts")
    samples: int = key(32, "samples per prompt (n of pass@k)", range=COUNT, unit="samples")
    k: list[int] = key([1, 4, 16], "the k of pass@k; each at most `samples`")
    temperature: float = key(1.0, "sampling temperature of the evaluation", range=POSITIVE)


@dataclass
class CheckpointConfig:
    """Resumable state."""

    every: int = key(50, "steps between checkpoints; 0: only at the end", range=NOT_NEGATIVE, unit="steps")
    keep_last: int = key(2, "complete checkpoints to keep", range=COUNT, unit="checkpoints")


@dataclass
class WandbConfig:
    """Weights & Biases."""

    project: str = key("isentrope", "project")
    entity: str = key("", "user or team; empty: your default one")
    group: str = key("", "group; empty: none")
    mode: str = key(
        "online",
        "where records go",
        choices={"online": "", "offline": "files below the run folder, for `wandb sync` later"},
    )


@dataclass
class MlflowConfig:
    """MLflow."""

    tracking_uri: str = key("", "tracking server or file:// folder; empty: <run_dir>/mlruns")
    experiment: str = key("isentrope", "experiment")


@dataclass
class PrometheusConfig:
    """The endpoint that Prometheus scrapes, on the driver's node."""

    host: str = key("127.0.0.1", "address to listen on; 0.0.0.0 for a Prometheus on another machine")
    port: int = key(9108, "port of /metrics", range=Range(1, 65535))
    targets: str = key(
        "",
        "folder where a file names this endpoint while it runs, for Prometheus's file_sd_configs; empty: none",
        path="written",
    )


@dataclass
class AlertsConfig:
    """Which alerts are raised, and who is told."""

    rules: str = key(
        "",
        "folder with further rules, or the shipped ones changed (a file of the same name); empty: the shipped ones",
        path="read",
    )
    off: list[str] = key([], "names of rules that are not wanted, e.g. [reward_drop]")
    webhook_file: str = key(
        "",
        "file that holds the URL (a secret) to which alerts are posted, in the form that Slack takes; empty: none",
        path="read",
    )
    mail: str = key("", "address that alerts are mailed to with the node's sendmail; empty: none")
    slurm_comment: bool = key(False, "put the newest alert into the Slurm job's comment")


@dataclass
class StallConfig:
    """When a run that stands still is helped."""

    factor: float = key(
        20.0,
        "a step, an evaluation or a checkpoint counts as stalled after m + factor * sqrt(m * min(m, 60 s)), "
        "where m is the median of its kind in this process; 0: never",
        range=NOT_NEGATIVE,
    )
    min_seconds: float = key(
        600.0,
        "but at least after so long; stands for m where nothing of the kind, as the start, has ended before",
        range=POSITIVE,
        unit="seconds",
    )
    action: str = key(
        "restart",
        "what is done about a stall",
        choices={
            "report": "the stacks of every process, and an event",
            "restart": "that, then exit with 1: a launched run goes on from its checkpoint",
        },
    )


@dataclass
class MonitoringConfig:
    """What a run writes while it runs, and who watches it."""

    samples_per_step: int = key(
        4,
        "rollouts written to samples/ each step; every tenth step a forward pass over them gives their entropies",
        range=NOT_NEGATIVE,
        unit="samples",
    )
    progress: bool = key(True, "live progress in the terminal")
    sinks: list[str] = key([], "where metrics go as well", choices=tuple(SINKS))
    wandb: WandbConfig = key(WandbConfig(), "sink wandb")
    mlflow: MlflowConfig = key(MlflowConfig(), "sink mlflow")
    prometheus: PrometheusConfig = key(PrometheusConfig(), "sink prometheus")
    alerts: AlertsConfig = key(AlertsConfig(), "alerts")
    stall: StallConfig = key(StallConfig(), "stall detection")


@dataclass
class RunConfig:
    """A whole training run."""

    name: str = key("run", "label in reports", form=FOLDER_NAME)
    run_dir: str = key("", "folder the run writes; empty: runs/<name>-<date>-<time>", path="written")
    seed: int = key(0, "seed of data order, sampling and dropout", range=SEED)
    steps: int = key(100, "training steps", range=COUNT, unit="steps")
    runtime: str = key(
        "ray",
        "what the run's parts live in",
        choices={"ray": "learner ranks and engines are Ray actors", "inline": "one process, for debugging"},
    )
    model: ModelConfig = key(ModelConfig(), "the policy")
    learner: LearnerConfig = key(LearnerConfig(), "Megatron learner")
    rollout: RolloutConfig = key(RolloutConfig(), "rollout engines")
    data: DataConfig = key(DataConfig(), "prompts and verification")
    objective: ObjectiveConfig = key(ObjectiveConfig(), "policy loss")
    entropy: EntropyConfig = key(EntropyConfig(), "entropy control")
    evaluation: EvaluationConfig = key(EvaluationConfig(), "evaluation")
    checkpoint: CheckpointConfig = key(CheckpointConfig(), "checkpoints")
    monitoring: MonitoringConfig = key(MonitoringConfig(), "events, samples, progress")

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row: prompt and response, or a whole conversation."""
        rollout, environment = self.rollout, self.data.environment
        turns = 1 if environment.name == "single" else environment.max_turns
        whole = rollout.max_prompt_tokens + turns * rollout.max_new_tokens
        return whole if environment.name == "single" else environment.max_tokens or whole

    @property
    def kept_free(self) -> int:
        """Tokens of the model's context, or of the KV cache, that the engine does not serve a sample."""
        return SGLANG_KEEPS_FREE if self.rollout.engine == "sglang" else 0

    @property
    def longest_row_words(self) -> str:
        """How ``longest_row`` comes about."""
        rollout, environment = self.rollout, self.data.environment
        if environment.name != "single" and environment.max_tokens:
            return f"data.environment.max_tokens = {environment.max_tokens} tokens"
        turns = "" if environment.name == "single" else f"data.environment.max_turns {environment.max_turns} x "
        words = f"max_prompt_tokens {rollout.max_prompt_tokens} + {turns}max_new_tokens {rollout.max_new_tokens}"
        return f"{words} = {self.longest_row} tokens"

    @property
    def room_words(self) -> str:
        """How the room of the longest row comes about."""
        return self.longest_row_words + (f", and {self.kept_free} that SGLang keeps free" if self.kept_free else "")
