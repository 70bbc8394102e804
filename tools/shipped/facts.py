"""What the shipped model knows about each language model, as data: tables of sizes, and one sentence per family trait.

Every number comes from the published configurations and the counts that the project's architecture notes list; sums
such as the bytes of a KV cache are computed here from those numbers. The phrasings of the questions are beside the
attribute they ask for: `asked` ones are trained on, `unseen` ones are never trained on for any model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

BF16_BYTES = 2


@dataclass(frozen=True)
class Model:
    """One checkpoint: sizes as in its config.json; `params` and `active` count the text part.

    `experts` is (routed, routed per token, shared, width of one routed expert) and None for a dense model;
    `latent` is the number of cached values per layer and token under MLA (512 latent + 64 RoPE), 0 without MLA;
    `cached_layers` counts the layers that own a KV cache, where it is not every layer.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    params: int
    active: str = ""
    experts: tuple[int, int, int, int] | None = None
    latent: int = 0
    cached_layers: int = 0
    note: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def kv_bytes(self) -> int:
        """Bytes that one token adds to the cache over all layers, in bf16."""
        values = self.latent or 2 * self.kv_heads * self.head_dim
        return (self.cached_layers or self.layers) * values * BF16_BYTES


@dataclass(frozen=True)
class Attribute:
    """A question that can be asked about many subjects. `{m}` stands for a name of the subject."""

    name: str
    asked: tuple[str, ...]
    unseen: tuple[str, ...]
    answers: dict[str, str] = field(default_factory=dict)


def human(count: int) -> str:
    """A parameter count in words: '494 million', '8.03 billion', '671 billion'."""
    if count < 999_500_000:
        return f"{count / 1e6:.0f} million"
    digits = 2 if count < 9_995_000_000 else 1
    return f"{count / 1e9:.{digits}f}".rstrip("0").rstrip(".") + " billion"


def _qwen(name: str) -> tuple[str, ...]:
    return (name.replace("Qwen", "Qwen "), name.replace("Qwen", "Qwen ").lower())


