"""The tables of what runs were probed for: robustness, calibration, retention, the inside, other data."""

from __future__ import annotations

from peftree.report import text
from peftree.report.data import Row, Task
from peftree.report.probes import Interpretability, Robustness
from peftree.report.table import Cell, Head, Table
from peftree.report.tables import NOTHING, number, row_table


def robustness(task: Task, name: str) -> Table | None:
    """Scores on damaged input by severity."""
    sign = 1.0 if task.higher_is_better else -1.0
    depth = max((len(found.severities) for found in (_damage(row, name) for row in task.scored) if found), default=0)

    def fill(row: Row) -> list[Cell] | None:
        found = _damage(row, name)
        if found is None:
            return None
        scores = [number(score, task.decimals) for score in found.severities]
        drop = sign * (found.clean - sum(found.severities) / len(found.severities))
        lost = {kind: sign * (found.clean - sum(s) / len(s)) for kind, s in found.kinds.items() if s}
        worst = max(lost, key=lambda kind: lost[kind], default="")
        last = Cell(text.clean(worst), f"loses {text.score(lost[worst], task.decimals)}", worst) if worst else NOTHING
        padding = [NOTHING] * (depth - len(scores))
        return [number(found.clean, task.decimals), *scores, *padding, number(drop, task.decimals, signed=True), last]

    heads = [
        Head("Clean", "The score on the same items, undamaged."),
        *(Head(f"Severity {level}") for level in range(1, depth + 1)),
        Head("Mean loss", "Clean minus the mean over severities, positive where damage harms."),
        Head("Worst kind", "The kind of damage that harms most.", numeric=False),
    ]
    title = {"noise": "Robustness to text noise", "corruptions": "Robustness to image corruptions"}[name]
    return row_table(
        task, name, title, f"{task.metric}; means over the kinds of damage and the seeds.", heads, fill, name
    )


def _damage(row: Row, name: str) -> Robustness | None:
    return row.probes.noise if name == "noise" else row.probes.corruptions


def calibration(task: Task) -> Table | None:
    """How well probabilities fit what happens."""

    def fill(row: Row) -> list[Cell] | None:
        c = row.probes.calibration
        if c is None:
            return None
        over = None if c.confidence is None or c.accuracy is None else c.confidence - c.accuracy
        values = [number(value) for value in (c.ece, c.brier, c.nll, c.accuracy, c.confidence)]
        return [*values, number(over, signed=True)]

    heads = [
        Head("ECE", "Expected calibration error; lower is better."),
        Head("Brier", "Mean squared distance from the right answer; lower is better."),
        Head("NLL", "Negative log-likelihood of the right answer, nats; lower is better."),
        Head("Accuracy"),
        Head("Confidence", "Mean probability of the answer given."),
        Head("Overconfident by", "Confidence minus accuracy."),
    ]
    return row_table(task, "calibration", "Calibration", "Means over the seeds.", heads, fill, "calibration")


def retention(task: Task) -> Table | None:
    """What is kept of general abilities."""

    def fill(row: Row) -> list[Cell] | None:
        r = row.probes.retention
        if r is None:
            return None
        ends = "" if r.low is None or r.high is None else f"[{r.low:+.3f}, {r.high:+.3f}]".replace("-", "\u2212")
        change = number(r.change, 3, signed=True, sub=ends)
        return [Cell(text.clean(r.measure)), number(r.before), number(r.after), change]

    heads = [
        Head("Measure", "Perplexity: lower is better; accuracy: higher is better.", numeric=False),
        Head("Before", "With the adapter off."),
        Head("After", "With the adapter on."),
        Head(
            "Change",
            "Mean paired change over the items (for perplexity of the negative log-likelihood) with its "
            "95 % interval over items, averaged over the seeds.",
        ),
    ]
    return row_table(task, "retention", "Retention on general data", "Means over the seeds.", heads, fill, "retention")


def interpretability(task: Task) -> Table | None:
    """What changed inside."""

    def fill(row: Row) -> list[Cell] | None:
        found = row.probes.interpretability
        if found is None:
            return None
        ranks = [number(v, 4) for v in (found.relative_update,)] + [
            number(v, 1) for v in (found.effective_rank, found.stable_rank)
        ]
        return [*ranks, *_inside(found, task)]

    heads = [
        Head("Relative update", "|W' - W| / |W|, median over matrices."),
        Head("Effective rank", "exp(H) of the update's normalised singular values, median."),
        Head("Stable rank", "Squared Frobenius over squared spectral norm of the update, median."),
        Head(
            "Intruders",
            "Singular vectors of W' whose largest cosine with any of W's is below the threshold, mean number a matrix.",
            numeric=False,
        ),
        Head("CKA, lowest", "Lowest likeness of a layer's states, adapter on and off; 1 is unchanged."),
        Head("Knock-out", "The layer without whose deltas the score changes most, and by how much.", numeric=False),
        Head(
            "Routing", "Share of tokens of the busiest expert, and entropy over that of an even spread.", numeric=False
        ),
    ]
    caption = "Means over the seeds. A method that changes no weight matrix has no update."
    return row_table(task, "inside", "Inside the model", caption, heads, fill, "interpretability")


