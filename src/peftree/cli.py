"""The command line: flags in, calls out, tables back; no logic of its own."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import warnings
from collections import Counter
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from peftree import __version__
from peftree.advise.command import advise
from peftree.assets.command import data, models
from peftree.errors import ConfigError, PeftreeError, PeftreeWarning, plain, unwritten
from peftree.plan.command import plan
from peftree.printing import EXITS, Json, emit, short, tabled
from peftree.train.command import RunFolder, convert, export, merge

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Parameter-efficient fine-tuning: the whole tree of methods, measured.",
    epilog=f"Exit codes: {'; '.join(f'{code} {meaning}' for code, meaning in EXITS.items())}.",
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress output.")]
Model = Annotated[str, typer.Argument(help="A model folder (config.json is enough), or a packaged or hub name.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for example r=32 method=lora.")]
Scoring = Annotated[list[str] | None, typer.Argument(help="key=value for data or scoring: data.test=other.csv.")]


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: versions, memory, threads, extras, and one adapter end to end."""
    from peftree.doctor import examine

    rows = examine()
    table = tabled("peftree doctor", ["check", "state", "what to do"], [[r.name, r.state, r.advice] for r in rows])
    emit([vars(r) for r in rows], as_json, table)
    if any(r.failed for r in rows):
        raise typer.Exit(1)


@app.command()
def methods(
    name: Annotated[str, typer.Argument(help="One method: its equation and fields.")] = "",
    tree: Annotated[bool, typer.Option("--tree", help="The survey's tree, row by row, and what works.")] = False,
    as_json: Json = False,
) -> None:
    """Show the methods with their tags, one method with its fields, or the survey's whole tree."""
    from peftree.describe import NEEDS, OURS, STATES, describe_method, method_rows, tree_rows

    if tree:
        listed = tree_rows()
        states = Counter(r["state"] for r in listed)
        count = ", ".join(f"{n} {state}" for state, n in states.most_common())
        last = [" ".join(r["methods"] or [f"{f}()" for f in r["functions"]] or r["needs"]) for r in listed]
        shown = [[r["row"], r["branch"], r["name"], r["state"], what] for r, what in zip(listed, last, strict=True)]
        columns = ["row", "branch", "name in the survey", "state", "methods, or what is missing"]
        table = tabled(f"The tree of PEFT A2Z: {count}", columns, shown)
        table.caption_justify = "left"
        table.caption = "\n".join(f"{mark}: {meaning}" for mark, meaning in (STATES | NEEDS).items())
        emit(listed, as_json, table)
        return
    if name:
        info = describe_method(name)
        fields = [[f["name"], f["type"], f["default"], f["limits"], f["description"]] for f in info["fields"]]
        rate = f"default lr {info['tags']['lr']:g}: {info['tags']['lr_from'] or OURS}"
        table = tabled(
            f"{info['name']} ({info['branch']}, {info['paper']})\n{info['equation']}\n{rate}",
            ["field", "type", "default", "limits", "description"], fields,
        )  # fmt: skip
        emit(info, as_json, table)
        return
    found = method_rows()
    tags = ["identity at start", "merges", "adds tokens", "needs data"]
    rows: list[list[Any]] = []
    for branch, mine in groupby(found, key=itemgetter("branch")):
        rows.append([branch, *[""] * 6])
        for row in mine:
            marks = ["yes" if row[t] else "." for t in tags]
            lr = f"{row['default lr']:g}{'' if row['default lr from'] else '*'}"
            rows.append([f"  {row['name']}", *marks, lr, row["paper"].removeprefix("arXiv ")])
    columns = ["method", "identity", "merges", "+tokens", "data", "lr", "arXiv"]
    table = tabled("The tree of methods", columns, rows)
    table.caption_justify, table.caption = "left", f"*: {OURS}; `peftree methods NAME` says where other rates are from"
    emit(found, as_json, table)


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """Show the sites of a model: roles, layers, shapes, towers. Reads the config only."""
    from peftree.describe import inspect_model

    info = inspect_model(model)
    keys = ["tower", "role", "kind", "count", "layers", "in x out", "parameters"]
    shapes = [", ".join(" x ".join(map(str, shape)) for shape in r["shapes"]) for r in info["sites"]]
    rows = [[{**r, "in x out": s}[k] for k in keys] for r, s in zip(info["sites"], shapes, strict=True)]
    title = f"{info['class']}: {info['parameters']:,} parameters"
    table = tabled(f"{title}. {info['unclear']}" if info["unclear"] else title, keys, rows)
    emit(info, as_json, table)


