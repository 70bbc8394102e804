"""Arrays of other libraries, with the libraries where they are installed, and with stand-ins everywhere."""

import functools
import importlib.util
import sys
import types
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from npllm.errors import ArgumentError
from npllm.testing.case import find_case
from npllm.testing.checking import check
from npllm.testing.frameworks import (
    FRAMEWORKS,
    UNWRITTEN,
    address,
    as_numpy,
    framework,
    guessed,
    is_unwritten,
    plain_function,
    unwritten,
)

CASE = find_case("rms_norm", "plain")


def honest(x, weight, eps):
    f = x.astype(np.float32)
    return (f / np.sqrt((f * f).mean(-1, keepdims=True) + np.float32(eps)) * weight.astype(np.float32)).astype(x.dtype)


# -- stand-ins --------------------------------------------------------------------------------------------------------


class OnlyDlpack:
    """An array of a library that the kit has never heard of."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __dlpack__(self, **how: Any) -> Any:
        return self.x.__dlpack__(**how)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()


class OnlyArray:
    """What can be turned into a NumPy array, and nothing else."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.x


class OnGpu(OnlyDlpack):
    def __dlpack_device__(self) -> Any:
        return (2, 0)


@pytest.mark.parametrize("kind", [OnlyDlpack, OnlyArray])
@pytest.mark.parametrize("policy", ["f32", "f16"])
def test_any_array_object_may_come_back(kind: Any, policy: str) -> None:
    check("rms_norm", lambda x, weight, eps: kind(honest(x, weight, eps)), CASE, policy).raise_on_failure()


def test_bfloat16_comes_back_as_bits_where_dlpack_refuses_it() -> None:
    def bits(x, weight, eps):
        return OnlyDlpack(honest(x, weight, eps).view(np.uint16))

    def refused(x, weight, eps):
        return OnlyDlpack(honest(x, weight, eps))

    check("rms_norm", bits, CASE, "bf16").raise_on_failure()
    if "torch" not in sys.modules:
        report = check("rms_norm", refused, CASE, "bf16")
        assert report.problem == "returned"
        assert "return its bits as uint16" in report.message


def test_a_gpu_array_that_nothing_here_can_fetch_is_named() -> None:
    if importlib.util.find_spec("cupy") or importlib.util.find_spec("torch"):
        pytest.skip("CuPy or PyTorch is installed: they would try to fetch it")
    report = check("rms_norm", lambda x, **_: OnGpu(x), CASE)
    assert report.problem == "returned"
    assert "lies on a GPU: CuPy or PyTorch is needed" in report.message


@pytest.mark.parametrize("x", [None, "text", 3.5, [1.0, 2.0], object()])
def test_what_is_no_array_is_refused(x: Any) -> None:
    with pytest.raises(TypeError, match="is no array"):
        as_numpy(x)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int32, np.uint8])
def test_memory_that_nobody_wrote_to_is_known_again(dtype: Any) -> None:
    x = unwritten((3, 2), np.dtype(dtype))
    assert is_unwritten(x).all()
    assert x.dtype.itemsize in UNWRITTEN
    assert np.dtype(dtype).kind in "iu" or np.isnan(x.astype(np.float64)).all()
    assert not is_unwritten(np.zeros(3, dtype)).any()
    assert np.dtype(dtype).kind in "iu" or not is_unwritten(np.full(3, np.nan).astype(dtype)).any()


def test_addresses_are_those_of_the_first_element() -> None:
    x = np.zeros((4, 5), np.float32)
    assert address(x[1:]) == x.ctypes.data + 20
    assert address(x[:0]) is None
    assert address(3.0) is None


def test_numpy_gives_copies() -> None:
    home, x = FRAMEWORKS["numpy"](), np.arange(6.0).reshape(2, 3).T
    there = home.put(x)
    assert there.flags.c_contiguous
    assert not np.shares_memory(there, x)
    home.spoil(there)
    assert np.isnan(there).all()
    with pytest.raises(ArgumentError, match="numpy arrays have no device 'cuda'"):
        framework(honest, None, "cuda")


# -- which framework --------------------------------------------------------------------------------------------------


def compiled(source: str, **names: Any) -> Any:
    """The function `kernel` of a source, in a file whose globals are `names`."""
    space = dict(names)
    exec(source, space)
    return space["kernel"]


