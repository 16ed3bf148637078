"""The command line: one command a job; each is a few lines that call the package."""

import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import gubs
from gubs import console
from gubs.config import Settings, load_settings, preset_names
from gubs.errors import GubsError

if TYPE_CHECKING:
    from gubs.llm.budget import Plan

app = typer.Typer(
    name="gubs",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learns why users skip videos: group-aware user behaviour simulation on Ray.\n\n"
    "What makes something takes --run (where results go), --preset and any number of key=value settings; "
    "`gubs settings` lists them. Exit codes: 0 done, 1 a bug, 2 settings, 3 input data, 4 artifacts, 5 the machine, "
    "6 a text LLM, or weights that an engine refuses, 7 groups, 8 a training that diverged, 9 one that is not healthy.",
)

_DATA, _GROUPS, _JOBS = "From logs and videos to a data set", "Groups and labels, by text LLMs", "Clusters"
_MODEL, _LOOK, _SETUP = "The model", "Look", "Set-up"

RunOption = Annotated[str, typer.Option("--run", "-r", help="Run folder: a path or URI (s3://...).")]
PresetOption = Annotated[str, typer.Option("--preset", "-p", help=f"{', '.join(preset_names())}, or a YAML file.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Make it again even if it is there.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For scripts: JSON on stdout.")]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Only print calls, tokens and price per role.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings that differ from the preset.")
]

DEFAULT_RUN = "runs/demo-synthetic"


AddressOption = Annotated[
    str, typer.Option(help="Dashboard of a cluster, http://host:8265; else a local head is started.")
]


@app.command(rich_help_panel=_DATA)
def demo(
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    force: ForceOption = False,
    address: AddressOption = "",
    overrides: Overrides = None,
) -> None:
    """All of the below in one go, as a Ray job, on a small simulated app (or source.kind=... source.path=...)."""
    from gubs import jobs, pipeline

    settings = _settings(preset, overrides)  # a wrong setting is said before a cluster is started
    if not jobs.named_cluster(address):
        pipeline.base_model(settings)  # once on a machine, and faster while nothing else runs on it
    arguments = ["--all", "--run", run, "--preset", preset, *(["--force"] if force else []), *(overrides or [])]
    raise typer.Exit(jobs.submit("train_grpo", arguments, address))


@app.command(rich_help_panel=_DATA)
def synth(
    run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", force: ForceOption = False, overrides: Overrides = None
) -> None:
    """Simulate a video app: users, views, clicks, rendered videos, and the true cause of every skip."""
    from gubs import pipeline

    pipeline.synth(pipeline.open_run(run), _settings(preset, overrides), force)


@app.command(rich_help_panel=_DATA)
def ingest(
    run: RunOption, preset: PresetOption = "tiny", force: ForceOption = False, overrides: Overrides = None
) -> None:
    """Read logs: source.kind=logs|movielens|amazon|kuairand|microlens source.path=FOLDER."""
    from gubs import pipeline

    pipeline.ingest(pipeline.open_run(run), _settings(preset, overrides), force)


@app.command(rich_help_panel=_DATA)
def build(
    run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", force: ForceOption = False, overrides: Overrides = None
) -> None:
    """Filter out noise, split users into train and test, records into history and targets."""
    from gubs import pipeline

    pipeline.build(pipeline.open_run(run), _settings(preset, overrides), force)


@app.command(rich_help_panel=_DATA)
def frames(
    run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", force: ForceOption = False, overrides: Overrides = None
) -> None:
    """Decode every video once: sampled, resized frames in the frame store, and a verdict per file."""
    from gubs import pipeline

    pipeline.frames(pipeline.open_run(run), _settings(preset, overrides), force)


