"""A study's report: conditions, verdicts, a table for each question, and exact commands."""

from typing import Any

from job.study.data import CHOOSE, TEST
from job.study.findings import AUC, MEASURES, STEP, Scores
from job.study.form import ALONE, MGD, ORIGINAL, RANDOM, TEACHER, UNTRAINED
from job.study.plan import Plan, Question, arguments

Records = list[dict[str, Any]]
TUNED = "Do not choose settings by these figures. `split: choose` has other images for that."
CHOSEN = "**These figures choose settings and are not results**: "
CHOSEN += "the images were held out of `train`. None is from `val`."
SPLITS = {TEST: TUNED, CHOOSE: CHOSEN}
ONE_SEED = "**One seed has no deviation, so here every lead counts, even a small one.** "


def write(plan: Plan, records: Records, pictures: dict[str, str]) -> str:
    """Return the report, in Markdown.

    records: those of every seed of the arms to report. pictures: {set: file name of its picture}.
    """
    hours = sum(record["seconds"] for record in records) / 3600  # of commands, some concurrent
    machines = "; on ".join(sorted({record["on"] for record in records}))
    seeds = ", ".join(map(str, plan.seeds))
    lines = [
        f"# Results of {plan.about}",
        "",
        f"{len(records)} networks, seeds {seeds}; {hours:.1f} hours of commands, "
        f"{plan.at_once} at a time; "
        f"finished {max(record['measured'] for record in records)} on {machines}.",
        *describe_missing(plan, records),
        "Accuracies are top-1 in percent on held-out images, means over seeds ± their standard "
        "deviation. A lead counts only if it exceeds the larger deviation of the two. "
        f"{ONE_SEED if len(plan.seeds) == 1 else ''}{SPLITS[plan.split]} "
        "% of the lead: the lead over the student alone, in percent of the teacher's. "
        "AUC: the area under the cumulative "
        "singular values of the normalised features, 0.5 if all are equal, 1 at full collapse. "
        "Step time: the median over a training's steps, divided by that of the student "
        f"alone{note_on_times(plan)}. The last column is the distillation loss divided by the "
        "framework's loss or its range, in the first and in the last epoch.",
    ]
    lines += ["", describe_arms(plan), *describe_better(plan, records)]
    for name, picture in pictures.items():
        own = [record for record in records if record["set"] == name]
        lines += ["", *describe_set(plan, name, own)]
        lines += ["", f"![{name}: accuracies of each seed and their means]({picture})"]
    return "\n".join([*lines, "", *describe_commands(records)]) + "\n"


def complete(plan: Plan, records: Records) -> Records:
    """Return the records of the arms that have a record of every seed.

    Sets are left out if an arm that a verdict needs lacks one.
    """
    by_unit = {record["unit"]: record for record in records}
    arms: dict[tuple[str, str], bool] = {}
    for unit in plan.units:
        arms[unit.set, unit.arm] = arms.get((unit.set, unit.arm), True) and unit.name in by_unit
    basis = (TEACHER, UNTRAINED, ALONE, MGD, RANDOM)
    sets = [name for name in plan.questions if all(arms[name, arm] for arm in basis)]
    shown = (unit for unit in plan.units if unit.set in sets and arms[unit.set, unit.arm])
    return [by_unit[unit.name] for unit in shown]


def describe_missing(plan: Plan, records: Records) -> list[str]:
    """Return a paragraph that names the missing arms of each set, if there are any.

    Networks of a missing arm can be measured, but not all its seeds are.
    """
    measured = {record["unit"] for record in records}
    if not (missing := [unit for unit in plan.units if unit.name not in measured]):
        return []
    shown = []
    for name in dict.fromkeys(unit.set for unit in missing):
        every = not any(record["set"] == name for record in records)
        arms = dict.fromkeys(unit.arm for unit in missing if unit.set == name)
        shown.append(f"on {name} {'all' if every else ', '.join(arms)}")
    reason = "an arm is shown if all its seeds are measured"
    text = f"{len(missing)} of {len(plan.units)} networks are not shown ({reason})"
    return ["", f"**Incomplete**: {text}: {'; '.join(shown)}.", ""]


def note_on_times(plan: Plan) -> str:
    """Return a note on step times if several networks train at a time."""
    if plan.at_once == 1:
        return ""
    return f"; {plan.at_once} networks train at a time and slow each other down unevenly"


def describe_arms(plan: Plan) -> str:
    """Return a sentence with the arms of MGD and their options that the student alone lacks."""
    trained = {unit.arm: unit.train for unit in reversed(plan.units)}
    kinds = {MGD: "MGD", RANDOM: "MGD with a random matching", ORIGINAL: "MGD as published"}
    texts = []
    for arm, kind in kinds.items():
        if arm in trained:
            own = own_options(trained[arm], trained[ALONE])
            texts.append(f"`{arm}` is {kind}" + (f", by `{own}`" if own else ""))
    return f"{'; '.join(texts)}."


def own_options(train: dict[str, Any], alone: dict[str, Any]) -> str:
    """Return the options, as flags, that the student alone lacks, without a share of 0."""
    own = {name: value for name, value in train.items() if alone.get(name) != value}
    if own.get("loss_share") == 0:
        del own["loss_share"]
    return " ".join(arguments(own))


