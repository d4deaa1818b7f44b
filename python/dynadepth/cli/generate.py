"""The command generate: answers to one prompt, or to all prompts of a file."""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dynadepth.cli.options import PLAN_HELP, Device, Dtype, Json, Model

if TYPE_CHECKING:
    from dynadepth.cli.prompts import AnswerFile

__all__ = ["generate"]


def generate(
    *,
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to continue")] = None,
    task: Annotated[
        Path | None,
        typer.Option(
            "--task", help="File of prompts: JSON lines with `prompt`, or text, one prompt per line"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File of the answers, JSON lines; used with --task"),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="Mean depth over prompts, as a fraction of the full depth"),
    ] = None,
    fidelity: Annotated[
        float | None,
        typer.Option(
            "--fidelity",
            help="Share of new tokens that are the base model's own choice, below 1; needs routers that are exits",
        ),
    ] = None,
    plan: Annotated[str | None, typer.Option("--plan", help=PLAN_HELP)] = None,
    routers: Annotated[
        str | None,
        typer.Option(
            "--routers", help="Folder or Hub id of the routers [default: beside the model]"
        ),
    ] = None,
    router_backend: Annotated[
        Literal["torch", "onnx"],
        typer.Option("--router-backend", help="Library that computes the decisions"),
    ] = "torch",
    shortcuts: Annotated[
        str | None,
        typer.Option(
            "--shortcuts",
            help="Folder or Hub id of shortcuts, in place of skipped layers [default: those of the routers]",
        ),
    ] = None,
    max_depth: Annotated[
        float | None,
        typer.Option("--max-depth", help="Hard limit on each prompt's depth, at least 1"),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Maximum length of an answer in tokens")
    ] = 64,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", min=1, help="Number of prompts of --task that run together"),
    ] = 8,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the model's chat template")
    ] = False,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", min=0.0, help="Sampling temperature; 0 takes the likeliest token"
        ),
    ] = 0.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the sampling")
    ] = 0,
    show_exits: Annotated[
        bool,
        typer.Option(
            "--show-exits", help="Colour the tokens of --prompt's answer by where they left"
        ),
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt, or a file of them, at a mean depth (--budget), a --fidelity, or with one --plan."""
    if sum(each is not None for each in (budget, fidelity, plan)) != 1:
        raise typer.BadParameter("give one of --budget, --fidelity and --plan")
    if plan is not None and routers is not None:
        raise typer.BadParameter("--routers goes with --budget; a --plan needs no routers")
    if plan is not None and router_backend != "torch":
        raise typer.BadParameter("--router-backend goes with --budget; a --plan needs no routers")
    if show_exits and (plan is not None or prompt is None or as_json):
        raise typer.BadParameter(
            "--show-exits goes with --prompt and with --fidelity or the --budget of exits, without --json"
        )
    if (prompt is None) == (task is None):
        raise typer.BadParameter("give either --prompt or --task")
    if (task is None) != (out is None):
        raise typer.BadParameter("--task and --out go together")
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("--prompt is empty")

    from dynadepth import wrap_model
    from dynadepth.cli.prompts import AnswerFile, read_prompts
    from dynadepth.errors import ConfigError
    from dynadepth.files import sha256_text
    from dynadepth.models.loading import load_model, load_tokenizer

    prompts = [prompt or ""] if task is None else read_prompts(task)
    how: dict[str, Any] = {"plan": plan}
    if plan is None:
        how = {"routers": routers, "router_backend": router_backend}
        how |= {"budget": budget} if fidelity is None else {"fidelity": fidelity}
    how |= {"max_depth": max_depth, "shortcuts": shortcuts}
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    settings = {"model": model, "dtype": dtype, "chat": chat, "batch_size": batch_size}
    settings = {**settings, **how, **sampling, "prompts": sha256_text(json.dumps(prompts))}
    # Checked before the model is loaded, which takes a long time.
    answer_file = None if out is None else AnswerFile(out, settings)
    base = load_model(model, device=device, dtype=dtype)
    wrapped = wrap_model(base, **how)
    if show_exits and wrapped.dynadepth.exits is None:
        raise ConfigError(
            f"--show-exits was given, and the routers {routers or 'beside the model'} are no exits; train some with "
            "`dynadepth train --policy exits`"
        )
    answering = _Answering(wrapped, load_tokenizer(model), **sampling)
    tokens = answering.encode(prompts, chat=chat, task=task)
    start = time.perf_counter()
    if answer_file is None:
        (answer,) = answering.answer(prompts, tokens, [0])
        del answer["index"]
        printed, line = answer["text"], "depth {depth:.3f}, plan {plan}, {new_tokens} tokens"
        if wrapped.dynadepth.exits is not None:
            line, printed = answering.exits_seen(answer, colours=show_exits)
        del answer["ids"]
        result = {**answer, "model": model, "budget": budget, "fidelity": fidelity}
    else:
        result = {"out": str(out), **answering.answer_all(prompts, tokens, answer_file, batch_size)}
        printed = str(out)
        line = "{prompts} prompts, {plans} plans, mean depth {mean_depth:.3f}, {new_tokens} tokens"
    result["seconds"] = round(time.perf_counter() - start, 3)
    if as_json:
        typer.echo(json.dumps(result, indent=2, sort_keys=True))
        return
    # Asked for, colours are there in a pipe too.
    typer.echo(printed, color=show_exits or None)
    typer.echo(f"{line} in {{seconds:.1f}} s".format(**result), err=True)


class _Answering:
    """A wrapped model with its tokenizer and its sampling settings."""

    def __init__(
        self, model: Any, tokenizer: Any, max_new_tokens: int, temperature: float, seed: int
    ) -> None:
        self._model, self._tokenizer, self._seed = model, tokenizer, seed
        self._settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        if temperature:
            self._settings.update(do_sample=True, temperature=temperature)

    def encode(self, prompts: Sequence[str], *, chat: bool, task: Path | None) -> list[list[int]]:
        """Return the tokens of every prompt; an error names the prompt that has none."""
        from dynadepth.errors import TaskError
        from dynadepth.models.encoding import encode_prompt

        def encoded(number: int, prompt: str) -> list[int]:
            try:
                return encode_prompt(self._tokenizer, prompt, chat=chat)
            except TaskError as error:
                if task is None:
                    raise
                raise TaskError(f"{task}, prompt {number}: {error}") from error

        return [encoded(number, prompt) for number, prompt in enumerate(prompts, start=1)]

    def batches(
        self, tokens: Sequence[Sequence[int]], batch_size: int
    ) -> list[tuple[list[int], Any]]:
        """Group prompts by plan and similar length, so that every layer of a batch runs for all rows or for none.

        Returns:
            For each batch, the indices of its prompts and their plan, shape (num_layers,), uint8.
        """
        order = sorted(range(len(tokens)), key=lambda index: (len(tokens[index]), index))
        groups: defaultdict[bytes, list[int]] = defaultdict(list)
        plan_of = {}
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            plans = self._model.dynadepth.plan_prompts(
                **self._inputs([tokens[row] for row in rows])
            )
            for row, plan in zip(rows, plans, strict=True):
                groups[plan.tobytes()].append(row)
                plan_of[plan.tobytes()] = plan
        return [
            (group[begin : begin + batch_size], plan_of[key])
            for key, group in sorted(groups.items())
            for begin in range(0, len(group), batch_size)
        ]

    def answer_all(
        self,
        prompts: Sequence[str],
        tokens: Sequence[Sequence[int]],
        answer_file: "AnswerFile",
        batch_size: int,
    ) -> dict[str, Any]:
        """Write the answers to all prompts, except those that exist already, and return a summary."""
        with answer_file.open() as kept:
            batches = self.batches(tokens, batch_size)
            for done, (rows, plan) in enumerate(batches, start=1):
                if not set(rows) <= set(kept.answers):
                    with self._model.dynadepth.plans(plan):
                        found = self.answer(prompts, tokens, rows)
                        for answer in found:
                            del answer["ids"]
                        kept.add(found)
                typer.echo(f"answered batch {done} of {len(batches)}", err=True)
            answers = list(kept.answers.values())
            kept.finish()
        return {
            "prompts": len(answers),
            "batches": len(batches),
            "plans": len({answer["plan"] for answer in answers}),
            "mean_depth": sum(answer["depth"] for answer in answers) / len(answers),
            "new_tokens": sum(answer["new_tokens"] for answer in answers),
        }

    def answer(
        self, prompts: Sequence[str], tokens: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> list[dict[str, Any]]:
        """Return the answers to some prompts, which run as one batch."""
        import torch

        from dynadepth.models.encoding import answer_length, end_tokens
        from dynadepth.plans import plan_depth, plan_text

        inputs = self._inputs([tokens[row] for row in rows])
        # So that the samples of a batch do not depend on what ran before it.
        torch.manual_seed(self._seed + rows[0])
        generated = self._model.generate(**inputs, **self._settings)
        new = generated[:, inputs["input_ids"].shape[1] :].tolist()
        plans = self._model.dynadepth.last_plans
        ends = end_tokens(self._model)
        return [
            {
                "index": row,
                "prompt": prompts[row],
                "text": self._tokenizer.decode(answer, skip_special_tokens=True),
                "plan": plan_text(plan),
                "depth": float(plan_depth(plan)),
                "new_tokens": answer_length(answer, ends),
                "ids": answer,
            }
            for row, answer, plan in zip(rows, new, plans, strict=True)
        ]

    def exits_seen(self, answer: dict[str, Any], *, colours: bool) -> tuple[str, str]:
        """Add to the answer to one prompt where its tokens left.

        Args:
            answer: As `answer` returned it.
            colours: Whether its text is coloured.

        Returns:
            What to say of it, and its text.
        """
        from dynadepth.cli.exit_colours import coloured, legend
        from dynadepth.exits.exit_stats import passes_alone

        controller = self._model.dynadepth
        count, layers, run = answer["new_tokens"], controller.num_layers, controller.last_layers_run
        # The prompt's own forward gives the first token.
        decoded = [] if run is None else run[0, : max(0, count - 1)].tolist()
        layers_run = [layers, *decoded][:count]
        totals = controller.exit_totals
        passes = passes_alone(decoded, layers, controller.exits.window) if decoded else 1.0
        answer |= {"layers_run": layers_run, "passes": passes, "measured_fidelity": totals.fidelity}
        text = answer["text"]
        said = "passes {passes:.3f}, {new_tokens} tokens"
        if totals.fidelity is not None:
            said += ", fidelity by audits {measured_fidelity:.3f}"
        if colours:
            text = coloured(self._tokenizer, answer["ids"][:count], layers_run, layers)
            said += f" ({legend(layers_run, layers)})"
        return said, text

    def _inputs(self, tokens: Sequence[Sequence[int]]) -> dict[str, Any]:
        padded = self._tokenizer.pad({"input_ids": list(tokens)}, return_tensors="pt")
        names = ("input_ids", "attention_mask")
        return {name: padded[name].to(self._model.device) for name in names}
