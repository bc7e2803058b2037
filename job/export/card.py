"""The model card: a Markdown file with the front matter that hubs read.

Its figures are from the checkpoint, the records in the run's folder and the run of job.linear.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from job.checkpoints.foreign import Backbone
from job.checkpoints.seal import read_seal
from job.errors import RunError
from job.export import timm
from job.export.formats import ENDINGS, FORMATS
from job.export.network import Network
from job.export.options import command, differing
from job.export.origin import base_name
from job.export.records import Accuracy, Run, knn_accuracy, linear_accuracies, read_run
from job.text import printable

ENDING = ".md"
NOT_RECORDED = "not recorded"
# The import that a statement with a name needs before it.
IMPORTS = {
    "torch": "import torch",
    "torchvision": "import torchvision",
    "timm": "import timm",
    "safetensors": "import safetensors.torch",
    "onnxruntime": "import onnxruntime",
    "cfg": "from detectron2.config import get_cfg; cfg = get_cfg()",
}


def card_path(output: str) -> str:
    """Return the path of the card of an exported file, and of its other formats."""
    return os.path.splitext(output)[0] + ENDING


def write_card(
    network: Network,
    weights: Backbone,
    origin: Mapping[str, Any],
    checkpoint: str,
    output: str,
    form: str,
) -> bytes:
    """Return the card of a network. It is the same for each format, if the endings are usual.

    RunError: the records in the checkpoint's folder cannot be read.
    """
    try:
        run = read_run(checkpoint, weights.meta["config"])
        accuracies = [knn_accuracy(run, weights), *linear_accuracies(checkpoint, weights)]
    except RunError as error:
        raise RunError(f"model card: {error}. --no-card leaves it out", error.code) from None
    name = printable(os.path.splitext(os.path.basename(output))[0])
    parameters = sum(value.numel() for value in network.body.parameters()) / 1e6
    shape = f"images (B, 3, H, W) to features (B, {network.channels})"
    sections = {
        "Training": training(weights, run),
        "Accuracy": map(describe, accuracies),
        "Input": pixels(network),
        "Loading": loading(network, output, form),
        "Provenance": provenance(weights, origin, checkpoint),
        "Licence": licence(weights),
    }
    lines = ["---", front_matter(network, weights, accuracies, name) + "---", "", f"# {name}", ""]
    lines += [f"{code(network.arch)} without its head: {shape}."]
    lines += [f"It has {parameters:.1f} million parameters."]
    for title, section in sections.items():
        lines += ["", f"## {title}", "", *section]
    return ("\n".join(lines) + "\n").encode()


def front_matter(
    network: Network,
    weights: Backbone,
    accuracies: list[Accuracy],
    name: str,
) -> str:
    """Return the front matter as YAML."""
    config = weights.meta["config"]
    tags = ["self-supervised-learning"] if is_training(config) else []
    tags += [name for name in framework(config) if name != "none"]
    tags += ["knowledge-distillation", *distillers(config)] if config.get("teacher") else []
    matter: dict[str, Any] = {"license": "unknown", "pipeline_tag": "image-feature-extraction"}
    matter |= {"library_name": "timm"} if network.timm else {}
    matter |= {"tags": tags} if tags else {}
    results = [result(accuracy) for accuracy in accuracies if accuracy.value is not None]
    matter |= {"model-index": [{"name": name, "results": results}]} if results else {}
    return yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)


def result(accuracy: Accuracy) -> dict[str, Any]:
    """Return an accuracy in the hubs' form."""
    assert accuracy.value is not None
    data = printable(accuracy.data) or "unknown"
    metric = {"type": "accuracy", "value": round(accuracy.value, 2), "name": f"{accuracy.name} (%)"}
    return {
        "task": {"type": "image-classification"},
        "dataset": {"type": data, "name": data},
        "metrics": [metric],
    }


def training(weights: Backbone, run: Run) -> Iterator[str]:
    """Yield the lines about the images and the method."""
    config, facts = weights.meta["config"], weights.run
    if not is_training(config):
        yield "The checkpoint has no record of the training."
        return
    yield f"- Images: {images(config, facts, run)}"
    yield f"- Framework: {', '.join(map(code, framework(config)))}"
    if config.get("teacher"):
        arch = run.teacher.get("arch") or config.get("teacher_arch")
        network = code(arch) if arch else "a network"
        digest = facts.get("teacher") or NOT_RECORDED
        yield f"- Distillers: {', '.join(map(code, distillers(config)))}"
        yield f"- Teacher: {network} from {file_name(config['teacher'])}, digest {code(digest)}"
    else:
        yield "- Teacher: none"
    step = f", and {facts['step']} steps of the next" if facts.get("step") else ""
    done = weights.meta["epoch"] if weights.meta["epoch"] is not None else NOT_RECORDED
    yield f"- Epochs: {done} of {shown(config, 'epochs')}{step}"
    count = facts.get("workers")
    workers = f", over {count} worker{'s' * (count > 1)}" if count else ""
    yield f"- Batch: {shown(config, 'batch_size')} images{workers}"
    yield f"- Seed: {shown(config, 'seed')}"
    yield f"- Side of the views: {shown(config, 'image_size')} pixels"
    setting = [run.start[name] for name in ("device", "versions") if run.start.get(name)]
    yield f"- Device and versions: {'; '.join(map(code, setting)) or NOT_RECORDED}"
    yield ""
    yield "Options that differ from the defaults:"
    yield ""
    for name, (value, default) in differing(config).items():
        yield f"    {printable(f'{name}: {value} (default: {default})')}"
    if line := command(config, facts.get("workers", 1)):
        yield ""
        yield "A command with these options, with the last component of each path:"
        yield ""
        yield f"    {printable(line)}"


