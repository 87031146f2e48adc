"""Whether the training studies of a store hold what a run is to learn from, asked before anything is compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from mmfm_jax.data.store.format import SplitCounts
from mmfm_jax.data.store.studies import Studies
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment


def check_held(experiment: Experiment, store: Studies) -> None:
    """Raises UserError that names the inputs and labels of which no training study holds one, or only one class."""
    train, lacking = training_counts(store), []
    inputs = experiment.inputs
    lacking += [f"inputs.images.{role}" for role in inputs.images if not train.images.get(role)]
    lacking += [f"inputs.texts.{field}" for field in inputs.texts if not train.texts.get(field)]
    stats = store.stats
    missing = {name: column.missing for name, column in (stats.numbers | stats.categories).items()}
    lacking += [f"inputs.columns: {name}" for name in inputs.columns if missing.get(name, 0) >= train.studies]
    if lacking:
        raise UserError(
            f"{', '.join(lacking)}: none of the {train.studies} training studies of {store.url} holds one, so that "
            "nothing can be learnt of it; leave it out, or build the store with it (`mmfm inspect STORE`)"
        )
    for name, task in experiment.tasks.items():
        for field, label in task.needs().labels.items():
            classes = {value: n for value, n in train.labels.get(label, {}).items() if n}
            if len(classes) < 2:
                held = f"{', '.join(f'{n} are {value}' for value, n in classes.items()) or 'none has one'}"
                raise UserError(
                    f"tasks.{name}.{field}: the label {label} has to tell two classes apart, and of the "
                    f"{train.studies} training studies of {store.url} {held}; leave the task out, or add studies"
                )


def training_counts(store: Studies) -> SplitCounts:
    """How many training studies hold each part, over all stores of a mix, whatever their weights."""
    total, images, texts = 0, Counter[str](), Counter[str]()
    labels: dict[str, Counter[str]] = {}
    for one in store.stores:
        train = one.counts.get("train", SplitCounts())
        total += train.studies
        images.update(train.images)
        texts.update(train.texts)
        for label, classes in train.labels.items():
            labels.setdefault(label, Counter()).update(classes)
    return SplitCounts(
        studies=total, images=dict(images), texts=dict(texts), labels={n: dict(c) for n, c in labels.items()}
    )


def crowded(experiment: Experiment, store: Studies) -> Iterator[str]:
    """Where a batch takes more studies of a store than train, so that it holds some of them twice or more."""
    size, sources = experiment.train.batch_size, store.sources("train")
    total = sum(weight for weight, _ in sources)
    for name, (weight, rows) in zip(store.names, sources):
        taken = size * weight / total
        if taken <= len(rows):
            continue
        place = f"data.mix.{name}" if store.mixed else store.url
        of = f"{taken:.0f} of its {size} studies come" if store.mixed else f"its {size} studies come"
        yield (
            f"train.batch_size: {of} out of {len(rows)} training studies of {place}, so that a batch holds one of them "
            f"{taken / len(rows):.1f} times, and a contrastive task sets it against itself; make it "
            f"{int(len(rows) * total / weight)} or less"
        )
