"""Golden bundles: cases as files, so that a kernel in C++, CUDA or Rust is tested without Python.

A bundle is a folder: manifest.json, README.txt, and a safetensors file for each case and scale, `attention/window-edge@4`,
with the inputs, the truth, and the variance and the bound of a correct kernel's error. The manifest says in words and
numbers how to judge by them; `judge_results` judges the files that somebody's program wrote, as `check` does a callable.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import npllm
from npllm.arrays import Array
from npllm.checkpoint import SafetensorsFile
from npllm.config import nearest, printable, read_json, shown
from npllm.errors import ArgumentError, CheckpointError
from npllm.handles import REALS
from npllm.saving import Outgoing, workplace, write_tensors
from npllm.testing import judge as judging
from npllm.testing.call import Form, KernelError, converted
from npllm.testing.case import Case, find_case
from npllm.testing.case import cases as corpus
from npllm.testing.checking import Finding, forms_of, told, verdicts_on, widened
from npllm.testing.estimate import Estimate
from npllm.testing.frameworks import Framework
from npllm.testing.operation import Arrays, Operation
from npllm.testing.operation import operation as find
from npllm.testing.report import Report, Suite, surroundings
from npllm.testing.rounding import FORMATS, Rounding
from npllm.testing.wording import reproduce, words_of

# The schema of manifests; the number changes when a field goes or changes its meaning.
SCHEMA = "npllm.bundle/1"

MANIFEST, README = "manifest.json", "README.txt"

# Types by their safetensors names, as NumPy calls them.
TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "U8": "uint8", "I8": "int8", "U16": "uint16", "I32": "int32", "I64": "int64",
}  # fmt: skip
NAMES = {kind: name for name, kind in TYPES.items()}
READABLE = REALS | {name: (kind, kind) for name, kind in TYPES.items() if name not in REALS}

# What the first axes of keys and values are where a table of pages leads to them.
PAGED = {"batch": "page", "key": "slot"}

# The largest file that is not split: no case comes near.
WHOLE = 1 << 62

FILE = re.compile(r"[a-z_0-9]+/[A-Za-z0-9._@+-]+\.safetensors")

RULES = (
    "Everything is computed in float64; `got` is the kernel's output, `error` is got - truth.",
    "Shape and type of an output are those of its entry; where the type is I32, any integers will do.",
    "NaN stands where truth is NaN and nowhere else. An infinity of the same sign stands where truth, rounded to the "
    "output's type, is infinite, and nowhere else; the rules below are for the other elements.",
    "|error| <= bound at every element.",
    "Let x = error / sqrt(variance), and 0 where error is 0. sqrt(mean(x^2)) over all n elements is at most "
    "spread * (1 + scatter / sqrt(n)).",
    "The same holds for each index of each axis that has more than one: n is then the number of elements of that slice; "
    "slices of fewer than smallest_slice elements are skipped.",
    "Not all elements are equal, unless all of truth are after rounding to the output's type, or there is only one.",
    "follows_choice: the operation picks experts or tokens. Where candidates are nearer to each other than their errors, "
    "either choice is right, and truth shows only one of them: compare such an entry with `npllm verify --judge`.",
    "route: put each token's experts, and their weights along with them, in ascending order of the expert's number first.",
)

TEXT = """\
Golden bundle of npllm {version}: inputs, true results and error budgets for kernels of {operations}.

manifest.json lists the entries: a case, a scale, settings (arguments that are no arrays), and the file, a safetensors file
with the tensors inputs.NAME as the kernel takes them, and per output NAME truth.NAME, variance.NAME, bound.NAME (float64).
bfloat16 is stored by its bits. The policy tells where a kernel may round. Axes are named in the manifest.

For each entry: read the inputs, run the kernel, and judge (manifest.json, `judging`, has the rules in full):

    for (i = 0; i < n; i++) {{
        double e = got[i] - truth[i];                        // NaN and infinities: where truth has them, nowhere else
        if (!(fabs(e) <= bound[i])) fail();
        if (e != 0) sum += e * e / variance[i];
    }}
    if (sqrt(sum / n) > {spread} * (1 + {scatter} / sqrt(n))) fail();     // and so for every slice of every axis

