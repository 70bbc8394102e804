"""Models from the Hugging Face hub: the files that npllm reads, and no others, in the cache that other tools share.

Every transfer goes through `huggingface_hub`. It reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE when it is
first imported, shows its progress bars on a terminal only, resumes a transfer that breaks off, and gives a file its
final name only once it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from npllm import mistral_native
from npllm.checkpoint import find_weights
from npllm.config import printable, read_json
from npllm.errors import CheckpointError, HubError
from npllm.tokenizer import FILES as TOKENIZERS

log = logging.getLogger("npllm")

# What npllm reads beside the weights, as far as a repository has it.
SMALL_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)

# (single file, index of shards) of the weights, by whether pickles are wanted.
WEIGHTS = {
    False: ("model.safetensors", "model.safetensors.index.json"),
    True: ("pytorch_model.bin", "pytorch_model.bin.index.json"),
}

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Seconds until a hub that does not answer counts as unreachable; huggingface_hub's own default for file requests.
TIMEOUT = 10.0

NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"

# Errors of writing, not of the connection: full, over the quota, too large, not allowed.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)

# Seconds before the second and the third attempt at a file whose transfer broke off.
PAUSES = (1.0, 4.0)

T = TypeVar("T")


class BrokenTransferError(HubError):
    """A transfer ended before its file was whole."""


def looks_like_hub_id(source: str) -> bool:
    """Whether `source` is spelled like `name` or `owner/name`; a folder of that name, if any, is the caller's matter."""
    spelled = re.fullmatch(f"(?:{NAME}/)?{NAME}", source) is not None
    return spelled and len(source) <= 96 and not re.search(r"--|\.\.|\.git$", source)


