"""A model that says what it is told to, and the recordings and tokens around it."""

import numpy as np

from pipeline.data.tokenizer import load_tokenizer
from pipeline.rollout.recording.recording import Limits, Recording
from pipeline.rollout.recording.template import ConversationTemplate
from pipeline.types import Prompt, Sample, WeightSpan
from tests.chat_folder import write_chat_folder

NO_PROMPT = Prompt("p", (), "", None, "exact")
PLENTY = Limits(max_new_tokens=64, max_tokens=4096, max_turns=16)


class Script:
    """``draw`` of a recording: the answers in turn, each a text or token ids; ``requests`` is what it was asked.

    An answer longer than allowed is cut. One that ends neither in a token that ends responses nor in a stop text of the
    request is cut too, as far as anyone can tell.
    ``routed``: the number of the request is the one expert of every token.
    """

    def __init__(self, tokenizer, *answers, version=0, cached=0):
        self.tokenizer, self.answers, self.version, self.cached = tokenizer, list(answers), version, cached
        self.requests, self.routed = [], False

    async def __call__(self, request):
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        ids = self.tokenizer.encode_rendered(answer) if isinstance(answer, str) else answer
        ids = np.array(ids[: request.max_new_tokens], np.int64)
        (text,) = self.tokenizer.decode_batch([ids])
        ended = ids[-1] in self.tokenizer.eos_token_ids or any(stop in text for stop in request.stop)
        reason = "stop" if ended else "length"
        log_probs = -0.01 * (1 + np.arange(len(ids), dtype=np.float32))
        spans = (WeightSpan(self.version, 0, len(ids)),)
        length = len(request.prompt.token_ids) + len(ids) - 1
        routes = np.full((length, 1, 1), len(self.requests), np.uint8) if self.routed else None
        return Sample(
            ids,
            log_probs,
            request.temperature,
            request.seeds[0],
            request.role,
            reason,
            spans,
            routes=routes,
            cached_tokens=self.cached,
        )


def template_of(tmp_path, name, **variables):
    return ConversationTemplate(load_tokenizer(write_chat_folder(tmp_path / name, name)), variables=variables)


def recording(template, *answers, limits=PLENTY, prompt=NO_PROMPT, seed=5, temperature=1.0):
    """A recording, and the script that it draws from."""
    script = Script(template.tokenizer, *answers)
    return Recording(prompt, template, script, seed=seed, temperature=temperature, limits=limits), script


def text_of(template, ids):
    """With the ends of answers, which decoding leaves out."""
    return "".join(template.tokenizer.pieces(np.array(ids, np.int64)))


def user(text):
    return {"role": "user", "content": text}


def answered(completion):
    """The message that a client keeps."""
    calls = [
        {"id": name, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
        for name, call in zip(completion.call_ids, completion.tool_calls, strict=True)
    ]
    return {"role": "assistant", "content": completion.text} | ({"tool_calls": calls} if calls else {})


CHECK = {
    "type": "function",
    "function": {
        "name": "check",
        "description": "Says whether an answer is right.",
        "parameters": {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]},
    },
}