def library(name: str) -> types.ModuleType:
    return types.ModuleType(name)


KERNEL = "def kernel(x): return {}.thing(x)"


def test_the_framework_is_what_the_code_names() -> None:
    torch, jnp, cupy = library("torch"), library("jax.numpy"), library("cupy")
    assert guessed(compiled(KERNEL.format("torch"), torch=torch)) == "torch"
    assert guessed(compiled(KERNEL.format("jnp"), jnp=jnp, torch=torch)) == "jax"
    assert guessed(compiled(KERNEL.format("np"), np=np, torch=torch)) == "numpy"
    assert guessed(compiled(KERNEL.format("cp"), cp=cupy, np=np)) == "cupy"
    assert guessed(honest) == guessed(np.add) == guessed(len) == "numpy"


def test_a_library_that_the_first_call_will_import_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert guessed(compiled("def kernel(x):\n    import cupy\n    return cupy.abs(x)", np=np)) == "cupy"


def test_else_what_the_file_imports() -> None:
    assert guessed(compiled("def kernel(x): return x", torch=library("torch"))) == "torch"
    with pytest.raises(ArgumentError, match="could be for jax or torch: say which as framework='jax'"):
        guessed(compiled("def kernel(x): return x", torch=library("torch"), jnp=library("jax.numpy")))


def test_wrappers_are_looked_through() -> None:
    kernel = compiled(KERNEL.format("torch"), torch=library("torch"))

    class Module:
        forward = kernel

        def __call__(self, *arrays: Any) -> Any:
            raise NotImplementedError

    class Call:
        __call__ = kernel

    for each in (functools.partial(kernel, 1), lambda x: kernel(x), functools.wraps(kernel)(lambda x: x), Module(), Call()):
        assert guessed(each) == "torch"
    assert plain_function(functools.partial(functools.partial(kernel))) is kernel


def test_unknown_and_missing_frameworks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="framework 'pytorch' is unknown; known: torch"):
        framework(honest, "pytorch")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ArgumentError, match=r"framework torch cannot be imported .*: pip install torch"):
        framework(honest, "torch")


# -- the libraries themselves -----------------------------------------------------------------------------------------


def needed(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: its arrays cannot be made")


@pytest.mark.parametrize("policy", ["f32", "bf16", "f16"])
def test_torch(policy: str) -> None:
    torch = needed("torch")

    def kernel(x, weight, eps):
        f = x.float()
        return (f * torch.rsqrt((f * f).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)

    def learns(x, weight, eps):
        return kernel(x.requires_grad_(), weight, eps)

    def writes(x, weight, eps):
        return kernel(x, weight, eps), x.mul_(2)[0]

    assert guessed(kernel) == "torch"
    check("rms_norm", kernel, CASE, policy).raise_on_failure()
    check("rms_norm", learns, CASE, policy).raise_on_failure()
    assert check("rms_norm", lambda x, weight, eps: x.view(x.shape), CASE, policy, framework="torch").problem == "view"
    assert check("rms_norm", lambda **given: writes(**given)[0], CASE, policy, framework="torch").problem == "modified"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int32, np.uint8, np.int8])
@pytest.mark.parametrize("name", ["torch", "jax", "cupy"])
def test_bits_survive_both_ways(name: str, dtype: Any) -> None:
    needed(name)
    if name == "jax" and np.dtype(dtype).itemsize == 8:
        pytest.skip("JAX has no 64-bit arrays unless jax_enable_x64 is set")
    home = framework(honest, name)
    for shape in ((3, 4), (0, 2), (1,)):
        x = (10.0 * np.random.default_rng(0).random(shape)).astype(dtype)
        assert home.get(home.put(x)).tobytes() == x.tobytes()


@pytest.mark.parametrize("policy", ["f32", "bf16", "f16"])
def test_jax(policy: str) -> None:
    jax = needed("jax")
    jnp = jax.numpy

    @jax.jit
    def kernel(x, weight, eps):
        f = x.astype(jnp.float32)
        return (f / jnp.sqrt((f * f).mean(-1, keepdims=True) + eps) * weight.astype(jnp.float32)).astype(x.dtype)

    assert guessed(kernel) == "jax"
    check("rms_norm", kernel, CASE, policy).raise_on_failure()
