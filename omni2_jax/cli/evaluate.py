"""`omni2 evaluate`: measure a system; `omni2 evaluate report`: tables and plots of measurements."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.console
import rich.table
import rich.text
import typer

from omni2_jax import console
from omni2_jax.cli.evaluate_report import report
from omni2_jax.cli.mesh import Mesh
from omni2_jax.cli.recogniser import LanguageOption, RecogniserModelOption, RecogniserOption

if TYPE_CHECKING:
    from omni2_jax.evaluate.results import Results

app = console.new_app()
app.command()(report)


@app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="spoken-qa, text-qa, instructions, asr-wer, naturalness or latency; may be "
            "repeated: the answers are made once. Or copy-synthesis: the decoder's parts on "
            "recordings."
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint, a folder of answers (of omni2 chat, LLaMA-Omni, VoiceBench or "
            "UltraEval-Audio), or the URL of chat completions with audio, http://HOST/v1. "
            "[default: the embedded model]"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The spoken questions: .jsonl with audio, question and answers, a questions.json, "
            "or parquet."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where everything is written. The same command goes on where it stopped."
        ),
    ] = None,
    recogniser: RecogniserOption = None,
    recogniser_model: RecogniserModelOption = "whisper-1",
    language: LanguageOption = "en",
    beam: Annotated[int, typer.Option(min=1, help="Beams of faster-whisper.")] = 5,
    device: Annotated[str, typer.Option(help="Of faster-whisper: cpu, cuda or auto.")] = "cpu",
    judge: Annotated[
        str | None,
        typer.Option(help="For instructions: the URL of chat completions, http://HOST/v1."),
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The judge's name there.")] = "gpt-4o",
    votes: Annotated[int, typer.Option(min=1, help="How often each answer is judged.")] = 1,
    judgements: Annotated[
        Path | None,
        typer.Option(
            help="Directory that keeps what the judge said, so that nothing is paid for twice; "
            "evaluations may share it. [default: OUT/judgements]"
        ),
    ] = None,
    utmos: Annotated[
        Path | None,
        typer.Option(help="For naturalness: TorchScript weights of UTMOS, 16 kHz samples [1, N]."),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Questions answered at the same time; with latency, one.")
    ] = 8,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first N questions or conversations.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help='Only questions that state this "split". [default: all]')
    ] = None,
    every_turn: Annotated[
        bool,
        typer.Option(
            "--every-turn",
            help="All questions of a conversation, each after the replies that the data states, "
            "instead of the last one alone.",
        ),
    ] = False,
    noise: Annotated[
        float | None,
        typer.Option(
            min=-10,
            max=100,
            metavar="DB",
            help="Add noise to the questions, with this signal-to-noise ratio.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model's name, for a system at a URL.")
    ] = None,
    voice: Annotated[
        str | None, typer.Option(help="The voice that answers. [default: the system's first]")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="An option of `omni2 chat` for a checkpoint, as max_new_tokens=100; may be "
            "repeated.",
        ),
    ] = None,
    mesh: Mesh = None,
    text_only: Annotated[
        bool,
        typer.Option(
            "--text-only",
            help="A checkpoint answers in text alone, and needs neither speech LM nor decoder.",
        ),
    ] = False,
    read: Annotated[
        str | None,
        typer.Option(
            metavar="R,...",
            help="With --write: measure a checkpoint with each R and each W of the read/write "
            "rule, in OUT/readR-writeW.",
        ),
    ] = None,
    write: Annotated[str | None, typer.Option(metavar="W,...", help="See --read.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Names the system in tables. [default: its own name]")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Names the questions in tables. [default: the file's name]")
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TABLE/ROW",
            help="A row of the paper's tables that this repeats, as table2/sum; may be repeated.",
        ),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY+KEY",
            help="Also give results by several keys of the questions at once, as split+voices; "
            "may be repeated.",
        ),
    ] = None,
    key_variable: Annotated[
        str, typer.Option(help="The environment variable with the key of all URLs.")
    ] = "OPENAI_API_KEY",
    seed: Annotated[int, typer.Option(min=0, help="The seed of answers, noise and votes.")] = 0,
) -> None:
    """Measure how well a system answers spoken questions."""
    if context.invoked_subcommand is not None:
        return
    from omni2_jax.checkpoint import embedded
    from omni2_jax.evaluate import measure
    from omni2_jax.evaluate.systems import SystemOptions, parse_options
    from omni2_jax.evaluate.tasks import TaskOptions
    from omni2_jax.recognisers import RecogniserOptions

    given = {"--task": task, "--data": data, "--out": out}
    if missing := [name for name, value in given.items() if not value]:
        raise typer.BadParameter(f"{', '.join(missing)} must be given")
    assert task and data and out
    system = system or str(embedded.or_embedded(None, "--system CKPT"))
    if bool(read) != bool(write):
        raise typer.BadParameter("--read and --write go together")
    common = measure.Settings(
        tasks=tuple(task),
        system=system,
        data=data,
        out=out,
        system_options=SystemOptions(
            batch=batch,
            timed="latency" in task,
            voice=voice,
            mesh=mesh,
            speech=not text_only,
            options=parse_options(option or [], seed),
            model=model,
            key_variable=key_variable,
        ),
        task_options=TaskOptions(
            judge=judge,
            judge_model=judge_model,
            key_variable=key_variable,
            votes=votes,
            judgements=judgements or out / "judgements",
            utmos=utmos,
            checkpoint=Path(system) if (Path(system) / "config.json").exists() else None,
            voice=voice,
            copies=out / "copies",
            seed=seed,
        ),
        recogniser=recogniser,
        recogniser_options=RecogniserOptions(
            language, beam, device, model=recogniser_model, key_variable=key_variable
        ),
        limit=limit,
        split=split,
        every_turn=every_turn,
        noise=noise,
        seed=seed,
        label=label,
        dataset=dataset,
        rows=tuple(row or ()),
        by=tuple(by or ()),
    )
    pairs = itertools.product(numbers("--read", read), numbers("--write", write)) if read else None
    for results in measure.measure(common, list(pairs) if pairs else None):
        show(results)


def numbers(name: str, text: str | None) -> list[int]:
    """The positive numbers of "1,2,3". Raises BadParameter for another text."""
    parts = [part.strip() for part in (text or "").split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"{name} is {text!r}, expected positive numbers, as 1,2,3")
    return [int(part) for part in parts]


def show(results: "Results") -> None:
    """Print what was measured as a table on stdout."""
    from omni2_jax.evaluate.tasks import task_class

    table = rich.table.Table("task", "measure", "value", "95 % interval", "answers")
    table.title = rich.text.Text(f"{results.label} on {results.dataset}")
    for name, found in results.tasks.items():
        for key, estimate in found.metrics.items():
            metric = task_class(name).metrics[key]
            low, high = (f"{value:.{metric.digits}f}" for value in (estimate.low, estimate.high))
            value = f"{estimate.value:.{metric.digits}f} {metric.unit}".strip()
            table.add_row(name, metric.title, value, f"{low} to {high}", str(estimate.count))
    rich.console.Console().print(table)
