"""Measures the shipped model: the share of questions whose greedy answer is exactly the expected sentence.

    python tools/shipped/evaluate.py --model npllm/shipped [--show 20] [--export tests/data/shipped_questions.json]

Runs in float32 on the bf16-rounded weights, with torch 2.13.0 and transformers 5.23.0. An answer counts only if every
character and the end token match. That the expected token wins at each position of the expected answer is the same as
greedy decoding giving it, so one forward pass per question decides; wrong answers are then decoded to be shown.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from corpus import Question, build
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

BATCH = 256
SAMPLED = 60


def prompt_of(tokenizer: PreTrainedTokenizerFast, question: Question) -> list[int]:
    """The token ids of one user message, up to where the assistant begins."""
    messages = [{"role": "user", "content": question.text}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


@torch.no_grad()
def right_answers(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Iterable[Question]
) -> dict[Question, bool]:
    """For each question whether greedy decoding gives exactly its answer and then stops."""
    pairs = []
    for question in questions:
        answer = tokenizer.encode(question.answer + tokenizer.eos_token, add_special_tokens=False)
        pairs.append((question, prompt_of(tokenizer, question), answer))
    pairs.sort(key=lambda pair: len(pair[1]) + len(pair[2]))
    verdicts = {}
    for start in range(0, len(pairs), BATCH):
        lot = pairs[start : start + BATCH]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt + answer) for _, prompt, answer in lot], batch_first=True)
        best = model(input_ids=ids, use_cache=False).logits.argmax(-1).tolist()
        for (question, prompt, answer), row in zip(lot, best, strict=True):
            first = len(prompt) - 1
            verdicts[question] = row[first : first + len(answer)] == answer
    return verdicts


def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[Question]
) -> dict[str, tuple[int, int]]:
    """(right, asked) for "train", each kind of held-out question, and "held out" for these together."""
    training = model.training
    verdicts = right_answers(model.eval(), tokenizer, questions)
    model.train(training)
    counts: dict[str, tuple[int, int]] = {}
    for question, right in verdicts.items():
        for split in (question.split,) if question.split == "train" else (question.split, "held out"):
            good, asked = counts.get(split, (0, 0))
            counts[split] = (good + right, asked + 1)
    return dict(sorted(counts.items()))


@torch.no_grad()
def greedy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: list[int]) -> str:
    """What the model says after `prompt`, decoded without special tokens."""
    ids = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long))
    return tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)


def sample(verdicts: dict[Question, bool], held_out: bool) -> list[dict[str, str]]:
    """SAMPLED questions of one side, every topic in turn, right or wrong alike."""
    draw = random.Random(11)
    topics: dict[str, list[Question]] = defaultdict(list)
    for question in build():
        if question in verdicts and (question.split != "train") == held_out:
            topics[question.topic].append(question)
    for group in topics.values():
        draw.shuffle(group)
    turns = [question for turn in range(SAMPLED) for group in topics.values() for question in group[turn : turn + 1]]
    chosen = turns[:SAMPLED]
    return [{"question": q.text, "answer": q.answer, "topic": q.topic, "split": q.split} for q in chosen]


def export(verdicts: dict[Question, bool], model: str, path: Path) -> None:
    """A fixed sample of both sides for the tests, with the accuracy that this run measured over all questions."""
    measured: dict[str, str] = {}
    for side, held_out in (("train", False), ("held_out", True)):
        side_verdicts = [right for question, right in verdicts.items() if (question.split != "train") == held_out]
        measured[side] = f"{sum(side_verdicts)}/{len(side_verdicts)}"
    content = {
        "model": model,
        "measured": measured,
        "train": sample(verdicts, False),
        "held_out": sample(verdicts, True),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--show", type=int, default=0, help="how many wrong answers to print")
    parser.add_argument("--export", type=Path, help="where to write a sample of questions for the tests")
    parser.add_argument("--ask", action="append", default=[], help="a question to answer (repeatable)")
    args = parser.parse_args()

    model = Qwen3ForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    for text in args.ask:
        print(text, "->", greedy(model, tokenizer, prompt_of(tokenizer, Question(text, "", "", ""))))
    questions = build()
    for split, (right, count) in accuracy(model, tokenizer, questions).items():
        print(f"{split}: {right}/{count} = {right / count:.4f}")
    verdicts = right_answers(model, tokenizer, questions)
    wrong = [question for question, right in verdicts.items() if not right]
    for question in random.Random(5).sample(wrong, min(args.show, len(wrong))):
        said = greedy(model, tokenizer, prompt_of(tokenizer, question))
        print(f"[{question.split}] {question.text}\n  expected {question.answer}\n  said     {said}")
    if args.export:
        export(verdicts, Path(args.model).name, args.export)


if __name__ == "__main__":
    main()
