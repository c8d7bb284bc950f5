"""The engine gives what transformers and PEFT give, one request at a time, whatever runs beside."""

import random
import threading
from pathlib import Path

import pytest
import torch
from serving_models import (
    RANKS,
    VOCAB,
    PeftOracle,
    Receiver,
    answer,
    ask,
    byte_tokenizer,
    finish,
    peft_adapter,
    tiny_gpt2,
    tiny_llama,
)

import loralab
from loralab import adapters
from loralab.errors import CapacityError, RequestError
from loralab.serving.engine import Engine
from loralab.serving.plain_runner import PlainRunner
from loralab.serving.requests import Entry, Piece, Request, Sampling
from loralab.serving.runner import Chunk

TOKENIZER = byte_tokenizer()
ENTRIES: list[Entry] = [
    None,
    *RANKS,
    {"two": 0.5, "eight": 0.5},
    {"four": 1.5, "one": -0.5},
    {"six": 0.25},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tiny_llama()
    made = {}
    for seed, (name, rank) in enumerate(RANKS.items()):
        made[name] = tmp_path_factory.mktemp(name)
        peft_adapter(base, made[name], rank, seed)
    return made


@pytest.fixture(scope="module")
def oracle(folders: dict[str, Path]) -> PeftOracle:
    return PeftOracle(tiny_llama(), folders)


@pytest.fixture(scope="module")
def hosting(folders: dict[str, Path]) -> torch.nn.Module:
    model = tiny_llama()
    for name, folder in folders.items():
        loralab.load_adapter(model, folder, name=name)
    return model


@pytest.fixture
def engine(hosting) -> Engine:
    return Engine(PlainRunner(hosting, num_slots=8, max_tokens=128), TOKENIZER, prefill_tokens=24)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(97, 123) for _ in range(draw.randrange(1, 60))] for _ in range(count)]


def test_many_adapters_at_once_equal_generate_with_peft_one_by_one(engine, oracle):
    asked = [(prompt, ENTRIES[number % len(ENTRIES)]) for number, prompt in enumerate(prompts(24))]
    receivers = []
    for prompt, entry in asked:  # they come while others run, and are more than there are slots
        receivers.append(ask(engine, prompt, entry, max_tokens=10))
        engine.step()
    finish(engine)
    for (prompt, entry), receiver in zip(asked, receivers, strict=True):
        oracle.assert_greedy(prompt, entry, receiver.tokens)
        assert receiver.reason == ("stop" if receiver.tokens[-1] == 256 else "length")


def test_gpt2_answers_as_generate(tmp_path):
    base, model = tiny_gpt2(), tiny_gpt2()
    peft_adapter(base, tmp_path / "a", 3, 1)
    loralab.load_adapter(model, tmp_path / "a", name="a")
    engine = Engine(PlainRunner(model, num_slots=4, max_tokens=128), TOKENIZER, prefill_tokens=16)
    oracle = PeftOracle(base, {"a": tmp_path / "a"})
    asked = [(prompt, [None, "a"][n % 2]) for n, prompt in enumerate(prompts(6, seed=3))]
    receivers = [ask(engine, prompt, entry, max_tokens=8) for prompt, entry in asked]
    finish(engine)
    for (prompt, entry), receiver in zip(asked, receivers, strict=True):
        oracle.assert_greedy(prompt, entry, receiver.tokens)


def test_a_reused_prefix_changes_no_answer(engine, oracle):
    [system] = prompts(1, seed=9)
    system = (system * 9)[:70]
    asked = [([*system, 97 + n], name) for n in range(3) for name in ("two", None, "eight")]
    receivers = [ask(engine, prompt, entry, max_tokens=6) for prompt, entry in asked]
    finish(engine)
    again = [ask(engine, prompt, entry, max_tokens=6) for prompt, entry in asked]
    finish(engine)
    for (prompt, entry), first, second in zip(asked, receivers, again, strict=True):
        oracle.assert_greedy(prompt, entry, first.tokens)
        assert second.tokens == first.tokens
    stats = engine.stats()
    assert stats["prefix_hits"] >= 15  # all but the first of each adapter
    assert stats["cached_tokens"] >= 15 * 69


