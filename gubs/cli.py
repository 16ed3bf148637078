"""The command line: one command per job, each a few lines that call the package."""

import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

import gubs
from gubs import console, jobs, stages
from gubs.artifacts import open_run
from gubs.config import load_settings
from gubs.jobs import DEFAULT_RUN, ForceOption, Overrides, PresetOption, RunOption
from gubs.records import Task

if TYPE_CHECKING:
    from gubs.llm.budget import CostEstimate

app = typer.Typer(
    name="gubs",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learns why users skip videos: group-aware user behaviour simulation on Ray.\n\n"
    "Commands that make something take --run (where results go), --preset and any number of key=value settings; "
    "`gubs settings` lists them. Exit codes: 0 success, 1 a bug, 2 settings, 3 input data, 4 artifacts, 5 the machine, "
    "6 a text LLM, or weights that an engine refuses, 7 groups, 8 training diverged, 9 training is unhealthy.",
)

_DATA, _GROUPS, _JOBS = "From logs and videos to a data set", "Groups and labels, by text LLMs", "Clusters"
_MODEL, _SERVE, _LOOK, _SETUP = "The model", "The filter", "Look", "Set-up"

JsonOption = Annotated[bool, typer.Option("--json", help="For scripts: print JSON to stdout.")]
RunArgument = Annotated[str, typer.Argument(help="Run folder.")]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Only print calls, tokens and price per role.")]
AddressOption = Annotated[str, typer.Option(help="Dashboard of a cluster, http://host:8265; default: a local head.")]


@app.command(rich_help_panel=_DATA)
def demo(
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    force: ForceOption = False,
    address: AddressOption = "",
    overrides: Overrides = None,
) -> None:
    """Run the whole pipeline as Ray jobs, on a small simulated app (or source.kind=... source.path=...)."""
    from gubs.ufm.stage import base_model

    settings = load_settings(preset, overrides or [])  # refuse a wrong setting before a cluster starts
    arguments = ["--run", run, "--preset", preset, *(["--force"] if force else []), *(overrides or [])]
    if jobs.named_cluster(address):
        raise typer.Exit(jobs.submit("train_grpo", arguments, address))
    opened = open_run(run)
    if settings.ufm.model.own_words:
        stages.make(["ifvr"], opened, settings, force=force)  # its words are to be read
    base_model(settings.ufm.model, opened)  # once per machine, and faster while nothing else runs there
    raise typer.Exit(jobs.demo(arguments, opened, settings))


@app.command(rich_help_panel=_DATA)
def synth(
    run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", force: ForceOption = False, overrides: Overrides = None
) -> None:
    """Simulate a video app: users, views, clicks, rendered videos, and the true cause of every skip."""
    _make(["raw", "truth", "videos"], run, preset, force, overrides)


@app.command(rich_help_panel=_DATA)
def ingest(
    run: RunOption, preset: PresetOption = "tiny", force: ForceOption = False, overrides: Overrides = None
) -> None:
    """Read logs: source.kind=logs|movielens|netflix|amazon|yelp|mind|agent4rec|kuairand|microlens source.path=DIR."""
    _make(["raw"], run, preset, force, overrides)


@app.command(rich_help_panel=_DATA)
def build(
    run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", force: ForceOption = False, overrides: Overrides = None
) -> None:
    """Filter out noise; split users into train and test, and their records into history and targets."""
    _make(["ifvr"], run, preset, force, overrides)


@app.command(rich_help_panel=_DATA)
def frames(
    run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", force: ForceOption = False, overrides: Overrides = None
) -> None:
    """Decode every video once: sampled, resized frames in the frame store, and a verdict per file."""
    _make(["frames"], run, preset, force, overrides)


@app.command(rich_help_panel=_GROUPS)
def ugm(
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    force: ForceOption = False,
    dry_run: DryOption = False,
    overrides: Overrides = None,
) -> None:
    """Make group profiles: summarize, cluster, reflect. Without llm.endpoints, a small local model answers."""
    if not dry_run:
        return _make(["ugm"], run, preset, force, overrides)
    from gubs.ugm.stage import estimate

    settings = load_settings(preset, overrides or [])
    profiles = settings.teachers.profiles
    return _print_estimate(estimate(open_run(run), settings.ugm, settings.llm, profiles=profiles))