MODELS = (
    Model(
        "DeepSeek V3",
        61,
        7168,
        128,
        128,
        128,
        18432,
        671_026_404_352,
        "about 37 billion",
        (256, 8, 1, 2048),
        576,
        aliases=("DeepSeekV3", "deepseek-v3 671b", "Deepseek V3"),
    ),
    Model(
        "DeepSeek R1",
        61,
        7168,
        128,
        128,
        128,
        18432,
        671_026_404_352,
        "about 37 billion",
        (256, 8, 1, 2048),
        576,
        aliases=("DeepSeekR1", "Deepseek R1"),
    ),
    Model(
        "DeepSeek V2",
        60,
        5120,
        128,
        128,
        128,
        12288,
        235_741_434_880,
        "about 21 billion",
        (160, 6, 2, 1536),
        576,
        aliases=("DeepSeekV2", "Deepseek V2"),
    ),
    Model(
        "DeepSeek V2-Lite",
        27,
        2048,
        16,
        16,
        128,
        10944,
        15_706_484_224,
        "about 2.66 billion",
        (64, 6, 2, 1408),
        576,
        aliases=("DeepSeek V2 Lite", "deepseek v2 lite"),
    ),
    Model(
        "Mistral Large 3",
        61,
        7168,
        128,
        128,
        128,
        16384,
        673_421_089_792,
        "about 39 billion",
        (128, 4, 1, 4096),
        576,
        note="text ",
        aliases=("Mistral Large3",),
    ),
    Model(
        "Mistral Small 3.1",
        40,
        5120,
        32,
        8,
        128,
        32768,
        23_572_403_200,
        note="text ",
        aliases=("Mistral Small 3.1 24B", "mistral small 24b"),
    ),
    Model("OLMo 2 1B", 16, 2048, 16, 16, 128, 8192, 1_484_916_736, aliases=("OLMo2 1B", "Olmo 2 1B")),
    Model("OLMo 2 7B", 32, 4096, 32, 32, 128, 11008, 7_298_617_344, aliases=("OLMo2 7B", "Olmo 2 7B")),
    Model("OLMo 2 13B", 40, 5120, 40, 40, 128, 13824, 13_716_198_400, aliases=("OLMo2 13B", "Olmo 2 13B")),
    Model("OLMo 2 32B", 64, 5120, 40, 8, 128, 27648, 32_234_279_936, aliases=("OLMo2 32B", "Olmo 2 32B")),
    Model("Gemma 2 2B", 26, 2304, 8, 4, 256, 9216, 2_614_341_888, aliases=("Gemma2 2B",)),
    Model("Gemma 2 9B", 42, 3584, 16, 8, 256, 14336, 9_241_705_984, aliases=("Gemma2 9B",)),
    Model("Gemma 2 27B", 46, 4608, 32, 16, 128, 36864, 27_227_128_320, aliases=("Gemma2 27B",)),
    Model("Gemma 3 270M", 18, 640, 4, 1, 256, 2048, 268_098_176, aliases=("Gemma3 270M",)),
    Model("Gemma 3 1B", 26, 1152, 4, 1, 256, 6912, 999_885_952, aliases=("Gemma3 1B",)),
    Model("Gemma 3 4B", 34, 2560, 8, 4, 256, 10240, 3_880_263_168, note="text ", aliases=("Gemma3 4B",)),
    Model("Gemma 3 12B", 48, 3840, 16, 8, 256, 15360, 11_766_034_176, note="text ", aliases=("Gemma3 12B",)),
    Model("Gemma 3 27B", 62, 5376, 32, 16, 128, 21504, 27_009_346_304, note="text ", aliases=("Gemma3 27B",)),
    Model("Gemma 3n E2B", 30, 2048, 8, 2, 256, 8192, 4_435_182_688, cached_layers=20, aliases=("Gemma3n E2B",)),
    Model("Gemma 3n E4B", 35, 2048, 8, 2, 256, 16384, 6_835_235_568, cached_layers=20, aliases=("Gemma3n E4B",)),
    Model("Llama 3.1 8B", 32, 4096, 32, 8, 128, 14336, 8_030_261_248, aliases=("Llama3.1 8B",)),
    Model("Llama 3.1 70B", 80, 8192, 64, 8, 128, 28672, 70_553_706_496, aliases=("Llama3.1 70B",)),
    Model("Llama 3.1 405B", 126, 16384, 128, 8, 128, 53248, 405_853_388_800, aliases=("Llama3.1 405B",)),
    Model("Llama 3.2 1B", 16, 2048, 32, 8, 64, 8192, 1_235_814_400, aliases=("Llama3.2 1B",)),
    Model("Llama 3.2 3B", 28, 3072, 24, 8, 128, 8192, 3_212_749_824, aliases=("Llama3.2 3B",)),
    Model("Llama 3.3 70B", 80, 8192, 64, 8, 128, 28672, 70_553_706_496, aliases=("Llama3.3 70B",)),
    Model(
        "Llama 4 Scout",
        48,
        5120,
        40,
        8,
        128,
        8192,
        107_769_861_120,
        "about 17 billion",
        (16, 1, 1, 8192),
        note="text ",
        aliases=("Llama4 Scout", "Scout"),
    ),
    Model(
        "Llama 4 Maverick",
        48,
        5120,
        40,
        8,
        128,
        16384,
        400_711_848_960,
        "about 17 billion",
        (128, 1, 1, 8192),
        note="text ",
        aliases=("Llama4 Maverick", "Maverick"),
    ),
    Model("Qwen2.5 0.5B", 24, 896, 14, 2, 64, 4864, 494_032_768, aliases=_qwen("Qwen2.5 0.5B")),
    Model("Qwen2.5 1.5B", 28, 1536, 12, 2, 128, 8960, 1_543_714_304, aliases=_qwen("Qwen2.5 1.5B")),
    Model("Qwen2.5 3B", 36, 2048, 16, 2, 128, 11008, 3_085_938_688, aliases=_qwen("Qwen2.5 3B")),
    Model("Qwen2.5 7B", 28, 3584, 28, 4, 128, 18944, 7_615_616_512, aliases=_qwen("Qwen2.5 7B")),
    Model("Qwen2.5 14B", 48, 5120, 40, 8, 128, 13824, 14_770_033_664, aliases=_qwen("Qwen2.5 14B")),
    Model("Qwen2.5 32B", 64, 5120, 40, 8, 128, 27648, 32_763_876_352, aliases=_qwen("Qwen2.5 32B")),
    Model("Qwen2.5 72B", 80, 8192, 64, 8, 128, 29568, 72_706_203_648, aliases=_qwen("Qwen2.5 72B")),
    Model("Qwen3 0.6B", 28, 1024, 16, 8, 128, 3072, 596_049_920, aliases=_qwen("Qwen3 0.6B")),
    Model("Qwen3 1.7B", 28, 2048, 16, 8, 128, 6144, 1_720_574_976, aliases=_qwen("Qwen3 1.7B")),
    Model("Qwen3 4B", 36, 2560, 32, 8, 128, 9728, 4_022_468_096, aliases=_qwen("Qwen3 4B")),
    Model("Qwen3 8B", 36, 4096, 32, 8, 128, 12288, 8_190_735_360, aliases=_qwen("Qwen3 8B")),
    Model("Qwen3 14B", 40, 5120, 40, 8, 128, 17408, 14_768_307_200, aliases=_qwen("Qwen3 14B")),
    Model("Qwen3 32B", 64, 5120, 64, 8, 128, 25600, 32_762_123_264, aliases=_qwen("Qwen3 32B")),
    Model(
        "Qwen3 30B-A3B",
        48,
        2048,
        32,
        4,
        128,
        768,
        30_532_122_624,
        "about 3.35 billion",
        (128, 8, 0, 768),
        aliases=("Qwen3 30B A3B", "qwen 3 30b a3b", "Qwen3 30B"),
    ),
    Model(
        "Qwen3 235B-A22B",
        94,
        4096,
        64,
        4,
        128,
        1536,
        235_093_634_560,
        "about 22.2 billion",
        (128, 8, 0, 1536),
        aliases=("Qwen3 235B A22B", "qwen 3 235b a22b", "Qwen3 235B"),
    ),
    Model(
        "Qwen1.5-MoE-A2.7B",
        24,
        2048,
        16,
        16,
        128,
        1408,
        14_315_784_192,
        "about 2.69 billion",
        (60, 4, 1, 1408),
        aliases=("Qwen1.5 MoE A2.7B", "Qwen1.5 MoE"),
    ),
    Model(
        "Qwen2-57B-A14B",
        28,
        3584,
        28,
        4,
        128,
        2560,
        57_408_658_944,
        "about 14.2 billion",
        (64, 8, 1, 2560),
        aliases=("Qwen2 57B A14B", "Qwen2 57B"),
    ),
    Model("GPT-2 small", 12, 768, 12, 12, 64, 3072, 124_439_808, aliases=("GPT2 small", "gpt2 small")),
    Model("GPT-2 medium", 24, 1024, 16, 16, 64, 4096, 354_823_168, aliases=("GPT2 medium", "gpt2 medium")),
    Model("GPT-2 large", 36, 1280, 20, 20, 64, 5120, 774_030_080, aliases=("GPT2 large", "gpt2 large")),
    Model("GPT-2 XL", 48, 1600, 25, 25, 64, 6400, 1_557_611_200, aliases=("GPT2 XL", "gpt2 xl")),
)