def test_a_conversation_goes_on_from_its_cache(engine):
    first = ask(engine, "abcdefghijklmnopqrstuvwxyz" * 2, "two", max_tokens=10)
    finish(engine)
    prompt = [*("abcdefghijklmnopqrstuvwxyz" * 2).encode(), *first.tokens, *b" go on"]
    request = Request(tuple(prompt), "two", "'two'", Sampling(max_tokens=4, temperature=0))
    ticket = engine.submit(request, Receiver())
    finish(engine)
    assert ticket.num_cached_tokens == 52 + 10 - 1  # the last token was never read


def test_another_content_under_the_same_name_shares_nothing(engine):
    prompt = "the same words for everybody who asks here"
    answer(engine, prompt, "two", identity="one hash")
    before = engine.stats()["cached_tokens"]
    answer(engine, prompt, "two", identity="another hash")
    assert engine.stats()["cached_tokens"] == before


def test_a_seed_gives_the_same_answer_whatever_runs_beside(engine):
    settings = {"temperature": 1.0, "top_p": 0.9, "seed": 11, "max_tokens": 20, "ignore_eos": True}
    alone = answer(engine, "hello", "two", **settings)
    for n in range(12):
        ask(engine, "x" * (n + 1), list(RANKS)[n % 6], max_tokens=9, temperature=1.0)
    engine.step()
    beside = ask(engine, "hello", "two", **settings)
    finish(engine)
    assert beside.tokens == alone.tokens
    other = answer(engine, "hello", "two", **{**settings, "seed": 12})
    assert other.tokens != alone.tokens


def test_logprobs_are_the_models_own(engine, oracle):
    receiver = answer(
        engine, "hello", "six", max_tokens=4, temperature=0.7, seed=1, logprobs=3, ignore_eos=True
    )
    tokens = list(b"hello")
    for piece in receiver.pieces:
        expected = oracle.logits(tokens, "six").log_softmax(0)
        assert piece.logprob == pytest.approx(float(expected[piece.token_id]), abs=1e-4)
        best = expected.topk(3)
        assert [token for token, _ in piece.top_logprobs] == best.indices.tolist()
        assert [value for _, value in piece.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )
        tokens.append(piece.token_id)


def test_scores_of_given_tokens(engine, oracle):
    tokens = tuple(prompts(1, seed=4)[0] * 4)[:60]
    future = engine.score(tokens, "four", num_best=2)
    finish(engine)
    scored = future.result(timeout=0)
    assert [one.token_id for one in scored] == list(tokens)
    assert scored[0].logprob is None
    for place in (1, 24, 25, 59):
        expected = oracle.logits(tokens[:place], "four").log_softmax(0)
        assert scored[place].logprob == pytest.approx(float(expected[tokens[place]]), abs=1e-4)
        assert scored[place].top_logprobs[0][0] == int(expected.argmax())


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(engine):
    whole = answer(engine, "hello", "two", max_tokens=30, ignore_eos=True)
    stop = whole.text[8:12]
    cut = answer(engine, "hello", "two", max_tokens=30, ignore_eos=True, stop=(stop, "never"))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.reason == "stop"
    assert len(cut.tokens) < 30


def test_cancelling_frees_the_slot(hosting):
    engine = Engine(PlainRunner(hosting, num_slots=1, max_tokens=128), TOKENIZER)
    first, second = Receiver(), Receiver()
    request = Request((97, 98), sampling=Sampling(max_tokens=100, ignore_eos=True, temperature=0))
    running = engine.submit(request, first)
    waiting = engine.submit(request, second)
    engine.step()
    third = ask(engine, "c", max_tokens=2, ignore_eos=True)
    running.cancel()
    waiting.cancel()
    finish(engine)
    assert first.reason == second.reason == "cancelled"
    assert not second.tokens
    assert third.reason == "length"
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0


def test_a_receiver_that_fails_ends_its_own_request_alone(engine):
    def broken(piece: Piece) -> None:
        raise ConnectionError("gone")

    engine.submit(Request((97,), sampling=Sampling(max_tokens=50)), broken)
    other = ask(engine, "b", "two", max_tokens=8, ignore_eos=True)
    finish(engine)
    assert len(other.tokens) == 8
    assert engine.stats()["running"] == 0