Or write each output NAME to a safetensors file of the same name in another folder, and let npllm judge and explain:

    npllm verify --judge BUNDLE RESULTS
"""


# -- writing ----------------------------------------------------------------------------------------------------------


def export(
    directory: str | Path,
    operations: Iterable[str | Operation],
    *,
    tags: Iterable[str] = (),
    without: Iterable[str] = (),
    cases: Iterable[str | Case] = (),
    policy: Rounding | str | None = None,
    seed: int = 0,
) -> Path:
    """Write a bundle of these operations' cases into `directory`, new, empty, or with an earlier bundle, which it replaces.

    tags, without   as `npllm.testing.cases`; an operation that has no such tag has no such case.
    cases           ids, names or cases in place of the whole corpus; `tags` and `without` then count no more.
    policy          as `check`: it decides the types of the inputs, and the budget.

    Returns the path of the manifest. ArgumentError for a selection without cases and for a folder with other files.
    """
    folder = Path(directory)
    ops = [find(each) for each in operations]
    rounding = policy if isinstance(policy, Rounding) else Rounding(policy or "f32")
    wanted = selected(ops, tags, without, [cases] if isinstance(cases, str | Case) else cases)
    before = files_before(folder)
    with workplace(folder) as temporary:
        entries = [written(*each, scale, rounding, seed, temporary) for each in wanted for scale in each[1].scales]
        files = {entry["file"] for entry in entries}
        if foreign := [file for file in sorted(files - before) if (folder / file).exists()]:
            raise ArgumentError(f"{folder / foreign[0]}: is there and belongs to no bundle; choose another folder")
        used = {op.name: op for op, _ in wanted}
        (temporary / README).write_text(readme(used), encoding="utf-8")
        figures = {"spread": judging.SPREAD, "scatter": judging.SCATTER, "smallest_slice": judging.SLICE}
        manifest = {
            "schema": SCHEMA, "npllm": npllm.__version__, "policy": asdict(rounding), "seed": seed,
            "judging": figures | {"rules": RULES},
            "operations": {name: op.about for name, op in used.items()}, "entries": entries,
        }  # fmt: skip
        text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
        move(temporary, folder, before, files)
    return folder / MANIFEST


def selected(
    ops: list[Operation], tags: Iterable[str], without: Iterable[str], cases: Iterable[str | Case]
) -> list[tuple[Operation, Case]]:
    """The cases to write, each once, with their operations."""
    if wanted := list(cases):
        found = [one for each in wanted for one in named(ops, each)]
    else:
        found = [(op, case) for op, (want, leave) in tagged(ops, tags, without) for case in corpus(op.name, want, leave)]
    if not found:
        raise ArgumentError("no case has these tags: there is nothing to write")
    return list({case.id: (op, case) for op, case in found}.values())


def named(ops: list[Operation], case: str | Case) -> list[tuple[Operation, Case]]:
    """A case by its id or name, of each operation that has it."""
    if isinstance(case, Case):
        return [(find(case.operation), case)]
    owner, slash, _ = case.partition("/")
    ops = [op for op in ops if op.name == owner or not slash] or ops
    if len(ops) == 1:
        return [(ops[0], find_case(ops[0].name, case))]
    found = [(op, each) for op in ops for each in op.cases if case in (each.name, each.id)]
    if not found:
        ids = nearest(case, {each.id if slash else each.name for op in ops for each in op.cases}).split(", ")[:5]
        raise ArgumentError(f"no operation has a case {case!r}; nearest: {', '.join(ids)}")
    return found


def tagged(
    ops: list[Operation], tags: Iterable[str], without: Iterable[str]
) -> list[tuple[Operation, tuple[frozenset[str], frozenset[str]]]]:
    """Operations that have all of `tags`, and of both what each knows; ArgumentError for a tag that none knows."""
    want, leave = (frozenset(each.split(",") if isinstance(each, str) else each) - {""} for each in (tags, without))
    known = {op.name: frozenset[str]().union(*(case.tags for case in op.cases)) for op in ops}
    everything = frozenset[str]().union(*known.values())
    for tag in sorted((want | leave) - everything):
        raise ArgumentError(f"no operation has cases tagged {tag!r}; tags: {nearest(tag, everything)}")
    return [(op, (want, leave & known[op.name])) for op in ops if want <= known[op.name]]


def written(op: Operation, case: Case, scale: float, rounding: Rounding, seed: int, temporary: Path) -> dict[str, Any]:
    """Write the file of an entry -> the entry."""
    inputs = case.inputs(seed, scale, rounding.format("inputs"))
    forms = forms_of(op, case, inputs, rounding)
    with np.errstate(all="ignore"):
        estimates = op.estimate(widened(inputs), case.settings, rounding, None)
    arrays = {f"inputs.{name}": x for name, x in inputs.items()}
    for name, estimate in zip(forms, estimates, strict=True):
        arrays |= {f"truth.{name}": estimate.value, f"variance.{name}": estimate.variance, f"bound.{name}": estimate.bound}
    file = file_of(case, scale)
    place = temporary / file
    place.parent.mkdir(exist_ok=True)
    deque(write_tensors(temporary, {name: outgoing(x) for name, x in arrays.items()}, WHOLE, temporary.parent), 0)
    os.replace(temporary / "model.safetensors", place)
    return {
        "operation": op.name, "case": case.id, "scale": float(scale), "tags": sorted(case.tags),
        "settings": dict(case.settings), "file": file, "sha256": digest(place), "follows_choice": op.chooses,
        "inputs": [described(name, x, axes_of(op, name, inputs)) for name, x in inputs.items()],
        "outputs": [
            {"name": name, "dtype": NAMES[form.dtype.name], "shape": list(form.shape), "axes": list(form.axes)}
            for name, form in forms.items()
        ],
    }  # fmt: skip


def file_of(case: Case, scale: float) -> str:
    """`attention/window-edge@4.safetensors`; what a file system may not like stands by its number."""
    name = re.sub(r"[^A-Za-z0-9.@-]", lambda found: f"_{ord(found[0]):02x}_", case.name)
    return f"{case.operation}/{name}@{repr(float(scale)).removesuffix('.0')}.safetensors"


def described(name: str, x: Array, axes: tuple[str, ...]) -> dict[str, Any]:
    return {"name": name, "dtype": NAMES[x.dtype.name], "shape": list(x.shape), "axes": list(axes)}


def axes_of(op: Operation, name: str, inputs: Arrays) -> tuple[str, ...]:
    axes = words_of(op.inputs[name], inputs[name].ndim)
    return tuple(PAGED.get(word, word) for word in axes) if "pages" in inputs and name in ("k", "v") else axes


def outgoing(x: Array) -> Outgoing:
    # bfloat16 has no buffer of its own to write from.
    data = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return Outgoing(NAMES[x.dtype.name], x.shape, x.dtype.itemsize, lambda: [data])


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def readme(used: Iterable[str]) -> str:
    figures = {"spread": judging.SPREAD, "scatter": judging.SCATTER}
    return TEXT.format(version=npllm.__version__, operations=", ".join(used), **figures)


def files_before(folder: Path) -> set[str]:
    """The files of the bundle that `folder` has; ArgumentError if it has only others."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return set()
    if not (folder / MANIFEST).is_file():
        raise ArgumentError(f"{folder}: has other files than a bundle's; choose a new or an empty folder")
    return {entry["file"] for entry in read_manifest(folder)["entries"]}


