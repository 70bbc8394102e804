"""What publishers say of the sizes of their models, and what they count differently from npllm: the text part, all of it."""

SCOUT = "109 B, 17 B active, with the vision encoder"
VISION = "with a vision encoder of 0.4 B"
TABLES = "effective: without the two embedding tables, with {} M for keys and values in the file that no layer uses"

CLAIMS = {
    "DeepSeek V2": "236 B, 21 B active",
    "DeepSeek V2-Lite": "15.7 B, 2.4 B active, which leaves the input embedding out",
    "DeepSeek V3": "671 B, 37 B active; 36.7 B in README_WEIGHTS, which leaves the input embedding out",
    "DeepSeek R1": "671 B, 37 B active",
    "Kimi K2": "1 T, 32 B active, which leaves the input embedding out",
    "Llama 3 8B": "8.0 B",
    "Llama 3 70B": "70.6 B",
    "Llama 3.1 8B": "8.0 B",
    "Llama 3.1 70B": "70.6 B",
    "Llama 3.1 405B": "405 B",
    "Llama 3.2 1B": "1.23 B",
    "Llama 3.2 3B": "3.21 B",
    "Llama 4 Scout": SCOUT,
    "Llama 4 Scout base": SCOUT,
    "Llama 4 Maverick": "400 B, 17 B active",
    "Mistral Small 3.1": f"24 B, {VISION}",
    "Mistral Large 3": "675 B, 41 B active: 673 B and 39 B of them text, the rest the vision encoder",
    "Mixtral 8x7B": "46.7 B, 12.9 B active",
    "Mixtral 8x22B": "141 B, 39 B active",
    "Qwen1.5-MoE A2.7B": "14.3 B, 2.7 B active",
    "Qwen2 57B-A14B": "57 B, 14 B active",
    "Qwen3 0.6B": "0.6 B; 0.44 B without the embedding",
    "Qwen3 1.7B": "1.7 B; 1.4 B without the embedding",
    "Qwen3 4B": "4.0 B; 3.6 B without the embedding",
    "Qwen3 8B": "8.2 B; 6.95 B without embedding and head",
    "Qwen3 14B": "14.8 B; 13.2 B without embedding and head",
    "Qwen3 32B": "32.8 B; 31.2 B without embedding and head",
    "Qwen3 30B-A3B": "30.5 B, 3.3 B active; 29.9 B without embedding and head",
    "Qwen3 235B-A22B": "235 B, 22 B active; 234 B without embedding and head",
    "Gemma 3 270m": "270 M, 170 M of them the embedding",
    "Gemma 3 4B": f"4 B, {VISION}",
    "Gemma 3 12B": f"12 B, {VISION}",
    "Gemma 3 27B": f"27 B, {VISION}",
    "Gemma 3n E2B": f"5 B with vision and audio, 1.91 B {TABLES.format(21.0)}",
    "Gemma 3n E4B": f"8 B with vision and audio, 3.98 B {TABLES.format(31.5)}",
}