@app.command(rich_help_panel=_GROUPS)
def teach(
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    force: ForceOption = False,
    dry_run: DryOption = False,
    overrides: Overrides = None,
) -> None:
    """Let the annotator write SFT examples, reasons for skips, and profiles of users without tags."""
    opened, settings = open_run(run), load_settings(preset, overrides or [])
    teachers, seed = settings.teachers, settings.seed
    if not dry_run:
        wanted = ["profiles"] if teachers.profiles else []
        return stages.make([*wanted, "sft", "labels"], opened, settings, force=force)
    from gubs.teachers import profiles, reasons, sft
    from gubs.teachers.annotator import Annotator

    requests = [*sft.requests(opened, teachers, seed), *reasons.requests(opened, teachers, seed)]
    if teachers.profiles:
        requests += profiles.requests(opened, teachers, seed, settings.source.kind)
    with Annotator(opened, settings.llm) as annotator:
        return _print_estimate(annotator.estimate(requests))


groups = typer.Typer(no_args_is_help=True, help="Look at the groups of users, and place others in them.")
app.add_typer(groups, name="groups", rich_help_panel=_GROUPS)


@groups.command("show")
def groups_show(run: RunArgument = DEFAULT_RUN, as_json: JsonOption = False) -> None:
    """Write a page about every group: its profile, what reflection changed, its members and the verdicts on them."""
    from gubs.report.groups import write_page

    opened = open_run(run)
    if as_json:
        console.print_json(opened.artifact("ugm").table("groups").to_pylist())
    else:
        console.print_line(write_page(opened))


@groups.command("assign")
def groups_assign(
    users: Annotated[str, typer.Argument(help="Parquet: user_id, and what is known of age, gender, tags, ...")],
    run: RunOption = DEFAULT_RUN,
    out: Annotated[str, typer.Option(help="File to write; default: beside the table.")] = "",
) -> None:
    """Place the users of a table: each in the nearest group whose threshold it reaches. Asks no language model."""
    from gubs.ugm.assign import assign_table

    target, placed, total = assign_table(open_run(run), users, out)
    console.say(f"{placed:,} of {total:,} users are in a group")
    console.print_line(target)


annotate = typer.Typer(no_args_is_help=True, help="Answer the skips whose reason a person has to decide.")
app.add_typer(annotate, name="annotate", rich_help_panel=_GROUPS)
NameOption = Annotated[str, typer.Option("--name", help="Your name; stored with every answer.")]


@annotate.command("export")
def annotate_export(
    file: Path, run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", name: NameOption = ""
) -> None:
    """Write the open items to FILE.csv or FILE.jsonl."""
    from gubs.teachers.queue_files import export_queue

    count = export_queue(open_run(run), load_settings(preset).teachers, file, name)
    console.say(f"{count:,} items in {file}")


@annotate.command("import")
def annotate_import(
    file: Path, run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", name: NameOption = ""
) -> None:
    """Read the answers from a completed file."""
    from gubs.teachers.annotations import add_answers
    from gubs.teachers.queue_files import read_answers

    opened = open_run(run)
    answers, unanswered = read_answers(opened, file, name)
    info = add_answers(opened, load_settings(preset).model_dump(mode="json"), answers).manifest.info
    console.say(
        f"{len(answers):,} answers read, {unanswered:,} rows without one; {info['decided']:,} decided, "
        f"{len(info['tied'])} tied, kappa {info['agreement']['mean_kappa']}"
    )


@annotate.command("review")
def annotate_review(
    name: NameOption, run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", file: Path | None = None
) -> None:
    """Answer in the terminal: A, B, C, D, s = skip, q = quit; you can resume later."""
    from gubs.teachers.review import review

    resolved = load_settings(preset)
    answered, unanswered = review(open_run(run), resolved.model_dump(mode="json"), resolved.teachers, name, file=file)
    console.say(f"{answered} answered, {unanswered} left")


model = typer.Typer(no_args_is_help=True, help="Make the checkpoints of the small presets.")
app.add_typer(model, name="model", rich_help_panel=_MODEL)


@model.command("init")
def model_init(
    size: Annotated[str, typer.Argument(help="tiny or small.")],
    folder: Annotated[str, typer.Option(help="Folder of the checkpoint; default: the user's cache.")] = "",
    lessons: Annotated[int, typer.Option(help="Steps that teach `tiny` to read; default: its preset's.")] = -1,
) -> None:
    """Make a Qwen2.5-VL checkpoint to start from: `tiny` from scratch, `small` with the text model SmolLM2-135M."""
    from gubs.ufm.model import init

    steps = load_settings(size).ufm.model.lessons if lessons < 0 else lessons
    with console.progress("lessons") as on_progress:
        checkpoint = init(size, folder, lessons=steps, on_progress=on_progress)
    console.print_line(str(checkpoint))


