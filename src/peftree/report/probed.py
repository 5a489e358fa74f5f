"""The tables of what runs were probed for, and of other data."""

from __future__ import annotations

from collections.abc import Sequence

from peftree import text
from peftree.evaluate.subject import UNMEASURED, Unmeasured
from peftree.probes import Scale, Sheet, probes
from peftree.report.data import Row, Task
from peftree.report.tables import measured, row_table
from peftree.table import Cell, Head, Table, number


def probed(task: Task) -> list[Table | None]:
    """The table of each probe."""
    scale = Scale(task.decimals, 1.0 if task.higher_is_better else -1.0)

    def table(name: str, sheet: Sheet) -> Table | None:
        def fill(row: Row) -> Sequence[Cell] | None:
            found = row.probes.get(name)
            return None if found is None or isinstance(found, Unmeasured) else sheet.fill(found, scale)

        caption = sheet.caption.format(metric=task.metric)
        return row_table(task, sheet.anchor or name, sheet.title, caption, sheet.heads, fill, name)

    return [table(name, probe.sheet) for name, probe in probes().items()]


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
            cells.append(measured(one.score if one else None, task.decimals))
            cells.append(measured(one.difference if one else None, task.decimals, signed=True))
        return cells

    heads = [Head("Own test set")]
    for name in names:
        heads += [
            Head(name, "Score with its 95 % interval.", own=True),
            Head("against full", f"Paired difference from full fine-tuning on {name}.", own=True),
        ]
    caption = f"{task.metric}; trained as above, scored on data from elsewhere."
    return row_table(task, "shift", "Other test sets", caption, heads, fill)


def sequence(task: Task) -> Table | None:
    """A sequence of tasks, trained one after another."""
    stages = next((row.stages for row in task.scored if row.stages), None)
    if stages is None:
        return None

    def fill(row: Row) -> list[Cell] | None:
        s = row.stages
        if s is None or s.tasks != stages.tasks:
            return None
        final, backward, forward = s.transfer.final, s.transfer.backward, s.transfer.forward
        cells = [number(final, task.decimals), number(backward, task.decimals, signed=True)]
        cells += [Cell(UNMEASURED) if forward is None else number(forward, task.decimals, signed=True)]
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
    caption = f"{task.metric}; trained on {text.join(list(stages.tasks))} in turn."
    return row_table(task, "sequence", "A sequence of tasks", caption, heads, fill)


def metrics(task: Task) -> Table | None:
    """Further metrics of the test set."""
    names = list(dict.fromkeys(name for row in task.scored for name in row.values if name != task.metric))

    def fill(row: Row) -> list[Cell] | None:
        return [number(row.values.get(name)) for name in names] if names and row.values else None

    return row_table(
        task, "values", "Further metrics", "On the test set; means over the seeds.", [Head(n) for n in names], fill
    )
