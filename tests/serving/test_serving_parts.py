"""Laws of sampling, text, queues and prefixes, without a model."""

import random
from collections import Counter

import pytest
import torch
from serving_models import byte_tokenizer
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loralab.errors import CapacityError
from loralab.serving.prefixes import Slots
from loralab.serving.requests import Sampling
from loralab.serving.sampling import Sampler, choose_tokens, kept
from loralab.serving.scheduler import FairQueue
from loralab.serving.text import TextStream


def scores(vocab: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocab", [40, 3000])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1), (7, 1), (0, 0.8), (7, 0.6), (900, 0.999)])
def test_filters_keep_what_transformers_keep(vocab, top_k, top_p):
    for seed in range(5):
        logits = scores(vocab, seed) / 1.3
        warpers = LogitsProcessorList()
        if top_k:
            warpers.append(TopKLogitsWarper(min(top_k, vocab)))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        expected = warpers(torch.zeros(1, 1, dtype=torch.int64), logits[None])[0].softmax(0)
        tokens, shares = kept(logits, top_k, top_p)
        assert tokens.tolist() == expected.nonzero().flatten().tolist()
        torch.testing.assert_close(shares / shares.sum(), expected[tokens], atol=1e-6, rtol=1e-4)


def test_the_repetition_penalty_is_transformers_own():
    prompt = [3, 5, 5, 9]
    logits = scores(20, 1)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt]), logits[None].clone())
    warmed = TemperatureLogitsWarper(0.8)(torch.tensor([prompt]), expected)[0].softmax(0)
    counts: Counter[int] = Counter()
    for seed in range(1500):
        settings = Sampling(temperature=0.8, repetition_penalty=1.7, seed=seed)
        counts[Sampler(settings, prompt).choose(logits).token_id] += 1
    drawn = torch.tensor([counts[token] / 1500 for token in range(20)])
    assert float((drawn - warmed).abs().sum()) / 2 < 0.05  # total variation
    greedy = Sampler(Sampling(temperature=0, repetition_penalty=1.7), prompt)
    assert greedy.choose(logits).token_id == int(expected.argmax())


def test_a_token_of_the_answer_is_penalised_too():
    logits = torch.tensor([1.0, 0.9, 0.1])
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), [2])
    assert [sampler.choose(logits).token_id for _ in range(2)] == [0, 1]


def test_logits_that_are_no_numbers_give_no_token():
    logits = torch.zeros(4, 8)
    logits[0, 3] = float("nan")
    logits[1] = float("-inf")
    logits[2, 2] = float("inf")
    logits[3, 5] = 1.0
    samplers = [Sampler(Sampling(temperature=0), []) for _ in range(4)]
    chosen = choose_tokens(logits, samplers)
    assert chosen[:3] == [None, None, None]
    assert chosen[3] is not None
    assert chosen[3].token_id == 5


def test_a_seed_decides_and_no_seed_does_not():
    logits = torch.zeros(1000)

    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), [])
        return [sampler.choose(logits).token_id for _ in range(5)]

    assert drawn(7) == drawn(7) != drawn(8)
    assert drawn(None) != drawn(None)


