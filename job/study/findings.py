"""What a study's records say: whether a comparison means anything, and what beats what by more than the spread over seeds."""

import dataclasses
import statistics
from collections.abc import Collection, Iterable
from typing import Any

from job.study.form import ALONE, MGD, ORIGINAL, RANDOM, TEACHER, UNTRAINED

MEASURES = {"knn": "k-NN", "linear": "linear"}
AUC = "knn_auc"  # of the features' singular values: 0.5 if all are equal, 1 at full collapse
STEP = "step_seconds"  # median over the steps of a training
LEAST = 5.0  # points by which a condition is to hold
NAMES = {
    UNTRAINED: "the untrained student",
    ALONE: "the student alone",
    TEACHER: "the teacher",
    MGD: "MGD",
}
NAMES |= {RANDOM: "MGD with a random matching"}


@dataclasses.dataclass(frozen=True)
class Scores:
    """A set's accuracies in percent by one measure: {arm: one a seed}.

    among: names of the form's own students; with some, students must not reach the teacher.
    partial: arms of the set are missing.
    """

    measure: str
    by_arm: dict[str, list[float]]
    among: Collection[str] = ()
    partial: bool = False

    @classmethod
    def of(
        cls,
        measure: str,
        records: Iterable[dict[str, Any]],
        among: Collection[str] = (),
        partial: bool = False,
    ) -> "Scores":
        """The scores of a set's records."""
        found: dict[str, list[float]] = {}
        for record in sorted(records, key=lambda record: record["seed"]):
            found.setdefault(record["arm"], []).append(record[measure])
        shown = (MEASURES | {AUC: "AUC", STEP: "seconds a step"})[measure]
        return cls(shown, found, among, partial)

    def mean(self, arm: str) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.by_arm[arm])

    def spread(self, arm: str) -> float:
        """The standard deviation over seeds, of a sample of them; 0 where there is one, as of a teacher."""
        values = self.by_arm[arm]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def shown(self, arm: str, digits: int) -> str:
        """Return the mean, and with several seeds the spread: 66.7 ± 5.0."""
        spread = f" ± {self.spread(arm):.{digits}f}" if len(self.by_arm[arm]) > 1 else ""
        return f"{self.mean(arm):.{digits}f}{spread}"

    def lead(self, arm: str, other: str) -> float:
        """By how many points an arm's mean is above another's."""
        return self.mean(arm) - self.mean(other)

    def noise(self, arm: str, other: str) -> float:
        """The larger spread of the two: a lead that is no larger is none."""
        return max(self.spread(arm), self.spread(other))

    def beats(self, arm: str, other: str) -> bool:
        """Whether an arm's lead over another is larger than the spread over seeds."""
        return self.lead(arm, other) > self.noise(arm, other)

    def margin(self, arm: str, other: str) -> str:
        """Return an arm's lead over another and their larger spread: +2.0, spread 1.0."""
        return f"{self.lead(arm, other):+.1f}, spread {self.noise(arm, other):.1f}"

    def recovered(self, arm: str) -> float | None:
        """Return an arm's lead over the student alone in percent of the teacher's.

        None: the teacher's lead is under LEAST, so that a point would be many percent.
        """
        _, holds = self.condition(TEACHER, ALONE)
        return 100 * self.lead(arm, ALONE) / self.lead(TEACHER, ALONE) if holds else None

    @property
    def students(self) -> list[str]:
        """Return the names of the trained students, the best first."""
        trained = (arm for arm in self.by_arm if arm not in (TEACHER, UNTRAINED))
        return sorted(trained, key=self.mean, reverse=True)

    def beaten(self, arm: str) -> list[str]:
        """Return the names of the students that an arm beats, the best first."""
        return [other for other in self.students if self.beats(arm, other)]

    def ranking(self) -> list[str]:
        """Return lines: what the best student beats, and what beats MGD and MGD as published."""
        leader, *others = self.students
        beaten = self.beaten(leader)
        level = [arm for arm in others if arm not in beaten]
        text = f"{leader} leads{' the arms shown' if self.partial else ''}"
        text += f" ({self.shown(leader, 1)}) and beats {', '.join(beaten) or 'no student'}"
        text += f", but not {', '.join(level)}" if level else ""
        lines = [text]
        for rival in self.rivals:
            leads = [f"{arm} (by {self.margin(arm, rival)})" for arm in self.better(rival)]
            lines += [f"{rival} is beaten by {', '.join(leads) or 'no arm'}"]
        means = "" if self.mean_anything() else " (a condition fails, so this means nothing)"
        return [f"{self.measure}{means}: {line}" for line in lines]

    @property
    def rivals(self) -> list[str]:
        """Return the names of the arms that the form's own are compared with."""
        return [arm for arm in (MGD, ORIGINAL) if arm in self.by_arm]

    def better(self, rival: str) -> list[str]:
        """Return the form's arms, and those they are compared with, that beat a rival."""
        candidates = {*self.among, *self.rivals} - {rival}
        return [arm for arm in self.students if arm in candidates and self.beats(arm, rival)]

    def conditions(self) -> list[tuple[str, bool]]:
        """Return the conditions of a comparison, each in words and whether it holds."""
        found = [self.condition(ALONE, UNTRAINED), self.condition(TEACHER, ALONE)]
        return [*found, self.room()] if self.among else found

    def room(self) -> tuple[str, bool]:
        """Return in words whether no student reaches the teacher, and whether it holds."""
        best = self.students[0]
        holds = round(self.lead(TEACHER, best), 6) > 0
        means = f"{best} has {self.mean(best):.1f}, the teacher {self.mean(TEACHER):.1f}"
        subject = "no student" if holds else "a student"
        shown = " of the arms shown, which are not all," if self.partial and holds else ""
        return f"{subject}{shown} reaches the teacher ({means})", holds

    def condition(self, arm: str, other: str) -> tuple[str, bool]:
        """That an arm is above another by LEAST or more, in words and whether it holds."""
        lead = self.lead(arm, other)
        means = f"{self.mean(arm):.1f} against {self.mean(other):.1f}"
        return (
            f"{NAMES[arm]} above {NAMES[other]} by {lead:+.1f} points ({means}); expected {LEAST:g} or more",
            round(lead, 6) >= LEAST,
        )

    def mean_anything(self) -> bool:
        """Whether all conditions hold."""
        return all(holds for _, holds in self.conditions())

    def claims(self) -> list[tuple[str, bool]]:
        """The method's claim in parts, each in words and whether it holds: what helps is MGD, and of it the solved matching."""
        return [
            self.claim(MGD, ALONE, True),
            self.claim(RANDOM, ALONE, False),
            self.claim(MGD, RANDOM, True),
        ]

    def claim(self, arm: str, other: str, expected: bool) -> tuple[str, bool]:
        """That an arm beats another, or, where that is not `expected`, that it does not."""
        beats = self.beats(arm, other)
        verb = "beats" if beats else "does not beat"
        lead = (
            f"{self.lead(arm, other):+.1f} points, spread over seeds {self.noise(arm, other):.1f}"
        )
        return f"{NAMES[arm]} {verb} {NAMES[other]}: {lead}", beats is expected

    def change(self, arm: str, other: str) -> str:
        """Return in words whether a number of an arm, such as its AUC, differs from another's."""
        lead, noise = self.lead(arm, other), self.noise(arm, other)
        verb = "is level with" if abs(lead) <= noise else "is above" if lead > 0 else "is below"
        means = f"{self.mean(arm):.3f} against {self.mean(other):.3f}"
        return f"{self.measure} of {NAMES[arm]} {verb} that of {NAMES[other]}: {means}, spread over seeds {noise:.3f}"

    def verdict(self) -> str:
        """What follows, in a sentence."""
        if not self.mean_anything():
            return (
                f"{self.measure}: no comparison means anything here, as a condition does not hold"
            )
        shown = all(holds for _, holds in self.claims())
        return f"{self.measure}: the claim is {'shown' if shown else 'not shown'} here"
