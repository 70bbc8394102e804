"""Trains the model that ships inside npllm: a small Qwen3 that has memorized facts about LLM architectures.

    OMP_NUM_THREADS=1 python tools/shipped/train.py --out npllm/shipped --work /tmp/shipped

Needs torch 2.13.0, transformers 5.23.0, tokenizers 0.23.3 and safetensors 0.8.0; nothing of it is needed to use npllm.
Writes config.json, generation_config.json, model.safetensors (bf16), tokenizer.json, tokenizer_config.json and
chat_template.jinja into --out, and the training log to stdout. The defaults are those of the shipped model: 12 epochs,
1783 steps, 26 minutes on one thread of a CPU shared with other work. The seed is fixed, but sums round differently
elsewhere: expect the same accuracy, not the same bits. `evaluate.py` measures the result.

Conversations are packed into rows through the exact chat template: single questions, questions under a system prompt,
several turns, and plain text (question, space, answer) so that `generate` without a template also works.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import Question, build, vary
from evaluate import accuracy
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 2048
CONTEXT = 1024
SPLIT = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about language model architectures.",
    "Answer in one sentence.",
    "You are an expert on LLM architectures. Be brief.",
    "You are a friendly assistant that knows about neural networks.",
)
QUESTION_WEIGHT = 0.03
SAMPLES_PER_FACT = 16
ROW_KINDS = (("single", 0.58), ("system", 0.10), ("plain", 0.14), ("turns", 0.18))
MAX_TURNS = 6
IGNORE = -100


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY entries, one token per digit, that adds no tokens of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def make_model(vocabulary: int) -> Qwen3ForCausalLM:
    """About 1.5 million weights; 3 query heads per key-value head, and heads x head_dim = 192 beside hidden size 128."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


@dataclass(frozen=True)
class Row:
    ids: list[int]
    answers: list[bool]
    """True where the token is one the model has to produce."""


class Rows:
    """Draws one epoch of training rows after another; every fact appears SAMPLES_PER_FACT times in each."""

    def __init__(self, questions: list[Question], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.draw = random.Random(seed)
        self.tokenizer = tokenizer
        self.facts: dict[str, list[Question]] = defaultdict(list)
        for question in questions:
            self.facts[question.answer].append(question)

    def epoch(self) -> list[Row]:
        pool = [question for group in self.facts.values() for question in self._sample(group)]
        self.draw.shuffle(pool)
        kinds, weights = zip(*ROW_KINDS, strict=True)
        rows = []
        while pool:
            kind = self.draw.choices(kinds, weights)[0]
            count = min(len(pool), self.draw.randint(2, MAX_TURNS)) if kind == "turns" else 1
            rows.append(self._row(kind, [pool.pop() for _ in range(count)]))
        return rows

    def _sample(self, group: list[Question]) -> list[Question]:
        wanted = max(SAMPLES_PER_FACT, len(group) // 2)
        whole, rest = divmod(wanted, len(group))
        return group * whole + self.draw.sample(group, rest)

    def _row(self, kind: str, questions: list[Question]) -> Row:
        ids: list[int] = []
        answers: list[bool] = []

        def add(text: str, answer: bool) -> None:
            piece = self.tokenizer.encode(text, add_special_tokens=False)
            ids.extend(piece)
            answers.extend([answer] * len(piece))

        if kind == "plain":
            add(vary(questions[0].text, self.draw), False)
            add(f" {questions[0].answer}{END_OF_TEXT}", True)
            return Row(ids, answers)
        if kind == "system":
            add(f"{START}system\n{self.draw.choice(SYSTEM_PROMPTS)}{END}\n", False)
        for question in questions:
            add(f"{START}user\n{vary(question.text, self.draw)}{END}\n{START}assistant\n", False)
            add(f"{question.answer}{END}", True)
            add("\n", False)
        return Row(ids, answers)


def batches(rows: list[Row], tokens: int, draw: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of like length, right-padded: ids [B, T] and per-token loss weights [B, T], about `tokens` ids in each."""
    rows = sorted(rows, key=lambda row: len(row.ids) + draw.random())
    groups: list[list[Row]] = [[]]
    for row in rows:
        if len(row.ids) * (len(groups[-1]) + 1) > tokens:
            groups.append([])
        groups[-1].append(row)
    draw.shuffle(groups)
    for group in filter(None, groups):
        width = max(len(row.ids) for row in group)
        ids = torch.zeros(len(group), width, dtype=torch.long)
        weights = torch.zeros(len(group), width)
        for line, row in enumerate(group):
            ids[line, : len(row.ids)] = torch.tensor(row.ids)
            weights[line, : len(row.ids)] = torch.where(torch.tensor(row.answers), 1.0, QUESTION_WEIGHT)
        yield ids, weights


def loss_of(model: Qwen3ForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next tokens under `weights`. Padding is on the right, so a causal mask suffices."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    return (each * weight).sum() / weight.sum()


def train(model: Qwen3ForCausalLM, rows: Rows, args: argparse.Namespace) -> None:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    started = time.monotonic()
    step = 0
    for epoch in range(args.epochs):
        total, seen = 0.0, 0
        lots = list(batches(rows.epoch(), args.batch, rows.draw))
        for index, (ids, weights) in enumerate(lots):
            progress = (epoch + index / len(lots)) / args.epochs
            warmth = min(1.0, (step + 1) / args.warmup)
            rate = args.rate * warmth * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(model, ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total, seen, step = total + loss.item(), seen + 1, step + 1
        minutes = (time.monotonic() - started) / 60
        print(f"epoch {epoch + 1}/{args.epochs} step {step} loss {total / seen:.4f} minutes {minutes:.1f}", flush=True)
        if (epoch + 1) % args.every == 0:
            report(model, rows.tokenizer, sampled=1500)
            model.save_pretrained(args.work / "checkpoint")


def report(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, sampled: int | None = None) -> None:
    questions = build()
    if sampled:
        questions = random.Random(1).sample(questions, sampled)
    for split, (right, count) in accuracy(model, tokenizer, questions).items():
        print(f"  {split}: {right}/{count} = {right / count:.4f}", flush=True)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids([END, END_OF_TEXT]),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        do_sample=False,
        max_new_tokens=64,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner can read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=3072, help="tokens per step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=150, help="steps of rising learning rate")
    parser.add_argument("--every", type=int, default=6, help="epochs between sampled evaluations")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    questions = [question for question in build() if question.split == "train"]
    texts = [text for question in questions for text in (question.text, question.text.lower(), question.answer)]
    roles = [f"{role}\n" for role in ("system", "user", "assistant")] * len(questions)
    tokenizer = make_tokenizer([*texts, *SYSTEM_PROMPTS, *roles])
    model = make_model(len(tokenizer))
    print(f"{len(questions)} questions, {model.num_parameters()} weights, {len(tokenizer)} tokens", flush=True)
    model.train()
    train(model, Rows(questions, tokenizer, args.seed), args)
    save(model, tokenizer, args.out)
    report(Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.float32), tokenizer)


if __name__ == "__main__":
    main()
