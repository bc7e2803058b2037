"""A study's results as text: conditions, verdicts, a table for each question, and the commands that gave them."""

from typing import Any

from job.study.data import CHOOSE, TEST
from job.study.findings import AUC, MEASURES, STEP, Scores
from job.study.form import ALONE, MGD, ORIGINAL, RANDOM, TEACHER, UNTRAINED
from job.study.plan import Plan, Question, words

Records = list[dict[str, Any]]
TUNED = "Whoever chooses settings by these figures tunes on them. `split: choose` avoids it."
CHOSEN = "**These figures choose settings and are not results**: "
CHOSEN += "the images were held out of `train`, and none is from `val`."
SPLITS = {TEST: TUNED, CHOOSE: CHOSEN}
ONE_SEED = "**One seed has no deviation, so every lead counts here**, as small as it may be. "


def write(plan: Plan, records: Records, pictures: dict[str, str]) -> str:
    """Return the report, in Markdown.

    records: one of every seed of the arms to report. pictures: {set: a picture's file name}.
    """
    hours = (
        sum(record["seconds"] for record in records) / 3600
    )  # of commands, of which several may go at once
    machines = "; on ".join(sorted({record["on"] for record in records}))
    seeds = ", ".join(map(str, plan.seeds))
    lines = [
        f"# Results of {plan.about}",
        "",
        f"{len(records)} networks, seeds {seeds}; {hours:.1f} hours of commands, {plan.at_once} at a time; "
        f"finished {max(record['measured'] for record in records)} on {machines}.",
        *describe_missing(plan, records),
        "Accuracies are top-1 in percent on held-out images, means over seeds ± their standard deviation. A lead counts where it "
        "is larger than the larger deviation of the two. "
        f"{ONE_SEED if len(plan.seeds) == 1 else ''}{SPLITS[plan.split]} "
        "Of the lead: the lead over the student alone in percent of the teacher's. "
        "AUC: the area under the cumulative "
        "singular values of the normalised features, 0.5 if all are equal, 1 at full collapse. "
        "Step time: the median over a training's steps, over that of the student "
        f"alone{together(plan)}. The last column has the "
        "distillation loss over the framework's, or over its range, in the first and in the last epoch.",
    ]
    lines += ["", describe_arms(plan), *describe_better(plan, records)]
    for name, picture in pictures.items():
        own = [record for record in records if record["set"] == name]
        lines += ["", *describe_set(plan, name, own)]
        lines += ["", f"![{name}: accuracies of each seed and their means]({picture})"]
    return "\n".join([*lines, "", *describe_commands(records)]) + "\n"


def complete(plan: Plan, records: Records) -> Records:
    """Return the records of the arms that have one of every seed.

    Only of sets in which the arms that a verdict needs are among them.
    """
    found = {record["unit"]: record for record in records}
    arms: dict[tuple[str, str], bool] = {}
    for unit in plan.units:
        arms[unit.set, unit.arm] = arms.get((unit.set, unit.arm), True) and unit.name in found
    basis = (TEACHER, UNTRAINED, ALONE, MGD, RANDOM)
    sets = [name for name in plan.questions if all(arms[name, arm] for arm in basis)]
    shown = (unit for unit in plan.units if unit.set in sets and arms[unit.set, unit.arm])
    return [found[unit.name] for unit in shown]


def describe_missing(plan: Plan, records: Records) -> list[str]:
    """Return a paragraph that names the arms that `records` lacks by set, if there are any.

    Some of their networks may be measured, but not all seeds of their arm.
    """
    found = {record["unit"] for record in records}
    if not (missing := [unit for unit in plan.units if unit.name not in found]):
        return []
    shown = []
    for name in dict.fromkeys(unit.set for unit in missing):
        whole = not any(record["set"] == name for record in records)
        arms = dict.fromkeys(unit.arm for unit in missing if unit.set == name)
        shown.append(f"of {name} {'all' if whole else ', '.join(arms)}")
    reason = "an arm is shown when all its seeds are measured"
    text = f"{len(missing)} of {len(plan.units)} networks are not shown ({reason})"
    return ["", f"**Incomplete**: {text}: {'; '.join(shown)}.", ""]


def together(plan: Plan) -> str:
    """Return what to know of times of networks that train at once."""
    if plan.at_once == 1:
        return ""
    return f"; {plan.at_once} networks train at a time and slow each other down unevenly"


def describe_arms(plan: Plan) -> str:
    """Return which arms are MGD's, with their options in addition to those of the student alone."""
    trained = {unit.arm: unit.train for unit in reversed(plan.units)}
    kinds = {MGD: "MGD", RANDOM: "MGD with a random matching", ORIGINAL: "MGD as published"}
    texts = []
    for arm, kind in kinds.items():
        if arm in trained:
            own = own_options(trained[arm], trained[ALONE])
            texts.append(f"`{arm}` is {kind}" + (f", by `{own}`" if own else ""))
    return f"{'; '.join(texts)}."


def own_options(train: dict[str, Any], alone: dict[str, Any]) -> str:
    """Return the options that differ from the student alone's, as flags, without a share of 0."""
    own = {name: value for name, value in train.items() if alone.get(name) != value}
    if own.get("loss_share") == 0:
        del own["loss_share"]
    return " ".join(words(own))


