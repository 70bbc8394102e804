"""Golden bundles, from the outside: kernels and judges that know the files and the manifest only."""

import json
import re
import secrets
import shutil
import struct

import numpy as np
import pytest

from npllm.errors import ArgumentError
from npllm.testing.bundle import README, SCHEMA, export, file_of, judge_results, read_manifest
from npllm.testing.case import Case, cases
from npllm.testing.checking import truth, widened
from npllm.testing.judge import SCATTER, SLICE, SPREAD
from npllm.testing.operation import operations
from npllm.testing.rounding import FORMATS, Rounding

F = np.float32
NUMPY = {"F64": "f8", "F32": "f4", "F16": "f2", "U8": "u1", "I8": "i1", "I32": "i4", "BF16": "u2"}
WINDOWS = ("window33", "window-append", "append", "equal-scores", "no-keys", "t17")


# -- somebody else's program: no npllm in here ---------------------------------------------------------------------------


def wide(bits):
    """bfloat16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(F)


def narrow(x):
    """float32 to the bits of the nearest bfloat16, ties to even; finite numbers."""
    bits = np.ascontiguousarray(x, F).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def read(path):
    """A safetensors file by its specification; bfloat16 comes as float32."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = (8 + length + at for at in entry["data_offsets"])
        x = np.frombuffer(data[begin:end], "<" + NUMPY[entry["dtype"]]).reshape(entry["shape"])
        found[name] = wide(x) if entry["dtype"] == "BF16" else x
    return found


def write(path, outputs):
    """name -> (type, shape, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, end = {}, 0
    for name, (kind, shape, data) in outputs.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in outputs.values()))


def rms_norm(x, weight=None, *, eps, offset=0.0):
    y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True, dtype=F) + F(eps))
    return y if weight is None else y * (F(offset) + weight)


def attention(q, k, v, *, scale, window=None, wider=0):
    """Causal, bottom-right, over [B, T, H, K] and [B, S, G, K]."""
    T, S, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, groups, axis=2) for x in (k, v))
    scores = np.einsum("bthk,bshk->bhts", q, k) * F(scale)
    behind = np.arange(S - T, S)[:, None] - np.arange(S)
    seen = (behind >= 0) & (behind < (S if window is None else window) + wider)
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - np.max(scores, axis=-1, keepdims=True, initial=F(-1e30)))
    rounded = wide(narrow(p))
    return np.einsum("bhts,bshv->bthv", rounded, v) / np.maximum(p.sum(-1), F(1e-30)).transpose(0, 2, 1)[..., None]


def program(bundle, results, kernel):
    """Run `kernel` on the bundle, whose outputs are bfloat16, and write what it returns."""
    for entry in json.loads((bundle / "manifest.json").read_text())["entries"]:
        tensors = read(bundle / entry["file"])
        inputs = {each["name"]: tensors[f"inputs.{each['name']}"] for each in entry["inputs"]}
        y = kernel(**inputs, **entry["settings"])
        (output,) = entry["outputs"]
        assert output["dtype"] == "BF16"
        write(results / entry["file"], {output["name"]: ("BF16", y.shape, narrow(y).tobytes())})


def passes(manifest, entry, got, tensors, name):
    """The manifest's rules on one output, for finite truths."""
    by = manifest["judging"]
    error = got - tensors[f"truth.{name}"]
    if (np.abs(error) > tensors[f"bound.{name}"]).any() or not np.isfinite(error).all():
        return False
    x2 = np.divide(error**2, tensors[f"variance.{name}"], out=np.zeros_like(error), where=error != 0)
    slices = [x2] + [s for axis in range(x2.ndim) for s in np.moveaxis(x2, axis, 0) if x2.shape[axis] > 1]
    slices = [s for s in slices if s.size and (s is slices[0] or s.size >= by["smallest_slice"])]
    return all(np.sqrt(s.mean()) <= by["spread"] * (1 + by["scatter"] / np.sqrt(s.size)) for s in slices)