def fetch(
    model_id: str,
    *,
    revision: str | None = None,
    config_only: bool = False,
    pickles: bool = False,
    check: Callable[[dict[str, Any]], None] | None = None,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Download what npllm reads of a model and return its folder in the cache.

    `revision` is a branch, tag or commit (default: main). `config_only` stops after config.json (params.json, where the
    repository has nothing but Mistral's own files: npllm.mistral_native). `pickles` fetches
    pytorch_model.bin or its shards in place of safetensors, for `npllm convert`; nothing here opens them. `check` gets
    what config.json holds, or would hold, before anything else is downloaded, and refuses a model by raising.
    `cache_dir` and `endpoint` stand in for HF_HOME and HF_ENDPOINT.

    All files are of one commit. The cache's reference to `revision` moves only when the download is complete, so a
    broken download of a new commit leaves the old one usable. When the hub cannot be asked, a complete copy in the
    cache serves, with a warning. Raises HubError.
    """
    if not looks_like_hub_id(model_id):
        raise HubError(f"{printable(repr(model_id), 300)}: no such folder, nor spelled like a hub id (owner/name)")
    repository = Repository(model_id, revision or "main", cache_dir, endpoint)
    wanted = Wanted(config_only, pickles, check)
    folder = repository.cached(repository.revision)
    if folder is not None and folder.name == repository.revision and wanted.missing(folder) is None:
        wanted.inspect(folder)
        return folder
    try:
        commit, names = repository.listing()
    except HubError as problem:
        return _from_cache(folder, wanted, problem)
    return _download(repository, wanted, commit, names)


@dataclass(frozen=True)
class Wanted:
    """What a caller of `fetch` asks for."""

    config_only: bool
    pickles: bool
    check: Callable[[dict[str, Any]], None] | None

    def inspect(self, folder: Path) -> None:
        if self.check is not None:
            # Only errors matter here: the folder is read again, with its warnings, by whoever fetched it.
            self.check(mistral_native.read_described(folder, warn=lambda *_: None)[0])

    def missing(self, folder: Path) -> str | None:
        """What a folder of the cache, which has the model's description, lacks; None when it is complete."""
        if self.config_only:
            return None
        single, index = WEIGHTS[self.pickles]
        try:
            if not self.pickles:
                find_weights(folder)
            elif not (folder / single).is_file():
                shards = _shards(folder / index)
                return next((f"{shard} is missing" for shard in shards if not (folder / shard).is_file()), None)
        except (CheckpointError, HubError) as problem:
            return str(problem)
        return None


@dataclass(frozen=True)
class Repository:
    """One model at one revision: a thin layer over huggingface_hub whose errors say what to do."""

    model_id: str
    revision: str
    cache_dir: Path | None
    endpoint: str | None

    @property
    def address(self) -> str:
        from huggingface_hub import constants

        return self.endpoint or constants.ENDPOINT

    def listing(self) -> tuple[str, set[str]]:
        """The commit that `revision` stands for, and the names of its files."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint)
        info = self._ask(lambda: api.model_info(self.model_id, revision=self.revision, timeout=TIMEOUT))
        if info.sha is None:
            raise HubError(f"{self.address} names no commit for {self.model_id}: check HF_ENDPOINT")
        return info.sha, {sibling.rfilename for sibling in info.siblings or []}

    def download(self, name: str, revision: str) -> Path:
        """The whole file `name` in the cache; a file of a known commit that is there already needs no network.

        A transfer that breaks off is begun again, because not every version of huggingface_hub does that by itself.
        """
        from huggingface_hub import hf_hub_download

        def attempt() -> str:
            return hf_hub_download(self.model_id, name, revision=revision, cache_dir=self.cache_dir, endpoint=self.endpoint)

        with _without_their_remarks():
            for pause in PAUSES:
                try:
                    return Path(self._ask(attempt, name))
                except BrokenTransferError:
                    time.sleep(pause)
            return Path(self._ask(attempt, name))

    def cached(self, revision: str) -> Path | None:
        """The folder of `revision` in the cache, if config.json or params.json is there."""
        from huggingface_hub import try_to_load_from_cache

        for name in ("config.json", mistral_native.PARAMS):
            found = try_to_load_from_cache(self.model_id, name, cache_dir=self.cache_dir, revision=revision)
            if isinstance(found, str):
                return Path(found).parent
        return None

    def _ask(self, request: Callable[[], T], file: str | None = None) -> T:
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return request()
        except Exception as problem:  # what a broken connection raises depends on the HTTP library of the hub's version
            reason = problem.__cause__ if isinstance(problem, LocalEntryNotFoundError) else None
            raise self._error(reason if isinstance(reason, Exception) else problem, file) from problem

    def _error(self, problem: Exception, file: str | None) -> HubError:
        """What went wrong while `file` (None: the listing) was asked for, and what to do."""
        from huggingface_hub import constants

        refusal = self._refusal(problem, file)
        if refusal is not None:
            return HubError(refusal)
        # Only an error of the file system names a file.
        if isinstance(problem, OSError) and (problem.errno in UNWRITABLE or problem.filename is not None):
            where = self.cache_dir or constants.HF_HUB_CACHE
            return HubError(
                f"cannot write {file or 'files'} to {where} ({problem.strerror}): "
                "free space there or set HF_HOME to another disk"
            )
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        if file is None:
            return HubError(
                f"cannot reach {self.address} for {self.model_id} ({reason}): check the connection and HF_ENDPOINT, "
                "or set HF_HUB_OFFLINE=1 to use the cache alone"
            )
        return BrokenTransferError(
            f"the download of {file} of {self.model_id} broke off ({reason}): "
            "run the same again; files that are complete are kept"
        )

    def _refusal(self, problem: Exception, file: str | None) -> str | None:
        """The hub answered, but not with what was asked for; None for every other problem."""
        from huggingface_hub import errors

        status = getattr(getattr(problem, "response", None), "status_code", None)
        if isinstance(problem, errors.OfflineModeIsEnabled):
            return f"HF_HUB_OFFLINE is set, so {self.model_id} cannot be looked up at the hub: unset it to download"
        if isinstance(problem, errors.GatedRepoError):
            return (
                f"{self.model_id} is gated: accept its licence at {self.address}/{self.model_id}, "
                "then set HF_TOKEN to a token of that account"
            )
        if isinstance(problem, errors.RevisionNotFoundError):
            return f"{self.model_id} has no revision {self.revision!r}: give a branch, a tag or a commit"
        if isinstance(problem, errors.EntryNotFoundError) and status == 404:
            return f"{self.model_id} has no file {file}"
        if isinstance(problem, errors.RepositoryNotFoundError) or status == 404:
            return (
                f"no model {self.model_id} at {self.address}, and no folder of that name here: "
                "check the spelling; for a private model set HF_TOKEN"
            )
        if status in (401, 403):
            return f"{self.address} refuses {self.model_id} ({status}): set HF_TOKEN to a valid token with access to it"
        return None if status is None else f"{self.address} answers {status} for {self.model_id}: try again later"


@contextlib.contextmanager
def _without_their_remarks() -> Iterator[None]:
    """Keep huggingface_hub from writing two lines at every transfer that breaks off: the error says it in one."""

    def ours(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Error while downloading")

    logger = logging.getLogger("huggingface_hub.file_download")
    logger.addFilter(ours)
    try:
        yield
    finally:
        logger.removeFilter(ours)


def _from_cache(folder: Path | None, wanted: Wanted, problem: HubError) -> Path:
    if folder is None:
        raise problem
    missing = wanted.missing(folder)
    if missing is not None:
        raise HubError(f"{problem}; the copy in the cache is incomplete ({missing})") from problem
    log.warning("%s; using the copy in the cache, %s", problem, folder)
    wanted.inspect(folder)
    return folder


def _download(repository: Repository, wanted: Wanted, commit: str, names: set[str]) -> Path:
    description = mistral_native.description(names)
    if description not in names:
        raise HubError(f"{repository.model_id} has no config.json, so it is not a checkpoint that npllm can read")
    folder = repository.download(description, commit).parent
    wanted.inspect(folder)
    if not wanted.config_only:
        files = _weight_files(repository.model_id, names, wanted.pickles)
        for name in [*_small_files(names), *files]:
            repository.download(name, commit)
        if files[0].endswith(".json"):
            for shard in _shards(folder / files[0], names):
                repository.download(shard, commit)
    if repository.revision != commit:
        repository.download(description, repository.revision)
    return folder


def _small_files(names: set[str]) -> list[str]:
    """What is read beside the weights; of two tokenizers only the one that counts."""
    tokenizer = next((name for name in TOKENIZERS if name in names), None)
    return sorted(names.intersection(SMALL_FILES) | ({tokenizer} if tokenizer else set()))


def _weight_files(model_id: str, names: set[str], pickles: bool) -> list[str]:
    """The index of the shards, which outranks a single file as it does in `checkpoint`, or the single file.

    Mistral's own shards may come without an index: then all of them.
    """
    if mistral_native.is_native(names) and not pickles:
        try:
            return mistral_native.require_weights(names, model_id)
        except CheckpointError as bad:
            raise HubError(str(bad)) from None
    single, index = WEIGHTS[pickles]
    for name in (index, single):
        if name in names:
            return [name]
    pickle = next((name for name in sorted(names) if name.endswith(PICKLE_SUFFIXES)), None)
    if pickle is not None and not pickles:
        raise HubError(
            f"{model_id} has only pickled weights ({pickle}), which can run code when read; "
            f"turn them into safetensors with: npllm convert {model_id} OUT"
        )
    own = mistral_native.weight_files(names)
    hint = f"; {own[0]} is in Mistral's own form, which needs {mistral_native.PARAMS} beside it" if own else ""
    raise HubError(f"{model_id} has neither {single} nor {index}{hint}")


def _shards(index: Path, names: set[str] | None = None) -> Iterator[str]:
    """The shards that an index names, each once; a name outside the folder, or not among `names`, is an error."""
    table = read_json(index, HubError).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise HubError(f"{index}: weight_map must map tensor names to shard file names")
    suffix = ".bin" if index.name.startswith("pytorch_model") else ".safetensors"
    for shard in dict.fromkeys(map(str, table.values())):
        parts = PurePosixPath(shard)
        if parts.is_absolute() or ".." in parts.parts or re.search(r"[\\:]", shard) or parts.suffix != suffix:
            raise HubError(f"{index}: {shard[:200]!r} is not the name of a {suffix} file inside the repository")
        if names is not None and shard not in names:
            raise HubError(f"{index}: names the shard {shard}, which the repository lacks")
        yield shard