def test_one_requests_error_touches_no_other(engine, oracle):
    unknown = ask(engine, "hello", "eigth", max_tokens=5)
    fine = [ask(engine, prompt, "eight", max_tokens=5) for prompt in prompts(4, seed=5)]
    finish(engine)
    assert unknown.reason == "error"
    assert "eight" in str(unknown.pieces[-1].error)
    for prompt, receiver in zip(prompts(4, seed=5), fine, strict=True):
        oracle.assert_greedy(prompt, "eight", receiver.tokens)


def test_a_lack_of_memory_may_pass(engine, monkeypatch):
    def full(chunks):
        return torch.empty(2**50)

    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "forward", full)
        hungry = ask(engine, "hello", max_tokens=5)
        finish(engine)
    assert isinstance(hungry.pieces[-1].error, CapacityError)
    assert len(answer(engine, "hello", max_tokens=5, ignore_eos=True).tokens) == 5


def test_numbers_that_are_none_stay_with_their_request(engine, oracle, hosting):
    adapters.install(hosting, adapters.extract(hosting, "two"), "wild")
    try:
        with torch.no_grad():
            for parameter in adapters.adapter_parameters(hosting, "wild").values():
                parameter.fill_(float("nan"))
        for _ in range(3):  # slots that held NaN are used again
            wild = [ask(engine, "hello" * (n + 2), "wild", max_tokens=3) for n in range(4)]
            fine = [ask(engine, prompt, "two", max_tokens=5) for prompt in prompts(4, seed=6)]
            finish(engine)
            for one in wild:
                assert one.reason == "error"
                assert "not a number" in str(one.pieces[-1].error)
            for prompt, receiver in zip(prompts(4, seed=6), fine, strict=True):
                oracle.assert_greedy(prompt, "two", receiver.tokens)
    finally:
        loralab.detach(hosting, "wild")


def test_what_cannot_be_read_is_refused_with_a_reason(engine):
    def refused(ids: tuple[int, ...]) -> str:
        with pytest.raises(RequestError) as caught:
            engine.submit(Request(ids), Receiver())
        return str(caught.value)

    assert "empty" in refused(())
    assert "128 tokens, and at most 127" in refused((97,) * 128)
    assert f"token {VOCAB} is none of the model's {VOCAB}" in refused((97, VOCAB))
    with pytest.raises(RequestError, match="no model that can classify"):
        engine.classify((97,))
    with pytest.raises(RequestError) as caught:
        Sampling(temperature=-1, top_p=0, max_tokens=0)
    assert all(word in str(caught.value) for word in ("temperature", "top_p", "max_tokens"))


def test_a_full_slot_ends_an_answer_by_length(engine):
    receiver = answer(engine, [97] * 120, max_tokens=100, ignore_eos=True)
    assert receiver.reason == "length"
    assert len(receiver.tokens) == 8


def test_a_full_queue_says_so_and_keeps_a_place_for_others(hosting):
    engine = Engine(PlainRunner(hosting, num_slots=1, max_tokens=128), TOKENIZER, max_waiting=20)
    flood = 0
    with pytest.raises(CapacityError, match=r"14 requests are waiting.*'flood'"):
        while True:
            ask(engine, "a", tenant="flood", max_tokens=2)
            flood += 1
    assert flood == 14
    ask(engine, "b", tenant="other", max_tokens=2)
    assert engine.stats()["tenants"]["other"]["waiting"] == 1
    finish(engine)


def test_a_flood_does_not_starve_another_tenant(hosting):
    engine = Engine(PlainRunner(hosting, num_slots=2, max_tokens=128), TOKENIZER)
    flood = [
        ask(engine, "a" * 9, "two", tenant="a", max_tokens=4, ignore_eos=True) for _ in range(20)
    ]
    engine.step()
    others = [ask(engine, "b", tenant="b", max_tokens=4, ignore_eos=True) for _ in range(3)]
    while not all(one.reason for one in others):
        engine.step()
    assert sum(one.reason is not None for one in flood) <= 8
    finish(engine)
    assert all(len(one.tokens) == 4 for one in flood)