def is_training(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's options are `job.train`'s."""
    return bool(config) and "pretrained" not in config


def images(config: Mapping[str, Any], facts: Mapping[str, Any], run: Run) -> str:
    """Return the images of a run's training, their number, and how many have a label."""
    folders = [config.get("data", ""), *listed(config.get("more_data", []))]
    count, labelled = facts.get("images"), run.start.get("labelled", 0 if run.unlabelled else None)
    if labelled is None:
        labels = f"labels: {NOT_RECORDED}"
    else:
        with_label = "all" if labelled == count else labelled or "none"
        labels = f"{with_label} with a label (the training uses no labels)"
    number = f"{count:,} images" if count is not None else f"number of images: {NOT_RECORDED}"
    return f"{', '.join(map(file_name, folders))}; {number}; {labels}"


def framework(config: Mapping[str, Any]) -> list[str]:
    """Return the name of a run's framework, or [] for another program's checkpoint."""
    return [str(config.get("framework", "moco"))] if is_training(config) else []


def distillers(config: Mapping[str, Any]) -> list[str]:
    """Return the names of a run's distillers. Earlier versions had only one."""
    return [str(name) for name in listed(config.get("distill", ["mgd"]))]


def listed(value: Any) -> list[Any]:
    """Return an option's values. Other programs' files can have one value instead of a list."""
    return value if isinstance(value, list) else [value]


def describe(accuracy: Accuracy) -> str:
    """Return the line of an accuracy."""
    if accuracy.value is None:
        return f"- {accuracy.name}: not measured ({printable(accuracy.about)})"
    on = f" on {code(accuracy.data)}" if accuracy.data else ""
    about = f"{accuracy.about}; {printable(accuracy.source)}"
    return f"- {accuracy.name}: **{accuracy.value:.2f} %**{on} ({about})"


def pixels(network: Network) -> Iterator[str]:
    """Yield the lines about the network's input."""
    side = network.size
    values = network.mean, network.std
    mean, std = (", ".join(f"{value:g}" for value in each) for each in values)
    yield "- Pixels: RGB from 0 to 1, minus the mean, divided by the standard deviation"
    yield f"- Mean: {mean}"
    yield f"- Standard deviation: {std}"
    yield f"- Size: {side} x {side} pixels" + (" only" if network.fixed_size else ", and others")
    yield (
        f"- Evaluation: short side resized to {round(side * 256 / 224)} pixels, bilinear with "
        f"antialiasing, centre crop of {side} x {side}"
    )


def loading(network: Network, output: str, form: str) -> Iterator[str]:
    """Yield how to load each format. Each file has the name of `output`, with its own ending."""
    stem, ending = os.path.splitext(os.path.basename(output))
    endings = {name: end for end, name in reversed(ENDINGS.items())} | {form: ending}
    for form_name, each in FORMATS.items():
        if form_name in network.refused:
            yield f"- {form_name}: not possible, {network.refused[form_name]}"
            continue
        name = stem + endings[form_name]
        yield f"- {form_name}, {code(name)}:"
        yield ""
        yield from with_imports(each.load(network, name))
        yield ""
        if each.companions(network) and name.endswith(timm.ENDING):
            yield f"  or, in a folder with {code(name)} and {code(timm.CONFIG)}:"
            yield ""
            yield from with_imports(timm.FROM_FOLDER)
            yield ""


def with_imports(statement: str) -> Iterator[str]:
    """Yield a statement as a block of code, after its imports."""
    for name, line in IMPORTS.items():
        if re.search(rf"(?<![.\w']){name}\.", statement):
            yield f"      {line}"
    yield f"      {statement}"


def provenance(weights: Backbone, origin: Mapping[str, Any], checkpoint: str) -> Iterator[str]:
    """Yield the file of the weights, its digests and the program that exported them."""
    seal = read_seal(checkpoint)
    yield f"- Exported by: {code(origin['program'])}"
    yield f"- Source: {code(origin['source'])}, SHA-256 {code(origin['sha256'])}"
    yield f"- Seal of the source: {code(seal) if seal else 'none, another program wrote it'}"
    yield f"- Digest of the weights, as runs log a teacher's: {code(weights.digest)}"


def licence(weights: Backbone) -> Iterator[str]:
    """Yield the note on the licence."""
    teacher = weights.meta["config"].get("teacher")
    also = f" and of the teacher {file_name(teacher)}" if teacher else ""
    known = is_training(weights.meta["config"])
    of = f"the training images{also}" if known else "the training images and of any teacher"
    yield f"The licence of these weights follows from the licences of {of}."
    yield "The exporting program does not set it. Read them, and replace `license: unknown` above."


def file_name(path: str) -> str:
    """Return the last component of a path as code."""
    return code(base_name(str(path)))


def shown(config: Mapping[str, Any], name: str) -> str:
    """Return an option's value for people."""
    return printable(str(config.get(name, NOT_RECORDED)))


def code(text: Any) -> str:
    """Return any text as code within a line of Markdown."""
    text = printable(str(text))
    runs = [len(run) for run in re.findall("`+", text)]
    fence = "`" * (max(runs, default=0) + 1)
    space = " " if runs or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"
