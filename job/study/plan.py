"""A study's plan: the units that follow from a form and its questions."""

import dataclasses
from pathlib import Path
from typing import Any

from job.config import (
    OF_TEACHER,
    WITHOUT_EFFECT,
    Config,
    LinearConfig,
    MethodOptions,
    read_config,
    without_head,
    without_part,
)
from job.declare import convert, flag, words_of
from job.errors import RunError
from job.study.data import CHOOSE, MOST, TEST
from job.study.form import (
    ALONE,
    FILES,
    MGD,
    TEACHER,
    UNTRAINED,
    read_form,
    read_questions,
    slug,
)

# An epoch that changes only the batch norms' statistics. Without them the accuracy is too low.
STILL = {"lr": 0.0, "epochs": 1, "warmup_epochs": 0}
# Options on which no result depends.
NO_EFFECT = WITHOUT_EFFECT | FILES | {"keep", "save_every", "knn_every", "max_bad_images"}

NEWER = ("knn_k", "deterministic")  # options that older records lack, off by default

METHOD = [f for f in dataclasses.fields(MethodOptions) if f.name in ("framework", "distill")]


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """One network of a study: how it is trained and measured.

    train: options of job.train. linear: options of job.linear. Neither has options that are files.
    guided: it has a teacher.
    """

    set: str
    arm: str
    seed: int
    train: dict[str, Any]
    linear: dict[str, Any]
    guided: bool

    @property
    def name(self) -> str:
        """Return its name, which is also its folder: clipart/mgd-0."""
        return f"{self.set}/{slug(self.arm)}-{self.seed}"

    def resolved(self) -> dict[str, dict[str, Any]]:
        """Return {program: its options}, defaults included, without those of no effect on results.

        RunError: an option is invalid.
        """
        options: dict[str, dict[str, Any]] = {}
        unused = NO_EFFECT if self.guided else NO_EFFECT | OF_TEACHER
        configs = {"job.train": self.config(self.train), "job.linear": self.classifier()}
        for program, config in configs.items():
            values = dataclasses.asdict(config).items()
            options[program] = {name: value for name, value in values if name not in unused}
            for name in NEWER:
                if not options[program][name]:
                    del options[program][name]  # so older records remain valid
        return options

    def config(self, train: dict[str, Any]) -> Config:
        """Return the configuration from `train`. RunError: an option is invalid."""
        teacher = ["--teacher", "TEACHER"] if self.guided else []
        knn = arguments({"knn_every": 1})  # for all units, unless `train` has another value
        try:
            return read_config(["DATA", *knn, *arguments(train), *teacher])
        except RunError as error:
            raise RunError(f"{self.name}: job.train: {error}") from None

    def classifier(self) -> LinearConfig:
        """Return the configuration from `linear`. RunError: an option is invalid."""
        try:
            return read_config(["DATA", *arguments(self.linear)], "job.linear", LinearConfig)
        except RunError as error:
            raise RunError(f"{self.name}: job.linear: {error}") from None


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a set's students. asks: its text. answers: {answer: its arm}."""

    name: str
    asks: str
    answers: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A form with its units.

    questions: {set: its questions}. most: {set: training images per class}. split: test or choose
    (job/study/data.py). arms: the form's own arms. units: in the order of their training.
    """

    form: str
    about: str
    device: str
    at_once: int
    seeds: list[int]
    questions: dict[str, list[Question]]
    most: dict[str, int]
    split: str
    arms: list[str]
    units: list[Unit]

    def images(self, name: str) -> str:
        """Return the folder of a set's images in the study's: data/clipart-700[-choose]."""
        end = f"-{CHOOSE}" if self.split == CHOOSE else ""
        return f"data/{name}-{self.most[name]}{end}"


def read_plan(form: str) -> Plan:
    """Return the plan of a form.

    form: a YAML file, or the name of a form of this package. RunError: the form is invalid.
    """
    content = read_form(form)
    known = read_questions()
    reference = known["mgd"] | content.get("mgd", {})
    controls = {arm: known["controls"][arm] for arm in content.get("controls", known["controls"])}
    questions, units = {}, []
    for name, options in content["sets"].items():
        chosen = choose(form, name, options.get("questions", []), known["questions"])
        arms = {MGD: reference} | {arm: reference | changes for arm, changes in controls.items()}
        questions[name] = [answer(key, each, reference, arms) for key, each in chosen.items()]
        own, changed = content.get("arms", {}), options.get("arms", {})
        own = {arm: changes | changed.get(arm, {}) for arm, changes in own.items()}
        if both := sorted(own.keys() & arms.keys()):
            reason = f"a question of {name} has a network of this name"
            raise RunError(f"{form}: arms: {both[0]!r}: {reason}; expected another name")
        # The arms that a verdict needs come first.
        units += list_units(name, content, {UNTRAINED: STILL, ALONE: {}, **arms} | own)
    most = {name: options.get("most", MOST) for name, options in content["sets"].items()}
    head = (
        Path(form).stem,
        content["about"],
        content["device"],
        content["at_once"],
        content["seeds"],
    )
    split, names = content.get("split", TEST), [*content.get("arms", {})]
    plan = Plan(*head, questions, most, split, names, units)
    check_unlike(plan)
    return plan


def choose(
    form: str, name: str, choice: str | list[str] | dict[str, list[str]], questions: dict[str, dict]
) -> dict[str, dict]:
    """Return the questions of a set, each with its chosen answers.

    choice: "all", names, or {name: answers}. RunError: a question or an answer is unknown.
    """
    if choice == "all":
        return questions
    chosen = {}
    for key in choice:
        if key not in [*questions]:  # YAML items can be unhashable
            raise RunError(
                f"{form}: {name}: no question {key!r}; "
                f"expected all, or some of {', '.join(questions)}"
            )
        answers = questions[key]["answers"]
        tried = choice[key] if isinstance(choice, dict) else list(answers)
        known = isinstance(tried, list) and all(answer in [*answers] for answer in tried)
        if not known or len(set(tried)) < max(2, len(tried)):
            raise RunError(
                f"{form}: {name}: {key} {tried!r}: "
                f"expected two or more of {', '.join(answers)}, each once"
            )
        chosen[key] = questions[key] | {"answers": {answer: answers[answer] for answer in tried}}
    return chosen


def answer(name: str, question: dict, base: dict, arms: dict[str, dict]) -> Question:
    """Return a question with an arm for each answer. New arms are added to `arms`.

    base: the options of the reference. arms: {arm: its options}.
    """
    answers = {}
    for key, changes in question["answers"].items():
        options = base | question.get("base", {}) | changes
        same = [arm for arm, others in arms.items() if others == options]
        answers[key] = same[0] if same else f"{name} {key}"
        arms[answers[key]] = options
    return Question(name, question["asks"], answers)


def list_units(name: str, content: dict, arms: dict[str, dict]) -> list[Unit]:
    """Return the units of a set: its teacher, then those of each arm in the order of `arms`."""
    own, seeds = content["sets"][name], content["seeds"]

    def unit(arm: str, seed: int, options: dict) -> Unit:
        role = TEACHER if arm == TEACHER else "student"
        train = (
            content["train"]
            | own.get("train", {})
            | content[role]
            | own.get(role, {})
            | options
            | {"seed": seed}
        )
        undistilled = options.get("distill") == []
        guided = arm not in (TEACHER, UNTRAINED, ALONE) and not undistilled
        if undistilled:
            del train["distill"]
        if train.get("matching") == "random":
            train.pop("refresh_epochs", None)  # a random matching is never solved
        linear = content["linear"] | {"seed": seed}
        result = without_unused(Unit(name, arm, seed, train, linear, guided))
        if undistilled and train.get("framework") == "none":
            problem = "no loss trains it; expected a framework or a distiller"
            raise RunError(f"{result.name}: framework none, distill []: {problem}")
        if arm in content.get("arms", {}):
            unused = options.keys() - result.train.keys() | (OF_TEACHER if undistilled else set())
            if ignored := sorted(options.keys() & unused - {"distill"}):
                problem = "no effect on this network; expected options that it has"
                raise RunError(f"{result.name}: {ignored[0]}: {problem}. Remove it from the arm")
        return result

    return [unit(TEACHER, seeds[0], {})] + [
        unit(arm, seed, options) for arm, options in arms.items() for seed in seeds
    ]


def without_unused(unit: Unit) -> Unit:
    """Return a unit without the options of frameworks, distillers, heads or teachers it lacks.

    RunError: its framework or distillers are invalid.
    """
    try:
        chosen = {
            f.name: convert(f, unit.train[f.name], flag(f.name))
            for f in METHOD
            if f.name in unit.train
        }
    except RunError as error:
        raise RunError(f"{unit.name}: job.train: {error}") from None
    unused = {*without_part(MethodOptions(**chosen))}
    unused |= set() if unit.guided else OF_TEACHER
    train = {name: value for name, value in unit.train.items() if name not in unused}
    rest = {name: value for name, value in train.items() if name != "head_width"}
    if rest != train and without_head(unit.config(rest)):
        train = rest
    return dataclasses.replace(unit, train=train)


def check_unlike(plan: Plan) -> None:
    """Check units. RunError: two have the same name, or two of a set are the same network."""
    seen: dict[str, str] = {}
    for unit in plan.units:
        network = f"{unit.set} {unit.seed} {unit.guided} {unit.resolved()}"
        problems = {
            unit.name: f"have the same folder {unit.name}; expected different names. Rename",
            network: "are the same network; expected different ones. Remove",
        }
        for key, problem in problems.items():
            if key in seen:
                both = f"{unit.arm!r} and {seen[key]!r}"
                raise RunError(f"{unit.set}: {both} {problem} one of them")
            seen[key] = unit.arm


def arguments(options: dict[str, Any]) -> list[str]:
    """Return the arguments for options: {"moco_k": 256, "mlp": True} -> --moco-k 256 --mlp."""
    return [each for name, value in options.items() for each in words_of(name, value)]
