"""The Markdown pages: links, commands, options and figures match the repository."""

import functools
import importlib
import json
import re
import shlex
import subprocess
import tomllib

import pytest

import pages
from job import cli
from job.config import RETIRED, Config, LinearConfig, read_config
from job.embed import EmbedConfig
from job.errors import RunError
from job.metrics import schema
from job.study import demo
from pages import PAGES, ROOT, WRITTEN, name

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(
    re.findall(r"[\w-]+", re.search(r"^\.PHONY: ((.*\\\n)*.*)", MAKEFILE, re.MULTILINE)[1])
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONS = {"job.train": Config, "job.linear": LinearConfig, "job.embed": EmbedConfig}
PROGRAMS = {  # with a command line that each accepts
    "job.train": ["DIR"],
    "job.linear": ["DIR"],
    "job.embed": "DIR --pretrained FILE --out f.npy".split(),
    "job.export": ["FILE", "f.pth"],
    "job.pack": ["DIR", "OUT"],
    "job.show.watch": ["RUN"],
    "job.show.report": ["RUN"],
    "job.study.study": ["small", "--out", "OUT"],
}
MAINS = {module: f"{module}.app" for module in ("job.export", "job.show.watch", "job.show.report")}
SCRIPTS = {
    script: entry.partition(":")[0].removesuffix(".app")  # "mgd-watch": "job.show.watch"
    for script, entry in PROJECT["scripts"].items()
}
SHELL = ". apt-get docker eval export git head mkdir podman sbatch srun sudo tail".split()
SHELL += ["tensorboard", "wc"]
DEMO = ROOT / "job/study/results/2026-11-30-demo.json"
ORDER = ("untrained", "alone", "mgd", "teacher")  # of the demo's networks, by accuracy
# Starts of blocks that show output or a file's content, not commands.
SHOWN = ("k-NN ", "runs/demo/mgd: done", "arms:", "2026-11-24 ")
# Files that a page proposes to its reader.
PROPOSED = {
    (".github/CONTRIBUTING.md", "job/distill/cosine.py"),
    (".github/CONTRIBUTING.md", "tests/unit/distill/test_cosine.py"),
}
# A command in a sentence.
COMMAND = re.compile(r"(make|python3?|horovodrun|sbatch|srun|pip|mgd-[a-z]+)( |$)")
# Options of other programs: launchers, container engines, pip and NVIDIA's.
FOREIGN = set(
    """
    --bind --build-constraint --cap-drop --cleanenv --contain --cpus-per-task --device --exclude
    --export --gpus --gpus-per-node --group-add --help --init --ipc --network --no-require-hashes
    --nodelist --nodes --ntasks-per-node --only-deps --output --pid --rm --security-opt --shm-size
    --time --ulimit --upgrade --user
    """.split()
)


class Parsed(BaseException):
    """Ends a program after it has read its command line."""


class Wrong(BaseException):
    """A command is wrong. It is a BaseException because programs catch exceptions."""


def require(condition, text):
    """Raise Wrong with a text if a condition does not hold."""
    if not condition:
        raise Wrong(text)


def each_page(listed):
    """Return the parameters of a test of each page, with their paths as names."""
    return pytest.mark.parametrize("page", listed, ids=name)


def parse(module, words):
    """Read a command line as a program does, without running it. Return its option strings.

    Raise Wrong if the program would refuse it.
    """
    if kind := OPTIONS.get(module):
        try:
            if kind is EmbedConfig:
                cli.read(module, kind, words)
            else:
                read_config(words, module, kind)
        except RunError as error:
            raise Wrong(str(error)) from None
        return set(cli.build_parser(module, kind)._option_string_actions)
    seen = set()
    original = cli.Parser.parse_args

    def parse_args(self, args=None, namespace=None):
        seen.update(self._option_string_actions)
        try:
            original(self, words, namespace)
        except RunError as error:
            raise Wrong(str(error)) from None
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(cli.Parser, "parse_args", parse_args)
        importlib.import_module(MAINS.get(module, module)).main(words)
    return seen


@functools.cache
def known_options():
    """Return the options of all programs and scripts of the repository."""
    known = {option for module, words in PROGRAMS.items() for option in parse(module, words)}
    for script in [*(ROOT / "tests/campaigns").rglob("*.py"), *(ROOT / "tests/gpu").glob("*.py")]:
        known |= set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", script.read_text()))
    return known | RETIRED.keys()


def check_program(module, words):
    """Raise Wrong if the program does not exist or refuses the options."""
    require(module in PROGRAMS, f"no program: {module}")
    words = [word for word in words if word not in ("...", "--help")]
    if words:
        parse(module, words)


def check_make(words):
    """Raise Wrong if the target or variable does not exist."""
    for word in words:
        variable, given, _ = word.partition("=")
        known = re.search(rf"\b{variable}\b", MAKEFILE) if given else word in TARGETS
        require(known, f"make {word}")


def check_script(words):
    """Raise Wrong if a Python or shell script is missing, or lacks an option or a word."""
    require((ROOT / words[0]).exists(), words[0])
    script = ROOT / words[0]
    sources = script.parent.glob("*.py") if script.suffix == ".py" else [script]
    source = "".join(path.read_text() for path in sources)
    for word in words[1:]:
        require(not re.fullmatch(r"--[\w-]+|[a-z]+", word) or re.search(rf"{word}\b", source), word)


def check_job(words):
    """Raise Wrong if a job script is missing, or if its program refuses the options."""
    [(number, script)] = [(n, word) for n, word in enumerate(words) if word.endswith(".sbatch")]
    script = script.rpartition("/")[2]
    require((ROOT / "slurm" / script).exists(), script)
    program = "job.linear" if script == "linear.sbatch" else "job.train"
    check_program(program, ["DIR", *words[number + 1 :]])


def check(command):
    """Raise Wrong if a program, option, file, target or extra of the command is unknown."""
    if re.match(r"\w+=\$\(", command):
        return
    words = shlex.split(command, comments=True)
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    if not words:
        return
    for word in words:
        if re.fullmatch(r"(job|mgd|moco|slurm|docker|tests)/[\w./-]+\.\w+", word):
            require((ROOT / word).exists(), word)
    first, rest = words[0], words[1:]
    first = first.removeprefix(".venv/bin/")
    if first == "make":
        check_make(rest)
    elif first == "pip":
        extras = re.findall(r"\.\[([\w,]+)\]", command)
        known = PROJECT["optional-dependencies"].keys()
        require(all(set(some.split(",")) <= known for some in extras), extras)
    elif first in SCRIPTS:
        check_program(SCRIPTS[first], rest)
    elif first == "horovodrun":
        require(not rest or rest[0] == "-np", command)
        check(shlex.join(rest[2:]))
    elif re.fullmatch(r"python3?", first):
        if rest[:1] == ["-m"]:
            if rest[1].startswith("job."):
                check_program(rest[1], rest[2:])
        elif rest and "/" in rest[0]:
            check_script(rest)
    elif first in ("sbatch", "srun") and ".sbatch" in command:
        check_job(words)
    elif first in ("docker", "podman") and "horovodrun" in rest:
        check(shlex.join(rest[rest.index("horovodrun") :]))
    elif first.endswith(".sh"):
        check_script(words)
    else:
        require(first in SHELL, f"unknown command: {first}")


def commands(page):
    """Return the commands in the page's blocks of code."""
    blocks = [block for block in pages.blocks(page) if not block[0].startswith(SHOWN)]
    return [line for block in blocks for line in block]


@each_page(PAGES)
def test_links_and_anchors_resolve(page):
    for target in pages.links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in pages.anchors(file), target


@each_page(WRITTEN)
def test_lines_have_at_most_100_characters(page):
    if page.parent.name != "study":
        text = page.read_text().splitlines()
        assert [line for line in text if len(line) > 100 and not line.startswith("|")] == []


def test_readme_has_at_most_160_lines():
    text = (ROOT / "README.md").read_text().splitlines()
    assert len(text) <= 160 and max(map(len, text)) <= 100


def test_readme_names_the_command_that_ci_calls():
    command = "make test"
    assert command in (ROOT / ".ci/run").read_text().splitlines()
    assert command in [line.split("#")[0].strip() for line in commands(ROOT / "README.md")]


def test_each_page_is_linked_from_another():
    linked = {ROOT / "README.md"}
    for page in PAGES:
        paths = [target.partition("#")[0] for target in pages.links(page)]
        linked |= {(page.parent / path).resolve() for path in paths}
    assert [name(page) for page in WRITTEN if page not in linked] == []


@each_page(WRITTEN)
def test_commands_are_known(page):
    for line in commands(page):
        check(line)


@each_page(WRITTEN)
def test_commands_in_sentences_are_known(page):
    for span in pages.spans(page):
        if COMMAND.match(span):
            check(span.replace(" -np N", " -np 2"))


@pytest.mark.parametrize(
    "command",
    [
        "make tests",
        "make study FROM=small",
        "pip install '.[tensorbord]'",
        "mgd-watch RUN --onse",
        "python -m job.trian DIR",
        "horovodrun -np 2 python -m job.train DIR --loss-shares 1",
        "python -m job.export a.pth b.pth --formats timm",
        "sbatch slurm/train.sbatch --batch-sizes 2",
        "sbatch slurm/trains.sbatch",
        "docker run moco-mgd horovodrun -np 8 python -m job.train /data -b x",
        "docker build -f docker/Dockerfile.cpu .",
        "python tests/campaigns/bench/cost.py --rates 3",
        "docker/local-engine.sh upwards",
        "nothing --like this",
    ],
)
def test_wrong_command_raises(command):
    with pytest.raises(Wrong):
        check(command)


@each_page(WRITTEN)
def test_options_in_sentences_exist(page):
    named = re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join(pages.spans(page)))
    assert set(named) - known_options() - FOREIGN == set()


