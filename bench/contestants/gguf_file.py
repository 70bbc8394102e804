"""A Qwen3 checkpoint as GGUF: python -m bench.contestants.gguf_file FOLDER OUT BF16|Q8_0|Q4_0, with package `gguf`.

Every matrix is of the one type, embedding and tied head included (llama-quantize --pure); norms are float32. There is no
vocabulary, only its size: llama.cpp takes token ids.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# GGUF's names of a model's tensors and of those of a layer, by Hugging Face's.
NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
OF_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def tensor_name(name: str) -> str:
    """A tensor's name in a GGUF file; KeyError for a name that Qwen3 has not."""
    layer = LAYER.fullmatch(name)
    return f"blk.{layer[1]}.{OF_LAYER[layer[2]]}.weight" if layer else NAMES[name]


def metadata(config: dict[str, Any]) -> dict[str, int | float | str]:
    """What the file says of the model: general architecture, sizes, and that there is no tokenizer."""
    sizes = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config.get("rope_parameters", config)["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    return {f"qwen3.{key}": value for key, value in sizes.items()} | {"tokenizer.ggml.model": "no_vocab"}


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Name and float32 values of every tensor of a folder's bfloat16 safetensors files."""
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, mode="r")
        begin = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(data[8:begin].tobytes())
        header.pop("__metadata__", None)
        for name, about in header.items():
            start, end = (begin + offset for offset in about["data_offsets"])
            bits = data[start:end].view("<u2").reshape(about["shape"])
            yield name, (bits.astype(np.uint32) << 16).view(np.float32)


def write(folder: Path, out: Path, kind: str) -> None:
    """Write the file; it appears under its name only when it is whole."""
    import gguf

    form, unfinished = gguf.GGMLQuantizationType[kind], out.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "qwen3")
    for key, value in metadata(json.loads((folder / "config.json").read_text())).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for name, values in tensors(folder):
        if values.ndim == 1:
            writer.add_tensor(tensor_name(name), values)
        else:
            writer.add_tensor(tensor_name(name), gguf.quantize(values, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(out)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
