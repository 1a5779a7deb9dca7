"""Runs a model that the native engine has no decoder for: transformers' own, with the engine's cache, in float32.

Slower than ``Decoder``, and right for every family that transformers has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.model import architecture, stacked
from pipeline.model.architecture import Architecture
from pipeline.rollout.engine import EngineError
from pipeline.rollout.native.decoder import AnyDecoder, Decoder, KeyValues, Routes, State


def decoder_of(model: Architecture, hf_path: Path, tensors: Mapping[str, torch.Tensor]) -> AnyDecoder:
    """The decoder of a model: its own, or transformers'.

    ``model`` was read from ``hf_path``; ``tensors`` by Hugging Face name: all of ``layout.tensor_shapes(model)``.
    """
    return Decoder(model, tensors) if model.native else TransformersDecoder(model, hf_path, tensors)


class TransformersDecoder:
    """transformers' model of a folder's ``config.json``, with other weights than the folder's."""

    def __init__(self, model: Architecture, hf_path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """``tensors`` are copied: the sender may overwrite its own in the next optimizer step.

        Raises ``EngineError`` where transformers' model is made of other tensors.
        """
        import transformers
        from transformers.utils import logging

        self.model = model
        said = architecture.read_config(hf_path)
        said = {key: value for key, value in said.items() if key not in ("auto_map", "quantization_config")}
        # model_type may be a name of the same computation that transformers does not know.
        config = transformers.AutoConfig.for_model(**said | {"model_type": model.family.name})
        logging.disable_progress_bar()
        copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
        made, report = getattr(transformers, said["architectures"][0]).from_pretrained(
            None,
            config=config,
            state_dict=stacked.stack(copies, model),
            dtype=torch.float32,
            attn_implementation="eager" if model.family.sinks else "sdpa",
            output_loading_info=True,
        )
        if lost := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
            raise EngineError(f"native engine: transformers' {type(made).__name__} has other tensors: {lost[:5]}")
        self._causal = made.eval()
        self._chosen = _Chosen()
        for name, module in made.named_modules():
            if name.endswith(".experts"):
                module.register_forward_pre_hook(self._chosen)

    def reserve(self, positions: int) -> None:
        """It has no tables."""

    def prefill(self, tokens: torch.Tensor, routes: Routes | None = None) -> tuple[torch.Tensor, KeyValues]:
        """As ``Decoder.prefill``."""
        length = tokens.shape[1]
        cache = _Appended(self.model)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mask = torch.zeros(length, length).masked_fill_(later, -torch.inf)
        places, heard = torch.arange(length), Routes()
        hidden = self._run(tokens, places[None], mask.expand(len(tokens), 1, -1, -1), places, cache, heard)
        if routes is not None:
            routes += [layer.unflatten(0, tokens.shape) for layer in heard]
        return hidden, cache.found

    def step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KeyValues,
        column: int,
        padding: torch.Tensor | None,
        routes: Routes | None = None,
    ) -> torch.Tensor:
        """As ``Decoder.step``."""
        rows = len(tokens)
        mask = torch.zeros(rows, 1, 1, column + 1) if padding is None else padding[:, None, None, : column + 1]
        place = torch.tensor([column])
        hidden = self._run(tokens[:, None], positions[:, None], mask, place, _Written(cache, column), routes)
        return self.logits(hidden[:, 0])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Head of the final hidden states: ``[..., hidden]`` -> ``[..., vocab]``."""
        return self._causal.lm_head(hidden)

    def _run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        places: torch.Tensor,
        cache: Any,
        routes: Routes | None,
    ) -> torch.Tensor:
        """Hidden states before the head, ``[rows, length, hidden]``; ``mask`` ``[rows, 1, length, columns]`` is
        added to the scores of tokens in the columns ``places``. ``routes`` gets the experts of every token,
        ``[rows * length, top_k]`` by layer.
        """
        self._chosen.routes = routes
        masks: Any = mask
        if window := self.model.window:  # a row's tokens stand in neighbouring columns
            gone = torch.arange(mask.shape[-1]) <= places[:, None] - window.tokens
            masks = mask.masked_fill(gone, -torch.inf)
            if not all(window.layers):
                masks = {"full_attention": mask, "sliding_attention": masks}
        found = self._causal.model(
            input_ids=tokens, position_ids=positions, attention_mask=masks, past_key_values=cache, use_cache=True
        )
        return found.last_hidden_state


class _Chosen:
    """Hears what experts are chosen. It knows nothing of the model: one that is replaced is freed at once."""

    routes: Routes | None = None  # where choices are added

    def __call__(self, _: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        """Every family's experts are given hidden states, the chosen experts ``[tokens, top_k]``, and their shares."""
        if self.routes is not None:
            self.routes.append(given[1])


class _Layer(NamedTuple):
    """A layer's state, under the names that transformers' layers read; they move ``conv_states`` on in place."""

    conv_states: torch.Tensor
    recurrent_states: torch.Tensor


class _Appended:
    """What transformers' layers take for a cache: it keeps the keys and values, or the last state, of whole
    sequences.
    """

    def __init__(self, model: Architecture) -> None:
        none = torch.empty(0)
        self.found: KeyValues = [
            State(none, none) if model.is_delta(layer) else (none, none) for layer in range(model.layers)
        ]

    def has_previous_state(self, *_: Any) -> bool:
        return False

    def update_conv_state(self, state: torch.Tensor, layer: int) -> None:
        self.found[layer] = State(state, self.found[layer][1])

    def update_recurrent_state(self, state: torch.Tensor, layer: int) -> None:
        self.found[layer] = State(self.found[layer][0], state)

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.found[layer] = keys, values
        return keys, values


class _Written:
    """What transformers' layers take for a cache: one column of the engine's is written, those until it are read;
    states go on in their place.
    """

    def __init__(self, cache: KeyValues, column: int) -> None:
        self._cache, self._column = cache, column

    @property
    def layers(self) -> list[_Layer]:
        return [_Layer(*layer) for layer in self._cache]

    def has_previous_state(self, *_: Any) -> bool:
        return True

    def update_recurrent_state(self, state: torch.Tensor, layer: int) -> None:
        self._cache[layer][1].copy_(state)

    def get_seq_length(self, *_: Any) -> int:
        return self._column

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        held = self._cache[layer]
        for whole, new in zip(held, (keys, values), strict=True):
            whole[:, :, self._column] = new[:, :, 0]
        first, second = (whole[:, :, : self._column + 1] for whole in held)
        return first, second
