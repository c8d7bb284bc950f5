"""Laws of the store: nothing outside its folder, versions, leases, slots, memory."""

import gc
import json
import os
import shutil
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from served_adapters import llama, place, running, write_adapter_folder
from transformers import PreTrainedModel

from loralab.adapters import content_hash, hosted, read_adapter
from loralab.errors import (
    AdapterError,
    CapacityError,
    ForbiddenError,
    RequestError,
    UnknownAdapterError,
)
from loralab.serving.store import (
    AdapterStore,
    Limits,
    Registry,
    Version,
    identity,
    is_name,
    reading,
    registry,
)
from loralab.serving.store.reading import Reader
from loralab.serving.store.registry import FILES, Stamp
from loralab.serving.store.scheduling import plan
from loralab.serving.store.slots import Slot
from loralab.serving.store.working_set import WorkingSet, hit_rates

SECONDS = 30.0
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four adapters of one base."""
    root = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("red", "green", "blue", "v1.2")):
        write_adapter_folder(root / name, seed=seed + 1, rank=2 + seed)
    return root


@pytest.fixture
def root(folders: Path, tmp_path: Path) -> Path:
    """A registry of one's own to change."""
    shutil.copytree(folders, tmp_path / "adapters")
    return tmp_path / "adapters"


class Served:
    """A store on a running engine."""

    def __init__(self, store: AdapterStore, model: PreTrainedModel) -> None:
        self.store, self.model = store, model

    def versions(self, *names: str) -> tuple[Version, ...]:
        with self.store.lease(names).result(SECONDS) as lease:
            return lease.versions

    def state(self, name: str) -> Any:
        assert self.store.wait_until_idle(SECONDS)
        return next(state for state in self.store.describe() if state.name == name)


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    yield from _served(root, num_slots=2)


def _served(root: Path, **settings: Any) -> Iterator[Served]:
    model = llama()
    with running(model) as engine:
        store = AdapterStore(Registry(root), place(engine, model), **settings)
        yield Served(store, model)
        store.close()


# names ----------------------------------------------------------------------------------------


@given(st.text(max_size=12))
def test_a_name_is_one_plain_component(name: str) -> None:
    if is_name(name):
        path = Path(name)
        assert path.name == name and not path.is_absolute() and len(path.parts) == 1
        assert "\\" not in name and name not in (".", "..")


@pytest.mark.parametrize(
    "name", ["..", ".", "", "/etc", "a/b", "../red", "a\\b", "a\0b", "~", "C:", "red/", ".hidden"]
)
def test_paths_are_no_names(root: Path, name: str) -> None:
    with pytest.raises(ForbiddenError, match="names no folder under the server's adapters"):
        Registry(root).folder(name)


def test_links_that_lead_out_are_refused(root: Path, folders: Path) -> None:
    (root / "out").symlink_to(folders / "red", target_is_directory=True)
    shutil.copytree(root / "red", root / "half")
    (root / "half" / "adapter_model.safetensors").unlink()
    (root / "half" / "adapter_model.safetensors").symlink_to(
        folders / "red" / "adapter_model.safetensors"
    )
    (root / "round").symlink_to(root / "round")
    (root / "inside").symlink_to(root / "red", target_is_directory=True)
    registry = Registry(root)
    with pytest.raises(ForbiddenError, match="leads out of the server's adapters"):
        registry.folder("out")
    with pytest.raises(ForbiddenError, match="no plain file of the server's adapters"):
        registry.stamp("half")
    with pytest.raises(UnknownAdapterError):
        registry.folder("round")
    assert registry.folder("inside") == root.resolve() / "red"
    assert "out" not in registry.names() and "inside" in registry.names()


def test_a_pipe_is_never_opened(root: Path) -> None:
    (root / "red" / "probes.json").unlink()
    os.mkfifo(root / "red" / "probes.json")
    with pytest.raises(ForbiddenError, match="no plain file"):
        Registry(root).stamp("red")


# versions and identity --------------------------------------------------------------------------


def test_hosted_names_tell_dots_and_versions_apart(served: Served) -> None:
    [version] = served.versions("v1.2")
    assert version.hosted == f"v1%2E2@{version.content[:12]}"
    assert served.model.state_dict()  # the name may be part of parameters' names
    assert version.hosted in hosted(served.model)


def test_identity_is_content_and_weight() -> None:
    a, same, b = Version("a", "11"), Version("b", "11"), Version("c", "22")
    assert identity({}) == ""
    assert identity({a: 1}) == identity({same: 1.0})
    assert identity({a: 0.5, b: 1}) == identity({b: 1.0, a: 0.5}) != identity({a: 1, b: 0.5})


# slots ------------------------------------------------------------------------------------------


def test_the_least_recently_used_makes_room_and_pins_stay(served: Served) -> None:
    store = served.store
    store.pin("red").result(SECONDS).release()
    for name in ("green", "blue", "red", "v1.2"):
        served.versions(name)
    assert store.wait_until_idle(SECONDS)
    tiers = {state.name: state.tier for state in store.describe()}
    assert tiers == {"red": "device", "green": "memory", "blue": "memory", "v1.2": "device"}
    assert len(hosted(served.model)) == 2


