"""Make the 100k-parameter Llama that a recipe trains: about 20 s on one core.

Run it with `python tools/make_small_model.py recipe/pm4.yaml`.

A supervised warm-up on the recipe's task, in which 30 % of the answers are noise (countdown: right digits, random order
and operators; reasoning-gym: random digits), leaves a policy that solves about a quarter of the held-out problems at
the first try and nearly all within 16: the state in which RL has something to sharpen and entropy something to lose.
Written as the Hugging Face folder that the recipe names.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import nn
from torch.nn import functional

from pipeline.config.load import PACKAGED, load_config
from pipeline.config.schema import DataConfig
from pipeline.data.countdown import SYMBOLS, countdown_task
from pipeline.data.gym import generate_questions
from pipeline.data.sources import load_prompts
from pipeline.data.tokenizer import load_tokenizer
from pipeline.evaluation.metrics import pass_at_k
from pipeline.rollout.environments.tools import REPLY

HIDDEN, LAYERS, HEADS, FEED_FORWARD, ROPE_BASE, NORM_EPS = 64, 2, 4, 168, 1000.0, 1e-6
EOS = SYMBOLS.index("$")  # of every vocabulary: words come after the symbols
BATCH, PEAK_LR, NOISE = 128, 4e-3, 0.3
CHARACTERS = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
PIECES = pre_tokenizers.Split(tokenizers.Regex(" ?[A-Za-z]+ ?|."), "isolated")  # words whole, all else by character


class Attention(nn.Module):
    """Causal self-attention with rotary positions, bias-free; parameter names as in Hugging Face's Llama."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(HIDDEN, HIDDEN, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, seq, hidden] to the same."""
        batch, seq, _ = x.shape
        q, k, v = (
            projection(x).view(batch, seq, HEADS, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, seq, HIDDEN))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, FEED_FORWARD, bias=False)
        self.up_proj = nn.Linear(HIDDEN, FEED_FORWARD, bias=False)
        self.down_proj = nn.Linear(FEED_FORWARD, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, seq, hidden] to the same."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN, NORM_EPS)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, NORM_EPS)
        self.mlp = FeedForward()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, seq, hidden] to the same."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Its ``state_dict`` has the names of Hugging Face's LlamaForCausalLM."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(vocabulary, HIDDEN),
                "layers": nn.ModuleList(Layer() for _ in range(LAYERS)),
                "norm": nn.RMSNorm(HIDDEN, NORM_EPS),
            }
        )
        self.lm_head = nn.Linear(HIDDEN, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                half = name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight"))
                std = 0.05 if "embed" in name else HIDDEN**-0.5 * (0.5 if half else 1.0)
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, seq, vocabulary] of int64 [batch, seq]."""
        x = self.model["embed_tokens"](tokens)
        for layer in self.model["layers"]:
            x = layer(x)
        return self.lm_head(self.model["norm"](x))


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [batch, heads, seq, head_dim], halves paired (Hugging Face's layout)."""
    half = x.shape[-1] // 2
    frequencies = ROPE_BASE ** (-torch.arange(half).float() / half)
    angles = torch.arange(x.shape[-2]).float()[:, None] * frequencies
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


