"""The quickstart's GRPO step in plain torch and in TRL: same model folder, prompts, verifier, sampling and update.

Each function takes the run's configuration and takes a step for every item of ``turns``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from pipeline.config.load import resolve_path
from pipeline.config.schema import RunConfig
from pipeline.data.cursor import DataCursor
from pipeline.data.sources import load_prompts
from pipeline.data.tokenizer import load_tokenizer
from pipeline.rewards.verifier import make_verifier
from pipeline.types import Prompt


def plain_torch(config: RunConfig, turns: Iterator[bool]) -> None:
    """A step as one would write it for one process: no framework, transformers' model and key-value cache."""
    step = PlainStep(config)
    for _ in turns:
        step()


class PlainStep:
    """One GRPO step on one process for each call, without entropy control."""

    def __init__(self, config: RunConfig) -> None:
        self.config, folder = config, resolve_path(config.model.hf_path)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = load_tokenizer(folder)
        self.cursor = DataCursor(prompts_of(config), config.seed)
        given = config.learner.optimizer
        options = {"lr": given.lr, "betas": tuple(given.betas), "eps": given.eps, "weight_decay": given.weight_decay}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **options)

    def __call__(self) -> None:
        """Draw, judge, learn."""
        prompts = self.cursor.take(self.config.rollout.prompts_per_step)
        prompts = [prompt for prompt in prompts for _ in range(self.config.rollout.samples_per_prompt)]
        tokens, mask, old = self.draw(torch.tensor([prompt.token_ids for prompt in prompts]))
        drawn = tokens[:, -mask.shape[1] :]
        texts = self.tokenizer.decode_batch([row[own].numpy() for row, own in zip(drawn, mask, strict=True)])
        rewards = [
            make_verifier(prompt.verifier).score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)
        ]
        groups = torch.tensor(rewards).view(-1, self.config.rollout.samples_per_prompt)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
        logits = self.model(tokens[:, :-1], use_cache=False).logits[:, -mask.shape[1] :]
        log_probs = logits.log_softmax(-1).gather(2, drawn[..., None])[..., 0]
        ratio, scale = (log_probs - old).exp(), advantages.view(-1, 1)
        clip = self.config.objective
        gain = torch.minimum(ratio * scale, ratio.clamp(1 - clip.clip_low, 1 + clip.clip_high) * scale)
        loss = -(gain * mask).sum() / mask.sum()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.learner.optimizer.clip_grad)
        self.optimizer.step()

    @torch.no_grad()
    def draw(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Responses to prompts of one length: the whole rows, which response tokens count, their log-probs."""
        given, cache = tokens, None
        running = torch.ones(len(tokens), dtype=torch.bool)
        mask, old = [], []
        for _ in range(self.config.rollout.max_new_tokens):
            said = self.model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, log_probs = said.past_key_values, said.logits[:, -1].log_softmax(-1)
            given = torch.multinomial(log_probs.exp(), 1)
            tokens = torch.cat([tokens, given], 1)
            old.append(log_probs.gather(1, given))
            mask.append(running[:, None])
            running = running & (given[:, 0] != self.model.config.eos_token_id)
        return tokens, torch.cat(mask, 1), torch.cat(old, 1)


def trl(config: RunConfig, turns: Iterator[bool]) -> None:
    """TRL's trainer, sampling with the model that it trains."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    folder, rollout, prompts = resolve_path(config.model.hf_path), config.rollout, prompts_of(config)
    rows, given = rollout.prompts_per_step * rollout.samples_per_prompt, config.learner.optimizer

    def reward(completions: list[str], number: list[int], **_: Any) -> list[float]:
        asked = [prompts[each] for each in number]
        return [make_verifier(p.verifier).score(p, text) for p, text in zip(asked, completions, strict=True)]

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = next(turns, None) is None

    with TemporaryDirectory() as scratch:
        arguments = GRPOConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=rows,
            num_generations=rollout.samples_per_prompt,
            max_completion_length=rollout.max_new_tokens,
            temperature=1.0,
            beta=0.0,
            learning_rate=given.lr,
            adam_beta2=given.betas[1],
            max_grad_norm=given.clip_grad,
            lr_scheduler_type="constant",
            max_steps=1_000_000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=config.seed,
        )
        GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": p.text, "number": i} for i, p in enumerate(prompts)]),
            processing_class=AutoTokenizer.from_pretrained(Path(folder), padding_side="left"),
            callbacks=[Turns()],
        ).train()


def prompts_of(config: RunConfig) -> list[Prompt]:
    """What the run trains on."""
    tokenizer = load_tokenizer(resolve_path(config.model.hf_path))
    return list(load_prompts(config.data, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens).train)
