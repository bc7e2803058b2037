"""Compare runs in one self-contained HTML file, and save its pictures as PNG files:

mgd-report RUN... [--out FILE]        RUN: a run's folder, a folder that holds runs, or a SLURM job's log
"""

import argparse
import base64
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib import rc_context

from job.cli import Parser
from job.declare import expand
from job.errors import RunError
from job.files import write_whole
from job.show.read.ends import reported
from job.show.read.runs import Shown, find_runs
from job.show.report import curves, matching, tables, timing
from job.show.report.style import STYLE, Picture
from job.text import printable

CURVES = {
    "training": [curves.loss, curves.parts, curves.accuracy, curves.neighbours, curves.rate],
    "matching": [matching.stability, matching.cost],
    "collapse": [curves.collapse],
    "time": [timing.breakdown, timing.speed],
}


def main(argv: list[str] | None = None) -> None:
    """Run `job.show.report` on the command line's options."""
    with reported():
        parser = Parser(
            prog="mgd-report",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "runs",
            metavar="RUN",
            nargs="+",
            type=expand,
            help="a run's folder, a folder that holds runs (such as an array's), or a job's log",
        )
        parser.add_argument(
            "--out",
            metavar="FILE",
            type=expand,
            default="report.html",
            help="default: report.html; the pictures are saved next to it",
        )
        parser.add_argument(
            "--data",
            metavar="DIR",
            type=expand,
            action="append",
            default=[],
            help="path of the runs' images on this machine; can be repeated",
        )
        parser.add_argument(
            "--teacher",
            metavar="FILE",
            type=expand,
            default="",
            help="path of the runs' teacher on this machine",
        )
        parser.add_argument(
            "--no-features",
            action="store_true",
            help="omit the pictures that need networks and images, and more time",
        )
        given = parser.parse_args(argv)
        out = Path(given.out)
        if out.is_dir() or out.suffix not in (".html", ".htm"):
            raise RunError(
                f"--out {out}: expected a file such as {out / 'report.html' if out.is_dir() else 'report.html'}"
            )
        runs = find_runs(given.runs)
        html, pictures = render(
            runs, out, None if given.no_features else (given.data, given.teacher)
        )
        save(out, html, pictures)
        number = f"{len(runs)} run{'s' * (len(runs) > 1)}"
        print(
            f"wrote {out}: {len(html) / 1e6:.1f} MB, {number}; {len(pictures)} pictures in {beside(out)}"
        )


def render(
    runs: Sequence[Shown], out: Path, elsewhere: tuple[list[str], str] | None
) -> tuple[bytes, list[Picture]]:
    """Return the report's HTML and its pictures.

    elsewhere: paths of data and teacher, empty: those of the runs' options. None: no features.
    """
    now = time.time()
    trained = [run for run in runs if run.history.kind == "train"]
    classified = [run for run in runs if run.history.kind == "linear"]
    with rc_context(STYLE):
        sections = {
            name: [picture for draw in some if (picture := draw(trained))]
            for name, some in CURVES.items()
        }
        sections["linear"] = [picture for draw in (curves.linear,) if (picture := draw(classified))]
        notes = []
        if elsewhere and trained:
            from job.show.report.images import look_inside  # it takes seconds to import

            seen = look_inside(trained, *elsewhere)
            sections |= {
                "maps": seen.maps,
                "neighbours": seen.neighbours,
                "embedding": seen.embeddings,
            }
            notes = seen.notes
    template = jinja2.Environment(
        autoescape=True,
        finalize=cleaned,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template.filters["data_uri"] = lambda picture: (
        "data:image/png;base64," + base64.b64encode(picture.png).decode()
    )
    html = template.from_string(
        (resources.files("job.show.report") / "report.html").read_text()
    ).render(
        runs=runs,
        made=time.strftime("%Y-%m-%d %H:%M", time.localtime(now)),
        overview=tables.overview(runs),
        sections=sections,
        notes=notes,
        features=bool(elsewhere and trained),
        results=tables.linear_results(runs),
        differing=[
            table
            for some in (trained, classified)
            if (table := tables.options_of(some, differing=True))
        ],
        options=[
            table
            for some in (trained, classified)
            if (table := tables.options_of(some, differing=False))
        ],
        checkpoints=tables.checkpoints(runs, out.parent, now),
        warnings=tables.warnings(runs),
    )
    return html.encode(errors="backslashreplace"), [
        picture for some in sections.values() for picture in some
    ]


def cleaned(value: object) -> object:
    """Return a value for the page. Markup is from the page's macros, whose values are cleaned."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def beside(out: Path) -> Path:
    """Return the folder of a report's pictures."""
    return out.with_name(f"{out.stem}-pictures")


def save(out: Path, html: bytes, pictures: Sequence[Picture]) -> None:
    """Write a report, its pictures first.

    RunError: a file cannot be written.
    """
    try:
        beside(out).mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            write_whole(str(beside(out) / f"{picture.name}.png"), picture.png)
        write_whole(str(out), html)
    except OSError as error:
        raise RunError(
            f"cannot write {error.filename or out}: {error.strerror or error}. Choose another --out",
            code=1,
        ) from None
