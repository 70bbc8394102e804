"""The truth files of single operations, `tests/truth/blocks`, and npllm's operations run on their inputs."""

import json
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import Backend, merge_heads
from npllm.cache import LayerCache, LayerSpec, Rows
from npllm.handles import Stack, Weight
from npllm.latent import LATENT_EPS, query_weights
from npllm.models import interpret
from npllm.weights import MLP, Experts, Gate, GatedFFN, LatentKV, Linear
from tests.export import TRUTH, stale

Parameters = dict[str, Any]
Tensors = dict[str, Array]


class File:
    """One file of `tests/truth/blocks`: the parameters and the tensors of each case."""

    def __init__(self, name: str) -> None:
        with safe_open(TRUTH / "blocks" / f"{name}.safetensors", "numpy") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if why := stale(about["provenance"], "blocks"):
            pytest.fail(why)
        self.given: dict[str, Parameters] = about["cases"]
        self.tensors = {case: self._of(case, tensors) for case in self.given}

    @staticmethod
    def _of(case: str, tensors: Tensors) -> Tensors:
        return {key.partition("/")[2]: value for key, value in tensors.items() if key.partition("/")[0] == case}


FILES = {name: File(name) for name in sorted(path.stem for path in (TRUTH / "blocks").iterdir())}


def cases_of(*files: str) -> Any:
    """Parametrise with the file and the case."""
    return pytest.mark.parametrize(("file", "case"), [(file, case) for file in files for case in FILES[file].given])


both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def lookup(file: str, case: str, dtype: str) -> tuple[Parameters, Tensors, str]:
    """Parameters; tensors with real inputs in `dtype` and outputs computed in it; the limit."""
    tensors = FILES[file].tensors[case]
    exact = {name.removesuffix("_f64"): value for name, value in tensors.items() if name.endswith("_f64")}
    single = {name: value for name, value in tensors.items() if not name.endswith("_f64")}
    if dtype == "float32":
        return FILES[file].given[case], single, "block"
    wide = {name: value.astype(dtype) if value.dtype.kind == "f" else value for name, value in single.items()}
    return FILES[file].given[case], wide | exact, "block float64"


# -- operations on a file's inputs --------------------------------------------------------------------------------------


def feed_forward(case: str, t: Tensors) -> MLP | GatedFFN:
    """The layer of a case of `ffn`, in arrays; GPT-2's matrices are stored transposed."""

    def linear(name: str) -> Linear:
        weight = t[f"{name}.weight"]
        return Linear(weight.T if case == "gelu" else weight, t.get(f"{name}.bias"))

    if case == "gelu":
        return MLP(linear("c_fc"), linear("c_proj"))
    return GatedFFN(linear("gate_proj"), linear("up_proj"), linear("down_proj"))


def fed_forward(be: Backend, w: MLP | GatedFFN, x_MD: Array, residual_MD: Array) -> Array:
    if isinstance(w, MLP):
        return be.mlp(x_MD, w, "gelu_new", residual_MD=residual_MD)
    return be.gated_ffn(x_MD, w, "silu", residual_MD=residual_MD)


def prepared(be: Backend, bundle: Any) -> Any:
    """A bundle of a file's arrays as the backend prepares one of handles."""
    return be.prepare(handles(bundle))


def handles(bundle: Any) -> Any:
    if bundle is None:
        return None
    if isinstance(bundle, np.ndarray):
        return Weight.of("exported", bundle)
    if isinstance(bundle, list):
        return Stack("exported", tuple(map(handles, bundle)))
    return type(bundle)(*map(handles, bundle))


def config_of(given: Parameters) -> Any:
    """What the model file of a case's architecture reads from the case's config fields."""
    heads = given["num_attention_heads"]
    others = {"model_type": given["model"], "num_key_value_heads": heads, "head_dim": 8, "num_experts_per_tok": 1}
    return interpret(others | given, warn=lambda *_: None).config


def gated_ffn_of(t: Tensors, name: str) -> GatedFFN:
    return GatedFFN(*(Linear(t[f"{name}.{part}.weight"]) for part in GatedFFN._fields))


def gate_of(t: Tensors, prefix: str) -> Gate:
    correction = t.get(f"{prefix}e_score_correction_bias")
    return Gate(Linear(t[f"{prefix}weight"]), None if correction is None else Linear(correction))


def experts_of(t: Tensors, transposed: bool) -> Experts:
    """The experts of a file, which stores gate above up (`transposed`: beside it, and all of them as [in, out])."""
    both, down = t["experts.gate_up_proj"], t["experts.down_proj"]
    if transposed:
        both, down = both.transpose(0, 2, 1), down.transpose(0, 2, 1)
    gate, up = np.split(both, 2, axis=1)
    return Experts(Linear(list(gate)), Linear(list(up)), Linear(list(down)))


def mixture(be: Backend, given: Parameters, t: Tensors, x_MD: Array, router: blocks.Router | None = None) -> Array:
    """A whole mixture of experts by the backend's operations -> y_MD; `router` takes the place of the config's."""
    llama4, act = given["model"] == "llama4_text", given["hidden_act"]
    gate, experts = prepared(be, gate_of(t, "router." if llama4 else "gate.")), prepared(be, experts_of(t, llama4))
    index_MC, weight_MC = be.route(x_MD, gate, router or config_of(given).router)
    y_MD = be.moe(x_MD, experts, index_MC, weight_MC, act, weigh="input" if llama4 else "output")
    shared = [name for name in ("shared_expert", "shared_experts") if f"{name}.gate_proj.weight" in t]
    if not shared:
        return y_MD
    ffn = prepared(be, gated_ffn_of(t, shared[0]))
    if "shared_expert_gate.weight" in t:
        weight_M1 = blocks.sigmoid(be.xp, be.linear(x_MD, prepared(be, Linear(t["shared_expert_gate.weight"]))))
        return y_MD + weight_M1 * be.gated_ffn(x_MD, ffn, act)
    return be.gated_ffn(x_MD, ffn, act, residual_MD=y_MD)


class Projections:
    """The modules of an attention layer as the attributes that npllm.latent asks for, prepared by a backend."""

    def __init__(self, be: Backend, t: Tensors) -> None:
        for name in {key.rpartition(".")[0] for key in t if "." in key}:
            setattr(self, name, prepared(be, Linear(t[f"{name}.weight"], t.get(f"{name}.bias"))))


def latent_spec(given: Parameters) -> LayerSpec:
    return LayerSpec(1, given["kv_lora_rank"] + given["qk_rope_head_dim"], 0, latent=given["kv_lora_rank"])


def latent_attention(be: Backend, given: Parameters, t: Tensors, x_MD: Array, rows: Rows, memory: LayerCache) -> Array:
    """A layer of latent attention by the backend's operations, output projection included -> y_MD."""
    c, w = config_of(given), Projections(be, t)
    angles = be.angles(c.rope, rows.positions_M)
    scale_M = None
    if given["model"] == "mistral4":
        scale_M = blocks.temperature(be.xp, rows.positions_M, c.trained_context, c.llama_4_scaling_beta, be.array_dtype)
    kv_a = LatentKV(w.kv_a_proj_with_mqa, w.kv_a_layernorm)
    of = (query_weights(c, w), kv_a, memory, rows, angles, c.head_dim, LATENT_EPS)
    q_MHK, keys = be.append_latents(x_MD, *of, scale_M=scale_M)
    o_MHV = be.latent_attention(q_MHK, keys, rows, w.kv_b_proj, mask=blocks.CAUSAL, scale=c.scale)
    return be.linear(merge_heads(o_MHV), w.o_proj)