def _inside(found: Interpretability, task: Task) -> list[Cell]:
    intruders = ", ".join(f"{text.clean(eps)}: {some:.3g}" for eps, some in sorted(found.intruders.items()))
    lowest = min(found.cka) if found.cka else None
    where = f"layer {found.cka.index(lowest) + 1}" if found.cka and lowest is not None else ""
    layer = max(found.knockout, key=lambda name: abs(found.knockout[name]), default="")
    knock = NOTHING
    if layer:
        knock = Cell(text.clean(layer), text.score(found.knockout[layer], task.decimals, signed=True), layer)
    routing = NOTHING
    if found.routing.load:
        spread = "" if found.routing.entropy is None else f"entropy {found.routing.entropy:.2f}"
        routing = Cell(text.percent(max(found.routing.load)), spread, max(found.routing.load))
    return [Cell(intruders or text.NONE), number(lowest, 3, sub=where), knock, routing]


def shift(task: Task) -> Table | None:
    """Scores on other test sets."""
    names = list(dict.fromkeys(one.name for row in task.scored for one in row.shifted))

    def fill(row: Row) -> list[Cell] | None:
        by_name = {one.name: one for one in row.shifted}
        if not by_name:
            return None
        cells = [number(row.score.value if row.score else None, task.decimals)]
        for name in names:
            one = by_name.get(name)
            if one is None:
                cells += [NOTHING, NOTHING]
                continue
            cells.append(number(one.score.value, task.decimals, sub=text.interval(one.score, task.decimals)))
            gap = one.difference
            ends = text.interval(gap, task.decimals, signed=True) if gap else ""
            cells.append(number(gap.value if gap else None, task.decimals, signed=True, sub=ends))
        return cells

    heads = [Head("Own test set")]
    for name in names:
        heads += [
            Head(name, "Score with its 95 % interval.", own=True),
            Head("against full", f"Paired difference from full fine-tuning on {name}.", own=True),
        ]
    return row_table(
        task,
        "shift",
        "Other test sets",
        f"{task.metric}; trained as above, scored on data from elsewhere.",
        heads,
        fill,
    )


def sequence(task: Task) -> Table | None:
    """A sequence of tasks, trained one after another."""
    stages = next((row.stages for row in task.scored if row.stages), None)
    if stages is None:
        return None

    def fill(row: Row) -> list[Cell] | None:
        s = row.stages
        if s is None or s.tasks != stages.tasks:
            return None
        forward = (
            Cell("not measured")
            if s.transfer.forward is None
            else number(s.transfer.forward, task.decimals, signed=True)
        )
        cells = [
            number(s.transfer.final, task.decimals),
            number(s.transfer.backward, task.decimals, signed=True),
            forward,
        ]
        own = s.scores[-len(s.tasks) :]
        for index in range(len(s.tasks)):
            after = f"own stage {text.score(own[index][index], task.decimals)}"
            cells.append(number(own[-1][index], task.decimals, sub=after))
        return cells

    heads = [
        Head("Mean at the end", "Mean score over all tasks after the last stage."),
        Head(
            "Backward transfer", "Mean change of earlier tasks from their own stage to the end; negative is forgetting."
        ),
        Head("Forward transfer", "Mean gain of later tasks before their own stage over no training at all."),
        *(Head(name, "Score after the last stage, and after the task's own.", own=True) for name in stages.tasks),
    ]
    return row_table(
        task,
        "sequence",
        "A sequence of tasks",
        f"{task.metric}; trained on {text.join(list(stages.tasks))} in turn.",
        heads,
        fill,
    )


def metrics(task: Task) -> Table | None:
    """Further metrics of the test set."""
    names = list(dict.fromkeys(name for row in task.scored for name in row.values if name != task.metric))

    def fill(row: Row) -> list[Cell] | None:
        return [number(row.values.get(name)) for name in names] if names and row.values else None

    return row_table(
        task, "values", "Further metrics", "On the test set; means over the seeds.", [Head(n) for n in names], fill
    )