TEXTS = ["plain", "Größe", "日本語のテキスト", "a👩‍👩‍👧b🇩🇪", "tab\tnew\nline  two"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_split_no_character(text):
    stream = TextStream(byte_tokenizer())
    pieces = [stream.add(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == list(text)


def test_bytes_that_are_no_text_are_decoded_as_a_whole_would_be():
    tokenizer = byte_tokenizer()
    draw = random.Random(0)
    for _ in range(50):
        tokens = [draw.choice([draw.randrange(256), *"aé日".encode(), 256]) for _ in range(20)]
        stream = TextStream(tokenizer)
        streamed = "".join(map(stream.add, tokens)) + stream.finish()
        assert streamed == tokenizer.decode(tokens, skip_special_tokens=True)


def test_stop_texts_at_any_cut():
    tokenizer = byte_tokenizer()
    draw = random.Random(1)
    for _ in range(200):
        text = "".join(draw.choice("abé") for _ in range(12))
        stops = ["".join(draw.choice("abé") for _ in range(n)) for n in (2, 4)]
        stream = TextStream(tokenizer, stops)
        streamed = ""
        for byte in text.encode():
            streamed += stream.add(byte)
            if stream.stopped:
                break
        else:
            streamed += stream.finish()
        places = [text.find(stop) for stop in stops if stop in text]
        whole = text[: min(places)] if places else text
        # the first to be complete ends it: one that began before may never be
        assert stream.stopped == bool(places)
        assert not any(stop in streamed for stop in stops)
        assert text.startswith(streamed)
        assert len(streamed) >= len(whole)


def served(queue: FairQueue[str], tokens: dict[str, int], turns: int) -> Counter[str]:
    """What each tenant is given, when every request of it is as long as stated."""
    given: Counter[str] = Counter()
    for _ in range(turns):
        item = queue.pop()
        if item is None:
            break
        given[item] += tokens[item]
        queue.charge(item, 0, tokens[item])
    return given


def test_tenants_get_equal_shares_however_long_their_requests_are():
    queue: FairQueue[str] = FairQueue(10_000)
    tokens = {"long": 100, "short": 5, "middle": 20}
    for name, count in (("long", 50), ("short", 500), ("middle", 200)):
        for _ in range(count):
            queue.put(name, name)
    given = served(queue, tokens, 200)
    assert max(given.values()) - min(given.values()) <= 2 * max(tokens.values())


def test_who_was_away_gains_no_credit():
    queue: FairQueue[str] = FairQueue(1000)
    tokens = {"busy": 10, "late": 10}
    for _ in range(100):
        queue.put("busy", "busy")
    served(queue, tokens, 50)
    for _ in range(30):
        queue.put("late", "late")
    given = served(queue, tokens, 40)
    assert given["busy"] == pytest.approx(given["late"], abs=20)


def test_a_request_that_does_not_fit_lets_others_pass():
    queue: FairQueue[str] = FairQueue(100)
    for item in ("waits", "goes"):
        queue.put("a", item)
    assert queue.pop(lambda item: item == "goes") == "goes"
    assert queue.pop(lambda item: item == "goes") is None
    assert queue.pop() == "waits"
    assert queue.pop() is None
    assert len(queue) == 0


def test_a_full_queue_has_a_place_for_a_newcomer():
    queue: FairQueue[int] = FairQueue(100)
    for tenant in ("a", "b", "c"):
        with pytest.raises(CapacityError, match="100 places"):
            for item in range(1000):
                queue.put(tenant, item)
    queue.put("d", 0)
    assert queue.waiting()["a"] == 67
    assert len(queue) < 100


def test_many_tenants_are_forgotten_in_time():
    queue: FairQueue[int] = FairQueue(100)
    for tenant in range(1500):
        queue.put(str(tenant), tenant)
        queue.pop()
        queue.charge(str(tenant), 1, 0)
    assert len(queue._given) <= 1001


def test_the_longest_prefix_is_found_and_what_it_holds_is_kept():
    slots = Slots(3)
    first = slots.take(range(100), "x")
    assert first is not None
    assert first.num_reused == 0
    first.slot.tokens = list(range(100))
    running = slots.take([*range(60), 7, 7], "x")  # copied from a slot that is in use
    assert running is not None
    assert (running.copied_from, running.num_reused) == (first.slot, 60)
    slots.release(first.slot)
    slots.release(running.slot)
    longer = slots.take([*range(100), 5], "x")  # goes on where all that is held is needed
    assert longer is not None
    assert (longer.slot, longer.num_reused, longer.copied_from) == (first.slot, 100, None)
    assert slots.take(range(50), "y").num_reused == 0  # another adapter
    assert slots.take(range(50), "x") is not None
    assert slots.take(range(50), "x") is None


def test_the_last_token_is_always_computed():
    slots = Slots(1)
    start = slots.take(range(40), "")
    assert start is not None
    start.slot.tokens = list(range(40))
    slots.release(start.slot)
    again = slots.take(range(40), "")
    assert again is not None
    assert again.num_reused == 39
    assert again.slot.tokens == list(range(39))


def test_a_prompt_waits_for_one_that_reads_its_beginning():
    slots = Slots(2)
    reading = slots.take(range(90), "x")
    assert reading is not None
    assert slots.should_wait([*range(80), 1], "x")
    assert not slots.should_wait([*range(80), 1], "y")
    assert not slots.should_wait([1, *range(80)], "x")
    reading.slot.tokens = list(range(90))
    assert not slots.should_wait([*range(80), 1], "x")


def test_unsound_slots_are_forgotten():
    slots = Slots(1)
    start = slots.take(range(40), "")
    assert start is not None
    start.slot.tokens = list(range(40))
    slots.release(start.slot, sound=False)
    assert slots.take(range(40), "").num_reused == 0
