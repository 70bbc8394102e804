"""Around the kernels of the Numba backend: what must be installed, when it is chosen, what is kept of compiling, threads."""

import errno
import functools
import json
import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from npllm import backend as canon
from npllm import machine
from npllm.backends.numba_cpu import ahead, backend, features, jit
from npllm.backends.numba_cpu.jit import Compiled
from npllm.backends.numba_cpu.store import ENDING, KEPT, Code, Store, root
from npllm.cli import main
from npllm.errors import BackendError
from npllm.registry import PREFERENCE, get_backend

CODE = Code("library", "symbol", b"object")
# Importing it makes all kernels known.
NUMBA = backend.NumbaBackend
LEAST = next(each.least_parameters for each in PREFERENCE if each.name == "numba")


def python(script: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter of its own, for at most a minute."""
    command, settings = [sys.executable, "-c", script, *argv], os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=settings, check=False)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Lines that are said once per process are said again."""
    for each in (canon.log_once, jit.say_that_it_compiles):
        each.cache_clear()
    yield
    for each in (canon.log_once, jit.say_that_it_compiles):
        each.cache_clear()


# -- what must be installed -------------------------------------------------------------------------------------------


def test_numba_that_is_missing_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(BackendError, match=r"numba is not installed: pip install 'npllm\[numba\]'"):
        features.check_numba()


@pytest.mark.parametrize(
    ("version", "disabled", "words"),
    [((0, 61), False, "numba 0.61.9 is too old, 0.62 is the least: pip install"), ((0, 62), True, "NUMBA_DISABLE_JIT")],
)
def test_numba_that_does_not_serve_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], disabled: bool, words: str
) -> None:
    other: Any = types.ModuleType("numba")
    other.__version__, other.version_info = "0.61.9", types.SimpleNamespace(short=version)
    other.config = types.SimpleNamespace(DISABLE_JIT=disabled)
    monkeypatch.setitem(sys.modules, "numba", other)
    with pytest.raises(BackendError, match=words):
        features.check_numba()


# A numba that cannot be imported stands in the way of the real one; then what the arguments say.
BROKEN = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numba":
            raise {error}