def failing(bundle, results):
    """The cases that the manifest's rules refuse, by `passes`."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    found = set()
    for entry in manifest["entries"]:
        got, tensors = read(results / entry["file"]), read(bundle / entry["file"])
        if not all(passes(manifest, entry, got[name].astype(float), tensors, name) for name in got):
            found.add(entry["case"])
    return found


# -- round trips ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "windows"
    export(folder, ["attention"], cases=WINDOWS, policy="bf16", seed=secrets.randbelow(1 << 31))
    return folder


@pytest.fixture
def small(tmp_path):
    """A bundle of one case, and results without fault."""
    bundle, results = tmp_path / "bundle", tmp_path / "results"
    export(bundle, ["rms_norm"], cases=[one_norm()], policy="bf16")
    program(bundle, results, rms_norm)
    return bundle, results


def one_norm():
    return next(case for case in cases("rms_norm") if case.scales == (1.0,) and {"eps"} == set(case.settings))


def only_file(bundle):
    (entry,) = read_manifest(bundle)["entries"]
    return entry["file"]


def test_honest_norms_pass(tmp_path):
    bundle, results = tmp_path / "bundle", tmp_path / "results"
    manifest = export(bundle, ["rms_norm"], policy=Rounding("bf16"), seed=secrets.randbelow(1 << 31))
    assert manifest == bundle / "manifest.json"
    program(bundle, results, rms_norm)
    suite = judge_results(bundle, results)
    assert suite.ok, str(suite)
    assert [report.case for report in suite.reports] == [case.id for case in cases("rms_norm")]
    assert failing(bundle, results) == set()


def test_wrong_norms_fail_and_are_explained(tmp_path):
    bundle, results = tmp_path / "bundle", tmp_path / "results"
    export(bundle, ["rms_norm"], policy="bf16", seed=secrets.randbelow(1 << 31))
    program(bundle, results, lambda x, weight=None, *, eps, offset=0.0: rms_norm(x, weight, eps=1e-30, offset=offset))
    suite = judge_results(bundle, results)
    failures = {report.case: report for report in suite.failures}
    assert any("eps" in report.explanation for report in failures.values())
    assert failing(bundle, results) == set(failures)


def test_honest_attention_passes_and_a_wide_window_is_named(windows, tmp_path):
    honest, wrong = tmp_path / "honest", tmp_path / "wrong"
    program(windows, honest, attention)
    assert judge_results(windows, honest).ok
    assert failing(windows, honest) == set()

    program(windows, wrong, lambda q, k, v, *, scale, window=None: attention(q, k, v, scale=scale, window=window, wider=1))
    suite = judge_results(windows, wrong)
    assert {report.case for report in suite.failures} == {"attention/window33", "attention/window-append"}
    assert {report.case for report in suite.failures} == failing(windows, wrong)
    for report in suite.failures:
        assert report.explanation == "window one key too wide"
        assert report.explained == 1.0
        assert "query" in report.message
        assert f"inputs, truth and bounds: {windows}" in report.message
        assert "check(" not in report.message


@pytest.mark.parametrize("op", operations(), ids=lambda op: op.name)
@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_every_operation_exports_and_the_canon_passes(op, kind, tmp_path):
    bundle, results = tmp_path / "bundle", tmp_path / "results"
    some = op.cases[secrets.randbelow(8) :: 8] or op.cases[:1]
    seed = secrets.randbelow(1 << 31)
    manifest = json.loads(export(bundle, [op], cases=some, policy=kind, seed=seed).read_text())
    by_id, rounding = {case.id: case for case in some}, Rounding(kind)
    for entry in manifest["entries"]:
        case = by_id[entry["case"]]
        inputs = case.inputs(seed, entry["scale"], rounding.format("inputs"))
        same_inputs(entry, inputs, read(bundle / entry["file"]))
        outputs = truth(op, case, inputs)
        write(results / entry["file"], {o["name"]: stored(o, outputs[o["name"]]) for o in entry["outputs"]})
    suite = judge_results(bundle, results)
    assert suite.ok, str(suite)
    assert {report.case for report in suite.reports} == set(by_id)
    assert all(report.seed == seed for report in suite.reports)


def same_inputs(entry, inputs, tensors):
    assert [each["name"] for each in entry["inputs"]] == list(inputs)
    for each in entry["inputs"]:
        x, got = inputs[each["name"]], tensors[f"inputs.{each['name']}"]
        assert each["shape"] == list(x.shape) == list(got.shape)
        assert len(each["axes"]) == x.ndim
        np.testing.assert_array_equal(got, x.astype(F) if x.dtype.name == "bfloat16" else x)
    for each in entry["outputs"]:
        for part in ("truth", "variance", "bound"):
            x = tensors[f"{part}.{each['name']}"]
            assert x.dtype == np.float64
            assert list(x.shape) == each["shape"]
            assert x.ndim == len(each["axes"])


def stored(output, x):
    """An output in the type that its entry asks for, to be written."""
    kind = output["dtype"]
    if kind == "I32":
        return kind, x.shape, x.astype(np.int32).tobytes()
    to = FORMATS[{"BF16": "bf16", "F32": "f32", "F16": "f16"}[kind]]
    with np.errstate(over="ignore"):
        return kind, x.shape, to.round(x).astype(to.dtype).tobytes()


# -- choices -------------------------------------------------------------------------------------------------------------


def nearly_tied(dice, scale):
    """Logits that all differ; the sigmoids of the first two agree in float32."""
    logits = dice.permuted(np.tile(np.linspace(-3.0, 3.0, 16, dtype=F), (64, 1)), axis=1)
    logits[:, 0], logits[:, 1] = 17.0, np.nextafter(F(17.0), F(18.0))
    return {"logits": logits.astype(np.float64)}


@pytest.mark.parametrize(("chosen", "ok"), [(0, True), (1, True), (2, False)])
def test_either_choice_of_a_near_tie_is_right(chosen, ok, tmp_path):
    case = Case("route", "nearly-tied", nearly_tied, {"experts_per_token": 1, "scores": "sigmoid"})
    manifest = export(tmp_path / "bundle", ["route"], cases=[case])
    (entry,) = json.loads(manifest.read_text())["entries"]
    assert entry["follows_choice"]
    logits = read(tmp_path / "bundle" / entry["file"])["inputs.logits"].astype(float)
    weight = 1.0 / (1.0 + np.exp(-logits[:, [chosen]]))
    outputs = {"index": np.full((64, 1), chosen), "weight": weight}
    write(tmp_path / "r" / entry["file"], {o["name"]: stored(o, outputs[o["name"]]) for o in entry["outputs"]})
    assert judge_results(tmp_path / "bundle", tmp_path / "r").ok == ok


@pytest.mark.parametrize("op", [op for op in operations() if not op.chooses], ids=lambda op: op.name)
def test_only_choices_are_followed(op):
    """Where the manifest says nothing else, a budget does not depend on what the kernel returned."""
    rounding, case = Rounding("f32"), op.cases[0]
    inputs = case.inputs(secrets.randbelow(1 << 31), case.scales[0], rounding.format("inputs"))
    with np.errstate(all="ignore"):
        alone = op.estimate(widened(inputs), case.settings, rounding, None)
        got = {name: 1.0 + 2.0 * x.value for name, x in zip(op.outputs, alone, strict=True)}
        after = op.estimate(widened(inputs), case.settings, rounding, got)
    for one, other in zip(alone, after, strict=True):
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=True))


# -- what is in a bundle -------------------------------------------------------------------------------------------------


def test_the_manifest_says_how_to_judge(small):
    bundle, _ = small
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["schema"] == SCHEMA
    assert manifest["policy"]["inputs"] == "bf16"
    assert manifest["seed"] == 0
    assert manifest["judging"] | {"rules": 0} == {"spread": SPREAD, "scatter": SCATTER, "smallest_slice": SLICE, "rules": 0}
    (entry,) = manifest["entries"]
    assert entry["file"] == f"{one_norm().id}@1.safetensors"
    assert entry["settings"] == dict(one_norm().settings)
    x = entry["inputs"][0]
    assert entry["outputs"] == [{"name": "y", "dtype": "BF16", "shape": x["shape"], "axes": x["axes"]}]
    text = (bundle / README).read_text()
    assert "npllm verify --judge" in text
    assert "rms_norm" in text
    assert str(SPREAD) in text


def test_the_same_bundle_twice_is_the_same(tmp_path):
    first, second = (export(tmp_path / name, ["embed"], seed=3).read_bytes() for name in ("a", "b"))
    assert first == second
    assert export(tmp_path / "c", ["embed"], seed=4).read_bytes() != first


def test_pages_and_slots_are_named(tmp_path):
    (entry, *_) = json.loads(export(tmp_path / "b", ["attention"], cases="paged").read_text())["entries"]
    axes = {each["name"]: each["axes"] for each in entry["inputs"]}
    assert axes["k"][:2] == ["page", "slot"]
    assert axes["q"][0] == "batch"


def test_file_names_are_safe():
    case = Case("attention", "sized(1, ../2)@7x0.5", lambda dice, scale: {})
    name = file_of(case, 0.125).removeprefix("attention/")
    assert name.endswith("@0.125.safetensors")
    assert not set(name) & set("/\\:*?\"<>|() ,'")
    names = {file_of(case, scale).lower() for op in operations() for case in op.cases for scale in case.scales}
    assert len(names) == sum(len(case.scales) for op in operations() for case in op.cases)


def test_tags_select_across_operations(tmp_path):
    both = ["attention", "rms_norm"]
    manifest = read_manifest(export(tmp_path / "b", both, tags="sinks,decode", without=["softcap"]).parent)
    assert {entry["case"] for entry in manifest["entries"]} == {
        case.id for case in cases("attention", tags="sinks,decode", without="softcap")
    }
    with pytest.raises(ArgumentError, match="no operation has cases tagged 'decod'; tags: decode"):
        export(tmp_path / "c", both, tags="decod")
    with pytest.raises(ArgumentError, match="no operation has a case 'window34'; nearest: window"):
        export(tmp_path / "c", both, cases=["window34"])
    with pytest.raises(ArgumentError, match="no operation has a case 'moe/usual'"):
        export(tmp_path / "c", both, cases=["moe/usual"])
    with pytest.raises(ArgumentError, match="nothing to write"):
        export(tmp_path / "c", [])
    assert not (tmp_path / "c").exists()


# -- folders -------------------------------------------------------------------------------------------------------------


def test_an_earlier_bundle_is_replaced_and_other_files_stay(small):
    bundle, _ = small
    old = bundle / only_file(bundle)
    (bundle / "notes.txt").write_text("mine")
    export(bundle, ["embed"])
    assert not old.exists()
    assert not old.parent.exists()
    assert (bundle / "notes.txt").read_text() == "mine"
    assert {path.parent.name for path in bundle.rglob("*.safetensors")} == {"embed"}
    assert not list(bundle.glob(".npllm*"))


def test_a_folder_of_other_files_is_refused(small, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ArgumentError, match="has other files than a bundle's; choose a new or an empty folder"):
        export(tmp_path / "mine", ["embed"])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]

    bundle, _ = small
    foreign = bundle / file_of(cases("embed")[0], cases("embed")[0].scales[0])
    foreign.parent.mkdir()
    foreign.write_text("mine")
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(ArgumentError, match="is there and belongs to no bundle"):
        export(bundle, ["embed"])
    assert foreign.read_text() == "mine"
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="has other files"):
        export(tmp_path / "file", ["embed"])


# -- results that are wrong before any number is looked at ---------------------------------------------------------------


def failed(bundle, results):
    (report,) = judge_results(bundle, results).reports
    assert not report.ok
    return report


def test_missing_and_unreadable_results(small):
    bundle, results = small
    path = results / only_file(bundle)
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    report = failed(bundle, results)
    assert report.problem == "returned"
    assert "truncated" in report.message
    path.write_bytes(b"")
    assert "too short" in failed(bundle, results).message
    path.unlink()
    report = failed(bundle, results)
    assert report.problem == "returned"
    assert "no such file" in report.message
    assert str(path) in report.message


@pytest.mark.parametrize(
    ("outputs", "problem", "text"),
    [
        (lambda x: {"z": ("BF16", x.shape, narrow(x).tobytes())}, "returned", "holds no tensor `.*it holds z"),
        (lambda x: {"": ("F32", x.shape, x.tobytes())}, "dtype", "is float32, the policy says bf16"),
        (lambda x: {"": ("F16", x.shape, x.astype(np.float16).tobytes())}, "dtype", "is float16"),
        (lambda x: {"": ("BF16", x[:-1].shape, narrow(x[:-1]).tobytes())}, "shape", r"has shape \[.*want \["),
        (lambda x: {"": ("BF16", x.T.shape, narrow(x.T).tobytes())}, "shape", "has shape"),
        (lambda x: {"": ("BF16", x.shape, narrow(np.full_like(x, 2.0)).tobytes())}, "constant", "are the same"),
        (lambda x: {"": ("BF16", x.shape, np.full(x.shape, 0x7FC0, "u2").tobytes())}, "non-finite", "NaN or infinity"),
        (lambda x: {"": ("U32", x.shape, x.tobytes())}, "returned", "stored as U32"),
    ],
)
def test_results_of_the_wrong_form(small, outputs, problem, text):
    bundle, results = small
    file = only_file(bundle)
    (y,) = read(results / file).values()
    (output,) = read_manifest(bundle)["entries"][0]["outputs"]
    write(results / file, {name or output["name"]: x for name, x in outputs(y).items()})
    report = failed(bundle, results)
    assert report.problem == problem
    assert re.search(text, report.message)


def test_bits_of_bfloat16_may_be_called_integers(small):
    bundle, results = small
    file = only_file(bundle)
    ((name, y),) = read(results / file).items()
    write(results / file, {name: ("U16", y.shape, narrow(y).tobytes()), "more": ("F32", (1,), bytes(4))})
    assert judge_results(bundle, results).ok


def test_files_without_an_entry_are_told(small):
    bundle, results = small
    shutil.copy(results / only_file(bundle), results / "other.safetensors")
    suite = judge_results(bundle, results)
    assert suite.ok
    assert suite.properties["ignored"] == "1 files without an entry: other.safetensors"
    assert suite.properties["policy"] == str(Rounding("bf16"))
    assert suite.properties["seed"] == "0"
    assert json.loads(suite.json())["ok"]
    assert "testcase" in suite.junit()


# -- damaged bundles -----------------------------------------------------------------------------------------------------


def refused(bundle, results, match):
    with pytest.raises(ArgumentError, match=match) as caught:
        judge_results(bundle, results)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(schema="npllm.bundle/2"), "npllm.bundle/2' is unknown; this version reads npllm.bundle/1"),
        (lambda m: m.pop("schema"), "schema None is unknown"),
        (lambda m: m.update(entries={}), "`entries` is damaged"),
        (lambda m: m.update(seed="0"), "`seed` is damaged"),
        (lambda m: m["policy"].update(inputs="bf17"), "format 'bf17' is unknown"),
        (lambda m: m["policy"].update(inputs=[]), "`policy` has unknown rounding points"),
        (lambda m: m["policy"].update(accumulator="f32"), "`policy` has unknown rounding points"),
        (lambda m: m["entries"].append(7), "entry 1 names no file"),
        (lambda m: m["entries"][0].update(file="../../etc/x.safetensors"), "entry 0 names no file"),
        (lambda m: m["entries"][0].pop("settings"), "entry 0 .*: is damaged"),
        (lambda m: m["entries"][0].update(scale="large"), "entry 0 .*: is damaged"),
        (lambda m: m["entries"][0].update(operation="rms_nrom"), "entry 0 .*'rms_nrom' is unknown; known: rms_norm"),
        (lambda m: m["entries"][0].update(outputs=[{"name": "out2", "dtype": "F32"}]), "rms_norm has other outputs"),
        (lambda m: m["entries"][0].update(file="rms_norm/gone@1.safetensors"), "gone.*no such file, but the manifest"),
        (lambda m: m["entries"][0].update(sha256="0" * 64), "not the file that was exported"),
    ],
)
def test_damaged_manifests(small, change, match):
    bundle, results = small
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    refused(bundle, results, match)


def test_damaged_folders(small, tmp_path):
    bundle, results = small
    refused(bundle, tmp_path / "nowhere", "no such folder; it holds the results")
    refused(bundle, bundle, "is the bundle itself; write the results into another folder")
    path = bundle / only_file(bundle)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(bundle, results, "SHA-256 is another")
    (bundle / "manifest.json").write_text("{")
    refused(bundle, results, "not valid JSON")
    (bundle / "manifest.json").unlink()
    refused(bundle, results, "no such file; a bundle has one")
