"""export and probe: adapters for other engines, and the proof that they are applied there."""

from pathlib import Path

import click

from loralab.cli.common import app, common, console_for

TYPES = ("f32", "f16", "bf16", "q8_0")


@app.command()
@click.argument("source", metavar="RUN|ADAPTER", type=click.Path(path_type=Path))
@click.option("--for", "engine", required=True, help="vllm, sglang, peft, llama.cpp or ollama.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--base", help="The base model, where SOURCE does not say it, or another copy.")
@click.option("--merged", is_flag=True, help="The base with the adapter in its weights.")
@click.option("--rank", type=int, help="Cut to this rank; approximates DoRA by plain pairs.")
@click.option("--dtype", type=click.Choice(TYPES), help="Of a GGUF base; default: as stored.")
@click.option("--adapter-only", is_flag=True, help="Write no GGUF base beside the adapter.")
@click.option("--name", help="The adapter's name on the server; default: the output's.")
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="Texts for the probes, one a line."
)
@click.option("--no-probes", is_flag=True, help="Write no probe file; the base is not run.")
@common
def export(
    source: Path,
    engine: str,
    output: Path,
    base: str | None,
    merged: bool,
    rank: int | None,
    dtype: str | None,
    adapter_only: bool,
    name: str | None,
    prompts: Path | None,
    no_probes: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write an adapter for another engine, such that it cannot be applied wrongly there.

    The scale is folded in, all pairs get one rank, and what the engine would leave out is refused
    by name. The folder holds the engine's command line and probes for `loralab probe`.

    \b
    Examples:
      loralab export runs/rank-8 --for vllm --output reviews
      loralab export my-adapter --base smollm2 --for llama.cpp --output reviews-gguf
      loralab export runs/dora --for sglang --merged --output reviews-merged
    """
    from loralab.runs.export import export as write_export, read_prompts

    console = console_for(as_json, quiet)
    document = write_export(
        source,
        output,
        engine=engine,
        base=base,
        merged=merged,
        rank=rank,
        dtype=dtype,
        name=name,
        adapter_only=adapter_only,
        probes=not no_probes,
        texts=read_prompts(prompts) if prompts is not None else (),
        listen=console.listen,
    )
    if as_json:
        console.data(document)
        return
    lines = [str(output), *(f"  {note}" for note in document["notes"])]
    if document.get("effect_kept") is not None:
        lines.append(f"  {document['effect_kept']:.4%} of the effect on the probes is kept")
    lines += ["", *document["commands"]]
    if document.get("probes") and document["url"]:
        lines.append(
            f"loralab probe {document['url']} --probes {output} --model {document['model']}"
        )
    console.text("\n".join(lines))


@app.command()
@click.argument("url")
@click.option("--probes", type=click.Path(path_type=Path), required=True, help="Of `export`.")
@click.option("--model", help="The name to ask for; default: the exported one.")
@click.option("--base-model", help="The base's name on the server, asked as a control.")
@click.option("--key", "key_variable", metavar="ENV", help="The variable that holds the API key.")
@click.option("--timeout", "timeout_seconds", type=click.FloatRange(0.1, 3600), default=60.0)
@click.option(
    "--tolerance", "tolerance_nats", type=click.FloatRange(0), help="Noise, nats a token."
)
@common
def probe(
    url: str,
    probes: Path,
    model: str | None,
    base_model: str | None,
    key_variable: str | None,
    timeout_seconds: float,
    tolerance_nats: float | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Does a server apply the adapter? Asks any OpenAI-compatible server the probes of an export.

    Tells an adapter that is applied from one that is not, from one at a wrong scale (which), and
    from something else (a part of it, another base). Exits with 1 unless it is applied.

    \b
    Examples:
      loralab probe http://localhost:8000 --probes reviews --model reviews
      loralab probe https://models.example.org --probes reviews/probes.json --key SERVER_KEY
    """
    from loralab.runs.probe import probe as ask

    console = console_for(as_json, quiet)
    more = {} if tolerance_nats is None else {"tolerance_nats": tolerance_nats}
    document = ask(
        url,
        probes,
        model=model,
        base_model=base_model,
        key_variable=key_variable,
        timeout_seconds=timeout_seconds,
        listen=console.listen,
        **more,
    )
    if as_json:
        console.data(document)
    else:
        checked = document["checked"]
        console.text(f"{document['verdict']}: {document['explanation']}")
        if checked:
            console.text(f"  checked: {checked}, {document['num_answers']} answers")
    if document["verdict"] != "applied":
        raise SystemExit(1)
