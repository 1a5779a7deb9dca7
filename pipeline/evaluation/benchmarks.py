"""The public benchmarks: each one's source, number of questions, how a row becomes a question, and how it is graded.

Sizes are those that papers report (docs/benchmarking.md); a source with another number of rows is refused. No benchmark
is shipped: rows come from a local file or from the ``datasets`` library. ``sample_math`` and ``sample_choice`` are a
few questions of our own, to try the whole path offline.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.load import PACKAGED
from pipeline.data import DataError
from pipeline.data.questions import Question
from pipeline.disk import replacing

LETTERS = "ABCDEFGHIJKLMNOPQRST"
ASK_MATH = "Please reason step by step, and put your final answer within \\boxed{}."
ASK_CHOICE = "Please reason step by step, and put the letter of your answer within \\boxed{}."
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    ``licence`` is what we know of the data's; read the source's own page before you use or pass it on.
    """

    title: str
    size: int
    read: Callable[[Row], tuple[str, Any]]  # question, answer
    verifier: str  # math | choice
    dataset: str = ""  # on the Hugging Face hub; "": shipped
    subset: str = ""
    split: str = "test"
    licence: str = "not stated"


def _math(row: Row) -> tuple[str, Any]:
    question = _first(row, "question", "problem")
    answer = _first(row, "answer", "final_answer")
    answer = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
    return f"{question}\n\n{ASK_MATH}", answer


def _options(row: Row) -> tuple[str, Any]:
    return _choice(_first(row, "question"), _first(row, "options"), str(_first(row, "answer_letter", "answer")))


def _arc(row: Row) -> tuple[str, Any]:
    choices = _first(row, "choices")
    right = choices["label"].index(_first(row, "answerKey"))
    return _choice(_first(row, "question"), choices["text"], LETTERS[right])


def _gpqa(row: Row) -> tuple[str, Any]:
    """A GPQA question with its options in an order drawn from the question's own hash: the same in every run.

    The source puts the right answer first.
    """
    question = _first(row, "Question")
    options = [_first(row, "Correct Answer"), *(_first(row, f"Incorrect Answer {i}") for i in (1, 2, 3))]
    order = list(range(4))
    random.Random(hashlib.blake2b(question.encode(), digest_size=8).hexdigest()).shuffle(order)
    return _choice(question, [options[i].strip() for i in order], LETTERS[order.index(0)])


def _choice(question: str, options: list[str], letter: str) -> tuple[str, Any]:
    lines = "\n".join(f"{mark}. {option}" for mark, option in zip(LETTERS, options, strict=False))
    return f"{question}\n\n{lines}\n\n{ASK_CHOICE}", letter


def _first(row: Row, *names: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise DataError(f"the row has none of the fields {', '.join(names)}; it has {', '.join(map(str, row))}")


BENCHMARKS = {
    "aime24": Benchmark("AIME 2024", 30, _math, "math", "HuggingFaceH4/aime_2024", split="train"),
    "aime25": Benchmark(
        "AIME 2025", 30, _math, "math", "MathArena/aime_2025", split="train", licence="CC BY-NC-SA 4.0"
    ),
    "hmmt25": Benchmark(
        "HMMT February 2025", 30, _math, "math", "MathArena/hmmt_feb_2025", split="train", licence="CC BY-NC-SA 4.0"
    ),
    "amc23": Benchmark("AMC 2023", 40, _math, "math", "math-ai/amc23"),
    "math500": Benchmark("MATH-500", 500, _math, "math", "HuggingFaceH4/MATH-500", licence="MIT"),
    "minerva": Benchmark("Minerva Math", 272, _math, "math", "math-ai/minervamath"),
    "olympiadbench": Benchmark("OlympiadBench", 674, _math, "math", "math-ai/olympiadbench", licence="Apache 2.0"),
    "gpqa_diamond": Benchmark(
        "GPQA Diamond", 198, _gpqa, "choice", "Idavidrein/gpqa", "gpqa_diamond", "train", licence="CC BY 4.0"
    ),
    "mmlu_pro": Benchmark("MMLU-Pro", 12032, _options, "choice", "TIGER-Lab/MMLU-Pro", licence="MIT"),
    "arc_challenge": Benchmark(
        "ARC Challenge", 1172, _arc, "choice", "allenai/ai2_arc", "ARC-Challenge", licence="CC BY-SA 4.0"
    ),
    "supergpqa": Benchmark("SuperGPQA", 26529, _options, "choice", "m-a-p/SuperGPQA", split="train", licence="ODC-BY"),
    "sample_math": Benchmark("our sample, mathematics", 12, _math, "math", licence="Apache 2.0 (ours)"),
    "sample_choice": Benchmark("our sample, multiple choice", 8, _options, "choice", licence="Apache 2.0 (ours)"),
}


def benchmark(name: str) -> Benchmark:
    """The benchmark called ``name``. Raises ``DataError`` naming the nearest."""
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.0)[0]
        raise DataError(f"unknown benchmark {name!r}: did you mean {near!r}? known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def load_questions(name: str, data: Path | None) -> list[Question]:
    """The questions of a benchmark, in the order of their source.

    Rows come from ``data/<name>.jsonl`` (one object a line, the fields of the source's own), from the shipped sample,
    or, without ``data``, from the ``datasets`` library. Raises ``DataError``: nothing there, a row that is not of this
    benchmark, another number of rows.
    """
    found = benchmark(name)
    rows, place = _rows(name, found, data)
    questions = []
    for number, row in enumerate(rows):
        try:
            text, answer = found.read(row)
        except (DataError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{place}, row {number}: not a question of {name}: {error}") from error
        questions.append(Question(f"{name}/{number}", answer, found.verifier, text=text))
    if len(questions) != found.size:
        raise DataError(
            f"{place} has {len(questions)} rows, {found.title} has {found.size}: it is another version or was cut; "
            f"get it again with `isentrope benchmark fetch {name}`"
        )
    return questions


def fetch(name: str, data: Path) -> Path:
    """Save a benchmark's rows to ``data/<name>.jsonl`` for machines without a network. Raises ``DataError``."""
    found = benchmark(name)
    target = data / f"{name}.jsonl"
    rows = list(_from_hub(name, found)) if found.dataset else list(_read_jsonl(_shipped(name)))
    data.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    load_questions(name, data)
    return target


def _rows(name: str, found: Benchmark, data: Path | None) -> tuple[Iterator[Row], str]:
    if not found.dataset:
        return _read_jsonl(_shipped(name)), str(_shipped(name))
    if data is None:
        return _from_hub(name, found), found.dataset
    path = data / f"{name}.jsonl"
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; `isentrope benchmark fetch {name} --data {data}` writes it where there is a network"
        )
    return _read_jsonl(path), str(path)


def _shipped(name: str) -> Path:
    return PACKAGED / "benchmark" / f"{name}.jsonl"


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}:{number}: not JSON: {error}; mend or remove the line") from error


def _from_hub(name: str, found: Benchmark) -> Iterator[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{name}: reading {found.dataset} needs the datasets library (pip install datasets); "
            "or give local files with --data"
        ) from error
    try:
        rows = load_dataset(found.dataset, found.subset or None, split=found.split)
    except Exception as error:  # whatever the hub, the network or the library say
        raise DataError(
            f"{name}: {found.dataset} cannot be read ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); without a network, "
            f"give local files with --data (written by `isentrope benchmark fetch {name}` elsewhere)"
        ) from error
    yield from ({key: value for key, value in row.items() if not isinstance(value, bytes)} for row in rows)
