"""`loralab init`: a commented recipe to start from."""

from pathlib import Path

from loralab.catalogue import MADE
from loralab.config import parse_config, shipped_text
from loralab.errors import OutputError
from loralab.files import write_text

IMAGE_RECIPE = "digits-styles"

TEMPLATE = """\
# A recipe: every setting of a run. Override one on the command line with section.key=value.
# Check it with `loralab doctor {path}`, train with `loralab train {path}`,
# compare the methods with `loralab compare {path}`.

[model]
name = "{model}"          # a catalogue name (loralab fetch), a local folder, or a hub id
task = "classification"   # or "causal"
num_labels = 2
dtype = "float32"         # or "bfloat16"; "auto" measures which is faster here
pooling = "{pooling}"     # "native": the model's own (CLS, last real token); or "mean", "last"
head_bias = false
head_dropout = 0.0
# dropout = 0.0           # overrides the base's own dropouts

[data]
name = "{data}"           # a catalogue name, a hub id or a folder; or give files:
# train = "train.csv"     # CSV, JSONL or Parquet; without the next two, they are split off by hash
# validation = "validation.csv"
# test = "test.csv"
text = "text"             # names of the columns
label = "label"
max_tokens = 128
# train_rows = 2000       # at most so many rows
min_rating = 0.5          # rated texts: leave out those with |mean rating| below

[method]
kind = "lora"             # "lora", "frozen", "full" or "head"
rank = 16
alpha = 32.0              # scale = alpha / rank
scaling = "alpha/rank"    # or "alpha/sqrt(rank)" (rsLoRA); `loralab doctor --convert rank=64`
dropout = 0.0             # says which settings start the same training
targets = "all-linear"    # or a list of names, or a regular expression
# exclude = ["down_proj"] # names that targets match and that stay out
# layers = "0-3, 12-15"   # only these blocks
# rank_pattern = {{ q_proj = 8, 'layers\\.0\\..*' = 32 }}   # other ranks; alpha_pattern alike
init = "kaiming"          # "gaussian", "orthogonal", "pissa", "olora"; from data: "eva", "lora_ga"
# init_rows = 64          # training rows that eva and lora_ga look at
# loraplus_lr_ratio = 16.0    # LoRA+: B learns so many times faster than A
# dora = true             # magnitudes apart from directions
# biases = "targets"      # or "all"
# whole_modules = ["norm"]    # trained whole beside the adapter, as the head always is
# token_rows = {{ embed_tokens = [49152] }}   # single rows of an embedding (new tokens)
# frozen_layers = 3       # for "frozen": the first k layers; default: the lower half
freeze_embedding = true

[training]
learning_rate = {rate}     # LoRA wants about ten times the rate of full fine-tuning
# head_learning_rate = 1e-2   # the new head's own rate
batch_size = 16
accumulation = 1
epochs = 2
schedule = "linear"       # "constant", "linear", "cosine"
warmup = 0.06             # share of all steps
weight_decay = 0.01
max_grad_norm = 1.0       # 0 clips nothing
seed = 0
evaluations_per_epoch = 1 # validations; the best checkpoint is restored at the end
# patience = 3            # stop after so many validations without improvement
checkpoint_steps = 50     # a killed run resumes from the last one, bit for bit
# compile = "auto"        # "on": torch.compile for blocks; "auto": long runs try what is faster
# activation_checkpointing = true
# offload_activations = true  # to the host's memory: long rows on a GPU
device = "auto"           # cuda, then mps, then cpu

[compare]
methods = ["head", "lora", "frozen", "full"]
seeds = [0, 1, 2]
# stop_losers = true      # LoRA's worse rates stop after a quarter, then half, of a run
# learning_rates.lora = [1e-4, 3e-4, 1e-3]    # a grid a method; extended where the best is an edge
"""


def write_recipe(path: Path, *, model: str, data: str) -> None:
    """Write a commented recipe to `path`, which must be new; of an image model the shipped one.

    Raises `OutputError` where `path` exists or cannot be written.
    """
    if path.exists():
        raise OutputError(f"{path} exists already", "choose another path, or delete it first.")
    if model in MADE:
        write_text(path, shipped_text(IMAGE_RECIPE))
        return
    pooling = "mean" if model == "minilm" else "native"
    text = TEMPLATE.format(path=path, model=model, data=data, pooling=pooling, rate="1e-3")
    parse_config(_tables(text), source="the written recipe")
    write_text(path, text)


def _tables(text: str) -> dict[str, object]:
    import tomllib

    return tomllib.loads(text)
