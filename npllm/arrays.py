"""The array vocabulary of npllm: types, and the letters that end array names.

An array's name ends in one capital letter per axis, `q_MHK`; einsum strings use the same letters. `tests/shapecheck.py`
binds the letters to sizes on every call of a block or backend operation, so a suffix cannot rot.

| letter | axis                                      | letter | axis                                        |
|--------|-------------------------------------------|--------|---------------------------------------------|
| B      | rows of a batch (sequences)               | K      | query/key width per head                    |
| T      | query positions of one row                | V      | value width per head                        |
| S      | key positions of one row                  | J      | RoPE pairs (half of the rotated width)      |
| M      | new tokens of all rows, packed            | F      | feed-forward width; any output width        |
| D      | model width (hidden size)                 | N      | vocabulary                                  |
| H      | query heads                               | W      | rows whose logits are wanted                |
| G      | key/value heads                           | R      | query heads per key/value head, H / G       |
| E      | experts                                   | C      | experts chosen for a token                  |
| L      | latent width of MLA (kv_lora_rank)        | A      | AltUp streams (altup_num_inputs)            |
| Y      | layers                                    | P      | width of a per-layer input                  |
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

# Backends bring arrays of their own (CuPy's); NumPy's type stands for all of them.
Array: TypeAlias = NDArray[Any]

# The array module of a backend: numpy, cupy, or the strict proxy of the tests.
Namespace: TypeAlias = Any

DTypeLike: TypeAlias = str | np.dtype[Any] | type[Any]
