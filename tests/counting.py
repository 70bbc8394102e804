"""A backend that counts the multiply-adds of a real forward pass, by the shapes of what is multiplied."""

from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.cache import Keys, Rows


class Counted(np.ndarray[Any, Any]):
    """An array whose matrix products are counted; what is computed from it is one too."""

    products = 0
    __array_priority__ = 1.0  # NumPy's own functions, concatenate among them, give an array of this class

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        plain = [np.asarray(each) if isinstance(each, Counted) else each for each in inputs]
        if out is not None:
            options["out"] = tuple(np.asarray(each) for each in out)
        result = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            Counted.products += result.size * plain[0].shape[-1]
        return out[0] if out else result.view(Counted) if isinstance(result, np.ndarray) else result


class CountingBackend(Backend):
    """`visible`: of attention, pairs of queries and keys that the mask lets through are counted, not the scores that are
    computed and then masked."""

    visible = False

    def prepare(self, bundle: Any) -> Any:
        prepared = super().prepare(bundle)
        return prepared.view(Counted) if isinstance(prepared, np.ndarray) else prepared

    def attention(self, q_MHK: Array, keys: Keys, rows: Rows, /, **options: Any) -> Array:  # type: ignore[override]
        if not self.visible:
            return super().attention(q_MHK, keys, rows, **options)
        before = Counted.products
        out_MHV = super().attention(q_MHK, keys, rows, **options)
        Counted.products = before
        for r, (_, start, begin, end) in enumerate(rows):
            k_SGK, v_SGV, first = keys.row(r)
            query_T, key_S = np.arange(start, start + end - begin), np.arange(first, first + len(k_SGK))
            seen = int(options["mask"].allowed(np, query_T, key_S).sum())
            Counted.products += seen * q_MHK.shape[1] * (k_SGK.shape[2] + v_SGV.shape[2])
        return out_MHV