@app.command(rich_help_panel=_GROUPS)
def ugm(
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    force: ForceOption = False,
    dry_run: DryOption = False,
    overrides: Overrides = None,
) -> None:
    """Make group profiles: summarize, cluster, reflect. Without llm.endpoints, a small local model answers."""
    from gubs import pipeline

    opened, resolved = pipeline.open_run(run), _settings(preset, overrides)
    if dry_run:
        _print_plan(pipeline.plan_ugm(opened, resolved))
    else:
        pipeline.ugm(opened, resolved, force)


@app.command(rich_help_panel=_GROUPS)
def teach(
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    force: ForceOption = False,
    dry_run: DryOption = False,
    overrides: Overrides = None,
) -> None:
    """Let the annotator write SFT examples, reasons of skips, and user profiles where a source has no tags."""
    from gubs import pipeline

    opened, resolved = pipeline.open_run(run), _settings(preset, overrides)
    if dry_run:
        _print_plan(pipeline.plan_teachers(opened, resolved))
    else:
        pipeline.teach(opened, resolved, force)


groups = typer.Typer(no_args_is_help=True, help="Look at the groups of users.")
app.add_typer(groups, name="groups", rich_help_panel=_GROUPS)


@groups.command("show")
def groups_show(
    run: Annotated[str, typer.Argument(help="Run folder.")] = DEFAULT_RUN, as_json: JsonOption = False
) -> None:
    """A page with every group: its profile, what reflection changed in it, its members and the verdicts on them."""
    from gubs import pipeline
    from gubs.ugm.show import write_page

    opened = pipeline.open_run(run)
    if as_json:
        console.print_json(opened.artifact("ugm").table("groups").to_pylist())
    else:
        console.out.print(write_page(opened), markup=False, soft_wrap=True)


annotate = typer.Typer(no_args_is_help=True, help="Skips whose reason a person has to decide.")
app.add_typer(annotate, name="annotate", rich_help_panel=_GROUPS)
NameOption = Annotated[str, typer.Option("--name", help="Who answers; kept with every answer.")]


@annotate.command("export")
def annotate_export(
    file: Path, run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", name: NameOption = ""
) -> None:
    """Write the open items to FILE.csv or FILE.jsonl."""
    from gubs import pipeline
    from gubs.teachers.queue_files import export_queue

    n = export_queue(pipeline.open_run(run), _settings(preset, []).teachers, file, name)
    console.say(f"{n:,} items in {file}")


@annotate.command("import")
def annotate_import(
    file: Path, run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", name: NameOption = ""
) -> None:
    """Read a file that was filled in."""
    from gubs import pipeline
    from gubs.teachers.annotations import add_answers
    from gubs.teachers.queue_files import read_answers

    opened = pipeline.open_run(run)
    answers, left = read_answers(opened, file, name)
    info = add_answers(opened, _settings(preset, []), answers).manifest.info
    console.say(
        f"{len(answers):,} answers taken, {left:,} rows left open; {info['decided']:,} decided, "
        f"{len(info['tied'])} tied, kappa {info['agreement']['mean_kappa']}"
    )


@annotate.command("review")
def annotate_review(
    name: NameOption, run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", file: Path | None = None
) -> None:
    """Answer in the terminal: A, B, C, D, s = skip, q = quit; go on later where you stopped."""
    from gubs import pipeline
    from gubs.teachers.review import review

    resolved = _settings(preset, [])
    given, left = review(pipeline.open_run(run), resolved, resolved.teachers, name, file=file)
    console.say(f"{given} answered, {left} left")


model = typer.Typer(no_args_is_help=True, help="Make the checkpoints of the small presets.")
app.add_typer(model, name="model", rich_help_panel=_MODEL)


@model.command("init")
def model_init(
    size: Annotated[str, typer.Argument(help="tiny or small.")],
    folder: Annotated[str, typer.Option(help="Where to; else the user's cache.")] = "",
    lessons: Annotated[int, typer.Option(help="Steps in which tiny is taught to read; default: its preset's.")] = -1,
) -> None:
    """Make a Qwen2.5-VL checkpoint to start from: `tiny` from nothing, `small` with the text model SmolLM2-135M."""
    from gubs.ufm.model import init

    steps = _settings(size, None).ufm.model.lessons if lessons < 0 else lessons
    with console.progress("lessons") as on_progress:
        made = init(size, folder, lessons=steps, on_progress=on_progress)
    console.out.print(str(made), markup=False, soft_wrap=True)


