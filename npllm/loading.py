"""`npllm.load`: from a folder, a hub id or nothing to a model that is ready to run."""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from npllm.backend import Backend
from npllm.checkpoint import Checkpoint
from npllm.config import Reader, read_json
from npllm.errors import ArgumentError, BackendError, ConfigError, MemoryLimitError, TokenizerError
from npllm.grouped import marked
from npllm.handles import Handle, fingerprint
from npllm.llm import LLM, Defaults
from npllm.matching import match
from npllm.model import Model, check_memory
from npllm.models import Described, read_config
from npllm.registry import get_backend
from npllm.sampling import Sampling
from npllm.tokenizer import FILES, Tokenizer
from npllm.weights import Spec, build_tree, count_parameters

if TYPE_CHECKING:
    from npllm.matformer import Slice

log = logging.getLogger("npllm")


def load(
    source: str | Path | None = None,
    backend: str = "auto",
    dtype: str | None = None,
    quantize: str | None = None,
    kv_dtype: str | None = None,
    weights: Literal["auto", "memory", "disk"] = "auto",
    threads: int | None = None,
    revision: str | None = None,
    max_context: int | None = None,
    strict: bool = False,
    matformer: str | Mapping[str, Any] | Slice | None = None,
) -> LLM:
    """Load a model: a local folder, a hub id, or (None) the small model that ships with npllm.

    backend      "numpy", an installed backend's name, or "auto": the fastest that loads and can have the weights where
                 they are to be; a small model (npllm.registry says how small) runs on "numpy", which has nothing to compile.
    quantize     weights in fewer bits, by a name that the backend knows; None: as they are stored.
    dtype        arithmetic: "float32", "float64", "bfloat16" where the backend can; None is the backend's choice.
    kv_dtype     how keys and values are cached: "float32", "float64", "bfloat16"; None: as they are computed.
    weights      "memory"; "disk": they stay in the mapped files, and each step reads the layers and the experts that it
                 uses; "auto": on disk if they do not fit into memory.
    threads      of BLAS and of the backend; None: OMP_NUM_THREADS, else NUMBA_NUM_THREADS, else all cores.
    revision     branch, tag or commit on the hub.
    max_context  at most so many tokens per row; never more than the model was trained for.
    strict       an operation that a backend declines is an error.
    matformer    of a Gemma 3n, only a part (npllm.matformer.choose): "e2b", or such as {"drop": [20, 21], "ffn": 8192}.

    ConfigError, CheckpointError, TokenizerError, HubError, MemoryLimitError, BackendError say in one line what is wrong.
    """
    make = functools.partial(get_backend, backend, dtype=dtype, strict=strict, threads=threads, quantize=quantize)
    be = make(parameters=0)  # refuses what no backend can do now, not after a download
    if weights not in ("auto", "memory", "disk"):
        raise ArgumentError(f"weights = {weights!r} must be 'auto', 'memory' or 'disk'")
    folder = locate(source, revision)
    described = read_config(folder)
    tokenizer = _read_tokenizer(folder, described.config.vocab_size)
    defaults = read_defaults(folder, described)
    checkpoint = Checkpoint(folder, described.block)
    handles = match(described, checkpoint)
    name = "npllm-shipped" if source is None else str(source)
    if matformer is not None:
        from npllm.matformer import sliced_model

        described, handles = sliced_model(described, handles, matformer, name)
    spec = described.architecture.weight_spec(described.config)
    if be.quantize is not None:
        handles = marked(spec, handles, be.quantize)
    if backend == "auto":
        be = make(parameters=count_parameters(spec), check=lambda each: _check_place(each, handles.values(), name, weights))
        log.info("backend %s (%s)", be.name, be.why)
    on_disk = weights == "disk" or not check_memory(be, handles.values(), name, demanded=weights == "memory")
    if on_disk:
        checkpoint.read_exactly()
    identity = _identity(handles, described.config, be.quantize)
    tree = _prepare(be, spec, handles, on_disk)
    model = Model(described.architecture, described.config, tree, spec)
    return LLM(
        model,
        be,
        tokenizer=tokenizer,
        defaults=defaults,
        max_context=max_context,
        kv_dtype=kv_dtype,
        name=name,
        folder=folder,
        fingerprint=identity,
    )


