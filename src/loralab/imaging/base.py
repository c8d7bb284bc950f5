"""`digits-diffusion`: a base that no package carries, trained here once and kept in the cache."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from loralab.catalogue import cache_folder
from loralab.config import MethodSection, TrainingSection
from loralab.errors import Interrupted, ResumeError
from loralab.events import Listener, Note, Phase, Progress, ignore
from loralab.files import cannot_write
from loralab.imaging.denoiser import Denoiser, build_denoiser, save_denoiser
from loralab.imaging.denoising import DenoisingTask
from loralab.imaging.digits import load_digits
from loralab.models import choose_dtype
from loralab.training import Started, StepDone, choose_device, fit, prepare

DIGITS_BASE = "digits-diffusion"
FACTS = "training.json"  # in the base's folder: how it was trained, and how long that took


@dataclass(frozen=True)
class BaseRecipe:
    """All that decides the base, but for the machine."""

    channels: tuple[int, ...] = (48, 96)
    fold: int = 4
    num_steps: int = 1150
    batch_size: int = 64
    learning_rate: float = 2e-3
    class_dropout: float = 0.1
    seed: int = 0

    def build(self) -> Denoiser:
        """The base before its training."""
        return build_denoiser(channels=self.channels, fold=self.fold, seed=self.seed)

    def key(self) -> str:
        """A hash of the recipe and of the versions that its bits depend on."""
        versions = {name: version(name) for name in ("torch", "diffusers", "scikit-learn")}
        text = json.dumps([asdict(self), versions], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def folder(self) -> Path:
        """Where the cache keeps the trained base, whether it is there yet or not."""
        return cache_folder() / "trained" / f"{DIGITS_BASE}-{self.key()}"


def digits_base(
    recipe: BaseRecipe | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    listen: Listener = ignore,
) -> Path:
    """The diffusers folder of the trained base; trained at first use, which takes minutes.

    Several processes may ask at once: one trains, the others wait. A training that was interrupted
    goes on from its last checkpoint.

    Raises `ModelError` without diffusers or scikit-learn, `Interrupted` after Ctrl-C, `OutputError`
    for a cache that cannot be written.
    """
    recipe = recipe or BaseRecipe()
    recipe.build()  # says what is not installed before anything else
    folder = recipe.folder()
    if not is_trained(folder):
        with _locked(folder, listen):
            if not is_trained(folder):
                _train(recipe, folder, device, threads, listen)
    return folder


def is_trained(folder: Path) -> bool:
    """Whether the folder holds a whole base: it is put there by one rename."""
    return (folder / FACTS).is_file()


def _train(
    recipe: BaseRecipe, folder: Path, device: str, threads: int | None, listen: Listener
) -> None:
    dtype = choose_dtype(choose_device(device).type).dtype
    started = time.perf_counter()
    work = folder.with_name(f".{folder.name}.{dtype}")  # another dtype is another training
    try:
        denoiser = _trained(recipe, work, dtype, device, threads, listen)
    except ResumeError as error:
        listen(Note(f"the base's training starts again: {error.cause}", warning=True))
        shutil.rmtree(work)
        denoiser = _trained(recipe, work, dtype, device, threads, listen)
    except Interrupted:
        raise Interrupted(
            f"interrupted while the base {DIGITS_BASE} was trained; its state is safe in the cache",
            "start the same command again: it goes on from there.",
        ) from None
    facts = {**asdict(recipe), "dtype": dtype, "seconds": time.perf_counter() - started}
    save_denoiser(denoiser, folder, {FACTS: facts})
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _trained(
    recipe: BaseRecipe,
    work: Path,
    dtype: str,
    device: str,
    threads: int | None,
    listen: Listener,
) -> Denoiser:
    """The base after its training, whose checkpoints lie in `work`."""
    rows, denoiser = load_digits().train, recipe.build()
    training = TrainingSection(
        learning_rate=recipe.learning_rate,
        batch_size=recipe.batch_size,
        epochs=-(-recipe.num_steps * recipe.batch_size // len(rows)) + 1,
        max_steps=recipe.num_steps,
        weight_decay=0.0,
        seed=recipe.seed,
        device=device,
        threads=threads,
    )
    task = DenoisingTask(
        denoiser.scheduler,
        class_dropout=recipe.class_dropout,
        bfloat16=dtype == "bfloat16",
    )
    trainable = prepare(denoiser.unet, MethodSection(kind="full"), training, task=task)
    for event in fit(trainable, rows, (), work):
        if isinstance(event, Started):
            listen(Phase(f"training the base {DIGITS_BASE}, once", event.total_steps, "steps"))
            listen(Progress(event.step))
        elif isinstance(event, StepDone):
            listen(Progress(event.step, f"loss {event.loss:.4f}"))
    return denoiser


@contextmanager
def _locked(folder: Path, listen: Listener) -> Iterator[None]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        listen(Note(f"waiting for another process that trains {DIGITS_BASE}"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