class _WithSettings(TyperCommand):
    """A command whose help ends with every setting of its kind, imported only when help is shown."""

    kind = ("peftree.settings", "RunConfig")

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the usual help, then the settings."""
        from peftree.setting_rows import text

        super().format_help(ctx, formatter)
        formatter.write(text(getattr(importlib.import_module(self.kind[0]), self.kind[1])))


class _WithPlan(_WithSettings):
    kind = ("peftree.plan.question", "Request")


@app.command(cls=_WithSettings)
def train(
    config: Annotated[str, typer.Argument(help="run.yaml, or the first key=value.")],
    overrides: Overrides = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train an adapter from run.yaml and key=value settings; writes the adapter, its metrics and a page."""
    from peftree.settings import load_config

    if Path(config).is_dir():
        from peftree.train.output import no_settings

        raise no_settings(Path(config))
    path = None if "=" in config and not Path(config).exists() else Path(config)
    words = [*([] if path else [config]), *(overrides or []), *(["quiet=true"] if quiet or as_json else [])]
    settings = load_config(path, words)
    from peftree.train.processes import started, team

    if (settings.processes or 1) > 1 and started() == 1:
        from peftree.train.launch import launch

        raise typer.Exit(launch(settings.processes or 1, [config, *words[0 if path else 1 :], *["--json"] * as_json]))
    from peftree.train.run import run  # a launcher needs nothing of it

    result = run(settings)
    if team().first:
        from peftree import report as reports  # takes half a second, and training may fail

        page = reports.write(settings.output, Path(settings.output) / "report.html")
        emit(result.metrics(), as_json)
        if not settings.quiet:
            typer.echo(plain(f"The loss curve, scores and costs: {page}"), err=True)