Noise = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Problems:
    """A task's token ids, and which of its problems are trained on."""

    symbols: Sequence[str]  # the vocabulary in token order
    prompts: np.ndarray  # int64 [problems, prompt]
    answers: np.ndarray  # int64 [right answers of all problems, longest], filled up with EOS, grouped by problem
    first: np.ndarray  # int64 [problems], row of each problem's first answer
    count: np.ndarray  # int64 [problems]
    held_out: np.ndarray  # bool [problems]
    noise: Noise  # from answers to what replaces them
    turns: int = 1  # answers of an episode, at most
    reply: tuple[int, ...] = ()  # token ids that follow a wrong answer

    def batch(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts and answers of ``BATCH`` training problems; about ``NOISE`` of the answers are random.

        Of episodes the prompts hold wrong answers and the replies to them; all of a batch as many.
        """
        rows = rng.choice(np.flatnonzero(~self.held_out), BATCH)
        answers = self.answers[self.first[rows] + (rng.random(BATCH) * self.count[rows]).astype(int)]
        noisy = np.flatnonzero(rng.random(BATCH) < NOISE)
        answers[noisy] = self.noise(answers[noisy], rng)
        prompts = self.prompts[rows]
        for _ in range(rng.integers(self.turns) if self.turns > 1 else 0):
            reply = np.broadcast_to(self.reply, (BATCH, len(self.reply)))
            prompts = np.concatenate([prompts, self.noise(answers, rng), reply], axis=1)
        return torch.from_numpy(prompts), torch.from_numpy(answers)


def problems_of(data: DataConfig, folder: Path) -> Problems:
    """The problems of a recipe's task; writes the model's tokenizer into ``folder``."""
    source = data.source
    if source.kind == "countdown":
        write_tokenizer(SYMBOLS, folder)
        return countdown_problems(source.task, data.held_out)
    texts = [question.text for question in generate_questions(source.task, source.size, source.params, source.seed)]
    words = {word for text in texts for word, _ in PIECES.pre_tokenize_str(text)}
    symbols = [*SYMBOLS, *sorted(words - set(SYMBOLS))]
    write_tokenizer(symbols, folder)
    return gym_problems(data, symbols, folder)


def countdown_problems(name: str, held_out: float) -> Problems:
    """Every problem of a countdown task, with all its answers; noise keeps an answer's digits."""
    task = countdown_task(name)
    operators = [SYMBOLS.index(c) for c in task.operators]

    def shuffled(answers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        answers = answers.copy()
        answers[:, 0:-1:2] = rng.permuted(np.sort(answers[:, 0:-1:2], axis=1), axis=1)
        answers[:, 1:-1:2] = rng.choice(operators, answers[:, 1:-1:2].shape)
        return answers

    prompts = np.array([[SYMBOLS.index(c) for c in task.problem(i) + "="] for i in range(len(task))])
    answers = np.pad(task.solutions.astype(np.int64), ((0, 0), (0, 1)), constant_values=EOS)
    return Problems(SYMBOLS, prompts, answers, task.first, task.count, task.held_out(held_out), shuffled)


def gym_problems(data: DataConfig, symbols: Sequence[str], folder: Path) -> Problems:
    """The questions of a reasoning-gym dataset that all have as many tokens, each with one answer.

    Noise draws new digits.
    """

    def redrawn(answers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.where(answers < 10, rng.integers(0, 10, answers.shape), answers)

    loaded = load_prompts(data, load_tokenizer(folder), max_prompt_tokens=64)
    prompts = [*loaded.train, *loaded.held_out]
    longest = max(len(prompt.answer) for prompt in prompts) + 1
    answers = [[SYMBOLS.index(c) for c in prompt.answer.ljust(longest, "$")] for prompt in prompts]
    apart = np.arange(len(prompts)) >= len(loaded.train)
    one = np.arange(len(prompts)), np.ones(len(prompts), np.int64)
    return Problems(symbols, np.array([p.token_ids for p in prompts]), np.array(answers), *one, apart, redrawn)


def train(model: Llama, problems: Problems, seed: int, steps: int) -> None:
    """Supervised warm-up: AdamW, linear warm-up over 50 steps, cosine to a tenth."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1.0, (step + 1) / 50) * (0.9 * cosine + 0.1)
        prompts, answers = problems.batch(rng)
        logits = model(torch.cat([prompts, answers[:, :-1]], dim=1))[:, prompts.shape[1] - 1 :]
        loss = functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def measure(model: Llama, problems: Problems, samples: int = 32) -> dict[str, float]:
    """pass@1, pass@16 and mean token entropy (nats, T=1) on the held-out problems."""
    generator = torch.Generator().manual_seed(1234)
    apart = np.flatnonzero(problems.held_out)
    prompts = problems.prompts[apart]
    tokens = torch.from_numpy(prompts).repeat_interleave(samples, dim=0)
    length = problems.answers.shape[1]
    entropy = tokens_seen = 0.0
    running = torch.ones(len(tokens), dtype=torch.bool)
    for _ in range(length):
        log_probs = model(tokens)[:, -1].log_softmax(-1)
        entropy += float((-(log_probs.exp() * log_probs).sum(-1) * running).sum())
        tokens_seen += float(running.sum())
        drawn = torch.multinomial(log_probs.exp(), 1, generator=generator).squeeze(1)
        drawn = torch.where(running, drawn, EOS)
        tokens = torch.cat([tokens, drawn[:, None]], dim=1)
        running &= drawn != EOS
    ended = tokens[:, prompts.shape[1] :].numpy().reshape(len(apart), samples, 1, length)
    spans = [slice(problems.first[i], problems.first[i] + problems.count[i]) for i in apart]
    right = [(each == problems.answers[span]).all(-1).any(-1) for each, span in zip(ended, spans, strict=True)]
    counts = np.sum(right, axis=1)
    return {
        "pass@1": pass_at_k(counts, samples, 1),
        "pass@16": pass_at_k(counts, samples, 16),
        "entropy": entropy / tokens_seen,
    }


def write_tokenizer(symbols: Sequence[str], folder: Path) -> None:
    """One token per symbol, ``$`` being the end of sequence; any other text is an error (there is no such token)."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<none>"))
    tokenizer.pre_tokenizer = CHARACTERS if symbols == SYMBOLS else PIECES
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["$"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "$", "pad_token": "$", "model_max_length": 64}
    write_json(folder / "tokenizer_config.json", config)


def write_folder(model: Llama, folder: Path) -> None:
    """The Hugging Face folder: configuration and weights in fp32, beside the tokenizer."""
    ends = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.lm_head.out_features,
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_BASE,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    write_json(folder / "config.json", config | ends)
    write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 1.0} | ends)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, value: dict[str, object]) -> None:
    """Indented, with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500, help="of the warm-up (chain_sum: 1500)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order: the same seed gives the same bytes
    torch.manual_seed(arguments.seed)
    config = load_config(arguments.recipe, check=False)
    folder = PACKAGED / config.model.hf_path
    problems = problems_of(config.data, folder)
    environment = config.data.environment
    if environment.name == "tools":
        reply = tuple(SYMBOLS.index(c) for c in environment.params.get("reply", REPLY))
        problems = replace(problems, turns=environment.max_turns, reply=reply)
    model = Llama(len(problems.symbols))
    train(model, problems, arguments.seed, arguments.steps)
    write_folder(model, folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    figures = ", ".join(f"{name} {value:.3f}" for name, value in measure(model, problems).items())
    print(f"{folder}: {parameters:,} parameters, {problems.held_out.sum()} held-out problems: {figures}")


if __name__ == "__main__":
    main()
