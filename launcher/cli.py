"""The command line: each command reads its options, calls one function of another module and prints what it returns.

It decides nothing. Invariant: importing this module imports neither torch nor ray nor deepspeed nor matplotlib, so that
help and usage errors come at once; results go to standard output, progress and everything else to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..errors import UserError

INTERRUPTED = 130
# Columns of a table that is not written to a terminal.
PIPE_WIDTH = 120

app = typer.Typer(
    name="longscan",
    help="Pretrain long-context language models built on linear scans: prepare text, train, evaluate, sample.",
    epilog="Start here:  longscan prepare python-stdlib -o corpus  &&  longscan train griffin-tiny data.corpora=corpus",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluations = typer.Typer(help="Measure a trained model.", no_args_is_help=True)
app.add_typer(evaluations, name="eval")
benches = typer.Typer(help="Measure the kernels of this machine's GPU.", no_args_is_help=True)
app.add_typer(benches, name="bench")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. optimizer.lr=3e-4.")
]
ConfigName = Annotated[str, typer.Argument(metavar="CONFIG", help="A preset's name, a YAML file, or a run folder.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or one checkpoint in it.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="longscan")
    except UserError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {escape(str(error))}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    sys.exit(0)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"longscan {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""


@app.command(no_args_is_help=True)
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="python-stdlib, a text file, a folder, a glob, .jsonl, .jsonl.gz or .parquet files, an MDS folder, or "
            "Megatron's .bin with .idx.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="CORPUS", help="Folder to write the corpus into.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, or the path of a Hugging Face tokenizer.json.")] = "bytes",
    train_bpe: Annotated[
        int | None, typer.Option("--train-bpe", metavar="N", help="Train a byte-level BPE of N tokens on the sources.")
    ] = None,
    field: Annotated[
        str, typer.Option(help="Field (.jsonl) or column (.parquet, MDS) that holds the text; in MDS perhaps ids.")
    ] = "text",
    pattern: Annotated[str, typer.Option(help="Which files of a folder to take.")] = "**/*",
    heldout: Annotated[float, typer.Option(help="Share of the files kept out of training, for evaluation.")] = 0.02,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core by default.")] = None,
    shard_mib: Annotated[float, typer.Option("--shard-mib", help="Size of a shard in MiB.")] = 64.0,
    bos: Annotated[str | None, typer.Option(help="Token that begins a document, if not a usual one.")] = None,
    eos: Annotated[str | None, typer.Option(help="Token that ends a document, if not a usual one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn text into a corpus of token shards that `train` reads.

    Killed half-way, the same command goes on where it stopped. Text that cannot be used (bad UTF-8, empty, no such
    field) is counted and listed in prepare.log.jsonl.

    ```sh
    longscan prepare python-stdlib -o corpus
    longscan prepare ~/books 'news/*.jsonl.gz' --field body -o corpus --train-bpe 32000
    longscan prepare pile_text_document --tokenizer gpt-neox/tokenizer.json -o corpus
    ```
    """
    from .preparing import prepare_with_progress

    report = prepare_with_progress(
        sources,
        output,
        tokenizer=tokenizer,
        train_bpe=train_bpe,
        field=field,
        pattern=pattern,
        heldout=heldout,
        workers=workers,
        shard_mib=shard_mib,
        bos=bos,
        eos=eos,
    )
    _print(report, as_json)


@app.command(no_args_is_help=True)
def train(
    config: ConfigName,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME by default.")] = None,
    init_from: Annotated[
        str | None, typer.Option(metavar="RUN", help="Begin with the weights of this run or checkpoint.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse to go on with a run that exists.")] = False,
    stop_at: Annotated[
        int | None, typer.Option(metavar="STEP", min=1, help="Save and leave after this step; resume later.")
    ] = None,
) -> None:
    """Train a model; the same command again resumes it.

    Everything is written into the run folder: the configuration, metrics, checkpoints, TensorBoard files. Ctrl-C once
    saves and leaves, twice leaves at once.

    ```sh
    longscan train griffin-demo data.corpora=corpus run.workers=2
    longscan train my.yaml optimizer.lr=3e-4 stages.0.tokens=1.5B --run runs/lr3e-4
    longscan train griffin-tiny data.corpora=corpus --init-from runs/old --run runs/new
    ```
    """
    from .config import resolve
    from .elastic.supervisor import train as train_run
    from .validate import check_run

    resolved = resolve(config, overrides or ())
    if run is not None:
        resolved.run.folder = str(run)
    checked, _ = check_run(resolved)
    outcome = train_run(checked, fresh=fresh, init_from=init_from, stop_at=stop_at)
    hint = "" if outcome.status == "finished" else "; the same command resumes it"
    _note(f"{outcome.status}: {outcome.folder}{hint}")