def move(temporary: Path, folder: Path, before: set[str], files: set[str]) -> None:
    """The finished files in place of those `before`; the manifest goes first and comes last: only with it is it a bundle."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for file in before:
        (folder / file).unlink(missing_ok=True)
    for file in sorted(files):
        (folder / file).parent.mkdir(exist_ok=True)
        os.replace(temporary / file, folder / file)
    for left in {Path(file).parent for file in before - files}:
        with suppress(OSError):  # it holds files of somebody else, or of the new bundle
            (folder / left).rmdir()
    for file in (README, MANIFEST):
        os.replace(temporary / file, folder / file)


# -- reading ----------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One file of a bundle; `outputs`: whether each is of integers."""

    op: Operation
    case: Case
    scale: float
    file: str
    sha256: str
    outputs: Mapping[str, bool]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, its fields looked at; ArgumentError in one line for whatever is wrong."""
    path = folder / MANIFEST
    manifest = read_json(path, ArgumentError, missing="; a bundle has one: npllm verify --export DIR")
    if (schema := manifest.get("schema")) != SCHEMA:
        raise ArgumentError(f"{path}: schema {shown(schema)} is unknown; this version reads {SCHEMA}")
    for name, kind in {"policy": dict, "seed": int, "entries": list}.items():
        if not isinstance(manifest.get(name), kind):
            raise ArgumentError(f"{path}: `{name}` is damaged; export the bundle again")
    for number, entry in enumerate(manifest["entries"]):
        file = entry.get("file") if isinstance(entry, dict) else None
        if not isinstance(file, str) or not FILE.fullmatch(file):
            raise ArgumentError(f"{path}: entry {number} names no file of a bundle; export the bundle again")
    return manifest


def entry_of(path: Path, number: int, raw: Mapping[str, Any]) -> Entry:
    """An entry of the manifest at `path`: the case as it was exported, whatever the corpus says by now."""
    try:
        op, name = find(raw["operation"]), raw["case"].removeprefix(f"{raw['operation']}/")
        settings = {key: tuple(x) if isinstance(x, list) else x for key, x in raw["settings"].items()}
        outputs = {each["name"]: each["dtype"][0] == "I" for each in raw["outputs"]}
        scale, sha = float(raw["scale"]), str(raw["sha256"])
    except (LookupError, TypeError, ValueError, AttributeError) as bad:
        what = str(bad) if isinstance(bad, ArgumentError) else "is damaged; export the bundle again"
        raise ArgumentError(f"{path}: entry {number} ({raw['file']}): {what}") from None
    if not outputs or not set(outputs) <= set(op.outputs):
        raise ArgumentError(f"{path}: entry {number} ({raw['file']}): {op.name} has other outputs; export the bundle again")
    return Entry(op, Case(op.name, name, undrawn, settings, scales=(scale,)), scale, raw["file"], sha, outputs)


def undrawn(generator: np.random.Generator, scale: float) -> dict[str, Array]:
    """Inputs of a case that stands in a file are read, not drawn."""
    raise ArgumentError("this case is of a bundle: its inputs are in the bundle's file")


def stored(folder: Path, entry: Entry) -> tuple[dict[str, Array], dict[str, Estimate]]:
    """Inputs and estimates of an entry's file, after its checksum was looked at."""
    path = folder / entry.file
    if not path.is_file():
        raise ArgumentError(f"{path}: no such file, but the manifest lists it; export the bundle again")
    if digest(path) != entry.sha256:
        raise ArgumentError(f"{path}: not the file that was exported (its SHA-256 is another); export the bundle again")
    file = SafetensorsFile(path)
    wanted = [f"{part}.{name}" for name in entry.outputs for part in ("truth", "variance", "bound")]
    if missing := [name for name in wanted if name not in file.entries]:
        raise ArgumentError(f"{path}: has no tensor {missing[0]}; export the bundle again")
    inputs = {name.removeprefix("inputs."): tensor(file, name) for name in file if name.startswith("inputs.")}
    order = {name: inputs[name] for name in entry.op.inputs if name in inputs}
    parts = [tensor(file, name) for name in wanted]
    return order, {name: Estimate(*parts[3 * i : 3 * i + 3]) for i, name in enumerate(entry.outputs)}


