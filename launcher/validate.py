"""Whether a configuration makes sense as a whole, found out before any process starts.

It builds nothing and starts nothing. Invariant: a run that passed here fails later for its machine's reasons alone, and
every problem is told at once, with the values.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..models import config as models
from .config import Config, StageConfig, with_vocabulary
from .schema import problems_of

if TYPE_CHECKING:
    from ..data import Corpus
    from ..parallel.dims import ParallelDims

SKIPPED = re.compile(r"(\d+):(\d+)-(\d+)")


def check_run(config: Config, workers: int | None = None) -> tuple[Config, list[Corpus]]:
    """The configuration with vocabulary, workers and whole paths filled in, and its corpora, once all passed the rules.

    Paths are made absolute because a cluster's workers start in another folder, and evaluations in any.
    """
    workers = worker_count(config) if workers is None else workers
    validate(config, workers)
    config = _with_whole_paths(config)
    corpora = open_corpora(config)
    config = with_vocabulary(config, corpora[0].tokenizer.vocab_size)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, workers=workers)), corpora


def _with_whole_paths(config: Config) -> Config:
    """The configuration with local corpora named by absolute paths; URLs stay."""
    from ..data import is_url

    entries = [
        entry
        if is_url(entry.path)
        else dataclasses.replace(entry, path=os.path.abspath(os.path.expanduser(entry.path)))
        for entry in config.data.corpora
    ]
    return dataclasses.replace(config, data=dataclasses.replace(config.data, corpora=entries))


def validate(config: Config, workers: int | None = None) -> None:
    """Returns nothing; raises ConfigError naming every broken rule. `workers` defaults to `worker_count(config)`."""
    problems = list(problems_of(config)) or list(_problems(config, workers))
    try:
        models.validate(config.model)
    except ConfigError as error:
        problems.append(str(error))
    if len(problems) == 1:
        raise ConfigError(f"{problems[0]}.")
    if problems:
        raise ConfigError(f"{len(problems)} problems in the configuration:" + "".join(f"\n  - {p}" for p in problems))


def worker_count(config: Config) -> int:
    """How many workers the run takes: as set, else by parallel.data, else one a GPU of this machine, else one."""
    if config.run.workers or config.run.launcher == "inline":
        return config.run.workers or 1
    if config.parallel.data:
        return config.parallel.data * replica_size(config)
    if config.run.device == "cpu":
        return 1
    import torch

    return max(torch.cuda.device_count(), 1)


def replica_size(config: Config) -> int:
    """How many workers hold one copy of the model."""
    return config.parallel.context * config.parallel.tensor * config.parallel.pipeline


def parallel_dims(config: Config, workers: int) -> ParallelDims:
    """The layout of the run over that many workers."""
    from ..parallel.dims import ParallelDims

    options = dataclasses.asdict(config.parallel)
    options |= {"data": workers // replica_size(config), "stage_layers": tuple(config.parallel.stage_layers)}
    return ParallelDims(**options)


def stage_micro_rows(config: Config, stage: StageConfig) -> int:
    """Rows of a micro-batch in `stage`."""
    return stage.micro_rows or config.batch.micro_rows


def open_corpora(config: Config) -> list[Corpus]:
    """The corpora of the configuration, in its order; they must share a tokenizer and hold a row of every stage."""
    from ..data import open_corpus

    corpora = [open_corpus(entry.path) for entry in config.data.corpora]
    first = corpora[0]
    for corpus in corpora[1:]:
        if corpus.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise ConfigError(
                f"{first.location} and {corpus.location} were prepared with different tokenizers "
                f"({_tokenizer(first)} and {_tokenizer(corpus)}); prepare them with the same one."
            )
    longest = max(stage.seq_len for stage in config.stages)
    for corpus in corpora:
        train = corpus.splits["train"]
        positions = train.tokens + train.documents
        if positions < longest:
            raise ConfigError(
                f"{corpus.location} holds {positions} training tokens, less than one row of {longest}; "
                "prepare more text or lower stages.*.seq_len."
            )
    return corpora


def _tokenizer(corpus: Corpus) -> str:
    info = corpus.tokenizer
    return f"{info.kind}, {info.vocab_size} tokens, {info.fingerprint[:8]}"


def _problems(config: Config, workers: int | None) -> Iterator[str]:
    yield from _data_problems(config)
    if not config.stages:
        yield "stages is empty; give at least one, say stages=[{seq_len: 512, tokens: 10M}]"
    for index, stage in enumerate(config.stages):
        yield from _stage_problems(config, index, stage)
    yield from _optimizer_problems(config)
    yield from _layout_problems(config, workers)
    yield from _run_problems(config)


def _data_problems(config: Config) -> Iterator[str]:
    if not config.data.corpora:
        yield "data.corpora is empty; run `longscan prepare` and name its folder: data.corpora=[FOLDER]"
    for index, corpus in enumerate(config.data.corpora):
        if not corpus.path:
            yield f"data.corpora.{index}.path is empty; name a folder or URL that `longscan prepare` wrote"
    for text in config.data.skipped_rows:
        found = SKIPPED.fullmatch(text)
        if not found:
            yield f"data.skipped_rows holds {text!r}; write stage:first-last, say 0:1200-1215"
        elif int(found[1]) >= len(config.stages) or int(found[2]) > int(found[3]):
            yield f"data.skipped_rows holds {text!r}; there are {len(config.stages)} stages, and first <= last"


def _stage_problems(config: Config, index: int, stage: StageConfig) -> Iterator[str]:
    name, batch, micro = f"stages.{index}", config.batch.tokens, stage_micro_rows(config, stage)
    if batch % stage.seq_len:
        below = batch // stage.seq_len * stage.seq_len
        nearest = f"{below} or {below + stage.seq_len}" if below else f"{stage.seq_len}"
        yield f"batch.tokens is {batch}, not a multiple of {name}.seq_len {stage.seq_len}; take {nearest}"
    elif (batch // stage.seq_len) % micro:
        rows, key = batch // stage.seq_len, f"{name}.micro_rows" if stage.micro_rows else "batch.micro_rows"
        yield (
            f"a step of {name} has {rows} rows (batch.tokens {batch} / seq_len {stage.seq_len}), "
            f"not a multiple of {key} {micro}; set {name}.micro_rows to a divisor of {rows}"
        )
    if stage.tokens < batch:
        yield f"{name}.tokens is {stage.tokens}, less than one step of batch.tokens {batch}"
    if stage.weights and len(stage.weights) != len(config.data.corpora):
        yield f"{name}.weights holds {len(stage.weights)} numbers for {len(config.data.corpora)} corpora"
    if stage.weights and (min(stage.weights) < 0 or max(stage.weights) <= 0):
        yield f"{name}.weights is {stage.weights}; no weight may be negative and one must be above 0"
    yield from _position_problems(name, stage, config)
    yield from _objective_problems(index, stage, config)


def _position_problems(name: str, stage: StageConfig, config: Config) -> Iterator[str]:
    told, pattern = models.told_positions(config.model), ", ".join(config.model.pattern)
    if stage.rope_base and "rope" not in told:
        yield f"{name}.rope_base is {stage.rope_base:g}, but nothing in model.pattern ({pattern}) rotates; leave it out"
    elif 0 < stage.rope_base <= 1:
        yield f"{name}.rope_base is {stage.rope_base:g}; it must be above 1, or 0 for the model's"
    if stage.alibi_scale and "alibi" not in told:
        yield f"{name}.alibi_scale is {stage.alibi_scale:g}, but model.pattern ({pattern}) has no ALiBi; leave it out"


def _objective_problems(index: int, stage: StageConfig, config: Config) -> Iterator[str]:
    name, model = f"stages.{index}", config.model
    if stage.trains == "lora" and not model.lora.rank:
        yield f"{name}.trains is lora, but model.lora.rank is 0; set it, say to 8"
    if stage.trains == "mixers" and set(model.mixers) != {"linearized_attention"}:
        yield f"{name}.trains is mixers, which needs model.pattern=[linearized_attention], not {model.pattern}"
    if stage.objective != "attention_transfer":
        return
    if stage.trains != "mixers":
        yield f"{name}.objective is attention_transfer, which needs {name}.trains=mixers, not {stage.trains}"
    if any(earlier.objective != stage.objective for earlier in config.stages[:index]):
        yield f"{name}.objective is attention_transfer after another; it matches weights that are still the teacher's"


def _optimizer_problems(config: Config) -> Iterator[str]:
    betas, batch, schedule = config.optimizer.betas, config.batch, config.schedule
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"optimizer.betas is {betas}; it must be two numbers from 0 to below 1"
    if bool(batch.ramp_from) != bool(batch.ramp_steps):
        yield f"batch.ramp_from is {batch.ramp_from} and batch.ramp_steps {batch.ramp_steps}; set both or neither"
    if batch.ramp_from > batch.tokens:
        yield f"batch.ramp_from is {batch.ramp_from}, more than batch.tokens {batch.tokens}"
    smallest = max((stage.seq_len * stage_micro_rows(config, stage) for stage in config.stages), default=0)
    if batch.ramp_from and batch.ramp_from < smallest:
        yield f"batch.ramp_from is {batch.ramp_from}, less than one micro-batch of {smallest} tokens"
    steps = sum(stage.tokens // batch.tokens for stage in config.stages) + batch.ramp_steps
    if config.stages and schedule.warmup_steps >= max(steps, 1):
        yield (
            f"schedule.warmup_steps is {schedule.warmup_steps}, but the run has about {steps} steps; "
            "lower it or train on more tokens"
        )


def _layout_problems(config: Config, workers: int | None) -> Iterator[str]:
    if config.run.launcher == "inline" and config.run.workers > 1:
        yield f"run.workers is {config.run.workers}, but run.launcher=inline has one; use run.launcher=ray"
        return
    workers = worker_count(config) if workers is None else workers
    size, data = replica_size(config), config.parallel.data
    layout = "context x tensor x pipeline = {context} x {tensor} x {pipeline}".format(**vars(config.parallel))
    if workers % size:
        yield f"{workers} workers cannot be split into replicas of {size} ({layout}); take a multiple of {size}"
    elif data and data * size != workers:
        yield (
            f"parallel.data is {data} replicas of {size} ({layout}), which takes {data * size} workers, not {workers}; "
            f"set parallel.data to {workers // size} or 0"
        )
    else:
        yield from _dims_problems(config, workers)


def _dims_problems(config: Config, workers: int) -> Iterator[str]:
    """What `parallel` itself refuses: sizes that the model or the rows do not divide by."""
    try:
        models.validate(config.model)
    except ConfigError:
        return  # `validate` tells that; no layout can be held against such a model.
    try:
        parallel_dims(config, workers).validate(workers, config.model, [stage.seq_len for stage in config.stages])
    except ConfigError as error:
        yield str(error).rstrip(".")


def _run_problems(config: Config) -> Iterator[str]:
    if config.logging.wandb and find_spec("wandb") is None:
        yield f"logging.wandb is {config.logging.wandb} and wandb is not installed: pip install 'longscan[wandb]'"
    if config.run.implementation == "triton" and config.run.device == "cpu":
        yield "run.implementation is triton and run.device is cpu; Triton needs a GPU, take auto or reference"
    if config.run.compile and config.parallel.zero == 3:
        yield (
            "run.compile is true and parallel.zero is 3, which changes the parameters' shapes from hooks that no graph "
            "can hold; set run.compile=false or parallel.zero=2"
        )
    compiler = os.environ.get("CXX", "g++")
    if config.run.compile and config.run.device == "cpu" and shutil.which(compiler) is None:
        yield f"run.compile is true and there is no C++ compiler {compiler} here; install it, or name another by CXX"
    if config.run.cuda_graphs:
        yield from _graph_problems(config)
    if config.parallel.copy_engines and config.run.device == "cpu":
        yield "parallel.copy_engines is true and run.device is cpu, which has none; set parallel.copy_engines=false"
    ratio = config.run.max_loss_ratio
    if 0 < ratio <= 1:
        yield f"run.max_loss_ratio is {ratio}; it must be above 1, or 0 to switch it off"
    checkpoint = config.checkpoint
    if checkpoint.keep_every % checkpoint.every:
        yield (
            f"checkpoint.keep_every is {checkpoint.keep_every}, not a multiple of checkpoint.every {checkpoint.every}"
        )


def _graph_problems(config: Config) -> Iterator[str]:
    """What a CUDA graph of a micro-batch cannot hold."""
    run, parallel = config.run, config.parallel
    rules = [
        ("parallel.zero", parallel.zero, parallel.zero > 0, "whose gradients DeepSpeed's host code adds up", "0"),
        ("parallel.pipeline", parallel.pipeline, parallel.pipeline > 1, "whose micro-batches alternate", "1"),
        (
            "run.activation_checkpoint",
            "offload",
            run.activation_checkpoint == "offload",
            "which the host copies",
            "full",
        ),
        ("run.compile", "true", run.compile, "which compiles at any step", "false"),
        ("run.implementation", "reference", run.implementation == "reference", "which asks the GPU for counts", "auto"),
        ("run.device", "cpu", run.device == "cpu", "which has no graphs", "cuda"),
    ]
    for name, value, broken, why, remedy in rules:
        if broken:
            yield f"run.cuda_graphs is true and {name} is {value}, {why}; set run.cuda_graphs=false or {name}={remedy}"
