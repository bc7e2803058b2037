"""Files of options: wrong content, wrong syntax, and attacks on time and memory."""

import os

import pytest

from cases import SMALL, Case, check
from short import short

LAUGHS = "\n".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]" for n in range(30)
)
MERGES = "\n".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" if n else "a0: &a0 {lr: 1}"
    for n in range(30)
)
MEGABYTE = 10**6

# name: content, and parts of the error. Without parts the file is valid.
FILES = {
    "an unknown key": ("lr: 0.1\ntempreature: 1", "'tempreature'"),
    "a misspelt key": ("batchsize: 4", "'batchsize'", "did you mean batch_size?"),
    "a key that is a number": ("1: 2", "'1'"),
    "a key of another program": ("pretrained: x", "'pretrained'"),
    "a list for a key": ("[lr]: 2", "one value"),
    "a string for a number": ("lr: fast", "lr 'fast'", "a number"),
    "a fraction for an integer": ("epochs: 1.5", "epochs 1.5", "an integer"),
    "a boolean for a number": ("epochs: yes", "epochs True", "an integer"),
    "a number for a boolean": ("mlp: 1", "mlp 1", "true or false"),
    "no value for a number": ("lr:", "lr None", "a number"),
    "a list for a number": ("lr: [0.1]", "lr [0.1]", "a number"),
    "a mapping for a number": ("lr: {a: 1}", "lr", "one value"),
    "a date for a number": ("lr: 2020-01-01", "lr", "2020", "a number"),
    "an invalid date": ("lr: 2020-13-45", "month"),
    "bytes for a string": ("out: !!binary aGVsbG8=", "out b'hello'", "text"),
    "an unknown group": ("mocco: {k: 5}", "unknown group 'mocco'", "did you mean moco?"),
    "an unknown key in a group": ("moco: {kk: 5}", "'moco.kk'", "did you mean moco.k?"),
    "a number for a group": ("moco: 5", "moco", "expected a mapping"),
    "a group in a group": ("moco: {k: {a: 1}}", "moco.k", "one value"),
    "a group that holds itself": ("moco: &a {k: *a}", "moco.k", "one value"),
    "a group twice": ("moco: {k: 5}\nmoco: {t: 1}", "moco is given twice"),
    "an option outside and in a group": ("moco_k: 5\nmoco: {k: 5}", "moco_k and moco.k"),
    "a number out of range in a group": ("moco: {k: 0}", "moco.k 0", "at least 1"),
    "a list in a list": ("schedule: [[1]]", "schedule", "a list of values"),
    "no stages": ("mgd_stages: []", "--mgd-stages []", "1 to 4"),
    "a number out of range": ("epochs: 0", "epochs 0", "at least 1"),
    "a number of many digits": ("epochs: " + "9" * 5000, "digits"),
    "a number that is too large": ("lr: 1e999", "lr 1e999", "finite"),
    "a key twice": ("lr: 0.1\nepochs: 1\nlr: 0.2", "lr", "twice"),
    "a key twice, in two spellings": ("batch-size: 4\nbatch_size: 8", "batch_size", "the same"),
    "a list": ("- lr: 0.1", "a mapping such as", "a sequence"),
    "one value": ("0.1", "a mapping such as", "a scalar"),
    "two documents": ("lr: 1\n---\nlr: 2", "not YAML", "another document"),
    "an anchor": ("lr: &rate 0.01\nweight_decay: *rate\nschedule: &epochs [1, 2]\n",),
    "an undefined alias": ("lr: *rate", "not YAML", "undefined alias"),
    "a list that holds itself": ("schedule: &a [*a]", "schedule", "a list of values"),
    "aliases that multiply": (LAUGHS, "'a0'"),
    "aliases that multiply, of a known key": (LAUGHS.replace("a29:", "schedule:"), "'a0'"),
    "merges that multiply": (MERGES, "unknown group 'a0'"),
    "code": (
        "out: !!python/object/apply:os.system ['touch harm']",
        "not YAML",
        "python/object/apply",
    ),
    "a tab": ("\tlr: 0.1", "not YAML", "'\\t'"),
    "a tab after the key": ("lr:\t0.1", "not YAML", "'\\t'"),
    "an open bracket": ("lr: [", "not YAML"),
    "a megabyte of brackets": ("[" * MEGABYTE, "more than 65536 characters"),
    "brackets in brackets": ("lr: " + "[" * 60_000, "too many nested brackets"),
    "braces in braces": ("{a: " * 15_000, "too many nested brackets"),
    "dashes after dashes": ("- " * 30_000, "too many nested brackets"),
    "a value of a megabyte": ("out: " + "x" * MEGABYTE, "more than 65536 characters"),
    "a value of 60 kB": ("lr: " + "x" * 60_000, "lr 'xxx", " ... ", "a number"),
    "a key of 60 kB": ("x" * 60_000 + ": 1", "not YAML: line 1, column 60001: "),
    "a tag of 60 kB": ("lr: !" + "x" * 60_000 + " 1", "not YAML", " ... "),
    "a list of 30,000 values": (
        "schedule: [" + "1," * 30_000 + "x]",
        "schedule 'x'",
        "an integer",
    ),
    "an invalid character": ("lr: 1\x07", "not YAML"),
    "bytes that are not text": (b"\x80\x81\x82" * 100, "not YAML", "utf-8"),
    "another encoding": ("lr: 1".encode("utf-16"), "not YAML", "utf-8"),
    "a picture": (b"\x89PNG\r\n\x1a\n", "not YAML"),
    "an empty file": ("",),
    "only comments": ("# nothing\n",),
    "a byte order mark": ("\ufefflr: 0.01",),
}
SPECIAL = {
    "a folder": "Is a directory",
    "no one's": "Permission denied",
    "a loop": "symbolic links",
    "a device": "65536 characters",
}


@pytest.fixture(scope="module")
def values(good, tmp_path_factory):
    folder = tmp_path_factory.mktemp("yaml")
    for name, (content, *_) in FILES.items():
        (folder / f"{name}.yaml").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    (folder / "a folder.yaml").mkdir()
    (folder / "no one's.yaml").touch(0)
    (folder / "a loop.yaml").symlink_to("a loop.yaml")
    (folder / "a device.yaml").symlink_to("/dev/zero")
    return {"good": good, "folder": folder}


CASES = [
    Case(
        name,
        ["{good}", *SMALL, "--config", f"{{folder}}/{name}.yaml"],
        tuple(part.replace("{", "{{").replace("}", "}}") for part in parts)
        and (*parts, *([f"{name}.yaml"] if "--mgd-stages []" not in parts else [])),
        unprivileged=name == "no one's",
    )
    for name, parts in [
        *((name, parts) for name, (_, *parts) in FILES.items()),
        *((name, [part]) for name, part in SPECIAL.items()),
    ]
]


SHORT = [
    "a misspelt key",
    "a string for a number",
    "a key twice",
    "aliases that multiply",
    "code",
    "an open bracket",
    "another encoding",
    "a folder",
]


@pytest.mark.parametrize("case", short(CASES, *SHORT), ids=lambda case: case.name)
def test_file(case, outcomes, values):
    check(case, outcomes, values)
    assert outcomes[case.name][0]["seconds"] < 20


@pytest.mark.short
def test_peak_of_memory(outcomes):
    peaks = [outcome["peak"] for outcome, _ in outcomes.values() if outcome["code"]]
    assert max(peaks) < min(peaks) + 100  # MB


@pytest.mark.short
def test_no_code_ran(outcomes):
    assert not any("harm" in os.listdir(folder) for _, folder in outcomes.values())