@each_page(WRITTEN)
def test_files_in_sentences_exist(page):
    for span in pages.spans(page):
        if re.fullmatch(r"(job|mgd|moco|slurm|docker|tests|\.ci|\.github)/[\w./-]+", span):
            assert (ROOT / span).exists() or (name(page), span) in PROPOSED, span


def test_hints_are_the_records_hints():
    text = pages.section("job/metrics/README.md", "## Hints")
    entries = re.findall(r"^- `(\w+)`", text, re.MULTILINE)
    ids = re.search(r"Hints: (.*?)\.\n", schema.Remark.__doc__, re.DOTALL)[1]
    assert set(entries) == set(re.findall(r"(\w+)(?=,|$)", re.sub(r"\s*\([^)]*\)", "", ids)))


def test_kinds_of_records_are_the_schema_s():
    text = pages.section("job/metrics/README.md", "## The run's folder")
    text = " ".join(text.split()).split("Each record has a `kind`.")[1].split("[schema.py]")[0]
    assert set(re.findall(r"`(\w+)`", text)) == schema.COURSE.keys() | schema.PROCESS.keys()


def test_presets_are_all_listed():
    rows = (ROOT / "job/presets/README.md").read_text().split("## Images")[0].split("|---|---|")[1]
    cells = re.findall(r"^\| (`.*?`) \|", rows, re.MULTILINE)
    named = set(re.findall(r"`([\w-]+)`", " ".join(cells)))
    assert named == {path.stem for path in (ROOT / "job/presets").glob("*.yaml")}