def tensor(file: SafetensorsFile, name: str) -> Array:
    found = file.weight(name, READABLE)
    return found.data.view(FORMATS["bf16"].dtype) if found.format == "bf16" else found.data


# -- judging ----------------------------------------------------------------------------------------------------------


def judge_results(directory: str | Path, results: str | Path) -> Suite:
    """Judge what a program wrote for a bundle: files of the same names in the folder `results`, a tensor for each output.

    As `check`: of the scales of a case the worst counts, and an operation that chooses may choose either of a near-tie. A
    file that is missing, cannot be read or lacks an output fails its case; files that no entry has are told in the suite's
    properties. ArgumentError if the bundle itself is damaged.
    """
    folder, given = Path(directory), Path(results)
    manifest = read_manifest(folder)
    if not given.is_dir():
        raise ArgumentError(f"{given}: no such folder; it holds the results, a file for each of {folder}")
    if given.resolve() == folder.resolve():
        raise ArgumentError(f"{given}: is the bundle itself; write the results into another folder")
    try:
        rounding = Rounding(**manifest["policy"])
    except TypeError:
        raise ArgumentError(f"{folder / MANIFEST}: `policy` has unknown rounding points; export the bundle again") from None
    groups: dict[str, list[Entry]] = {}
    for number, raw in enumerate(manifest["entries"]):
        entry = entry_of(folder / MANIFEST, number, raw)
        groups.setdefault(entry.case.id, []).append(entry)
    reports = tuple(judged(folder, given, entries, rounding, manifest["seed"]) for entries in groups.values())
    told_of = {"framework": "files", "bundle": f"npllm {manifest.get('npllm')}", "policy": str(rounding)}
    others = ignored(given, {entry.file for entries in groups.values() for entry in entries})
    return Suite(reports, surroundings() | told_of | {"seed": str(manifest["seed"])} | others)


