"""Commands that use what a run made, and those that a person answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from effbench.cli.options import ConfigDirs, Overrides, Results, complete_run
from effbench.runner.progress import Progress
from effbench.util.wrap import write

PointName = Annotated[str, typer.Option("--point", help="Operating point; else the last one.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(min=0.01, max=1, help="Share of the likely tokens.")]
DrawnFrom = Annotated[int, typer.Option("--draws", min=0, help="Seed of what is drawn.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to a command line."""
    for command in (export, generate, chat, judge):
        app.command()(command)


def export(
    run: Annotated[str, typer.Argument(help="Key, prefix or latest.", autocompletion=complete_run)],
    folder: Annotated[Path, typer.Argument(help="New folder to write.")],
    to: Annotated[
        Literal["auto", "transformers", "peft", "gguf"],
        typer.Option(help="For which tool; auto: an adapter for peft where it is one."),
    ] = "auto",
    point: Annotated[str, typer.Option(help="Operating point; the last one by default.")] = "",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the weights; auto: float32 where something is multiplied out."),
    ] = "auto",
    results: Results = Path("results"),
) -> None:
    """Write what a run made in a form that other tools load, with a README.

    \b
    Examples:
      effbench export latest adapter-r8 --point r8
      effbench export latest merged --to transformers
      effbench export latest merged --to gguf --dtype bfloat16
    """
    with Progress(sys.stderr.isatty()).during("export: loading"):
        from effbench.runner.stages.export import export as export_run

        said = export_run(run, folder, point, results, to, dtype)
    for line in said:
        write(line)
    write(f"Written: {folder}")


def generate(
    overrides: Overrides = None,
    prompt: Annotated[str, typer.Option(help="Text to go on from; - reads it from stdin.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Leave the chat template out.")] = False,
    point: PointName = "",
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    draws: DrawnFrom = 0,
    config_dir: ConfigDirs = None,
) -> None:
    """Go on from a prompt with what a run made, or with a model as it is.

    The prompt goes through the model's chat template, where it has one.

    \b
    Examples:
      effbench generate from=latest --prompt "2 + 2 ="
      effbench generate from=latest --point r4 --prompt "2 + 2 =" --temperature 0.7
      effbench generate model=smollm2-135m --prompt "Why is the sky blue?"
    """
    from effbench.cli.talk import Wish, generate_once

    wish = Wish(point, max_new_tokens, temperature, top_p, draws)
    text = sys.stdin.read() if prompt == "-" else prompt
    generate_once(list(overrides or []), list(config_dir or []), text, raw, wish)


def chat(
    overrides: Overrides = None,
    point: PointName = "",
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    draws: DrawnFrom = 0,
    config_dir: ConfigDirs = None,
) -> None:
    """Talk with what a run made, or with a model as it is: /clear begins anew, /quit ends.

    \b
    Examples:
      effbench chat from=latest
      effbench chat from=latest --point r4
    """
    from effbench.cli.talk import Wish, talk

    wish = Wish(point, max_new_tokens, temperature, top_p, draws)
    talk(list(overrides or []), list(config_dir or []), wish)


def judge(rules: Annotated[Path, typer.Argument(help="File of rules in JSON lines.")]) -> None:
    """Accept or reject the rules that wait in a file, each with its evidence, one by one.

    Each decision is in the file at once: quit when you like, the same command goes on.

    \b
    Example:
      effbench judge rules.jsonl
    """
    from effbench.cli.judging import judge_file

    judge_file(rules, input, typer.echo)