sys.meta_path.insert(0, Finder())
from npllm.cli import main
from npllm import get_backend
{then}
"""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("ModuleNotFoundError('No module', name='numba')", "numba is not installed: pip install 'npllm[numba]'"),
        ("SystemError('built for another NumPy')", "numba cannot be imported (built for another NumPy): pip install"),
    ],
)
def test_without_numba_the_name_is_one_line_of_error_and_auto_says_once_that_it_does_without(error: str, words: str) -> None:
    asked = python(BROKEN.format(error=error, then="sys.exit(main(['generate', 'x', '--backend', 'numba']))"))
    assert (asked.returncode, asked.stdout) == (1, "")
    assert asked.stderr.startswith(f"npllm: backend 'numba' cannot load: {words}")
    assert len(asked.stderr.splitlines()) == 1
    auto = python(BROKEN.format(error=error, then="print(get_backend().name, get_backend().why)"))
    assert auto.stdout.startswith("numpy auto: backend 'numba' cannot load")
    assert words in auto.stdout
    assert auto.stderr.count("cannot load") == 1
    small = python(BROKEN.format(error=error, then="sys.exit(main(['generate', 'What is MLA?', '-n', '2']))"))
    assert (small.returncode, small.stderr) == (0, ""), "the shipped model is served by the canon anyway"


# -- which backend ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name", "why"),
    [
        ({}, "numba", "auto: the fastest that loads"),
        ({"parameters": LEAST}, "numba", "auto: the fastest that loads"),
        ({"parameters": LEAST - 1}, "numpy", f"auto: numba gains nothing below {LEAST:,} parameters"),
        ({"parameters": 1, "dtype": "bfloat16"}, "numba", "auto: the numpy backend computes in float32 or float64"),
        ({"parameters": LEAST, "dtype": "float64"}, "numpy", "auto: numba is no faster in float64"),
        ({"name": "numba", "parameters": 1}, "numba", "asked for"),
    ],
)
def test_auto_takes_numba_where_it_gains(settings: dict[str, Any], name: str, why: str) -> None:
    be = get_backend(**settings)
    assert be.name == name
    assert isinstance(be, NUMBA) == (name == "numba")
    assert be.why.startswith(why)


def test_what_no_backend_can_do_is_refused_in_one_line_with_what_each_can() -> None:
    with pytest.raises(BackendError, match=r"numpy backend computes in float32 .*numba backend computes in stored"):
        get_backend(dtype="float31", parameters=1)


def test_the_shipped_model_answers_without_importing_numba() -> None:
    script = "import npllm, sys; print(npllm.load().backend.name, 'numba' in sys.modules)"
    assert python(script).stdout == "numpy False\n"


def test_a_cpu_path_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPLLM_CPU_FEATURES", "avx10")
    with pytest.raises(BackendError, match=r"NPLLM_CPU_FEATURES=avx10: this CPU runs .*generic"):
        features.choose()
    monkeypatch.setenv("NPLLM_CPU_FEATURES", "generic")
    assert features.choose().lanes == 4
    monkeypatch.delenv("NPLLM_CPU_FEATURES")
    assert features.choose() == features.runnable()[0]._replace(cpu="")


def test_a_system_that_llvm_does_not_know_takes_the_portable_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> None:
        raise RuntimeError("unknown host")

    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", unknown)
    assert features.choose().name == features.runnable()[0].name == "generic"


@pytest.mark.usefixtures("forgotten")
def test_threads(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        assert get_backend("numba", threads=1000).threads == machine.cores()
    assert caplog.messages == [f"1000 threads were asked for, there are {machine.cores()} cores"]
    assert get_backend("numba", threads=1).facts()["threads"] == 1
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")
    assert machine.default_threads() == get_backend("numba").facts()["threads"] == 1
    monkeypatch.setenv("OMP_NUM_THREADS", str(machine.cores()))
    assert machine.default_threads() == machine.cores()


def test_a_container_has_as_many_cores_as_its_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.cores() == 8
    for text, cores in (("max 100000", 8), ("150000 100000", 2), ("1000 100000", 1), ("nonsense", 8)):
        (tmp_path / "cpu.max").write_text(text)
        assert machine.cores() == cores


# -- what is kept of compiling ----------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store in a folder of the test's, that of this process meanwhile."""
    monkeypatch.setenv("NPLLM_CACHE", str(tmp_path / "kept"))
    made = Store("a version")
    monkeypatch.setattr(jit, "store", lambda: made)
    monkeypatch.setattr(ahead, "store", lambda: made)
    return made


def doubled(x: int) -> int:
    return 2 * x


def new() -> Compiled:
    """A function that this process has not compiled yet."""
    return Compiled(doubled, jit.types.intp(jit.types.intp))


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    """What tests compile is not among what there is to compile."""
    before = dict(Compiled.known)
    yield
    Compiled.known.clear()
    Compiled.known.update(before)


@pytest.mark.usefixtures("forgotten")
def test_a_kernel_is_compiled_once_and_says_so(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    new().address  # noqa: B018
    assert capsys.readouterr() == ("", f"npllm: compiling kernels for this CPU, once; kept in {store.folder}\n")
    jit.say_that_it_compiles.cache_clear()
    address = new().address
    assert capsys.readouterr() == ("", "")
    assert jit.ctypes.CFUNCTYPE(jit.ctypes.c_ssize_t, jit.ctypes.c_ssize_t)(address)(21) == 42


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "longer": lambda content: content + b"x",
    "other": lambda content: b"not a kernel at all, but long enough to have a digest and something after it",
}


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_compiled_anew(store: Store, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    new().address  # noqa: B018
    assert store.folder is not None
    file = store.folder / f"test_numba_product.doubled{ENDING}"
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](whole))
    assert store.read("test_numba_product.doubled") is None
    new().address  # noqa: B018
    assert store.read("test_numba_product.doubled") is not None
    assert capsys.readouterr().err.count("compiling") == 1