@app.command(rich_help_panel=_MODEL)
def sft(
    run: RunOption = DEFAULT_RUN, preset: PresetOption = "tiny", force: ForceOption = False, overrides: Overrides = None
) -> None:
    """Fine-tune the base model on the teacher's examples."""
    from gubs import pipeline

    pipeline.train_sft(pipeline.open_run(run), _settings(preset, overrides), force)


@app.command(rich_help_panel=_MODEL)
def grpo(
    run: RunOption = DEFAULT_RUN,
    preset: PresetOption = "tiny",
    name: Annotated[str, typer.Option(help="Of the trained policy; several can stand side by side.")] = "grpo",
    force: ForceOption = False,
    overrides: Overrides = None,
) -> None:
    """Train the policy by GA-GRPO, from the SFT model on."""
    from gubs import pipeline

    pipeline.train_grpo(pipeline.open_run(run), _settings(preset, overrides), force, name)


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
    """Ask policies about the test users; the table has the first one's figures beside the last one's."""
    from gubs import pipeline

    opened, resolved = pipeline.open_run(run), _settings(preset, [p for p in policies if "=" in p])
    names = [p for p in policies if "=" not in p]
    for policy in names:
        pipeline.judge(opened, resolved, policy, force)
    pipeline.report(opened, names, as_json)


@app.command(rich_help_panel=_MODEL)
def plan(
    preset: PresetOption = "tiny",
    gpu_gib: Annotated[float, typer.Option(help="Memory of a GPU, GiB.")] = 80.0,
    gpus: Annotated[int, typer.Option(help="GPUs, one a worker; 0 = as the settings say.")] = 0,
    as_json: JsonOption = False,
    overrides: Overrides = None,
) -> None:
    """Does a training fit the GPUs? The memory sum, phase by phase, before anything is loaded."""
    from gubs.ufm.memory import plans

    found = plans(_settings(preset, [*(overrides or []), *([f"ufm.workers.count={gpus}"] if gpus else [])]), gpu_gib)
    if as_json:
        console.print_json([p.to_json() for p in found])
    for line in [] if as_json else [line for p in found for line in p.lines()]:
        console.out.print(line, markup=False, soft_wrap=True)
    if any(p.problems for p in found):
        raise typer.Exit(5)


@app.command(rich_help_panel=_JOBS, context_settings={"ignore_unknown_options": True})
def submit(
    script: Annotated[str, typer.Argument(help="A script of ray_jobs/, without .py.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its own options and key=value settings.")] = None,
    address: AddressOption = "",
) -> None:
    """Submit a Ray job (`ray job submit`) and follow its log: to a cluster, or to a local head made for it."""
    from gubs import jobs

    raise typer.Exit(jobs.submit(script, arguments or [], address))


@app.command(rich_help_panel=_LOOK)
def show(run: Annotated[str, typer.Argument(help="Run folder.")] = DEFAULT_RUN, as_json: JsonOption = False) -> None:
    """Counts, distributions, rates and sample frames of a data set, as a page (or JSON)."""
    from gubs import pipeline
    from gubs.data.show import summarize

    opened = pipeline.open_run(run)
    if as_json:
        console.print_json(summarize(opened).to_json())
    else:
        console.out.print(pipeline.show(opened), markup=False, soft_wrap=True)


