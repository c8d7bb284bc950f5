"""init and fetch: before the first training."""

from pathlib import Path

import click

from loralab.cli.common import (
    app,
    common,
    console_for,
)


@app.command()
@click.argument("path", default="recipe.toml", type=click.Path(path_type=Path))
@click.option("--model", default="minilm", show_default=True, help="Base model of the recipe.")
@click.option("--data", default="movie-reviews", show_default=True, help="Data of the recipe.")
@common
def init(path: Path, model: str, data: str, as_json: bool, quiet: bool) -> None:
    """Write a commented recipe.

    \b
    Examples:
      loralab init
      loralab init tweets.toml --model smollm2 --data tweets
    """
    from loralab.runs.init import write_recipe

    console = console_for(as_json, quiet)
    write_recipe(path, model=model, data=data)
    if as_json:
        console.data({"recipe": str(path)})
    else:
        console.text(f"{path}\n\nNext: loralab doctor {path} && loralab train {path}")


@app.command()
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Fetch every entry.")
@common
def fetch(names: tuple[str, ...], everything: bool, as_json: bool, quiet: bool) -> None:
    """List the offline catalogue, or fetch entries into the cache.

    \b
    Examples:
      loralab fetch                           what there is
      loralab fetch minilm movie-reviews
      loralab fetch digits-diffusion          trained here, minutes
    """
    from loralab.runs.fetch import catalogue, fetch_entries

    console = console_for(as_json, quiet)
    if not names and not everything:
        entries = catalogue()
        if as_json:
            console.data(entries)
        else:
            rows = [(e["name"], e["kind"], e["size"], e["licence"], e["about"]) for e in entries]
            console.table(("name", "kind", "size", "licence", "what it is"), rows)
        return
    fetched = fetch_entries(names, everything=everything, listen=console.listen)
    if as_json:
        console.data(fetched)
    else:
        console.text("\n".join(f"{name}  {path}" for name, path in fetched.items()))
