"""A model that says what it is told: one token determines the next, so a test knows every answer beforehand."""

import itertools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.models import CHATML, END, IM_END, IM_START


def byte_tokenizer() -> Tokenizer:
    """One token per byte, ChatML's special tokens, and <think> and </think>, which are text as in Qwen3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_tokens([AddedToken(text, special=True) for text in (END, IM_START, IM_END)])
    built.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
    return built


def make_talker(folder: Path, *chains: str, context: int = 4096, template: str | None = CHATML) -> Path:
    """Write a model folder -> the folder. After each token of a chain comes the chain's next one.

    ChatML ends with a line break, so an answer is a chain that begins with one; `<|im_end|>` ends it. ValueError where
    chains contradict each other. Tokens of no chain are followed by `<|im_end|>`.
    """
    tokenizer = byte_tokenizer()
    size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(IM_END)
    following: dict[int, int] = {}
    for chain in chains:
        ids = tokenizer.encode(chain).ids
        for token, successor in itertools.pairwise(ids):
            if following.setdefault(token, successor) != successor:
                raise ValueError(f"{chain!r}: {tokenizer.decode([token])!r} has two successors")
    head_ND = np.zeros((size, size), np.float32)
    for token in range(size):
        head_ND[following.get(token, end), token] = 1
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, tokenizer, template, context, head_ND)
    return folder


def _write(folder: Path, tokenizer: Tokenizer, template: str | None, context: int, head_ND: np.ndarray) -> None:
    """One layer that adds nothing, between an embedding that is the identity and the head."""
    size = len(head_ND)
    config = {
        "model_type": "qwen3", "vocab_size": size, "hidden_size": size, "intermediate_size": 1, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "max_position_embeddings": context,
        "tie_word_embeddings": False, "eos_token_id": tokenizer.token_to_id(IM_END),
    }  # fmt: skip
    zeros = {"q_proj": (2, size), "k_proj": (2, size), "v_proj": (2, size), "o_proj": (size, 2)}
    tensors = {f"self_attn.{name}.weight": np.zeros(shape, np.float32) for name, shape in zeros.items()}
    tensors |= {f"mlp.{name}_proj.weight": np.zeros((1, size), np.float32) for name in ("gate", "up")}
    tensors["mlp.down_proj.weight"] = np.zeros((size, 1), np.float32)
    tensors |= {f"self_attn.{name}_norm.weight": np.ones(2, np.float32) for name in "qk"}
    tensors |= {f"{name}_layernorm.weight": np.ones(size, np.float32) for name in ("input", "post_attention")}
    tensors = {f"model.layers.0.{name}": values for name, values in tensors.items()}
    tensors |= {"model.embed_tokens.weight": np.eye(size, dtype=np.float32), "lm_head.weight": head_ND}
    tensors["model.norm.weight"] = np.ones(size, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": IM_END}))
