"""An honest backend in bfloat16, in NumPy: what is multiplied is rounded to it, sums and everything else are float32."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.cache import Keys, Rows
from npllm.testing.rounding import FORMATS
from npllm.weights import Gate

HALVED = {"factors": "bf16", "hidden": "bf16", "weights": "bf16"}
EXACT = ("route", "embed", "rms_norm", "layer_norm", "rope", "angles")


class Coarse(Backend):
    """All arithmetic is that of the canon in float32 but for `halved`."""

    name = "coarse"
    dtypes = ("bfloat16",)

    def rounding(self, operation: str, storage: str) -> Mapping[str, str]:
        return {} if operation in EXACT else HALVED | {"probs": "bf16"}

    @staticmethod
    def halved(x: Array) -> Array:
        return FORMATS["bf16"].round(x.astype(np.float64)).astype(x.dtype)

    def _product(self, x_MD: Array, weight: Any) -> Array:
        return self.halved(x_MD) @ self.halved(self.dense(weight)).T

    def expert(self, x_TD: Array, gate_FD: Array, up_FD: Array, down_DF: Array, act: str) -> Array:
        parts = (self.halved(part) for part in (x_TD, gate_FD, up_FD))
        hidden_TF = super().expert(*parts, np.eye(len(gate_FD), dtype=np.float32), act)
        return self.halved(hidden_TF) @ self.halved(down_DF).T

    def route(self, h_MD: Array, w: Gate, /, router: Any) -> tuple[Array, Array]:
        return Backend().route(h_MD, w, router)

    def attention(self, q_MHK: Array, keys: Keys, rows: Rows, /, **settings: Any) -> Array:
        keys = keys._replace(k_BSGK=self.halved(keys.k_BSGK), v_BSGV=self.halved(keys.v_BSGV))
        return super().attention(self.halved(q_MHK), keys, rows, **settings)