def scores_of(plan: Plan, name: str, records: Records) -> list[Scores]:
    """Return a set's scores by each measure."""
    shown = {record["arm"] for record in records}
    partial = any(unit.arm not in shown for unit in plan.units if unit.set == name)
    return [Scores.of(measure, records, plan.arms, partial) for measure in MEASURES]


def describe_better(plan: Plan, records: Records) -> list[str]:
    """Return a paragraph of the arms that beat MGD, and MGD as published, on all sets shown."""
    sets = list(dict.fromkeys(record["set"] for record in records))
    if not plan.arms or len(sets) < 2:
        return []
    lines = [""]
    by_set = []
    for name in sets:
        by_set.append(scores_of(plan, name, [each for each in records if each["set"] == name]))
    for scores in zip(*by_set, strict=True):
        named = zip(sets, scores, strict=True)
        failing = [name for name, each in named if not each.mean_anything()]
        means = f" (a condition fails on {', '.join(failing)})" if failing else ""
        rivals = [arm for arm in scores[0].rivals if all(arm in each.rivals for each in scores)]
        for rival in rivals:
            first, *rest = (each.better(rival) for each in scores)
            arms = [arm for arm in first if all(arm in others for others in rest)]
            text = f"{rival} is beaten on {', '.join(sets)} by {', '.join(arms) or 'no arm'}"
            lines.append(f"- {scores[0].measure}{means}: {text}.")
    return lines


def describe_set(plan: Plan, name: str, records: Records) -> list[str]:
    """Return conditions and verdicts of a set, by measure, then its tables."""
    questions, own = plan.questions[name], plan.arms
    scores = scores_of(plan, name, records)
    lines = [f"## {name}", ""]
    if own:
        lines += [*(f"- {text}." for found in scores for text in found.ranking()), ""]
    for found in scores:
        lines += [f"- **{found.verdict()}.**"]
        lines += [
            f"  - condition {'holds' if holds else 'FAILS'}: {text}"
            for text, holds in found.conditions()
        ]
        lines += [f"  - {text}" for text, _ in found.claims()]
    lines += [f"- {text}" for text in changes(records)]
    arms = {arm: arm for arm in (UNTRAINED, ALONE, TEACHER, MGD, *controls(records, questions))}
    lines += ["", *table("network", arms, scores, records)]
    for question in questions:
        known = scores[0].by_arm
        answers = {answer: arm for answer, arm in question.answers.items() if arm in known}
        if answers:
            lines += ["", f"**{question.asks}**", ""]
            lines += table(question.name, answers, scores, records)
    return lines


def changes(records: Records) -> list[str]:
    """Whether MGD and the random matching change the AUC, if all records have it."""
    if not all(AUC in record for record in records):
        return []
    scores = Scores.of(AUC, records)
    return [
        scores.change(*pair)
        for pair in ((ALONE, UNTRAINED), (MGD, ALONE), (RANDOM, ALONE), (MGD, RANDOM))
    ]


def controls(records: Records, questions: list[Question]) -> list[str]:
    """The arms that are no question's alone."""
    asked = {f"{question.name} {answer}" for question in questions for answer in question.answers}
    return [
        arm
        for arm in dict.fromkeys(record["arm"] for record in records)
        if arm not in asked | {UNTRAINED, ALONE, TEACHER, MGD}
    ]


def table(title: str, arms: dict[str, str], scores: list[Scores], records: Records) -> list[str]:
    """A table of arms. arms: {what a row is called: the arm}."""
    auc, step = (if_all(key, records) for key in (AUC, STEP))
    head = [
        title,
        *(found.measure for found in scores),
        *(f"{found.measure} over alone" for found in scores),
        *(f"{found.measure}, % of the lead" for found in scores),
        *(["AUC"] if auc else []),
        *(["step time over alone"] if step else []),
        "distillation / framework's",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for shown, arm in arms.items():
        cells = [found.shown(arm, 1) for found in scores]
        cells += ["" if arm == ALONE else f"{found.lead(arm, ALONE):+.1f}" for found in scores]
        parts = [None if arm in (ALONE, TEACHER) else found.recovered(arm) for found in scores]
        cells += ["" if part is None else f"{part:.0f}" for part in parts]
        cells += [auc.shown(arm, 3)] if auc else []
        cells += [f"{step.mean(arm) / step.mean(ALONE):.2f}"] if step else []
        lines.append(f"| {' | '.join([shown, *cells, pull(arm, records)])} |")
    return lines


def if_all(measure: str, records: Records) -> Scores | None:
    """Return the scores by a measure if all records have it."""
    return Scores.of(measure, records) if all(measure in record for record in records) else None


def pull(arm: str, records: Records) -> str:
    """The distillation loss over the framework's in the first and the last epoch, of an arm that has a teacher."""
    own = [record for record in records if record["arm"] == arm and record.get("pull_first")]
    if not own:
        return ""
    first, last = (
        sum(record[name] for record in own) / len(own) for name in ("pull_first", "pull_last")
    )
    return f"{first:.2g} to {last:.2g}"


def describe_commands(records: Records) -> list[str]:
    """The exact commands of the first seed of every arm; others have another --seed."""
    lines = [
        "## Commands",
        "",
        "Of each network with the first seed; the others have another `--seed`.",
        "",
    ]
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        first.setdefault((record["set"], record["arm"]), record)
    for (name, arm), record in first.items():
        lines += [f"{name}, {arm}:", "", *(f"    {command}" for command in record["commands"]), ""]
    return lines