@evaluations.command(no_args_is_help=True)
def extrapolate(
    run: RunPath,
    lengths: Annotated[
        str, typer.Option(help="Row lengths in tokens, separated by commas.")
    ] = "256,512,1024,2048,4096,8192",
    corpus: Annotated[str | None, typer.Option(help="Corpus to score; the run's first one by default.")] = None,
    tokens: Annotated[str, typer.Option(help="How many held-out tokens to score at each length.")] = "64Ki",
    output: Annotated[Path | None, typer.Option(help="Folder for the results; RUN/evals by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Score held-out text in rows of growing length, far beyond those of training.

    The same text is scored at every length, beside what a unigram and a bigram byte model and `xz -9` reach on it.
    Writes extrapolation.json and extrapolation.png.

    ```sh
    longscan eval extrapolate runs/griffin-demo
    longscan eval extrapolate runs/griffin-demo --lengths 512,4096,32768 --tokens 1M
    ```
    """
    from .evals.extrapolate import evaluate

    result, files = evaluate(run, lengths, corpus, tokens, output, device)
    _print(result, as_json)
    _note("wrote " + " and ".join(str(file) for file in files))


@benches.command("kernels")
def bench_kernels(
    ops: Annotated[list[str] | None, typer.Argument(metavar="OP", help="Which ops; all by default.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the usual shapes, not their growth with T; fewer repeats.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Time each op on the GPU beside what the machine allows at best and beside the peers that are installed.

    Needs a CUDA GPU and a clone of the repository. Each figure is added to benchmarks/results/ as soon as it is
    measured; `python -m benchmarks.report` makes the pages in docs/ from them.

    ```sh
    longscan bench kernels --quick
    longscan bench kernels scans attention --json
    ```
    """
    try:
        from ..benchmarks import kernels
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("longscan.benchmarks"):
            raise
        raise UserError(
            "the benchmarks are not part of an installed longscan; run this in a clone of its repository, after "
            "`make install` there"
        ) from None

    measured = kernels.run(ops or (), quick)
    _print(measured, as_json)
    if measured.failed:
        raise UserError(f"did not run: {', '.join(measured.failed)}; the table says why")


@app.command(no_args_is_help=True)
def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    tokens: Annotated[int, typer.Option(help="Most tokens to add.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this total probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Draw among this many likeliest tokens (0: all).")] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Continue a prompt with the newest checkpoint of a run; the prompt is printed first.

    ```sh
    longscan generate runs/griffin-demo "def main():" --tokens 300 --temperature 0.7
    ```
    """
    from .trained import open_trained

    text = sys.stdin.read() if prompt == "-" else prompt
    trained = open_trained(run, device)
    pieces = trained.sample(text, tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    sys.stdout.write(text)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command(no_args_is_help=True)
def plan(
    config: ConfigName,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs to lay it out on; with --simulate the most, 4096 by default.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Which GPU: a100-40gb, a100, l40s, h100, h200 or b200.")] = "h100",
    simulated: Annotated[
        bool, typer.Option("--simulate", help="Simulate steps on 8 GPUs and more, each with its best layout.")
    ] = False,
    lengths: Annotated[str, typer.Option(help="--simulate: row lengths in tokens.")] = "32Ki,128Ki,256Ki,1Mi",
    node: Annotated[int, typer.Option(min=1, help="--simulate: GPUs of a node.")] = 8,
    intra_bandwidth: Annotated[
        float, typer.Option(min=0, help="--simulate: GB/s between GPUs of a node; 0 = the data sheet's, less 20 %.")
    ] = 0.0,
    inter_bandwidth: Annotated[
        float, typer.Option(min=0.001, help="--simulate: GB/s of a GPU's network adapter.")
    ] = 45.0,
    intra_latency: Annotated[float, typer.Option(min=0, help="--simulate: microseconds of a message in a node.")] = 3.0,
    inter_latency: Annotated[float, typer.Option(min=0, help="--simulate: microseconds between nodes.")] = 8.0,
    overlap: Annotated[
        float, typer.Option(min=0, max=1, help="--simulate: share of a micro-batch that hides gradients' reduction.")
    ] = 0.0,
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="--simulate: recorded figures of the kernels to simulate with.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="--simulate: draw the result into this PNG, a new file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Lay a run out on GPUs on paper: which rank holds what, how many bytes, whether they are there.

    Nothing is built or started, and no corpus is needed. Where it does not fit, the nearest layouts that do are named.
    With --simulate, how fast a step would be on 8 to 4096 GPUs, and what ends the scaling.

    ```sh
    longscan plan griffin-1.3b --gpus 8 parallel.context=4
    longscan plan griffin-1.3b --simulate --measured benchmarks/results/kernels-h100.jsonl
    ```
    """
    if not simulated:
        from .plan_report import PlanReport

        _print(PlanReport.of(config, overrides or (), gpus, gpu), as_json)
        return
    from ..parallel.plan import Cluster, find_gpu
    from .evals.extrapolate import parse_lengths
    from .study_report import StudyReport

    bandwidths = {"intra_bandwidth": 1e9 * intra_bandwidth, "inter_bandwidth": 1e9 * inter_bandwidth}
    latencies = {"intra_latency": 1e-6 * intra_latency, "inter_latency": 1e-6 * inter_latency}
    cluster = Cluster(find_gpu(gpu), node, **bandwidths, **latencies)
    report = StudyReport.of(config, overrides or (), gpus, parse_lengths(lengths), cluster, measured, overlap)
    _print(report, as_json)
    if plot:
        _note(f"wrote {report.plot(plot)}")


@app.command(no_args_is_help=True)
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A model's folder, a run folder, or one checkpoint in it.")
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to make; it must not exist.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="--linearized: model.linearized_attention.KEY or run.seed."),
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="huggingface or longscan, to be sure of the direction the source gives.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16, for huggingface; as the weights came by default.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes or a tokenizer.json, for a source that holds none.")
    ] = None,
    linearized: Annotated[
        bool, typer.Option("--linearized", help="Of a Llama, make the twin that linearize begins with.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a Hugging Face model into a run folder, or a checkpoint into a Hugging Face model.

    Reads and writes safetensors from and to disk, one tensor at a time. RecurrentGemma, Llama and BLOOM; what does not
    fit is said before anything is written. A Llama may become its linearized twin, not trained.

    ```sh
    longscan convert recurrentgemma-2b griffin-2b
    longscan train griffin-2b data.corpora=corpus 'stages=[{seq_len: 8192, tokens: 1B}]' --init-from griffin-2b
    longscan convert runs/griffin-2b my-recurrentgemma --dtype bf16
    longscan convert llama-7b twin-7b --linearized model.linearized_attention.group=128
    ```
    """
    from .converting import convert as convert_model

    options = {"linearized": linearized, "overrides": overrides or ()}
    _print(convert_model(source, target, to, dtype, tokenizer, **options), as_json)


@app.command(no_args_is_help=True)
def linearize(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A Llama's folder (safetensors), or a run folder of a transformer.")
    ],
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME-linearized by default.")] = None,
    config: Annotated[
        str, typer.Option(metavar="NAME", help="Stages and all else but the model: a preset or a YAML file.")
    ] = "linearize",
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes or a tokenizer.json, for a source that holds none.")
    ] = None,
    stop_at: Annotated[
        int | None, typer.Option(metavar="STEP", min=1, help="Save and leave after this step; resume later.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train the linearized twin of a Llama: its attention, then adapters, then all of it on longer rows.

    The same command again resumes it. The model as it came is kept in RUN-teacher and measured beside the twin, which
    ends in RUN-merged, ready for generate, eval and train --init-from.

    ```sh
    longscan prepare ~/books -o corpus --tokenizer llama-7b/tokenizer.json
    longscan linearize llama-7b data.corpora=corpus --run runs/twin
    longscan linearize llama-7b data.corpora=corpus model.linearized_attention.group=128 stages.0.tokens=40M
    ```
    """
    from .linearizing import linearize as linearize_model

    folder = run or Path("runs") / f"{source.resolve().name}-linearized"
    found = linearize_model(source, folder, config, overrides or (), tokenizer, stop_at)
    _print(found, as_json)
    hint = "" if found.status == "finished" else "; the same command resumes it"
    _note(f"{found.status}: {folder}{hint}")


@app.command("config")
def show_config(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="A preset's name, a YAML file, or a run folder.")
    ] = None,
    overrides: Overrides = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="List every key with its type, default and meaning instead.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the resolved configuration as YAML, and what is still missing to train it.

    ```sh
    longscan config griffin-demo optimizer.lr=1e-3
    longscan config --keys
    ```
    """
    from .config_report import ConfigReport, KeysReport

    if keys:
        _print(KeysReport(), as_json)
    elif config is None:
        raise typer.BadParameter("name a configuration, or ask for --keys", param_hint="CONFIG")
    else:
        _print(ConfigReport.of(config, overrides or ()), as_json)


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the model presets: size beside the published one, FLOPs a token, bytes that generation keeps.

    Sizes are those with the published vocabulary, else with the bytes'. `model.preset=NAME` in a configuration takes a
    preset; keys beside it change it.

    ```sh
    longscan models
    longscan train small model.preset=hawk-small data.corpora=corpus
    ```
    """
    from .models_report import ModelsReport

    _print(ModelsReport.of_all(), as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can run: Python, PyTorch, GPUs, NCCL, Triton, Ray, Slurm, memory, limits."""
    from .cluster.doctor import examine

    _print(examine(), as_json)


def _print(report: Any, as_json: bool) -> None:
    """Prints a report on standard output: `to_json()` as one document, or what `show(console)` draws."""
    if as_json:
        print(json.dumps(report.to_json(), indent=2, allow_nan=False))
    else:
        report.show(Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH))


def _note(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


if __name__ == "__main__":
    main()