def locate(source: str | Path | None, revision: str | None = None) -> Path:
    """The folder of a model: given, downloaded, or the shipped one."""
    if source is None:
        return Path(__file__).parent / "shipped"
    if not str(source):
        raise ArgumentError("the model's name is empty: give a folder or a hub id")
    if (path := _existing(source)) is not None:
        if not path.is_dir():
            raise ConfigError(f"{path}: give the model's folder, not a file in it")
        return path
    from npllm import hub
    from npllm.models import interpret

    def check(values: dict[str, Any]) -> None:
        # Only errors matter here: `load` reads the file again when the weights are there, and then says its warnings.
        interpret(values, f"{source}: config.json", warn=lambda *_: None)

    return hub.fetch(str(source), revision=revision, check=check)


def _existing(source: str | Path) -> Path | None:
    """`source` as a path, if something is there."""
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except PermissionError as bad:
        raise ConfigError(f"{path}: cannot be read ({bad.strerror})") from None
    except (OSError, RuntimeError):  # too long for a name; the home of a user who does not exist
        return None


def _check_place(be: Backend, handles: Collection[Handle], name: str, weights: str) -> None:
    """BackendError where a backend reads no weights from disk, but is to, or has no room for them."""
    if be.on_disk:
        return
    if weights == "disk":
        raise BackendError(f"the {be.name} backend keeps no weights on disk, as weights='disk' asks for")
    try:
        check_memory(be, handles, name)
    except MemoryLimitError as error:
        raise BackendError(str(error)) from None


def _identity(handles: Mapping[str, Handle], config: Any, quantize: str | None) -> str:
    """A digest of the weights and of what is done with them: saved keys and values depend on both."""
    text = f"{fingerprint(handles)} {config}" + (f" {quantize}" if quantize else "")
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _prepare(be: Backend, spec: Spec, handles: dict[str, Handle], on_disk: bool) -> Any:
    if on_disk:
        return build_tree(spec, handles, be.mapped)
    if not sys.stderr.isatty():
        return build_tree(spec, handles, be.prepare)
    from tqdm import tqdm

    total = sum(handle.nbytes for handle in handles.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading", delay=0.5, leave=False) as bar:
        return build_tree(spec, handles, be.prepare, bar.update)


def _read_tokenizer(folder: Path, vocabulary: int) -> Tokenizer | None:
    if not any((folder / name).exists() for name in FILES):
        return None
    tokenizer = Tokenizer(folder)
    if tokenizer.size > vocabulary:
        raise TokenizerError(
            f"{tokenizer.path}: ids up to {tokenizer.size - 1}, but the model's vocabulary has {vocabulary} rows"
        )
    return tokenizer


# What transformers would do with these keys of generation_config.json is not done here, unless they hold these values.
WITHOUT_EFFECT = {
    "no_repeat_ngram_size": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "num_beams": 1,
    "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "min_length": 0, "min_new_tokens": None, "penalty_alpha": None, "guidance_scale": None,
}  # fmt: skip


def read_defaults(folder: Path, described: Described) -> Defaults:
    """`generation_config.json`, with `config.json`'s eos_token_id where it says nothing of stop ids."""
    path = folder / "generation_config.json"
    reader = Reader(read_json(path) if path.is_file() else {}, str(path))
    sampling: dict[str, Any] = {}
    if reader.flag("do_sample", False):
        sampling["temperature"] = reader.real("temperature", 1.0, positive=False)
        sampling["top_k"] = reader.integer("top_k", 0, least=0)
        sampling["top_p"] = reader.real("top_p", 1.0)
        sampling["min_p"] = reader.real("min_p", 0.0, positive=False)
    sampling["repetition_penalty"] = reader.real("repetition_penalty", 1.0)
    stop_ids = _stop_ids(reader) or _stop_ids(Reader(described.values, str(folder / "config.json")))
    max_tokens = reader.integer("max_new_tokens", 0) or None
    ignored = [key for key, idle in WITHOUT_EFFECT.items() if reader.raw(key) not in (None, idle)]
    if ignored:
        log.warning("%s: these keys have no effect here: %s", path, ", ".join(ignored))
    try:
        Sampling(**sampling)
    except ArgumentError as bad:
        raise ConfigError(f"{path}: {bad}") from None
    return Defaults(sampling, stop_ids, max_tokens)


def _stop_ids(reader: Reader) -> tuple[int, ...]:
    eos = reader.raw("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise reader.fail("eos_token_id", "must be a token id or a list of them")
    return tuple(ids)