def judged(folder: Path, given: Path, entries: list[Entry], rounding: Rounding, seed: int) -> Report:
    """The report of a case: that of its worst scale."""
    began = time.perf_counter()
    found = [(trial(folder, given, entry, rounding, seed), entry) for entry in entries]
    worst, entry = max(found, key=lambda each: (not each[0].report.ok, each[0].report.excess))
    report = told(entry.op, entry.case, rounding, worst, explain=True)
    # There is no kernel to call again: what reproduces the failure is the file.
    call = reproduce(entry.case, rounding, report)
    message = report.message.replace(call, f"inputs, truth and bounds: {folder / entry.file}")
    return replace(report, message=message, seconds=time.perf_counter() - began)


def trial(folder: Path, given: Path, entry: Entry, rounding: Rounding, seed: int) -> Finding:
    """What one file of results shows; its worst output counts."""
    op, case = entry.op, entry.case
    here = Report(op.name, case.id, str(rounding), scale=entry.scale, seed=seed)
    inputs, estimates = stored(folder, entry)
    try:
        results = op.comparable(results_of(given / entry.file, entry, estimates, rounding))
    except KernelError as failure:
        return Finding(replace(here, problem=failure.problem, message=str(failure)))
    if op.chooses:
        verdicts = verdicts_on(op, case, inputs, rounding, results)
    else:
        output = rounding.format("output")
        verdicts = {name: (judging.judge(results[name], each, output), each) for name, each in estimates.items()}
    return Finding.of(here, verdicts, inputs, results)


def results_of(path: Path, entry: Entry, estimates: Mapping[str, Estimate], rounding: Rounding) -> dict[str, Array]:
    """A program's outputs of one entry; KernelError says what is wrong with its file."""
    if not path.is_file():
        raise KernelError("returned", f"{path}: no such file; the bundle has such an entry")
    try:
        file = SafetensorsFile(path)
        if missing := [name for name in entry.outputs if name not in file.entries]:
            has = ", ".join(printable(name, 40) for name in list(file)[:8]) or "nothing"
            raise KernelError("returned", f"{path}: holds no tensor `{missing[0]}`; it holds {has}")
        found = {name: tensor(file, name) for name in entry.outputs}
    except CheckpointError as bad:
        raise KernelError("returned", str(bad).partition(";")[0]) from None
    home, forms = Framework(), forms_in(entry, estimates, rounding)
    try:
        return {name: converted(name, found[name], forms[name], home) for name in forms}
    except KernelError as failure:
        raise KernelError(failure.problem, f"{path}: {failure}") from None


def forms_in(entry: Entry, estimates: Mapping[str, Estimate], rounding: Rounding) -> dict[str, Form]:
    return {
        name: Form(words_of(entry.op.outputs[name], each.value.ndim), each.value.shape, of)
        for name, each in estimates.items()
        for of in [None if entry.outputs[name] else rounding.format("output")]
    }


def ignored(given: Path, wanted: set[str]) -> dict[str, str]:
    """The files among the results that the bundle knows nothing of, as a property of the suite."""
    there = {path.relative_to(given).as_posix() for path in given.rglob("*.safetensors")}
    others = sorted(there - wanted)
    return {"ignored": f"{len(others)} files without an entry: {', '.join(others[:5])}"} if others else {}
