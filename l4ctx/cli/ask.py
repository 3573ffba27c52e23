"""The `ask` command as a person types it, and what is refused at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l4ctx.cli import answer_options, options
from l4ctx.cli.answer_options import SamplingFlags
from l4ctx.cli.compute_options import ComputeFlags
from l4ctx.cli.dry_run import DryRunFlags, show_prompt
from l4ctx.cli.exits import check_stdout, errors_as_exit_codes
from l4ctx.cli.show import Display, carry_out, check_context_ranks, has_followed
from l4ctx.cli.sources import SourceFlags, spread
from l4ctx.cli.stdin import checkpoint_folder, holds_data, inputs, many_inputs, named
from l4ctx.cli.template_options import TemplateFlags
from l4ctx.errors import UsageError
from l4ctx.machine.ranks import Launch

if TYPE_CHECKING:
    from l4ctx.run.request import ContextOptions, Request, SourceOptions


@spread
def ask(
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION", help="What to ask; - reads the question from standard input.", show_default=False
        ),
    ] = None,
    paths: options.Paths = None,
    model: options.Model = None,
    question_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Read the question from a file (- for standard input); every argument is then a path."
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Ask many questions about the same documents: one a line, or one JSON object a line (id, question, "
            "max_new_tokens, temperature, top_p, top_k, seed). Every argument is then a path. Prints one JSON object "
            "a line, as each answer is ready; with --json, the report is the last one.",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="With --questions: answers at a time (default: as many as fit into memory, at most 32).",
            show_default=False,
        ),
    ] = None,
    in_order: Annotated[
        bool, typer.Option("--in-order", help="With --questions: print the answers in the order of the questions.")
    ] = False,
    resume_answers: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="With --questions: also append the answers to the file OUT, and ask only what it does not answer yet.",
        ),
    ] = None,
    context: answer_options.Context = None,
    save_context: Annotated[
        Path | None,
        typer.Option(
            parser=options.context_folder,
            metavar="CONTEXT",
            help="Keep what is read in this folder, to ask more later.",
        ),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            "--add",
            metavar="PATH",
            help="With --context: also read this, after what CONTEXT holds; CONTEXT does not change. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    replace: options.Replace = False,
    no_documents: Annotated[bool, typer.Option("--no-documents", help="Ask the model without any document.")] = False,
    *,
    read: SourceFlags,
    written: TemplateFlags,
    system: options.System = None,
    sampled: SamplingFlags,
    cite: answer_options.Cite = False,
    response_format: answer_options.ResponseFormat = None,
    loop_guard: answer_options.LoopGuard = True,
    computed: ComputeFlags,
    context_ranks: options.ContextRanks = 1,
    plain: options.Plain = False,
    stats: options.Stats = False,
    dry: DryRunFlags,
    log: options.Log = True,
    memory_report: options.MemoryReport = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Read documents and answer a question about them.

    l4ctx ask "What changed in version 2?" notes/ report.md --model DIR

    git log | l4ctx ask "Who worked on the parser?" --model DIR

    l4ctx ask "And who tested it?" --context CONTEXT --model DIR

    l4ctx ask --questions questions.txt --context CONTEXT --model DIR
    """
    if (question_file is not None or questions is not None) and question is not None:
        paths = [question, *(paths or [])]
        question = None

    launch = Launch.of(os.environ)

    def request() -> Request:
        from l4ctx.run.questions import QuestionsOptions
        from l4ctx.run.request import ContextOptions, Request
        from l4ctx.run.response_format import read_format

        check_stdout("the answer to")
        check_context_ranks(context_ranks, launch)
        dry.check(launch, many=questions is not None)
        saved = ContextOptions(context, save_context, is_added_to=bool(add), replace=replace)
        _check_contexts(saved, has_paths=bool(paths) or (read.files_from is not None and not add))
        _check_questions(questions, question_file, batch=batch, in_order=in_order, answers=resume_answers)
        asked, named_paths = None, read.named(paths or add or [])
        reads_pipe = context is None and not no_documents
        if questions is None:
            text, documents, stdin = inputs(question, question_file, named_paths, quiet=quiet, reads_pipe=reads_pipe)
        else:
            text = None
            found, documents, stdin = many_inputs(questions, named_paths, quiet=quiet, reads_pipe=reads_pipe)
            asked = QuestionsOptions(named(questions), found, batch, resume_answers, in_order=in_order)
        sources = read.options(documents, stdin)
        if cite and response_format is not None:
            raise UsageError("--cite asks for quotations, which --response-format does not allow: give one of them")
        if cite and no_documents:
            raise UsageError("--cite: there are no documents to name with --no-documents; leave out one of them")
        template = written.options(
            many=asked is not None, has_context=saved.folder is not None, has_system=bool(system), cites=cite
        )
        _check_sources(sources, saved, read.given(), no_documents=no_documents, system=system)
        return Request(
            checkpoint_folder(model, saved.folder, may_be_new=context is None),
            sources,
            text,
            system,
            saved,
            sampled.options(
                loop_guard=loop_guard,
                cites=cite,
                schema=None if response_format is None else read_format(response_format),
            ),
            computed.compute_options(context_ranks),
            computed.kv_options(),
            asked,
            launch,
            template,
        )

    with errors_as_exit_codes(json=json, checkpoint=model, context=context or save_context) as interruption:
        if dry.dry_run:
            show_prompt(request(), interruption, dry, json=json, quiet=quiet)
        elif not has_followed(launch):
            carry_out(request(), interruption, Display(json, quiet, memory_report, plain=plain, stats=stats, log=log))