@app.command(rich_help_panel=_LOOK)
def report(
    run: Annotated[str, typer.Argument(help="Run folder.")] = DEFAULT_RUN,
    policies: Annotated[list[str] | None, typer.Argument(help="Judged policies; all if none is named.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Curves of the trainings and the judged policies before and after, as a page and a table (or JSON)."""
    from gubs import pipeline

    pipeline.report(pipeline.open_run(run), policies or [], as_json)


@app.command(rich_help_panel=_LOOK)
def status(run: Annotated[str, typer.Argument(help="Run folder.")] = DEFAULT_RUN, as_json: JsonOption = False) -> None:
    """The finished stages of a run: rows, when, by which version."""
    from gubs import pipeline

    opened = pipeline.open_run(run)
    manifests = [opened.artifact(stage).manifest for stage in opened.stages()]
    if as_json:
        console.print_json([m.model_dump(mode="json") for m in manifests])
        return
    for m in sorted(manifests, key=lambda m: m.created):
        tables = ", ".join(f"{t.rows:,} {name}" for name, t in m.tables.items())
        console.out.print(f"{m.stage:<10} {m.created}  {m.code_version:<24} {tables}", markup=False, soft_wrap=True)
    if not manifests:
        console.say(f"{opened.uri}: no finished stage")


@app.command(rich_help_panel=_LOOK)
def probe(
    files: Annotated[list[str], typer.Argument(help="Video files.")],
    preset: PresetOption = "tiny",
    as_json: JsonOption = False,
) -> None:
    """The verdict on single video files: can they be decoded, and what is wrong if not."""
    from gubs.data.probe import probe_files

    results = probe_files(files, load_settings(preset).frames)
    if as_json:
        console.print_json(results)
        return
    for r in results:
        line = f"{r['verdict']:<16} {r['frames']:>3} frames  {r['file']}  {r['detail']}"
        console.out.print(line, markup=False, soft_wrap=True)


@app.command(rich_help_panel=_SETUP)
def doctor(as_json: JsonOption = False, disk: Annotated[str, typer.Option(help="Folder for runs.")] = ".") -> None:
    """Is this machine ready? One line a thing: ok, or what to do."""
    from gubs.doctor import examine

    findings = []
    for finding in examine(Path(disk)):
        findings.append(finding)
        if not as_json:
            mark = "[green]ok [/]" if finding.ok else "[red]NO [/]"
            console.out.print(
                f"{mark} {finding.name:<12} ",
                finding.text,
                "" if finding.ok else f"-> {finding.remedy}",
                soft_wrap=True,
            )
    if as_json:
        console.print_json([f.to_json() for f in findings])
    if not all(f.ok for f in findings):
        raise typer.Exit(5)


@app.command(rich_help_panel=_SETUP)
def settings(preset: PresetOption = "tiny", as_json: JsonOption = False, overrides: Overrides = None) -> None:
    """All settings with their values and meaning, after the preset and key=value."""
    from gubs.config import describe

    resolved = _settings(preset, overrides)
    if as_json:
        console.print_json(resolved.model_dump(mode="json"))
        return
    for key, value, text in describe(resolved):
        console.out.print(f"{key} = {value!r}", markup=False, style="bold", soft_wrap=True)
        if text:
            console.out.print(f"    {text}", markup=False, soft_wrap=True)


@app.command(rich_help_panel=_SETUP)
def version() -> None:
    """The version."""
    print(gubs.__version__)


def _settings(preset: str, overrides: list[str] | None) -> Settings:
    return load_settings(preset, overrides or [])


def _print_plan(plan: "Plan") -> None:
    for role in plan.roles.values():
        journal = f"{role.journaled:,} of {role.requests:,} requests are in the journal"
        tokens = f"about {role.tokens_in:,} tokens in, {role.tokens_out:,} out"
        line = f"{role.role:<11} {role.endpoint} {role.model}: {role.calls:,} calls ({journal}), {tokens}"
        console.out.print(f"{line}, price {role.money:.2f}", markup=False, soft_wrap=True)


def main(args: list[str] | None = None) -> None:
    """Runs the command line; errors with a remedy become one message and an exit code. Told to end (SIGTERM), it also
    ends what it started, a head node for example.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        app(args)
    except GubsError as e:
        console.err.print("error: ", style="bold red", end="")
        console.say(str(e))
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