@pytest.mark.parametrize(
    ("page", "title"), [("README.md", "## Results"), ("mgd/README.md", "## When a matching helps")]
)
def test_results_are_figures_of_the_study(page, title):
    figure = r"(?<![\d.])\d+\.\d(?!\d)"
    with_spread = rf"{figure}(?: ± \d+\.\d)?"
    study = (ROOT / "job/study/README.md").read_text()
    known = {*re.findall(figure, study), *re.findall(with_spread, study)}
    shown = re.findall(with_spread, pages.section(page, title))
    assert len(shown) > 4 and [figure for figure in shown if figure not in known] == []


def test_step_times_equal_the_bench_s():
    """The last column, steps over their passes, is there if the record has it."""
    page = pages.section("tests/campaigns/bench/README.md", "## Methods")
    record = re.search(r"\((results/[\w-]+\.json)\)", page)[1]
    figures = json.loads((ROOT / "tests/campaigns/bench" / record).read_text())
    row = r"^\| `(\w+)` \| ([\d.]+)(?: \| ([\d.]+))? \|$"
    shown = {method: columns for method, *columns in re.findall(row, page, re.MULTILINE)}
    kinds, known = ("alone", "passes"), {}
    for method in shown:
        over = [f"method_{method}_over_{kind}" for kind in kinds]
        known[method] = [f"{figures[each]:.2f}" if each in figures else "" for each in over]
    if "alone" in known:
        known["alone"][0] = "1"
    assert shown == known
    over = {f"method_{method}_over_{kind}" for method in shown for kind in kinds}
    assert {figure for figure in figures if re.match("method_.*_over_", figure)} <= over
    steps = re.findall(r"\| ([\d.]+) \|$", pages.section("README.md", "## Results"), re.MULTILINE)
    assert steps == ["1", *(shown[method][0] for method in ("mgd", "mgd", "gram", "disco"))]


def test_input_figures_equal_the_bench_s():
    page = pages.section("tests/campaigns/bench/README.md", "## Images")
    record = re.search(r"\((results/[\w-]+\.json)\)", page)[1]
    figures = json.loads((ROOT / "tests/campaigns/bench" / record).read_text())
    shown = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|$", page, re.MULTILINE))
    assert shown == {
        name.removeprefix("images_").removesuffix("_ms"): f"{value:.3f}"
        for name, value in figures.items()
        if name.startswith("images_")
    }
    ratios = r"^\| ([\w, ]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$"
    rows = re.findall(ratios, page, re.MULTILINE)
    for sides, column in zip((500, 2000, 4000), list(zip(*rows, strict=True))[1:], strict=True):
        known = [
            f"{value:.2f}"
            for name, value in figures.items()
            if re.fullmatch(rf"jpeg_{sides}_\w+_over_pil", name)
        ]
        assert len(column) > 9 and set(column) <= set(known)