@app.command("eval")
def evaluate(
    run_folder: RunFolder,
    overrides: Scoring = None,
    against: Annotated[str, typer.Option(help="What to compare with: base.")] = "base",
    split: Annotated[str, typer.Option(help="train, valid or test; empty: test if there is one.")] = "",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score a trained adapter beside the base model on the same items (data.test=other.csv for other data)."""
    from peftree.evaluate.against import against_base
    from peftree.probes.shuffled import with_others
    from peftree.train.run import open_run

    if against != "base":
        raise ConfigError(f"--against {against} is unknown.", "Use --against base.")
    if split not in ("", "train", "valid", "test"):
        raise ConfigError(f"--split {split} is unknown.", "Use train, valid or test.")
    opened = open_run(run_folder, overrides or [], progress=not (quiet or as_json))
    own = opened.score(split or None)
    found = dataclasses.asdict(against_base(opened.task.model, lambda: opened.score(split or None), own))
    found |= with_others(opened, split, own)
    rows = [[k, short(v)] for k, v in found.items() if v not in (None, "")]
    emit(found, as_json, tabled(str(run_folder), ["what", "value"], rows))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("demo-results"),
    seeds: Annotated[int, typer.Option(min=1, max=10, help="Runs of each method with different seeds.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, for a first look.")] = False,
) -> None:
    """Fine-tune real language and vision models with methods of every branch and write a report."""
    from peftree.demo import main as run_demo

    run_demo(out, 1 if quick else seeds)


@app.command()
def report(
    results: Annotated[
        Path, typer.Argument(help="What demo, bench or train wrote: records, results, runs, or a pack.")
    ],
    html: Annotated[Path | None, typer.Option(help="Also write one HTML page here.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX tables (booktabs).")] = False,
    as_json: Json = False,
) -> None:
    """Turn run records into tables and one self-contained page."""
    from rich.console import Console

    from peftree import report as reports
    from peftree.runs.read import read_results

    built = reports.build(read_results(results))
    forms = {as_json: reports.to_json, markdown: reports.to_markdown, latex: reports.to_latex}
    if True in forms:
        typer.echo(forms[True](built))
    else:
        Console().print(reports.terminal.render(built))
    if html:
        typer.echo(f"Wrote {reports.write(results, html)}", err=True in forms)


_GRAMMAR = {"ignore_unknown_options": True}  # an option of old is answered with the setting that it is now
app.command("plan", cls=_WithPlan, context_settings=_GRAMMAR)(plan)
app.command("advise", cls=_WithPlan, context_settings=_GRAMMAR)(advise)
app.command("merge")(merge)
app.command("export")(export)
app.command("convert")(convert)
app.command("models")(models)
app.command("data")(data)
bench = typer.Typer(no_args_is_help=True, help="The benchmark: fair, resumable runs of suites of tasks and methods.")
app.add_typer(bench, name="bench")
SuiteName = Annotated[str, typer.Argument(help="A suite that comes with the package, or a file.")]
Results = Annotated[Path | None, typer.Option("--out", help="Where results are; default: results/SUITE.")]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="Only this task; may be repeated.")]
Methods = Annotated[list[str] | None, typer.Option("--method", help="Only this method; may be repeated.")]


@bench.command("suites")
def bench_suites(as_json: Json = False) -> None:
    """List the suites that come with the package."""
    from peftree.bench.suite import known_suites, load_suite

    found = [load_suite(name) for name in known_suites()]
    rows = [[s.suite, s.tier, len(s.tasks), len(s.methods), sum(map(s.runs, s.tasks)), s.title] for s in found]
    columns = ["suite", "tier", "tasks", "methods", "runs", "about"]
    emit([dict(zip(columns, row, strict=True)) for row in rows], as_json, tabled("Suites", columns, rows))


@bench.command("run")
def bench_run(
    suite: SuiteName,
    out: Results = None,
    task: Tasks = None,
    method: Methods = None,
    workers: Annotated[int, typer.Option(min=0, help="Runs at a time; 0: two, or one on a single core.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the suite and show what would run.")] = False,
    slurm: Annotated[str, typer.Option(help="Run as Slurm jobs; submitit's options: slurm_partition=gpu.")] = "",
    ray: Annotated[str, typer.Option(help="Run on a Ray cluster: its address, auto, or local.")] = "",
    as_json: Json = False,
) -> None:
    """Run what is missing from a suite; Ctrl-C keeps finished runs, and the same command continues."""
    from peftree.bench import command
    from peftree.bench.suite import load_suite

    chosen, loaded = (tuple(task or ()), tuple(method or ())), load_suite(suite)
    if dry_run:
        found = command.plan(loaded, *chosen)
        rows = [[row[name] for name in command.PLAN] for row in found["tasks"]]
        runs, hours = (sum(row[name] for row in found["tasks"]) for name in ("runs", "hours"))
        title = f"{loaded.title} ({loaded.hash[:12]}): {runs:,} runs, about {hours:.1f} processor hours"
        emit(found, as_json, tabled(title, list(command.PLAN), rows))
        return
    command.run(loaded, out or Path("results", loaded.suite), *chosen, workers=workers, slurm=slurm, ray=ray)


@bench.command("status")
def bench_status(suite: SuiteName, out: Results = None, task: Tasks = None, as_json: Json = False) -> None:
    """Show the progress of a suite and the hours left; with --task, the progress of each method on that task."""
    from peftree.bench import command
    from peftree.bench.suite import load_suite

    loaded = load_suite(suite)
    found = command.status(loaded, out or Path("results", loaded.suite), tuple(task or ()))
    title = f"{found['done']} of {found['runs']} runs, about {found['hours left']:.1f} hours left"
    rows = found["methods" if task else "tasks"]
    heads = ["unfit" if name == "inapplicable" else name for name in rows[0]]
    emit(found, as_json, tabled(title, heads, [list(row.values()) for row in rows]))


@bench.command("compare")
def bench_compare(
    first: Annotated[str, typer.Argument(help="A method.")],
    second: Annotated[str, typer.Argument(help="The method to compare it with.")],
    results: Annotated[Path, typer.Option(help="A folder of run records, or a pack of them.")] = Path("results/small"),
    as_json: Json = False,
) -> None:
    """Compare two methods: which is better, with what confidence, and at what cost."""
    from peftree.bench.versus import versus
    from peftree.runs.read import read_results

    found = versus(read_results(results), first, second)
    typer.echo(found.to_json() if as_json else found.to_text())


@bench.command("pack")
def bench_pack(
    results: Annotated[Path, typer.Argument(help="A folder of results.")],
    target: Annotated[Path, typer.Argument(help="The file to write, such as study.jsonl.gz.")],
) -> None:
    """Write all run records into one small file that `report`, `compare` and `unpack` read."""
    from peftree.bench import command

    typer.echo(f"Packed {command.pack(results, target)} runs into {target}.")


@bench.command("unpack")
def bench_unpack(
    packed: Annotated[Path, typer.Argument(help="A file that `pack` wrote.")],
    out: Annotated[Path, typer.Argument(help="The folder of results to fill, for `run` to continue from.")],
) -> None:
    """Unpack run records, so that a suite continues where they end."""
    from peftree.bench import command

    typer.echo(f"Wrote {command.unpack(packed, out)} runs into {out}.")


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Parameter-efficient fine-tuning: the whole tree of methods, measured."""


def main() -> None:
    """Run the command line; a peftree or file error prints one line on stderr and exits with a code of `EXITS`."""
    usual = warnings.formatwarning  # names a place in the code, which is nothing to the user of a command
    warnings.formatwarning = lambda what, kind, *place: (
        f"note: {what}\n" if issubclass(kind, PeftreeWarning) else usual(what, kind, *place)
    )
    try:
        app()
    except PeftreeError as error:
        typer.echo(f"peftree: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        refused = unwritten(error.filename or "A file", error, "")
        typer.echo(f"peftree: {plain(str(error))}. {refused.fix}", err=True)
        sys.exit(refused.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        warnings.formatwarning = usual


if __name__ == "__main__":
    main()