@app.command(rich_help_panel=_MODEL)
def sft(
    run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", force: ForceOption = False, overrides: Overrides = None
) -> None:
    """Fine-tune the base model on the teacher's examples."""
    _make([stages.SFT], run, preset, force, overrides)


@app.command(rich_help_panel=_MODEL)
def grpo(
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    name: Annotated[str, typer.Option(help="Name of the policy; a run can have several.")] = stages.GRPO,
    force: ForceOption = False,
    overrides: Overrides = None,
) -> None:
    """Train the policy by GA-GRPO, starting from the SFT model."""
    settings = load_settings(preset, overrides or [])
    stages.make([stages.named(stages.GRPO, name, settings)], open_run(run), settings, force=force)


@app.command(rich_help_panel=_MODEL)
def judge(
    policies: Annotated[
        list[str], typer.Argument(metavar="POLICY... [key=value ...]", help="base, sft_model, grpo, ... and settings.")
    ],
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask policies about the test users; the table compares the first policy with the last."""
    settings = load_settings(preset, [p for p in policies if "=" in p])
    jobs.judge(open_run(run), settings, [p for p in policies if "=" not in p], force, as_json)


evaluate = typer.Typer(no_args_is_help=True, help="Fill the paper's tables, with every baseline beside them.")
app.add_typer(evaluate, name="evaluate", rich_help_panel=_MODEL)


@evaluate.command("ifvr")
def evaluate_ifvr(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=FILE.parquet ...] [key=value ...]", help="Predictions from elsewhere; settings."),
    ] = None,
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Table 2: judged policies and stored predictions beside baselines and SASRec, with what filtering costs."""
    files = {name: file for name, _, file in (w.partition("=") for w in words or []) if file.endswith(".parquet")}
    settings = load_settings(preset, [w for w in words or [] if not w.endswith(".parquet")])
    jobs.evaluate_ifvr(open_run(run), settings, files, force, as_json)


@evaluate.command("public")
def evaluate_public(
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    force: ForceOption = False,
    as_json: JsonOption = False,
    overrides: Overrides = None,
) -> None:
    """Table 3: "10 + 10" items per user of a data set of choices or ratings; every protocol the data allow."""
    jobs.evaluate_public(open_run(run), load_settings(preset, overrides or []), force, as_json)


@evaluate.command("simulated")
def evaluate_simulated(
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    force: ForceOption = False,
    as_json: JsonOption = False,
    overrides: Overrides = None,
) -> None:
    """Language models as simulated users on the same candidates; answers that can be used are never asked for twice."""
    jobs.evaluate_public(open_run(run), load_settings(preset, overrides or []), force, as_json, simulated=True)


@evaluate.command("ranking")
def evaluate_ranking(
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    force: ForceOption = False,
    as_json: JsonOption = False,
    overrides: Overrides = None,
) -> None:
    """Leave-one-out ranking: SASRec beside sequential kNN, item kNN and popularity; masked, unmasked, 100 negatives."""
    jobs.evaluate_ranking(open_run(run), load_settings(preset, overrides or []), force, as_json)


@evaluate.command("sensitivity")
def evaluate_sensitivity(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[POLICY] [key=value ...]", help="Default: grpo, else the one trained last; settings."),
    ] = None,
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """What a policy's answers depend on: profile, pictures, title, history, letters; asked again without each."""
    names = [w for w in words or [] if "=" not in w]
    settings = load_settings(preset, [w for w in words or [] if "=" in w])
    jobs.evaluate_sensitivity(open_run(run), settings, names[0] if names else "", force, as_json)


@evaluate.command("log")
def evaluate_log(
    folder: Annotated[str, typer.Argument(help="The service's log of decisions (serving.log_dir), a path or URI.")],
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    as_json: JsonOption = False,
    overrides: Overrides = None,
) -> None:
    """What the service decided, versions in shadow included, against what the test users of a run did."""
    jobs.evaluate_log(open_run(run), load_settings(preset, overrides or []), folder, as_json)


@evaluate.command("page")
def evaluate_page(run: RunArgument = DEFAULT_RUN, preset: PresetOption = "tiny") -> None:
    """Print the tables and write the page again from what is stored; makes nothing and needs no network."""
    jobs.evaluate_page(open_run(run), load_settings(preset))


@app.command(rich_help_panel=_MODEL)
def ablate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME] [key=value ...]", help="T4 ... T11, rule, groups, noise or order; settings of all arms."
        ),
    ] = None,
    run: Annotated[str, typer.Option("--run", "-r", help="Folder of all policies and the table.")] = "runs/ablations",
    preset: PresetOption = "tiny",
    worlds: Annotated[str, typer.Option(help="Data sets, by their seeds, as 0,1,2.")] = "0,1,2",
    seeds: Annotated[str, typer.Option(help="Trainings in each world, by their seeds.")] = "0,1,2",
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; may be repeated.")] = None,
    level: Annotated[list[str] | None, typer.Option(help="Only this level; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the cells and what they will take.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train and judge the arms of an ablation; what is finished is kept. Without NAME: list the ablations."""
    from gubs.ablate.command import ablate, list_grids
    from gubs.ablate.grid import Choice
    from gubs.errors import SettingsError

    names = [w for w in words or [] if "=" not in w]
    if not names:
        return list_grids()
    if len(names) > 1:
        raise SettingsError(f"{names[1]!r} is not key=value; separate worlds and seeds by commas: --worlds 7,0")
    choice = Choice(jobs.parse_numbers(worlds), jobs.parse_numbers(seeds), tuple(arm or ()), tuple(level or ()))
    settings = [w for w in words or [] if "=" in w]
    return ablate(names[0], open_run(run), choice, preset, settings, dry_run=dry_run, as_json=as_json)


@app.command(rich_help_panel=_MODEL)
def plan(
    preset: PresetOption = "tiny",
    gpu_gib: Annotated[float, typer.Option(help="Memory of a GPU, GiB.")] = 80.0,
    gpus: Annotated[int, typer.Option(help="GPUs, one per worker; 0 = as in the settings.")] = 0,
    as_json: JsonOption = False,
    overrides: Overrides = None,
) -> None:
    """Check whether the trainings fit the GPUs: memory by phase, before anything is loaded."""
    from gubs.ufm.memory import plans

    settings = load_settings(preset, [*(overrides or []), *([f"ufm.workers.count={gpus}"] if gpus else [])])
    memory_plans = plans(settings.ufm, settings.frames, gpu_gib)
    if as_json:
        console.print_json([p.to_json() for p in memory_plans])
    for line in [] if as_json else [line for p in memory_plans for line in p.lines()]:
        console.print_line(line)
    if any(p.problems for p in memory_plans):
        raise typer.Exit(5)


@app.command(rich_help_panel=_MODEL)
def distil(
    run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", force: ForceOption = False, overrides: Overrides = None
) -> None:
    """Teach the trained policy to answer without a thought, for the service's mode `score`."""
    _make([stages.DISTIL], run, preset, force, overrides)


@app.command("filter", rich_help_panel=_SERVE)
def filter_(
    tables: Annotated[
        list[str] | None, typer.Argument(metavar="[TABLE ...] [key=value ...]", help="Parquet or CSV.")
    ] = None,
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    out: Annotated[str, typer.Option(help="Folder of the decisions; default: beside the table.")] = "",
    task: Annotated[Task, typer.Option(help="What is asked.")] = Task.SEQUENTIAL,
    mode: Annotated[str, typer.Option(help="reason or score.")] = "reason",
    force: ForceOption = False,
) -> None:
    """Make the filter of a run; with a table of candidates (user_id, video_id), decide about every row."""
    words = tables or []
    settings = load_settings(preset, [w for w in words if "=" in w])
    jobs.filter_table(open_run(run), settings, [w for w in words if "=" not in w], out, task, mode, force)


class _ServeGroup(typer.core.TyperGroup):
    """`gubs serve --run R` is `gubs serve start --run R`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        complete = args and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if complete else ["start", *args])


serve = typer.Typer(cls=_ServeGroup, help="Serve the filter over HTTP; without a command: start.")
app.add_typer(serve, name="serve", rich_help_panel=_SERVE)
VersionArgument = Annotated[str, typer.Argument(metavar="APP", help="Application of a version, as `status` shows it.")]


@serve.command("start")
def serve_start(
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    force: ForceOption = False,
    dev: Annotated[bool, typer.Option("--dev", help="Ask for no API key; listens on this machine only.")] = False,
    overrides: Overrides = None,
) -> None:
    """Start a head node here, deploy the filter of a run on it, and serve until Ctrl-C."""
    changes = [*(overrides or []), *(["serving.insecure=true"] if dev else [])]
    arguments = ["--run", run, "--preset", preset, *(["--force"] if force else []), *changes]
    jobs.serve(arguments, open_run(run), load_settings(preset, changes))


@serve.command("status")
def serve_status(address: AddressOption = "", as_json: JsonOption = False) -> None:
    """Print the deployed versions, their status and their shares of the requests."""
    control = jobs.control(address)
    states, traffic = control.status(), control.traffic()
    if as_json:
        return console.print_json({"status": states, **traffic})
    for name, state in states.items():
        share = f"share {traffic['versions'][name]:g}" if name in traffic["versions"] else ""
        console.print_line(f"{name:<32} {state:<12} {share}{' shadow' if name in traffic['shadow'] else ''}")
    return None


@serve.command("split")
def serve_split(
    shares: Annotated[list[str], typer.Argument(metavar="APP=SHARE ...", help="As filter-1a2b=80 filter-3c4d=20.")],
    address: AddressOption = "",
) -> None:
    """Divide the requests between versions."""
    jobs.control(address).split(jobs.parse_shares(shares))


@serve.command("promote")
def serve_promote(version: VersionArgument, address: AddressOption = "") -> None:
    """Give a version all requests; the others stay deployed, so that you can switch back."""
    jobs.control(address).promote(version)


@serve.command("shadow")
def serve_shadow(
    version: VersionArgument,
    off: Annotated[bool, typer.Option("--off", help="End it.")] = False,
    address: AddressOption = "",
) -> None:
    """Run a version in shadow: its decisions only go to the log (serving.log_dir)."""
    jobs.control(address).shadow(version, on=not off)


@serve.command("remove")
def serve_remove(version: VersionArgument, address: AddressOption = "") -> None:
    """Remove a version that gets no requests."""
    jobs.control(address).remove(version)


@serve.command("key")
def serve_key(
    file: Annotated[Path, typer.Argument(help="File with the hashes of the keys.")],
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    per_minute: Annotated[float, typer.Option(help="Candidates per minute.")] = 6000.0,
) -> None:
    """Make an API key: prints it once, and adds its hash to the file."""
    from gubs.serving.keys import add_key

    print(add_key(file, name, per_minute))


@app.command(rich_help_panel=_JOBS, context_settings={"ignore_unknown_options": True})
def submit(
    script: Annotated[str, typer.Argument(help="A script in ray_jobs/, without .py.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its options and key=value settings.")] = None,
    address: AddressOption = "",
) -> None:
    """Submit a Ray job (`ray job submit`) and follow its log, on a cluster or a local head node."""
    raise typer.Exit(jobs.submit(script, arguments or [], address))


@app.command(rich_help_panel=_LOOK)
def show(run: RunArgument = DEFAULT_RUN, as_json: JsonOption = False) -> None:
    """Write a page (or JSON) about a data set: counts, distributions, rates and sample frames."""
    from gubs.report.data import describe, write_page

    opened = open_run(run)
    if as_json:
        console.print_json(describe(opened).to_json())
    else:
        console.print_line(write_page(opened))


@app.command(rich_help_panel=_LOOK)
def report(
    run: RunArgument = DEFAULT_RUN,
    policy: Annotated[str, typer.Option(help="A judged policy; default: the one trained last.")] = "",
    preset: PresetOption = "tiny",
    as_json: JsonOption = False,
    overrides: Overrides = None,
) -> None:
    """Write one page about a judged policy: verdicts, tables, curves, slices, cases. Needs nothing but the run."""
    jobs.report(open_run(run), load_settings(preset, overrides or []), policy, as_json)


@app.command(rich_help_panel=_LOOK)
def audit(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TABLE] [key=value ...]", help="A known table, or a CSV file; settings of the run."),
    ] = None,
    columns: Annotated[Path | None, typer.Option("--columns", help="YAML: what the columns of the file mean.")] = None,
    run: Annotated[str, typer.Option("--run", "-r", help="Run whose `public` has bars on the same files.")] = "",
    preset: PresetOption = "tiny",
    as_json: JsonOption = False,
) -> None:
    """Check a published table: which cells cannot hold together, and what simple baselines reach on the same files.
    Without a table: list the known ones.
    """
    tables = [w for w in words or [] if "=" not in w]
    jobs.audit(tables[0] if tables else "", columns, run, preset, [w for w in words or [] if "=" in w], as_json)


@app.command(rich_help_panel=_LOOK)
def status(
    run: RunArgument = DEFAULT_RUN,
    preset: Annotated[str, typer.Option("--preset", "-p", help="Compare with these settings.")] = "",
    as_json: JsonOption = False,
    overrides: Overrides = None,
) -> None:
    """Print which stages of a run are current, stale (and why) or missing. Without --preset or settings, each stage is
    compared with the settings it was made with.
    """
    settings = load_settings(preset or "tiny", overrides or []) if preset or overrides else None
    states = list(stages.states(open_run(run), settings))
    if as_json:
        console.print_json([s.to_json() for s in states])
        return
    for s in states:
        details = s.manifest.summary if s.manifest and s.status is stages.Status.CURRENT else ""
        details = details or s.reason or (f"`{s.stage.command}` makes it" if s.status is stages.Status.MISSING else "")
        console.print_line(f"{s.stage.name:<16} {s.status:<8} {details}")


@app.command(rich_help_panel=_LOOK)
def probe(
    files: Annotated[list[str], typer.Argument(help="Video files.")],
    preset: PresetOption = "tiny",
    as_json: JsonOption = False,
) -> None:
    """Check single video files: whether they can be decoded and, if not, what is wrong."""
    from gubs.video.probe import probe_files

    results = probe_files(files, load_settings(preset).frames)
    if as_json:
        console.print_json(results)
        return
    for r in results:
        console.print_line(f"{r['verdict']:<16} {r['frames']:>3} frames  {r['file']}  {r['detail']}")


@app.command(rich_help_panel=_SETUP)
def doctor(as_json: JsonOption = False, disk: Annotated[str, typer.Option(help="Folder for runs.")] = ".") -> None:
    """Check this machine: one line per check, ok or what to do."""
    from gubs.doctor import examine

    findings = []
    for finding in examine(Path(disk)):
        findings.append(finding)
        if not as_json:
            mark = "[green]ok [/]" if finding.ok else "[red]NO [/]"
            remedy = "" if finding.ok else f"-> {finding.remedy}"
            console.out.print(f"{mark} {finding.name:<12} ", finding.text, remedy, soft_wrap=True)
    if as_json:
        console.print_json([f.to_json() for f in findings])
    if not all(f.ok for f in findings):
        raise typer.Exit(5)


@app.command(rich_help_panel=_SETUP)
def settings(
    preset: PresetOption = "tiny",
    as_json: JsonOption = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the text of docs/settings.md.")] = False,
    overrides: Overrides = None,
) -> None:
    """Print all settings with value and meaning, after the preset and key=value."""
    from gubs.config import describe, to_markdown

    if as_markdown:
        print(to_markdown(), end="")
        return
    resolved = load_settings(preset, overrides or [])
    if as_json:
        console.print_json(resolved.model_dump(mode="json"))
        return
    for key, value, text in describe(resolved):
        console.out.print(f"{key} = {value!r}", markup=False, style="bold", soft_wrap=True)
        if text:
            console.print_line(f"    {text}")


@app.command(rich_help_panel=_SETUP)
def version() -> None:
    """Print the version."""
    print(gubs.__version__)


def _make(targets: list[str], run: str, preset: str, force: bool, overrides: list[str] | None) -> None:
    stages.make(targets, open_run(run), load_settings(preset, overrides or []), force=force)


def _print_estimate(estimate: "CostEstimate") -> None:
    for role in estimate.roles.values():
        journal = f"{role.journaled:,} of {role.requests:,} requests are in the journal"
        tokens = f"about {role.tokens_in:,} tokens in, {role.tokens_out:,} out, price {role.money:.2f}"
        console.print_line(f"{role.role:<11} {role.endpoint} {role.model}: {role.calls:,} calls ({journal}), {tokens}")


def main(args: list[str] | None = None) -> None:
    """Runs the command line. SIGTERM also ends what the command started, such as a head node."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    jobs.run_app(app, args)


if __name__ == "__main__":
    main()
