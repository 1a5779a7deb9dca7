"""What other trainers call a key: the words to write here, and why the key is named so.

A key that does not exist is looked up here by its last part before the nearest spelling is searched.
"""

from __future__ import annotations

_LR = "write learner.optimizer.lr: the learner owns its optimizer"
_BATCH = (
    "write rollout.prompts_per_step and rollout.samples_per_prompt: a step trains on all that it drew, "
    "so the batch is their product; learner.micro_batch_size only changes memory and speed"
)
_MINI = "write learner.updates_per_step, the number of mini-batches that a step's rows are cut into"
_UNTRUNCATED = (
    "leave it out: what is trained on is drawn at T=1 from the untruncated policy, else entropy and log-probs would "
    "be another policy's"
)
_TEMPERATURE = (
    f"{_UNTRUNCATED}; the controller sets the temperature of positives, evaluation.temperature that of evaluations"
)
_STOP = "write rollout.stop (texts) or rollout.stop_token_ids"
_KL = "write objective.kl_coef, the weight of the divergence from the model that the run started with; 0: none"
_TARGET = "write entropy.band.low and entropy.band.high, in nats per token: the controller keeps entropy between them"
_BONUS = "write entropy.actuator=entropy_bonus: the controller sets the coefficient, so that entropy meets its band"
_LENGTH = "write rollout.max_new_tokens, the limit of a response in tokens"
_PROMPT_LENGTH = "write rollout.max_prompt_tokens, the limit of a prompt in tokens"
_GROUP = "write rollout.samples_per_prompt, the group that GRPO compares"
_MODEL = "write model.hf_path, a Hugging Face folder on this machine"
_STEPS = "write steps: a run is counted in steps, and the data are gone through in an order that the seed fixes"
_CLIP = "write objective.clip_low and objective.clip_high: the ratio stays within 1 - low and 1 + high"
_CLIP_GRAD = "write learner.optimizer.clip_grad"
_WARMUP = "write learner.optimizer.warmup_steps"
_REWARD = "write data.verifier=module:function, your function (prompt, text) -> reward in [0, 1]"
_DATA = "write data.source.kind=jsonl and data.source.path"
_OUT = "write run_dir"
_SAVE = "write checkpoint.every, in steps"
_EVALUATE = "write evaluation.every, in steps"
_SINKS = "write monitoring.sinks=[wandb]; also tensorboard, mlflow, prometheus"
_ENGINE = "write rollout.engine=sglang; native is for small models on a CPU"
_TP = "write learner.tensor_model_parallel_size for the learner, rollout.tensor_parallel_size for each engine"
_GPUS = "leave it out: the learner takes TP x CP x PP x DP GPUs, engines take rollout.engines x their TP"
_TEMPLATE = "write data.chat_template=true and data.chat_template_file"
_TEMPLATE_WORDS = "write data.chat_template_kwargs"
_SYSTEM = "write data.system_prompt"

MEANT = {
    **dict.fromkeys(("lr", "learning_rate", "actor_lr"), _LR),
    **dict.fromkeys(("batch_size", "train_batch_size", "global_batch_size", "rollout_batch_size"), _BATCH),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), _BATCH),
    **dict.fromkeys(("mini_batch_size", "ppo_mini_batch_size", "ppo_epochs", "num_iterations"), _MINI),
    **dict.fromkeys(("temperature", "sampling_temperature"), _TEMPERATURE),
    **dict.fromkeys(("top_p", "top_k", "min_p", "repetition_penalty"), _UNTRUNCATED),
    **dict.fromkeys(("stop", "stop_sequences", "stop_strings", "stop_words", "eos_token_id"), _STOP),
    **dict.fromkeys(("kl", "kl_coef", "kl_loss_coef", "kl_beta", "beta", "init_kl_coef"), _KL),
    **dict.fromkeys(("target_entropy", "entropy_target", "target"), _TARGET),
    **dict.fromkeys(("entropy_coef", "entropy_coeff", "entropy_loss_coef"), _BONUS),
    **dict.fromkeys(("max_tokens", "max_response_length", "response_length", "max_completion_length"), _LENGTH),
    **dict.fromkeys(("max_prompt_length", "prompt_length"), _PROMPT_LENGTH),
    **dict.fromkeys(("n", "num_generations", "group_size", "n_samples", "n_samples_per_prompt", "rollout_n"), _GROUP),
    **dict.fromkeys(("model_path", "model_name", "model_name_or_path", "pretrained", "hf_checkpoint"), _MODEL),
    **dict.fromkeys(("epochs", "num_epochs", "total_epochs", "num_train_epochs", "max_steps", "total_steps"), _STEPS),
    **dict.fromkeys(("clip", "clip_ratio", "cliprange", "clip_eps", "epsilon", "eps_clip"), _CLIP),
    **dict.fromkeys(("max_grad_norm", "grad_clip"), _CLIP_GRAD),
    **dict.fromkeys(("warmup", "warmup_ratio", "lr_warmup_steps"), _WARMUP),
    **dict.fromkeys(("reward", "reward_fn", "reward_func", "reward_funcs", "reward_function", "reward_model"), _REWARD),
    **dict.fromkeys(("dataset", "train_file", "train_files", "data_path", "prompt_data", "dataset_path"), _DATA),
    **dict.fromkeys(("output_dir", "save_dir", "out", "output"), _OUT),
    **dict.fromkeys(("save_steps", "save_every", "save_freq", "save_interval"), _SAVE),
    **dict.fromkeys(("eval_steps", "eval_every", "test_freq", "eval_interval"), _EVALUATE),
    **dict.fromkeys(("wandb", "report_to", "logger", "logging"), _SINKS),
    **dict.fromkeys(("use_vllm", "vllm", "backend", "inference_engine"), _ENGINE),
    **dict.fromkeys(("tp", "tp_size", "tensor_parallel", "tensor_parallel_size"), _TP),
    **dict.fromkeys(("num_gpus", "gpus", "n_gpus_per_node", "nnodes", "num_nodes"), _GPUS),
    **dict.fromkeys(("chat_template_path", "template", "custom_chat_template"), _TEMPLATE),
    **dict.fromkeys(("enable_thinking", "template_kwargs", "chat_kwargs"), _TEMPLATE_WORDS),
    **dict.fromkeys(("system", "system_message"), _SYSTEM),
}


def what_to_write(name: str) -> str:
    """What a key that does not exist is called here, and why; "" where nobody calls anything so."""
    return MEANT.get(name.rpartition(".")[2], "")