@pytest.mark.usefixtures("forgotten")
def test_what_cannot_be_kept_is_compiled_again_and_says_so(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept").write_text("a file, where the folder should be")
    assert new().address
    line = "npllm: compiling kernels for this CPU, and again next time: "
    assert capsys.readouterr().err == f"{line}{store.folder} cannot be written (Not a directory); set NPLLM_CACHE\n"
    (tmp_path / "kept").unlink()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert new().address
    assert store.folder is not None
    assert list(store.folder.iterdir()) == [], "no half of a file stays behind"


def test_code_is_read_from_a_folder_that_cannot_be_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("kernel", CODE)
    monkeypatch.setattr(Store, "make", lambda self: pytest.fail("nothing is to be written"))
    assert store.read("kernel") == CODE


def test_old_versions_are_taken_away(store: Store) -> None:
    assert store.folder is not None
    for age in range(KEPT + 5):
        other = store.folder.parent / f"{age:016x}"
        other.mkdir(parents=True)
        (other / "file").write_text("")
        os.utime(other, (1e9 - age, 1e9 - age))
    store.write("kernel", CODE)
    left = {folder.name for folder in store.folder.parent.iterdir()}
    assert left == {store.folder.name, *(f"{age:016x}" for age in range(KEPT))}


def test_the_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NPLLM_CACHE", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert root() == tmp_path / "mine"
    monkeypatch.delenv("NPLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert root() == tmp_path / "xdg" / "npllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert root() == tmp_path / ".cache" / "npllm"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert root() is None
    assert Store("version").read("kernel") is None
    with pytest.raises(FileNotFoundError):
        Store("version").write("kernel", CODE)


# Compiles a function and says what it gives.
COMPILE = """
import ctypes
from npllm.backends.numba_cpu.jit import Compiled, types
def doubled(x):
    return 2 * x
address = Compiled(doubled, types.intp(types.intp)).address
print(ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_ssize_t)(address)(21))
"""


def test_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    start = functools.partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = os.environ | {"NPLLM_CACHE": str(tmp_path)}
    running = [start([sys.executable, "-c", COMPILE], env=environment) for _ in range(4)]
    assert [(process.communicate(timeout=60)[0], process.returncode) for process in running] == [("42\n", 0)] * 4
    after = python(COMPILE, NPLLM_CACHE=str(tmp_path))
    assert (after.stdout, after.stderr) == ("42\n", ""), "what they left is whole"


# -- compiling ahead, and what doctor knows ---------------------------------------------------------------------------


def test_warmup_compiles_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {name: Compiled.known[name] for name in ("team._stop", "team._serve")}
    made = Store(jit.store().version)
    monkeypatch.setattr(jit, "store", lambda: made)
    monkeypatch.setattr(ahead, "store", lambda: made)
    monkeypatch.setattr("npllm.backends.numba_cpu.service.store", lambda: made)
    monkeypatch.setattr(Compiled, "known", few)
    monkeypatch.setenv("NPLLM_CACHE", str(tmp_path))
    assert main(["warmup"]) == 0
    out, err = capsys.readouterr()
    assert (out.startswith("compiled 2 kernels in "), out.endswith(f"kept in {made.folder}\n"), err) == (True, True, "")
    assert main(["warmup"]) == 0
    assert capsys.readouterr().out == f"nothing to compile: 2 kernels are in {made.folder}\n"


def test_warmup_of_a_backend_without_kernels_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "--backend", "numpy"]) == 0
    assert capsys.readouterr().out == "nothing to compile: numpy has no kernels (asked for)\n"
    assert main(["warmup", "folder", "-m", "folder"]) == 2


def test_a_function_that_cannot_be_compiled_ends_the_warm_up(store: Store) -> None:
    def unknown() -> None: ...

    Compiled.known.clear()
    Compiled(unknown, jit.types.void())
    with pytest.raises(BackendError, match=r"kernel test_numba_product.unknown cannot be compiled: "):
        ahead.compile_ahead(1, lambda done, total: None)


