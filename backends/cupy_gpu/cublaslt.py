"""cuBLASLt through ctypes: `y = x W^T` and `y += x W^T` for prompts, in a form that a CUDA graph can capture.

CuPy's own cuBLAS calls refuse to be captured; cuBLASLt with a handle and a workspace of our own does not mind. What
it is handed are descriptions that only it looks into, but for `Heuristic`.
"""

from __future__ import annotations

import ctypes as c
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from npllm.errors import BackendError

# Enumerators of library_types.h, cublas_api.h and cublasLt.h; a test holds them against the headers.
CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF = 0, 2, 14
CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
CUBLAS_COMPUTE_32F = 68
CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB = 3, 4
CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1
CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5
CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6
CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7
CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
CUBLAS_STATUS_NOT_SUPPORTED = 15

# The types of x and W by their storage format; y is float32, and so are sums.
TYPES = {"f32": CUDA_R_32F, "f16": CUDA_R_16F, "bf16": CUDA_R_16BF}

# Shapes whose plans are kept: prompts end at any length.
MOST_PLANS = 4096

# What Hopper's kernels ask for at most (cublasSetWorkspace's documentation).
WORKSPACE = 32 << 20


class Algorithm(c.Structure):
    """cublasLtMatmulAlgo_t."""

    _fields_ = (("data", c.c_uint64 * 8),)


class Heuristic(c.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", Algorithm), ("workspace", c.c_size_t), ("state", c.c_int), ("waves", c.c_float),
        ("reserved", c.c_int * 4),
    )  # fmt: skip


class Shape(NamedTuple):
    """Of a product `y_MF = x_MD W_FD^T`: tokens M, outputs F, inputs D, and the format of x and W.

    Rows of W and y are `w_step` and `y_step` numbers apart; the addresses of x, W and y are multiples of `alignment`.
    """

    M: int
    F: int
    D: int
    format: str
    w_step: int
    y_step: int
    alignment: int


def alignment(*addresses: int) -> int:
    """The largest power of two, at most 256, that divides all addresses."""
    return min(256, *(address & -address or 256 for address in addresses))


def load() -> c.CDLL | None:
    """The library that CuPy would load, or None where there is none, or none that works with this GPU's driver."""
    library, handle = find(), c.c_void_p()
    if library is None or library.cublasLtCreate(c.byref(handle)):
        return None
    library.cublasLtDestroy(handle)
    return library


def find() -> c.CDLL | None:
    """The library, or None where it is not installed."""
    names = ["libcublasLt.so.13", "libcublasLt.so.12"]
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        names.insert(0, load_nvidia_dynamic_lib("cublasLt").abs_path or names[0])
    except (ImportError, OSError, RuntimeError):
        pass
    for name in names:
        try:
            return c.CDLL(name)
        except OSError:
            continue
    return None


class Plan:
    """What a product of one shape is described by, and the algorithm that the library's heuristic takes for it."""

    def __init__(self, library: c.CDLL, handle: c.c_void_p, shape: Shape, workspace: int) -> None:
        self.library, kind = library, TYPES[shape.format]
        self.made: list[tuple[str, c.c_void_p]] = []
        # The library's matrices lie by columns: y [F, M] = W [D, F]^T x [D, M].
        self.operation = self._make("MatmulDesc", CUBLAS_COMPUTE_32F, CUDA_R_32F)
        self._set("MatmulDesc", self.operation, CUBLASLT_MATMUL_DESC_TRANSA, c.c_int32(CUBLAS_OP_T))
        self._set("MatmulDesc", self.operation, CUBLASLT_MATMUL_DESC_TRANSB, c.c_int32(CUBLAS_OP_N))
        self.w = self._layout(kind, shape.D, shape.F, shape.w_step)
        self.x = self._layout(kind, shape.D, shape.M, shape.D)
        self.y = self._layout(CUDA_R_32F, shape.F, shape.M, shape.y_step)
        preference = self._make("MatmulPreference")
        self._set("MatmulPreference", preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, c.c_uint64(workspace))
        for attribute in (
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ):  # fmt: skip
            self._set("MatmulPreference", preference, attribute, c.c_uint32(shape.alignment))
        self.heuristic, found = Heuristic(), c.c_int(0)
        status = library.cublasLtMatmulAlgoGetHeuristic(
            handle, self.operation, self.w, self.x, self.y, self.y, preference, 1, c.byref(self.heuristic), c.byref(found)
        )
        if status not in (0, CUBLAS_STATUS_NOT_SUPPORTED):
            check(library, "MatmulAlgoGetHeuristic", status)
        # Without one, the library has no kernel for such a product.
        self.possible = status == 0 and found.value == 1 and self.heuristic.state == 0

    def _make(self, what: str, *arguments: Any) -> c.c_void_p:
        made = c.c_void_p()
        check(self.library, f"{what}Create", getattr(self.library, f"cublasLt{what}Create")(c.byref(made), *arguments))
        self.made.append((what, made))
        return made

    def _layout(self, kind: int, rows: int, columns: int, step: int) -> c.c_void_p:
        return self._make("MatrixLayout", kind, c.c_uint64(rows), c.c_uint64(columns), c.c_int64(step))

    def _set(self, what: str, of: c.c_void_p, attribute: int, value: Any) -> None:
        function = getattr(self.library, f"cublasLt{what}SetAttribute")
        check(self.library, f"{what}SetAttribute", function(of, attribute, c.byref(value), c.c_size_t(c.sizeof(value))))

    def destroy(self) -> None:
        for what, made in self.made:
            getattr(self.library, f"cublasLt{what}Destroy")(made)
        self.made = []


def check(library: c.CDLL, function: str, status: int) -> None:
    """BackendError for a status other than success."""
    if status:
        library.cublasLtGetStatusName.restype = c.c_char_p
        raise BackendError(f"cublasLt{function} failed: {library.cublasLtGetStatusName(status).decode()}")


class Products:
    """Products on a stream, with a workspace of `size` bytes at a device address and a plan for each shape."""

    def __init__(self, library: c.CDLL, workspace: int, size: int, stream: Callable[[], int]) -> None:
        self.library, self.workspace, self.size, self.stream = library, workspace, size, stream
        self.handle = c.c_void_p()
        check(library, "Create", library.cublasLtCreate(c.byref(self.handle)))
        self.plans: OrderedDict[Shape, Plan] = OrderedDict()

    def plan(self, shape: Shape) -> Plan:
        plan = self.plans.pop(shape, None) or Plan(self.library, self.handle, shape, self.size)
        self.plans[shape] = plan
        if len(self.plans) > MOST_PLANS:
            self.plans.popitem(last=False)[1].destroy()
        return plan

    def multiply(self, shape: Shape, x: int, w: int, y: int, *, add: bool = False) -> bool:
        """`y = x W^T`, or with `add` `y += x W^T`, at these device addresses -> whether the library has a kernel for it; if
        not, nothing was done."""
        plan = self.plan(shape)
        if not plan.possible:
            return False
        # By value, at the time of the call: a captured product keeps them.
        one, beta = c.c_float(1.0), c.c_float(1.0 if add else 0.0)
        status = self.library.cublasLtMatmul(
            self.handle, plan.operation, c.byref(one), c.c_void_p(w), plan.w, c.c_void_p(x), plan.x, c.byref(beta),
            c.c_void_p(y), plan.y, c.c_void_p(y), plan.y, c.byref(plan.heuristic.algorithm), c.c_void_p(self.workspace),
            c.c_size_t(self.size), c.c_void_p(self.stream()),
        )  # fmt: skip
        check(self.library, "Matmul", status)
        return True