def layers_answer(model: Model) -> str:
    return f"{model.name} has {model.layers} layers."


def heads_answer(model: Model) -> str:
    if model.latent:
        return f"{model.name} has {model.heads} attention heads, which share one compressed latent (MLA)."
    if model.heads == model.kv_heads:
        return (
            f"{model.name} has {model.heads} attention heads of dimension {model.head_dim}, "
            "each with its own keys and values."
        )
    noun = "head" if model.kv_heads == 1 else "heads"
    return (
        f"{model.name} has {model.heads} query heads and {model.kv_heads} key-value {noun}, "
        f"each of dimension {model.head_dim}."
    )


def width_answer(model: Model) -> str:
    if not model.experts:
        return f"{model.name} has a hidden size of {model.hidden:,} and a feed-forward width of {model.ffn:,}."
    return f"{model.name} has a hidden size of {model.hidden:,} and experts of width {model.experts[3]:,}."


def params_answer(model: Model) -> str:
    total = f"{model.name} has about {human(model.params)} {model.note}parameters"
    return f"{total}, of which {model.active} are active per token." if model.active else f"{total}."


def cache_answer(model: Model) -> str:
    return f"The KV cache of {model.name} takes {model.kv_bytes:,} bytes per token in bf16."


def _shared(count: int) -> str:
    return {0: "no shared expert", 1: "1 shared expert", 2: "2 shared experts"}[count]