def test_a_newcomer_waits_for_nobodys_answer(hosting):
    runner = PlainRunner(hosting, num_slots=4, max_tokens=128)
    engine = Engine(runner, TOKENIZER, spare_slots=1)
    flood = [
        ask(engine, "a" * n, "two", tenant="a", max_tokens=50, ignore_eos=True) for n in range(1, 9)
    ]
    engine.step()
    assert engine.stats()["tenants"]["a"]["running"] == 3
    newcomers = [ask(engine, "b", tenant=name, max_tokens=2, ignore_eos=True) for name in "bc"]
    for _ in range(4):
        engine.step()
    assert all(one.reason == "length" for one in newcomers)
    assert not any(one.reason for one in flood)
    finish(engine)
    assert all(len(one.tokens) == 50 for one in flood)


def test_a_long_prompt_does_not_hold_up_the_others(engine):
    writing = ask(engine, "a", max_tokens=60, ignore_eos=True)
    engine.step()
    ask(engine, [98] * 100, max_tokens=2)  # five steps of reading, 24 tokens each
    before = len(writing.tokens)
    for _ in range(4):
        engine.step()
    assert len(writing.tokens) == before + 4
    finish(engine)


def test_threads_and_draining(engine):
    engine.start()
    receivers = [Receiver() for _ in range(12)]
    sampling = Sampling(max_tokens=6, temperature=0, ignore_eos=True)

    def send(part: list[Receiver]) -> None:
        for receiver in part:
            engine.submit(Request((97, 98, 99), "two", "two", sampling), receiver)

    senders = [threading.Thread(target=send, args=(receivers[n::3],)) for n in range(3)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert engine.call(lambda: 41 + 1, changes_adapters=False).result(timeout=30) == 42
    engine.close(drain=True)
    assert {tuple(one.tokens) for one in receivers} == {tuple(receivers[0].tokens)}
    assert all(one.reason == "length" for one in receivers)
    with pytest.raises(CapacityError, match="shutting down"):
        ask(engine, "late")


def test_closing_at_once_tells_everybody(engine):
    receivers = [ask(engine, "a", max_tokens=120, ignore_eos=True) for _ in range(20)]
    engine.start()
    engine.close(drain=False)
    assert all(one.reason == "cancelled" for one in receivers)


def test_adapters_come_and_go_between_steps(engine, hosting, folders, oracle):
    running = ask(engine, "hello", "two", max_tokens=20, ignore_eos=True)
    engine.step()
    loaded = engine.call(lambda: loralab.load_adapter(hosting, folders["four"], name="late"))
    engine.step()
    loaded.result(timeout=0)
    late = ask(engine, "hello", "late", max_tokens=5)
    finish(engine)
    oracle.assert_greedy(list(b"hello"), "four", late.tokens)
    assert len(running.tokens) == 20
    gone = engine.call(lambda: loralab.detach(hosting, "late"))
    failed = engine.call(lambda: loralab.detach(hosting, "never there"))
    finish(engine)
    gone.result(timeout=0)
    with pytest.raises(loralab.errors.AdapterError, match="never there"):
        failed.result(timeout=0)


def test_the_plain_runner_does_not_care_how_a_prompt_is_cut(hosting):
    [tokens] = prompts(1, seed=8)
    tokens = (tokens * 9)[:50]
    runner = PlainRunner(hosting, num_slots=3, max_tokens=128)
    whole = runner.forward([Chunk(0, tokens, 0, "two")])[0]
    done = 0
    for size in (1, 7, 30, 12):
        noise = Chunk(2, [97] * 5, 0, "eight")
        cut = runner.forward([Chunk(1, tokens[done : done + size], done, "two"), noise])[0]
        done += size
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-5)
    runner.copy_prefix(1, 2, 30)
    torch.testing.assert_close(
        runner.forward([Chunk(2, tokens[30:], 30, "two")])[0], whole, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        runner.all_logits(Chunk(0, tokens[20:], 20, "two"))[-1], whole, atol=1e-5, rtol=1e-5
    )