def test_readme_shows_the_demo_s_table():
    record = json.loads(DEMO.read_text())["runs"][0]
    lines = demo.table(demo.networks(ROOT), record["accuracies"])
    shown = pages.section("README.md", "## Demo")
    assert "".join(f"    {line}\n" for line in lines) in shown


def test_demo_has_the_same_order_with_each_seed():
    runs = json.loads(DEMO.read_text())["runs"]
    assert [each["seed"] for each in runs] == [0, 1, 2]
    for each in runs:
        for measure in ("knn", "linear"):
            order = [each["accuracies"][name][measure] for name in ORDER]
            assert order == sorted(order) and len(set(order)) == 4


def test_pages_that_programs_name_exist():
    endings = (".py", ".sh", ".sbatch")
    files = [path for folder in ("job", "slurm", "docker") for path in (ROOT / folder).rglob("*")]
    texts = [path.read_text() for path in files if path.suffix in endings]
    named = {page for text in texts for page in re.findall(r"[\w/]+/README\.md", text)}
    assert len(named) > 3 and [page for page in named if not (ROOT / page).exists()] == []


@each_page([page for page in WRITTEN if "## The code\n" in page.read_text()])
def test_table_of_the_code_has_each_module(page):
    text = pages.section(name(page), "## The code")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    files = [path.name for path in page.parent.glob("*.py") if not path.name.startswith("__")]
    assert sorted(re.findall(r"`(\w+\.py)`", " ".join(cells))) == sorted(files)


# The tests below are of job/cluster/HOROVOD.md.

HOROVOD = "job/cluster/HOROVOD.md"
BUILD = (ROOT / "docker/build_horovod.sh").read_text()


def rows(title):
    """Return the cells of a section's table below its header."""
    lines = [line for line in pages.section(HOROVOD, title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def plain(expression):
    """Return the text that a simple regular expression matches."""
    return expression.strip("^$ ").replace("\\", "")


def test_horovod_changes_are_all_listed():
    changes = BUILD.split("\nedit() {")[1].partition("\n}\n")[2]
    changes = changes.partition("\nif ! command -v cmake")[0]
    setting = 'standard=N backend=gloo jobs=1; edit() { printf \'%s\\t%s\\n\' "$1" "$3"; }\n'
    done = subprocess.run(
        ["bash", "-euc", setting + changes], capture_output=True, text=True, check=True
    )
    made = [line.split("\t") for line in done.stdout.splitlines()]
    table = rows("## Changes of Horovod's source")
    assert [[cell.strip("`") for cell in row[:2]] for row in table] == [
        [file, plain(result)] for file, result in made
    ]
    for page in (HOROVOD, "docker/README.md"):
        assert f"{len(made)} changes" in (ROOT / page).read_text()


def test_horovod_files_are_listed_with_their_lines():
    """A count may be a quarter off, because the page gives the date of its counts."""
    counts = {row[0].strip("`"): int(row[1]) for row in rows("## Code for Horovod")}
    for path, lines in counts.items():
        assert lines == pytest.approx(len((ROOT / path).read_text().splitlines()), rel=0.25), path
    folders = [path for part in ("job", "moco") for path in (ROOT / part).rglob("*.py")]
    scripts = [*(ROOT / "docker").glob("*.sh"), *(ROOT / "slurm").glob("*.sh")]
    others = [ROOT / file for file in ("Makefile", "pyproject.toml", "docker/Dockerfile")]
    for path in [*folders, *scripts, *others]:
        named = [
            line for line in path.read_text().splitlines() if re.search("horovod|hvd", line, re.I)
        ]
        assert len(named) <= 3 or name(path) in counts, path


def test_horovod_page_names_the_pinned_versions():
    text = pages.section(HOROVOD, "## Updates of torch")
    patterns = {
        "docker/constraints.txt": r"^(?:torch|torchvision|nvidia-nccl-cu13)==([\d.]+)",
        "docker/pip.txt": r"^pip==([\d.]+)",
        "docker/build_horovod.sh": r"(?:^version=|cmake==)([\d.]+)",
        "pyproject.toml": r"\"((?:torch|torchvision)>=[^\"]+|setuptools>=[^\"]+,[^\"]+)\"",
        "docker/Dockerfile": r"nvidia/cuda:([\d.]+)-",
    }
    for file, pattern in patterns.items():
        versions = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
        assert versions and [each for each in versions if each not in text] == [], file