def test_a_leased_adapter_stays_until_it_is_released(served: Served) -> None:
    held = served.store.lease(["red", "green"]).result(SECONDS)
    waiting = served.store.lease(["blue"])
    with pytest.raises(TimeoutError):
        waiting.result(0.2)
    assert {v.hosted for v in held.versions} == set(hosted(served.model))
    held.release()
    held.release()
    waiting.result(SECONDS).release()


def test_whoever_stops_waiting_leaves_the_queue(served: Served) -> None:
    held = served.store.lease(["red", "green"]).result(SECONDS)
    gone = served.store.lease(["blue"])
    assert gone.cancel()
    held.release()
    assert served.store.wait_until_idle(SECONDS)
    assert served.store.num_waiting() == 0
    assert served.store.lease(["red"]).result(SECONDS).release() is None


def test_a_mix_of_more_than_the_slots_is_refused(served: Served) -> None:
    with pytest.raises(RequestError, match="the mix uses 3 adapters, this server has 2 slots"):
        served.store.lease(["red", "green", "blue"])


def test_unloading_frees_the_memory(served: Served) -> None:
    [version] = served.versions("red")
    tensors = [
        weakref.ref(parameter)
        for name, parameter in served.model.named_parameters()
        if f"adapters.{version.hosted}." in name
    ]
    assert len(tensors) > 10
    lease = served.store.lease(["red"]).result(SECONDS)
    assert served.store.unload("red") == 1
    with pytest.raises(UnknownAdapterError, match="there is no adapter 'red'"):
        served.store.lease(["red"])
    assert version.hosted in hosted(served.model)  # the request that runs on it finishes
    lease.release()
    assert served.store.wait_until_idle(SECONDS)
    gc.collect()
    assert hosted(served.model) == () and not any(tensor() is not None for tensor in tensors)
    served.store.load("red", "red").result(SECONDS).release()


# folders that change ------------------------------------------------------------------------------


def test_a_replacement_is_atomic(served: Served, root: Path) -> None:
    old = served.store.lease(["red"]).result(SECONDS)
    write_adapter_folder(root / "red", seed=9)
    new = served.store.lease(["red"]).result(SECONDS)
    assert old.versions != new.versions
    names = {old.versions[0].hosted, new.versions[0].hosted}
    assert names == set(hosted(served.model))
    old.release()
    assert served.store.wait_until_idle(SECONDS)
    assert hosted(served.model) == (new.versions[0].hosted,)
    new.release()


def test_a_touched_file_is_the_same_version(served: Served, root: Path) -> None:
    before = served.versions("red")
    os.utime(root / "red" / "adapter_config.json")
    assert served.versions("red") == before
    assert len(hosted(served.model)) == 1


def test_a_damaged_replacement_leaves_the_version_before_it_in_service(
    served: Served, root: Path
) -> None:
    before = served.versions("red")
    file = root / "red" / "adapter_model.safetensors"
    sound = file.read_bytes()
    file.write_bytes(sound[:-200])
    assert served.versions("red") == before
    assert "is damaged" in served.state("red").refused
    served.versions("green"), served.versions("blue")  # out of its slot and back from memory
    assert served.versions("red") == before
    file.write_bytes(sound)
    assert served.versions("red") == before
    assert served.state("red").refused is None