def _check_questions(
    questions: Path | None, question_file: Path | None, *, batch: int | None, in_order: bool, answers: Path | None
) -> None:
    """Raises UsageError for options about many questions that do not go together."""
    if questions is not None and question_file is not None:
        raise UsageError("--question-file holds one question, --questions many: give one of them")
    for option, is_given in (
        ("--batch", batch is not None),
        ("--in-order", in_order),
        ("--resume-answers", answers is not None),
    ):
        if is_given and questions is None:
            raise UsageError(f"{option} is for --questions")


def _check_contexts(saved: ContextOptions, *, has_paths: bool) -> None:
    """Raises UsageError for options about saved contexts that do not go together."""
    if saved.answer_from is not None and saved.save_to is not None:
        raise UsageError(
            "--context answers from what was kept, --save-context keeps: give one of them "
            "(l4ctx prefill adds documents to a context)"
        )
    if saved.is_added_to and (saved.answer_from is None or has_paths):
        raise UsageError(
            "--add PATH reads PATH behind what --context CONTEXT holds: give a context, and no other paths"
        )
    if saved.replace and saved.save_to is None:
        raise UsageError("--replace is for --save-context")


def _check_sources(
    sources: SourceOptions, saved: ContextOptions, given: list[str], *, no_documents: bool, system: str | None
) -> None:
    """Raises UsageError where there is nothing to ask about, and for options about what a context holds already."""
    if no_documents:
        if sources.paths or saved.folder is not None or (sources.stdin and holds_data(sources.stdin)):
            raise UsageError(
                "--no-documents asks the model alone: leave out paths, --context, --save-context and "
                "what is piped in, or leave out --no-documents"
            )
    elif not sources.paths and saved.answer_from is None:
        raise UsageError(
            "no documents: name files or folders, pipe a text in, or add --context CONTEXT; "
            "--no-documents asks the model alone"
        )
    if saved.answer_from is None or (sources.paths and not saved.is_added_to):
        return
    if saved.is_added_to:
        given = []
    for option in ["--system", *given] if system is not None else given:
        raise UsageError(f"{option}: what it is about is part of what the context holds; give it to l4ctx prefill")