def scores_of(plan: Plan, name: str, records: Records) -> list[Scores]:
    """Return a set's scores by each measure."""
    shown = {record["arm"] for record in records}
    partial = any(unit.arm not in shown for unit in plan.units if unit.set == name)
    return [Scores.of(measure, records, plan.arms, partial) for measure in MEASURES]


def describe_better(plan: Plan, records: Records) -> list[str]:
    """Return lines with the arms that beat MGD, and MGD as published, on all sets shown."""
    sets = list(dict.fromkeys(record["set"] for record in records))
    if not plan.arms or len(sets) < 2:
        return []
    lines = [""]
    by_set = []
    for name in sets:
        by_set.append(scores_of(plan, name, [each for each in records if each["set"] == name]))
    for scores in zip(*by_set, strict=True):
        named = zip(sets, scores, strict=True)
        failing = [name for name, each in named if not each.valid()]
        note = f" (invalid: a condition fails on {', '.join(failing)})" if failing else ""
        rivals = [arm for arm in scores[0].rivals if all(arm in each.rivals for each in scores)]
        for rival in rivals:
            first, *rest = (each.better(rival) for each in scores)
            arms = [arm for arm in first if all(arm in others for others in rest)]
            text = f"{rival} is beaten on {', '.join(sets)} by {', '.join(arms) or 'no arm'}"
            lines.append(f"- {scores[0].measure}{note}: {text}.")
    return lines


def describe_set(plan: Plan, name: str, records: Records) -> list[str]:
    """Return the section of a set: conditions and verdicts by measure, then tables."""
    questions, own = plan.questions[name], plan.arms
    scores = scores_of(plan, name, records)
    lines = [f"## {name}", ""]
    if own:
        lines += [*(f"- {text}." for each in scores for text in each.ranking()), ""]
    for each in scores:
        lines += [f"- **{each.verdict()}.**"]
        lines += [
            f"  - condition {'holds' if holds else 'FAILS'}: {text}"
            for text, holds in each.conditions()
        ]
        lines += [f"  - {text}" for text, _ in each.claims()]
    lines += [f"- {text}" for text in changes(records)]
    arms = {arm: arm for arm in (UNTRAINED, ALONE, TEACHER, MGD, *controls(records, questions))}
    lines += ["", *table("network", arms, scores, records)]
    for question in questions:
        by_arm = scores[0].by_arm
        answers = {answer: arm for answer, arm in question.answers.items() if arm in by_arm}
        if answers:
            lines += ["", f"**{question.asks}**", ""]
            lines += table(question.name, answers, scores, records)
    return lines


def changes(records: Records) -> list[str]:
    """Return lines: how MGD and the random matching change the AUC, if all records have it."""
    if not all(AUC in record for record in records):
        return []
    scores = Scores.of(AUC, records)
    return [
        scores.change(*pair)
        for pair in ((ALONE, UNTRAINED), (MGD, ALONE), (RANDOM, ALONE), (MGD, RANDOM))
    ]


def controls(records: Records, questions: list[Question]) -> list[str]:
    """Return the controls and the form's own arms."""
    answers = {f"{question.name} {answer}" for question in questions for answer in question.answers}
    return [
        arm
        for arm in dict.fromkeys(record["arm"] for record in records)
        if arm not in answers | {UNTRAINED, ALONE, TEACHER, MGD}
    ]


def table(title: str, arms: dict[str, str], scores: list[Scores], records: Records) -> list[str]:
    """Return a table of arms. title: heading of the first column. arms: {name of a row: arm}."""
    auc, step = (if_all(key, records) for key in (AUC, STEP))
    head = [
        title,
        *(each.measure for each in scores),
        *(f"{each.measure} over alone" for each in scores),
        *(f"{each.measure}, % of the lead" for each in scores),
        *(["AUC"] if auc else []),
        *(["step time over alone"] if step else []),
        "distillation / framework's",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for shown, arm in arms.items():
        cells = [each.shown(arm, 1) for each in scores]
        cells += ["" if arm == ALONE else f"{each.lead(arm, ALONE):+.1f}" for each in scores]
        recovered = [None if arm in (ALONE, TEACHER) else each.recovered(arm) for each in scores]
        cells += ["" if percent is None else f"{percent:.0f}" for percent in recovered]
        cells += [auc.shown(arm, 3)] if auc else []
        cells += [f"{step.mean(arm) / step.mean(ALONE):.2f}"] if step else []
        lines.append(f"| {' | '.join([shown, *cells, loss_ratios(arm, records)])} |")
    return lines


def if_all(measure: str, records: Records) -> Scores | None:
    """Return the scores by a measure if all records have it."""
    return Scores.of(measure, records) if all(measure in record for record in records) else None


def loss_ratios(arm: str, records: Records) -> str:
    """Return the mean ratios of losses in the first and last epoch; "" if unguided."""
    own = [record for record in records if record["arm"] == arm and record.get("pull_first")]
    if not own:
        return ""
    first, last = (
        sum(record[name] for record in own) / len(own) for name in ("pull_first", "pull_last")
    )
    return f"{first:.2g} to {last:.2g}"


def describe_commands(records: Records) -> list[str]:
    """Return the exact commands of each arm's first seed. Other seeds differ in --seed."""
    lines = [
        "## Commands",
        "",
        "Each network with the first seed. The others have another `--seed`.",
        "",
    ]
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        first.setdefault((record["set"], record["arm"]), record)
    for (name, arm), record in first.items():
        lines += [f"{name}, {arm}:", "", *(f"    {command}" for command in record["commands"]), ""]
    return lines