def test_of_a_known_folder_the_tensors_alone_are_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "SETTLED_SECONDS", -1.0)
    reader = Reader(Registry(root), Limits(), lambda outline: [])
    first = reader.read("red")
    with monkeypatch.context() as patched:
        patched.setattr(reading, "read_with_blueprint", never)
        again = reader.read("red")
    assert (again.content, again.rank, again.num_bytes) == (first.content, 2, first.num_bytes)
    assert content_hash(again.adapter) == first.content
    file, times = root / "red" / WEIGHTS, (root / "red" / WEIGHTS).stat()
    flip_a_bit(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had happened
    with pytest.raises(AdapterError, match="its checksum is another"):
        reader.read("red")


def test_files_that_were_new_when_they_were_read_are_read_once_more(
    root: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writes within one tick of the file system's clock give files of one stamp."""
    settled = False
    monkeypatch.setattr(
        Registry, "stamp", lambda self, name: Stamp(((FILES[1], len(name), 1, 1, 1),), settled)
    )
    before, written = served.versions("red"), content_hash(read_adapter(root / "red"))
    write_adapter_folder(root / "red", seed=9, rank=2)
    now = content_hash(read_adapter(root / "red"))
    assert served.versions("red") == before and before[0].content == written != now
    settled = True
    assert served.versions("red") == before  # which serves on meanwhile
    assert served.state("red").version.content == written
    assert served.versions("red")[0].content == now


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("it was read from the beginning")


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    with file.open("r+b") as handle:
        handle.write(data)


def test_where_memory_is_full_the_adapter_is_not_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*about: Any) -> Any:
        return torch.empty(2**50)  # torch's own words for it

    with monkeypatch.context() as patched:
        patched.setattr(served.store.place, "attach", full)
        with pytest.raises(CapacityError, match="memory ran out"):
            served.versions("red")
    assert served.versions("red")


def test_a_folder_that_is_gone_is_unknown(served: Served, root: Path) -> None:
    held = served.store.lease(["green"]).result(SECONDS)
    shutil.rmtree(root / "green")
    with pytest.raises(UnknownAdapterError, match="there is no adapter 'green'") as caught:
        served.store.lease(["green"])
    assert "known: blue, red, v1.2" in caught.value.next_step
    assert held.versions[0].hosted in hosted(served.model)
    held.release()
    assert served.store.wait_until_idle(SECONDS)
    assert hosted(served.model) == ()


def test_what_does_not_fit_is_refused_before_it_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    with running(model) as engine:
        limits = Limits(rank=3)
        store = AdapterStore(Registry(root), place(engine, model), limits=limits)
        config = json.loads((root / "red" / "adapter_config.json").read_text())
        config["target_modules"] = ["q_proj", "no_such"]
        (root / "red" / "adapter_config.json").write_text(json.dumps(config))
        monkeypatch.setattr(reading, "read_with_blueprint", never)
        with pytest.raises(AdapterError, match="its rank is 4, this server takes at most 3"):
            store.lease(["blue"]).result(SECONDS)
        store.close()


def test_a_pickle_is_no_adapter(served: Served, root: Path) -> None:
    torch.save({}, root / "red" / "adapter_model.bin")
    (root / "red" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="is a pickle, which can run code"):
        served.versions("red")


# scheduling, as a function of the state -----------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(
        st.lists(st.integers(0, 5), min_size=1, max_size=2, unique=True), min_size=1, max_size=30
    ),
    num_slots=st.integers(2, 3),
    max_leases=st.integers(1, 3),
    luck=st.randoms(use_true_random=False),
)
def test_everybody_is_served_at_last(
    arrivals: list[list[int]], num_slots: int, max_leases: int, luck: Any
) -> None:
    waiting = [tuple(Version(f"a{n}", f"{n}") for n in needs) for needs in arrivals]
    slots: dict[Version, Slot] = {}
    running: list[tuple[Version, ...]] = []
    clock = 0
    for _ in range(40 * len(arrivals)):
        made = plan(waiting, slots, num_slots=num_slots, max_leases=max_leases)
        for version in made.load:
            clock += 1
            slots[version] = Slot(version, turn=clock)
        for version in made.empty:
            assert slots[version].num_leases == 0
            slots[version].state = "leaving"
        assert len(slots) <= num_slots
        for number in made.grants:
            running.append(waiting[number])
            for version in waiting[number]:
                slots[version].num_leases += 1
                slots[version].num_served += 1
                assert slots[version].num_leases <= max_leases
        waiting = [w for number, w in enumerate(waiting) if number not in made.grants]
        if not waiting and not running:
            return
        moving = [slot for slot in slots.values() if slot.state != "ready"]
        if moving and (not running or luck.random() < 0.7):
            slot = luck.choice(moving)
            if slot.state == "loading":
                slot.state = "ready"
            else:
                del slots[slot.version]
        elif running:
            for version in running.pop(luck.randrange(len(running))):
                slots[version].num_leases -= 1
    raise AssertionError(f"{len(waiting)} requests wait for ever")


def test_a_flood_on_one_adapter_lets_others_in(root: Path) -> None:
    for served in _served(root, num_slots=2, max_leases=4):
        store, stop = served.store, threading.Event()
        store.pin("green").result(SECONDS).release()

        def flood(store: AdapterStore = store, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                store.lease(["red"]).result(SECONDS).release()

        threads = [threading.Thread(target=flood) for _ in range(4)]
        for thread in threads:
            thread.start()
        for name in ("blue", "v1.2", "blue"):
            served.versions(name)
        stop.set()
        for thread in threads:
            thread.join()


# the working set ------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abcdef"), max_size=60), st.integers(1, 7))
def test_hit_rates_are_those_of_a_cache_that_is_run(trace: list[str], size: int) -> None:
    cache: list[str] = []
    hits = repeats = 0
    for position, name in enumerate(trace):
        repeats += name in trace[:position]
        hits += name in cache
        cache = [name, *(other for other in cache if other != name)][:size]
    expected = hits / repeats if repeats else 1.0
    assert hit_rates(trace, [size])[size] == pytest.approx(expected)


def test_the_report_warns_before_and_at_the_cliff() -> None:
    seen = WorkingSet()
    for _ in range(20):
        seen.note(["a", "b", "c", "d"])
    assert seen.report(8).warning == ""
    assert "4 adapters, and there are 4 slots" in seen.report(4).warning
    report = seen.report(3)
    assert report.hit_rates[3] == 0.0
    assert "0% found theirs in place; 4 slots would reach 100%" in report.warning
