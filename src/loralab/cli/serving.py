"""serve: many adapters on one base, over HTTP."""

import json
from pathlib import Path
from typing import Any, Literal

import click

from loralab.cli.common import app, common, console_for


@app.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--base", help="The base model: a catalogue name, hub id or folder.")
@click.option("--adapters", type=click.Path(path_type=Path), help="A folder of adapters' folders.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Others need --keys.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--keys", type=click.Path(path_type=Path), help="A TOML file of keys and quotas.")
@click.option("--add-key", metavar="NAME", help="Make a key, add its hash to --keys, and end.")
@click.option("--admin", is_flag=True, help="With --add-key: it may load, unload and read metrics.")
@click.option("--slots", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--max-batch-size", type=click.IntRange(1, 1024), default=32, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=2), help="Of a prompt and its answer.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
)
@click.option(
    "--weights",
    type=click.Choice(["base", "int8"]),
    default="base",
    show_default=True,
    help="In which decoding reads the base; what int8 costs is measured and said.",
)
@click.option("--require-probes", is_flag=True, help="Refuse adapters that cannot be proved.")
@common
def serve(
    run: Path | None,
    base: str | None,
    adapters: Path | None,
    host: str,
    port: int,
    keys: Path | None,
    add_key: str | None,
    admin: bool,
    slots: int,
    max_batch_size: int,
    max_tokens: int | None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"],
    weights: Literal["base", "int8"],
    require_probes: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Serve adapters on one base in OpenAI's API, each proved to be applied.

    Requests name the base, an adapter, or a mix ("reviews=0.7,tweets=0.3") as `model`. With --json
    one line tells when the server answers.

    \b
    Examples:
      loralab serve --base smollm2 --adapters my-adapters
      loralab serve runs/rank-8 --port 8080
      loralab serve --add-key alice --keys keys.toml
      loralab serve --base smollm2 --adapters my-adapters --host 0.0.0.0 --keys keys.toml
    """
    console = console_for(as_json, quiet)
    if add_key is not None:
        if keys is None:
            raise click.UsageError("--add-key needs --keys FILE, where the key's hash is kept")
        from loralab.serving.http import add_key as make_key

        key = make_key(keys, add_key, admin=admin)
        if as_json:
            console.data({"name": add_key, "key": key, "admin": admin, "file": str(keys)})
        else:
            console.say(f"{keys} keeps its hash; the key itself is shown this once:")
            console.text(key)
        return
    from loralab.runs.serve import Serving, serve as serve_it

    def ready(facts: dict[str, Any]) -> None:
        console.close()
        if as_json:
            console.line(json.dumps({"ready": True, **facts}))
            return
        key = ' -H "Authorization: Bearer $LORALAB_KEY"' if facts["keys"] else ""
        model = facts["models"][-1]
        question = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 16})
        console.line(f"{facts['url']}/v1  ({', '.join(facts['models'][:8])})")
        console.line(
            f"curl {facts['url']}/v1/completions{key} -H 'Content-Type: application/json' "
            f"-d '{question}'"
        )

    serve_it(
        Serving(
            source=run,
            base=base,
            adapters=adapters,
            host=host,
            port=port,
            keys=keys,
            num_slots=slots,
            max_batch_size=max_batch_size,
            max_tokens=max_tokens,
            dtype=dtype,
            weights=weights,
            require_probes=require_probes,
        ),
        listen_to=console.listen,
        on_ready=ready,
    )