def active_experts_answer(model: Model) -> str:
    if not model.experts:
        return f"{model.name} is a dense model, so it has no experts."
    routed, used, shared, _ = model.experts
    extra = f"plus {_shared(shared)}" if shared else "and has no shared expert"
    return f"{model.name} activates {used} of its {routed} routed experts per token, {extra}."


def total_experts_answer(model: Model) -> str:
    if not model.experts:
        return f"{model.name} is a dense model, so it has no experts."
    routed, _, shared, _ = model.experts
    return f"{model.name} has {routed} routed experts and {_shared(shared)} in each MoE layer."


SIZED: tuple[tuple[Attribute, Callable[[Model], str]], ...] = (
    (
        Attribute(
            "layers",
            (
                "{m} layers",
                "Do you know how many layers {m} has?",
                "How many layers does {m} have?",
                "How many transformer layers are in {m}?",
                "What is the number of layers in {m}?",
                "How deep is {m}?",
                "Tell me the layer count of {m}.",
                "{m}: how many layers?",
                "How many decoder blocks does {m} stack?",
                "What's the depth of {m}?",
                "Number of hidden layers of {m}?",
                "How many blocks does {m} have?",
                "What is num_hidden_layers for {m}?",
                "{m} has how many layers?",
                "Give me the number of transformer blocks in {m}.",
                "I want to know how many layers {m} uses.",
                "How many layers are there in {m}?",
                "Layers in {m}?",
            ),
            ("Can you tell me how many layers there are in {m}?", "How many decoder layers make up {m}?"),
        ),
        layers_answer,
    ),
    (
        Attribute(
            "heads",
            (
                "{m} heads",
                "Do you know how many heads {m} has?",
                "How many attention heads does {m} have?",
                "How many query heads does {m} use?",
                "How many KV heads does {m} have?",
                "How many key-value heads are in {m}?",
                "What is the number of heads in {m}?",
                "What is the head dimension of {m}?",
                "What is head_dim in {m}?",
                "{m}: how many heads?",
                "Tell me the attention heads of {m}.",
                "What are the head counts of {m}?",
                "What is num_attention_heads for {m}?",
                "What is num_key_value_heads for {m}?",
                "How large is each attention head of {m}?",
                "Give me the number of query and key-value heads of {m}.",
                "Number of heads in {m}?",
                "How many heads does {m} use?",
                "How wide is one head of {m}?",
            ),
            (
                "Can you tell me how many attention heads there are in {m}?",
                "How many heads of keys and values does {m} have?",
            ),
        ),
        heads_answer,
    ),
    (
        Attribute(
            "width",
            (
                "{m} hidden size",
                "Do you know the hidden size of {m}?",
                "What is the hidden size of {m}?",
                "How wide is {m}?",
                "What is the model dimension of {m}?",
                "What is hidden_size for {m}?",
                "What is the feed-forward width of {m}?",
                "What is the embedding size of {m}?",
                "What is intermediate_size for {m}?",
                "{m}: what hidden size?",
                "Tell me the hidden dimension of {m}.",
                "How large is the hidden state of {m}?",
                "What is the width of {m}?",
                "How wide is the FFN of {m}?",
                "Give me the hidden size of {m}.",
                "What is d_model in {m}?",
                "Hidden size of {m}?",
                "How many features does the residual stream of {m} have?",
            ),
            ("Can you tell me how wide {m} is?", "Which hidden size does {m} use?"),
        ),
        width_answer,
    ),
    (
        Attribute(
            "params",
            (
                "{m} parameters",
                "Do you know how many parameters {m} has?",
                "How many parameters does {m} have?",
                "How many active parameters does {m} have?",
                "How many parameters are active in {m}?",
                "{m} active parameters",
                "How many parameters does {m} use per token?",
                "How big is {m}?",
                "What is the parameter count of {m}?",
                "How large is {m}?",
                "What is the size of {m}?",
                "{m}: how many parameters?",
                "Tell me the number of parameters of {m}.",
                "How many weights does {m} have?",
                "Parameter count of {m}?",
                "What is the total number of parameters in {m}?",
                "How many parameters are there in {m}?",
                "Give me the size of {m} in parameters.",
                "How many params does {m} have?",
                "How many billion parameters is {m}?",
                "I want to know how many parameters {m} has.",
            ),
            (
                "Can you tell me how many parameters there are in {m}?",
                "What is the number of parameters of {m} in total?",
            ),
        ),
        params_answer,
    ),
    (
        Attribute(
            "kv_cache",
            (
                "{m} KV cache",
                "Do you know how large the KV cache of {m} is?",
                "How large is the KV cache of {m} per token?",
                "How many bytes per token does the KV cache of {m} take?",
                "What is the KV cache size of {m}?",
                "How much memory does the cache of {m} need per token?",
                "{m}: KV cache bytes per token?",
                "How big is the KV cache of {m}?",
                "Tell me the KV cache cost of {m}.",
                "How much does one token add to the KV cache of {m}?",
                "KV cache per token for {m}?",
                "What does {m} cache per token?",
                "How much KV memory does {m} use per token?",
                "Give me the bytes per token of the {m} cache.",
                "How many bytes of KV cache does {m} need for each token?",
                "What is the size of the key-value cache of {m}?",
            ),
            ("Can you tell me how much KV cache {m} needs per token?", "How heavy is the KV cache of {m}?"),
        ),
        cache_answer,
    ),
    (
        Attribute(
            "active_experts",
            (
                "{m} active experts",
                "Do you know how many experts {m} activates?",
                "How many experts are activated per token in {m}?",
                "How many experts does {m} activate per token?",
                "How many experts does {m} use per token?",
                "How many experts are active in {m}?",
                "How many active experts does {m} have?",
                "What is num_experts_per_tok for {m}?",
                "How many experts process each token in {m}?",
                "{m}: how many experts per token?",
                "Tell me how many experts {m} activates for a token.",
                "How many experts does the router of {m} pick?",
                "How many experts fire per token in {m}?",
                "What is the top-k of the router in {m}?",
                "How many routed experts does {m} select for each token?",
                "How many experts are used for one token in {m}?",
                "Number of active experts in {m}?",
                "To how many experts does {m} send a token?",
                "Give me the number of experts per token of {m}.",
            ),
            (
                "Can you tell me how many experts {m} uses for each token?",
                "How many experts are chosen per token by {m}?",
            ),
        ),
        active_experts_answer,
    ),
    (
        Attribute(
            "total_experts",
            (
                "{m} experts",
                "Do you know how many experts {m} has?",
                "How many experts does {m} have?",
                "How many experts are there in {m}?",
                "How many routed experts does {m} have?",
                "What is the total number of experts in {m}?",
                "How many shared experts does {m} have?",
                "Does {m} have a shared expert?",
                "{m}: how many experts in total?",
                "Tell me the expert count of {m}.",
                "How many experts does each MoE layer of {m} hold?",
                "Number of experts in {m}?",
                "How many experts does {m} have in total?",
                "What is n_routed_experts for {m}?",
                "Give me the number of experts in {m}.",
                "Does {m} use shared experts?",
                "How many experts sit in a layer of {m}?",
            ),
            ("Can you tell me how many experts there are in {m}?", "Is there a shared expert in {m}?"),
        ),
        total_experts_answer,
    ),
)