def test_warmup_needs_a_folder_that_can_be_written(store: Store, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    new()
    with pytest.raises(BackendError, match=r"compiled kernels cannot be kept .*NPLLM_CACHE"):
        ahead.compile_ahead(1, lambda done, total: None)


def test_doctor_tells_what_a_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    facts = found["backends"]["numba"]["facts"]
    assert facts["path"] in facts["paths"]
    assert facts["arithmetic"]["f32"] == "float32"
    assert facts["arithmetic"]["bf16"] == ("bfloat16" if facts["bf16_instructions"] else "float32")
    assert facts["dtypes"][0] == found["backends"]["numba"]["dtype"] == "stored"
    assert 0 <= facts["kernels"]["compiled"] <= facts["kernels"]["all"]
    assert found["auto"] == {"small": "numpy", "large": "numba"}
    assert main(["doctor"]) == 0
    assert f"path: {facts['path']}\n" in capsys.readouterr().out


# -- threads ----------------------------------------------------------------------------------------------------------

# `work()` runs kernels on two threads and tells whether each chunk of work was done exactly once by each.
WORK = """
import atexit, os, signal, sys, threading, time
import numpy as np
from npllm.backends.numba_cpu import tape
from npllm.backends.numba_cpu.jit import kernel
from npllm.backends.numba_cpu.memory import add_word, word
from npllm.backends.numba_cpu.team import next_chunk, team as the_team

@kernel("2q")
def spread(args, team, thread, threads):
    while True:
        chunk = next_chunk(team)
        if chunk >= word(args, 1):
            break
        add_word(word(args, 0), chunk, 1)

the_team().size = max(2, the_team().size)

def work(kernels=20):
    done = np.zeros(100, np.int64)
    tape.run(2, *[tape.entry(spread, done.ctypes.data, 100)] * kernels)
    return bool((done == kernels).all())

assert work()
"""

# What is done with it, and what that prints.
SITUATIONS = {
    "fork, the child computes": """
child = os.fork()
if child == 0:
    os._exit(0 if work() and work() else 1)
print(os.waitpid(child, 0)[1], work())
""",
    "fork, the child ends like a program": """
child = os.fork()
if child == 0:
    sys.exit(0)
print(os.waitpid(child, 0)[1], work())
""",
    "threads of the caller's": """
wrong = []
def many():
    wrong.extend(1 for _ in range(15) if not work())
threads = [threading.Thread(target=many) for _ in range(4)]
[each.start() for each in threads]
[each.join() for each in threads]
print(len(wrong), work())
""",
    "an interrupt": """
heard = 0
for i in range(20):
    try:
        threading.Timer(0.002 * i, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            assert work()
    except KeyboardInterrupt:
        heard += 1
print(20 - heard, work())
""",
    "a daemon computes at the end": """
def forever():
    while True:
        work()
threading.Thread(target=forever, daemon=True).start()
time.sleep(0.02)
print(0, True, flush=True)
""",
    "a handler computes at the end": """
the_team.cache_clear()
atexit.register(lambda: print(0, work()))
assert work()
""",
    "no further threads": """
the_team.cache_clear()
the_team().size = 2
def refuse(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
print(0, work())
""",
    "one core": """
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(0, all(work() for _ in range(5)))
""",
    "idle": """
time.sleep(0.1)
before = time.process_time()
time.sleep(0.5)
print(int(10 * (time.process_time() - before)), work())
""",
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_team(situation: str) -> None:
    if situation.startswith("fork") and not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    found = python(WORK + SITUATIONS[situation])
    assert found.stdout == "0 True\n", found.stderr
    assert found.returncode == 0


def test_the_info_of_a_choice_is_for_those_who_ask(caplog: pytest.LogCaptureFixture) -> None:
    import npllm

    caplog.set_level(logging.INFO, "npllm")
    npllm.load()
    assert f"backend numpy (auto: numba gains nothing below {LEAST:,} parameters)" in caplog.messages
