"""What the shipped model knows about ideas: one sentence per term, asked for through the DEFINITION phrasings.

Facts with hand-written questions of their own, and small talk, are in single_facts.txt.
"""

from __future__ import annotations

from facts import Attribute

DEFINITION = Attribute(
    "definition",
    (
        "What is {m}?",
        "What does {m} mean?",
        "Explain {m}.",
        "Define {m}.",
        "Can you explain {m}?",
        "Tell me about {m}.",
        "What's {m}?",
        "How does {m} work?",
        "What is meant by {m}?",
        "Describe {m} in one sentence.",
        "Give me a short definition of {m}.",
        "I don't know what {m} is.",
        "{m}?",
        "What do you know about {m}?",
        "Explain {m} to me in one sentence.",
        "What is {m} in a language model?",
    ),
    ("Could you describe {m} briefly?", "In short, what is {m}?"),
)

TERMS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("MLA", "multi-head latent attention", "multi head latent attention", "mla", "latent attention"),
        "Multi-head latent attention (MLA) caches one small latent per token and expands it into keys and values.",
    ),
    (
        ("GQA", "grouped-query attention", "gqa", "grouped query attention"),
        "In grouped-query attention (GQA), several query heads share one key-value head, which shrinks the KV cache.",
    ),
    (
        ("MHA", "multi-head attention", "multi head attention", "mha"),
        "In multi-head attention (MHA), every query head has its own key and value head.",
    ),
    (
        ("MQA", "multi-query attention", "multi query attention", "mqa"),
        "In multi-query attention (MQA), all query heads share a single key-value head.",
    ),
    (
        ("qk-norm", "QK-norm", "query-key normalization", "qk norm"),
        "QK-norm normalizes the queries and keys before their dot product, which keeps attention scores stable.",
    ),
    (
        ("RoPE", "rotary position embedding", "rope", "rotary embeddings"),
        "RoPE encodes a position by rotating pairs of query and key values, so scores depend on relative distance.",
    ),
    (
        ("NoPE", "no positional embedding", "nope layers"),
        "NoPE means that a layer uses no position encoding; the causal mask alone tells the order of tokens.",
    ),
    (
        (
            "sliding window attention",
            "sliding-window attention",
            "SWA",
            "sliding window",
            "sliding windows",
            "local attention",
        ),
        "In sliding-window attention each token sees only the last few tokens, itself included, which bounds the cache.",
    ),
    (
        ("chunked attention", "chunk attention"),
        "In chunked attention a token sees only the earlier tokens of its own fixed block.",
    ),
    (
        ("causal masking", "a causal mask", "causal attention"),
        "A causal mask lets each token attend only to itself and to earlier tokens.",
    ),
    (
        ("RMSNorm", "root mean square normalization", "rmsnorm", "RMS norm"),
        "RMSNorm divides a vector by its root mean square and multiplies by a learned weight; it has no bias.",
    ),
    (
        ("LayerNorm", "layer normalization", "layer norm"),
        "LayerNorm subtracts the mean, divides by the standard deviation, then applies a learned weight and bias.",
    ),
    (
        ("pre-norm", "pre-normalization", "prenorm"),
        "Pre-norm normalizes the input of each block and leaves the residual stream itself untouched.",
    ),
    (
        ("post-norm", "post-normalization", "postnorm"),
        "Post-norm normalizes the output of a block; OLMo 2 does so before adding it to the residual stream.",
    ),
    (
        ("SwiGLU", "swiglu", "the SwiGLU block"),
        "SwiGLU multiplies SiLU of a gate projection by an up projection, then projects down.",
    ),
    (
        ("GeGLU", "geglu", "the GeGLU block"),
        "GeGLU multiplies GELU of a gate projection by an up projection, then projects down.",
    ),
    (
        ("GELU", "gelu", "the GELU activation"),
        "GELU is a smooth activation that weights its input by the normal distribution function.",
    ),
    (
        ("SiLU", "silu", "the SiLU activation"),
        "SiLU is an activation: its input multiplied by the sigmoid of its input.",
    ),
    (
        ("MoE", "mixture of experts", "moe", "a mixture-of-experts layer", "a sparse MoE"),
        "A mixture of experts (MoE) holds many feed-forward experts and runs only a few of them for each token.",
    ),
    (
        ("a router", "the MoE router", "an expert router", "expert routing"),
        "A router scores the experts for each token and picks the few that will process it.",
    ),
    (
        ("a shared expert", "the shared expert", "shared experts"),
        "A shared expert processes every token, next to the routed experts that the router picks.",
    ),
    (
        ("a routed expert", "routed experts"),
        "A routed expert is a feed-forward block that runs only for the tokens sent to it.",
    ),
    (
        ("active parameters", "the active parameter count"),
        "Active parameters are the weights that one token really uses; in a MoE they are a small part of the total.",
    ),
    (
        ("MatFormer", "matformer", "the MatFormer design"),
        "MatFormer nests smaller models in a larger one: Gemma 3n E2B is a slice of the layers and FFN width of E4B.",
    ),
    (
        ("per-layer embeddings", "PLE", "per-layer embedding", "per layer embeddings"),
        "Per-layer embeddings (PLE) give every layer of Gemma 3n its own small embedding of each token.",
    ),
    (
        ("AltUp", "altup", "alternating updates"),
        "AltUp keeps four residual streams in Gemma 3n, runs each layer on one and predicts and corrects the others.",
    ),
    (
        ("LAuReL", "laurel", "the LAuReL branch"),
        "LAuReL adds a learned low-rank residual branch, of rank 64 in Gemma 3n, beside attention.",
    ),
    (
        ("KV sharing", "cross-layer KV sharing", "kv cache sharing"),
        "With KV sharing, the upper layers of Gemma 3n reuse the keys and values of an earlier layer.",
    ),
    (
        ("activation sparsity", "gaussian top-k sparsity", "sparse activations"),
        "Gemma 3n keeps only about the largest 5 % of gate values per token in the FFN of its first ten layers.",
    ),
    (
        ("YaRN", "yarn", "YaRN scaling"),
        "YaRN extends the context of RoPE: it slows low frequencies, keeps high ones and blends those in between.",
    ),
    (
        ("llama3 RoPE scaling", "the llama3 rope type", "Llama 3 rope scaling"),
        "The llama3 RoPE scaling keeps high frequencies, divides low ones by a factor and blends those in between.",
    ),
    (
        ("linear RoPE scaling", "position interpolation", "linear rope scaling"),
        "Linear RoPE scaling divides all rotation frequencies by one factor.",
    ),
    (
        ("RoPE theta", "the RoPE base", "rope_theta"),
        "RoPE theta is the base of the rotation frequencies; a larger theta gives slower rotations for long contexts.",
    ),
    (
        ("interleaved RoPE", "the interleaved rope layout"),
        "Interleaved RoPE rotates neighbouring pairs: values 2j and 2j + 1.",
    ),
    (
        ("half-split RoPE", "rotate_half", "the half-split rope layout"),
        "Half-split RoPE pairs value j of a head with value j + D/2, where D is the head dimension.",
    ),
    (
        ("the KV cache", "KV cache", "KV caching", "a kv cache", "key-value cache"),
        "The KV cache stores the keys and values of past tokens, so that decoding need not compute them again.",
    ),
    (
        ("a latent cache", "the MLA cache"),
        "The MLA cache stores 512 latent values and 64 RoPE values per token and layer, 576 in all.",
    ),
    (
        ("a rolling cache", "a ring cache", "rolling KV cache"),
        "A rolling cache keeps only the entries that a sliding window or chunk can still see.",
    ),
    (
        ("absorbed MLA", "weight absorption", "MLA absorption"),
        "Absorbed MLA folds the key and value expansion into query and output, and attends to the latents directly.",
    ),
    (
        ("multi-token prediction", "MTP", "the MTP layer"),
        "Multi-token prediction (MTP) adds a layer that predicts one token further; plain generation skips it.",
    ),
    (
        ("logit softcapping", "softcapping", "soft capping", "a softcap"),
        "Softcapping bounds scores smoothly: cap times tanh of the score divided by cap.",
    ),
    (
        ("tied embeddings", "weight tying", "tied weights"),
        "With tied embeddings, the output head reuses the token embedding matrix.",
    ),
    (
        ("learned position embeddings", "absolute position embeddings", "learned positions"),
        "Learned position embeddings add a trained vector for each absolute position, as GPT-2 does.",
    ),
    (
        ("attention temperature tuning", "temperature tuning", "attn_temperature_tuning"),
        "Temperature tuning scales the queries of Llama 4's NoPE layers up slowly at long positions.",
    ),
    (
        ("Conv1D in GPT-2", "the GPT-2 Conv1D layout", "Conv1D weights"),
        "GPT-2's Conv1D is a linear layer whose weight is stored as input by output, so it is used without transposing.",
    ),
    (
        ("bf16", "bfloat16", "BF16"),
        "Bfloat16 is a 16-bit float with the exponent range of float32 and 8 bits of precision.",
    ),
    (
        ("FP8", "fp8", "e4m3", "block FP8"),
        "FP8 e4m3 has 4 exponent and 3 mantissa bits; DeepSeek V3 stores one scale per block of 128 x 128 weights.",
    ),
    (
        ("the residual stream", "residual connections", "a residual stream"),
        "The residual stream carries each token's vector through the layers; every block adds its output to it.",
    ),
    (
        ("the attention scale", "attention scaling"),
        "The attention scale multiplies the scores, usually by one over the square root of the head dimension.",
    ),
    (
        ("softmax attention", "attention", "self-attention", "softmax"),
        "Attention mixes the values of earlier tokens, weighted by a softmax of query-key scores.",
    ),
    (
        ("the head dimension", "head_dim", "head dimension"),
        "The head dimension is the width of one attention head; it need not be hidden size divided by heads.",
    ),
    (
        ("byte-level BPE", "BPE", "byte pair encoding"),
        "Byte-level BPE builds tokens by merging frequent pairs, starting from the 256 bytes.",
    ),
    (
        ("ChatML", "chatml", "the ChatML format"),
        "ChatML wraps each message in im_start and im_end tokens with the role on the first line.",
    ),
    (
        ("a chat template", "the chat template", "chat templates"),
        "A chat template turns a list of messages into the exact text that a model was trained on.",
    ),
    (("greedy decoding", "greedy sampling"), "Greedy decoding always takes the most probable next token."),
    (
        ("prefill", "the prefill phase"),
        "Prefill runs the whole prompt through the model at once and fills the KV cache.",
    ),
    (
        ("decoding", "the decode phase", "decode"),
        "Decoding produces one token at a time and reads all active weights for each of them.",
    ),
    (
        ("safetensors", "the safetensors format"),
        "Safetensors is a weight file: a JSON header, then raw tensor bytes that can be memory-mapped.",
    ),
    (
        ("group-limited routing", "grouped routing", "group limited routing"),
        "Group-limited routing first picks the best groups of experts, then the top experts inside them.",
    ),
    (
        ("the correction bias", "e_score_correction_bias", "the router bias of DeepSeek V3"),
        "The correction bias of DeepSeek V3 changes which experts are picked, but not their weights.",
    ),
    (
        ("perplexity", "the perplexity of a text"),
        "Perplexity is the exponential of the mean negative log-probability of the tokens of a text.",
    ),
    (("top-k sampling", "top-k"), "Top-k sampling draws the next token from the k most probable ones."),
    (
        ("top-p sampling", "nucleus sampling", "top-p"),
        "Top-p sampling draws from the smallest set of tokens whose probabilities add up to p.",
    ),
    (
        ("npllm", "NPLLM", "the npllm library"),
        "npllm is a library that defines and runs open language models in plain NumPy.",
    ),
    (
        ("a transformer", "the transformer", "a decoder-only transformer"),
        "A decoder-only transformer stacks causal attention and feed-forward blocks and predicts the next token.",
    ),
    (
        ("a token", "tokens", "tokenization"),
        "A token is a piece of text, often a word or part of one, that the model reads as a number.",
    ),
)

UNKNOWN_MODEL_ANSWER = "I do not know that model; I know DeepSeek, Mistral, OLMo 2, Gemma, Llama, Qwen and GPT-2 models."
UNKNOWN_MODELS: tuple[str, ...] = (
    "GPT-4",
    "GPT-5",
    "Claude",
    "Gemini",
    "Mixtral",
    "Phi-3",
    "Falcon",
    "Grok",
    "Command R",
    "BERT",
    "T5",
    "Yi",
    "Kimi K2",
    "BLOOM",
    "Mamba",
    "StarCoder",
    "PaLM",
    "DBRX",
    "Mistral 7B",
    "Llama 2",
    "GPT-3",
    "GPT-4o",
    "Phi-4",
    "SmolLM",
    "Granite",
    "ChatGLM",
    "Jamba",
    "Nemotron",
)
