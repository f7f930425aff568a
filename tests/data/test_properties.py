"""What holds for any buckets, captions and batches, on inputs that hypothesis makes up: the same ones in every run."""

from __future__ import annotations

import math
import random
import re
from itertools import islice, pairwise, product
from random import Random
from typing import NamedTuple

import pytest

pytest.importorskip("hypothesis")

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from library.data.sample import buckets
from library.data.sample import images as imaging
from library.data.sample.captions import CaptionOptions, make_caption
from library.data.sample.sampler import EpochBatches
from library.data.types import ItemKey
from library.runtime.seeds import derive
from library.types import Size

MANY = settings(deadline=None, derandomize=True, max_examples=100)
SEEDS = st.integers(0, 2**32 - 1)


# --- buckets ---


class Case(NamedTuple):
    """A resolution with limits that the options would accept, and its buckets."""

    resolution: Size
    low: int
    high: int
    step: int
    sizes: list[Size]


@st.composite
def cases(draw) -> Case:
    step = draw(st.sampled_from([8, 16, 32, 64]))
    resolution = Size(*(draw(st.integers(step, 1536)) for _ in "wh"))
    low = draw(st.integers(step, min(resolution)))
    high = draw(st.integers(max(resolution), 2048))
    low, high = buckets.round_limits(low, high, step)
    return Case(resolution, low, high, step, buckets.bucket_sizes(resolution, low, high, step))


def images(largest: int = 5000):
    return st.builds(Size, st.integers(1, largest), st.integers(1, largest))


@MANY
@given(cases())
def test_bucket_sizes(case):
    sizes = set(case.sizes)
    assert case.sizes == sorted(sizes)
    for width, height in sizes:
        assert width % case.step == height % case.step == 0
        assert case.low <= min(width, height) <= max(width, height) <= case.high
        assert width * height <= case.resolution.width * case.resolution.height
        assert Size(height, width) in sizes


@MANY
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 128))
def test_limits_never_shut_out_what_was_asked_for(low, high, step):
    lower, upper = buckets.round_limits(low, high, step)
    assert lower % step == upper % step == 0
    assert low - step < lower <= low
    assert high <= upper < high + step


@MANY
@given(cases(), images())
def test_the_bucket_chosen_is_the_best_and_is_covered(case, image):
    bucket, resized = buckets.choose(image, case.sizes)
    errors = [abs(width / height - image.width / image.height) for width, height in case.sizes]
    assert buckets.aspect_error(bucket, image) == min(errors)
    assert bucket == image or bucket == case.sizes[errors.index(min(errors))]
    over = resized.width - bucket.width, resized.height - bucket.height
    assert min(over) == 0
    # The other side keeps the image's proportions to half a pixel; floats may fall to either side of the half.
    scale = max(bucket.width / image.width, bucket.height / image.height)
    assert abs(resized.width - image.width * scale) <= 0.5 + 1e-6
    assert abs(resized.height - image.height * scale) <= 0.5 + 1e-6


FACES = st.builds(imaging.FaceBox, *[st.integers(0, 6000)] * 4)
SPANS = st.tuples(st.floats(0.1, 8), st.floats(0.1, 8)).map(lambda pair: tuple(sorted(pair)))


@MANY
@given(cases(), images(), SEEDS, FACES, SPANS, st.booleans())
def test_cuts_lie_inside_the_image(case, image, seed, face, span, anywhere):
    bucket, resized = buckets.choose(image, case.sizes)
    centre = imaging.centre_crop(resized, bucket)
    around = imaging.face_crop(resized, face, bucket, span, Random(seed), anywhere)
    for cut in (centre, imaging.random_crop(resized, bucket, Random(seed)), around):
        assert cut.to == bucket
        assert 0 <= cut.left <= cut.resized.width - bucket.width
        assert 0 <= cut.top <= cut.resized.height - bucket.height
    assert 0 <= resized.width - bucket.width - 2 * centre.left <= 1
    assert 0 <= resized.height - bucket.height - 2 * centre.top <= 1


@MANY
@given(cases(), images())
def test_no_upscale_only_shrinks(case, image):
    fit = buckets.choose_no_upscale(image, case.resolution, case.step)
    area = case.resolution.width * case.resolution.height
    if fit is None:
        longest = max(image) * min(1, math.sqrt(area / (image.width * image.height)))
        shortest = longest * min(image) / max(image)
        # One more step, as the other side is fitted to a whole number of steps first.
        assert shortest < 2 * case.step
        return
    bucket, resized = fit
    assert bucket.width % case.step == bucket.height % case.step == 0
    assert case.step <= bucket.width <= resized.width <= image.width
    assert case.step <= bucket.height <= resized.height <= image.height
    if image.width * image.height <= area:
        assert resized == image
    # A side is rounded to the next pixel before it is rounded down to steps: half a pixel along each side at most.
    assert bucket.width * bucket.height <= area + bucket.width + bucket.height


@MANY
@given(images(), st.sampled_from([512, 768, 1024, 1536]), st.sampled_from([32, 64]))
def test_no_upscale_keeps_the_area_of_usual_resolutions(image, side, step):
    assume(max(image) <= 8 * min(image))
    fit = buckets.choose_no_upscale(image, Size(side, side), step)
    assert fit is None or fit.bucket.width * fit.bucket.height <= side * side


@MANY
@given(cases(), images(), st.booleans())
def test_the_recorded_crop_lies_in_the_bucket(case, image, upscale):
    fit = buckets.choose(image, case.sizes) if upscale else buckets.choose_no_upscale(image, *case[::3])
    assume(fit is not None)
    left, top, right, bottom = buckets.crop_ltrb(fit.bucket, image)
    assert 0 <= left < right <= fit.bucket.width
    assert 0 <= top < bottom <= fit.bucket.height
    assert (right - left) / (bottom - top) == pytest.approx(image.width / image.height)


@MANY
@given(cases(), st.integers(1, 4))
def test_an_image_of_a_buckets_own_shape_fills_it(case, times):
    for bucket in case.sizes:
        image = Size(bucket.width * times, bucket.height * times)
        assert buckets.choose(image, case.sizes).bucket == bucket
        assert buckets.crop_ltrb(bucket, image) == pytest.approx((0, 0, *bucket))


# --- captions ---

WORDS = st.text("abcXYZ_-猫 ", min_size=1, max_size=6).map(str.strip).filter(bool)
TOKENS = st.lists(WORDS, max_size=6)
SOME_TOKENS = st.lists(WORDS, min_size=1, max_size=6)


def caption(raw: str, *, seed: int = 0, epoch: int = 1, step: int = 0, **options) -> str:
    return make_caption(raw, CaptionOptions(**options), Random(seed), epoch, step)


def tokens_of(text: str) -> list[str]:
    return text.split(", ") if text else []


def marked(*parts: list[str]) -> str:
    return " ||| ".join(", ".join(part) for part in parts)


@MANY
@given(TOKENS, TOKENS, TOKENS, SEEDS)
def test_marked_ends_stay_and_the_middle_is_shuffled(fixed, flexible, tail, seed):
    raw = marked(fixed, flexible, tail)
    result = tokens_of(caption(raw, seed=seed, shuffle_caption=True, keep_tokens_separator="|||"))
    end = len(fixed) + len(flexible)
    assert result[: len(fixed)] == fixed
    assert result[end:] == tail
    assert sorted(result[len(fixed) : end]) == sorted(flexible)


@MANY
@given(SOME_TOKENS, st.integers(0, 8), SEEDS)
def test_kept_tokens_stay_and_the_others_are_shuffled(tokens, keep, seed):
    result = tokens_of(caption(",".join(tokens), seed=seed, shuffle_caption=True, keep_tokens=keep))
    assert result[:keep] == tokens[:keep]
    assert sorted(result[keep:]) == sorted(tokens[keep:])


@MANY
@given(TOKENS, TOKENS, TOKENS, st.floats(0, 1, exclude_min=True), SEEDS)
def test_tag_dropout_takes_from_the_middle_only(fixed, flexible, tail, rate, seed):
    marks = {"keep_tokens_separator": "|||", "caption_tag_dropout_rate": rate}
    result = tokens_of(caption(marked(fixed, flexible, tail), seed=seed, **marks))
    kept = len(result) - len(fixed) - len(tail)
    assert 0 <= kept <= (len(flexible) if rate < 1 else 0)
    assert result[: len(fixed)] == fixed
    assert result[len(fixed) + kept :] == tail
    left = iter(flexible)
    assert all(token in left for token in result[len(fixed) : len(fixed) + kept])  # and in their order


@MANY
@given(SOME_TOKENS, st.integers(0, 3), st.integers(1, 40), st.integers(1, 8))
def test_token_warmup_only_grows(tokens, keep, steps, least):
    grow = {"token_warmup_step": steps, "token_warmup_min": least, "keep_tokens": keep}
    raw = ",".join(tokens)
    seen = [tokens_of(caption(raw, step=step, **grow)) for step in range(steps + 1)]
    assert seen[-1] == tokens
    assert len(seen[0]) == min(len(tokens), keep + least)
    assert all(later[: len(sooner)] == sooner for sooner, later in pairwise(seen))


@MANY
@given(TOKENS, WORDS, WORDS, st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 3), st.integers(1, 6), SEEDS)
def test_prefix_and_suffix_stand_unless_all_is_dropped(tokens, prefix, suffix, rate, every, epoch, seed):
    ends = {"caption_prefix": prefix, "caption_suffix": suffix}
    drops = {"caption_dropout_rate": rate, "caption_dropout_every_n_epochs": every}
    result = caption(", ".join(tokens), seed=seed, epoch=epoch, **ends, **drops)
    whole = " ".join([prefix, *([", ".join(tokens)] if tokens else []), suffix])
    if rate == 1 or (every and epoch % every == 0):
        assert result == ""
    else:
        assert result == whole or (result == "" and rate > 0)


@MANY
@given(TOKENS, TOKENS, TOKENS, WORDS, WORDS, SEEDS)
def test_prefix_and_suffix_stand_around_a_shuffle(fixed, flexible, tail, prefix, suffix, seed):
    ends = {"caption_prefix": f"{prefix},", "caption_suffix": f", {suffix}"}
    raw = marked(fixed, flexible, tail)
    result = tokens_of(caption(raw, seed=seed, shuffle_caption=True, keep_tokens_separator="|||", **ends))
    assert result[: len(fixed) + 1] == [prefix, *fixed]
    assert result[len(result) - len(tail) - 1 :] == [*tail, suffix]


@MANY
@given(
    st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([",", ";"]),
    SEEDS,
)
def test_groups_of_tags_move_as_one_and_lose_their_separator(groups, shuffle, rate, separator, seed):
    raw = separator.join("//".join(group) for group in groups)
    options = {"secondary_separator": "//", "caption_separator": separator}
    result = caption(raw, seed=seed, shuffle_caption=shuffle, caption_tag_dropout_rate=rate, **options)
    assert "//" not in result
    if not shuffle and not rate:
        assert result == raw.replace("//", separator)
        return
    left = [separator.join(group) for group in groups]
    for token in tokens_of(result):
        left.remove(token)
    assert rate or not left


RANDOM_OPTIONS = st.fixed_dictionaries(
    {
        "shuffle_caption": st.booleans(),
        "keep_tokens": st.integers(0, 3),
        "keep_tokens_separator": st.sampled_from(["", "|||"]),
        "secondary_separator": st.sampled_from([None, ";;"]),
        "enable_wildcard": st.booleans(),
        "caption_dropout_rate": st.sampled_from([0.0, 0.3]),
        "caption_tag_dropout_rate": st.sampled_from([0.0, 0.3]),
        "token_warmup_step": st.sampled_from([0, 0.5, 10]),
    }
)


@MANY
@given(st.text("ab,|;{} \n", max_size=40), RANDOM_OPTIONS, SEEDS)
def test_a_caption_depends_on_its_own_random_numbers_only(raw, options, seed):
    before = random.getstate()
    first = caption(raw, seed=seed, step=3, **options)
    assert random.getstate() == before
    random.seed(seed + 1)
    assert caption(raw, seed=seed, step=3, **options) == first
    random.setstate(before)
    assert "\n" not in first


# A wildcard template is a list of nodes: text, ("plain", nodes) for {{...}}, or ("group", alternatives).
TEXTS = st.text("abc ,", max_size=3)


def longer(nodes):
    lists = st.lists(nodes, max_size=3)
    return st.one_of(
        st.tuples(st.just("plain"), lists),
        st.tuples(st.just("group"), st.lists(lists, min_size=2, max_size=3)),
    )


TEMPLATES = st.lists(st.recursive(TEXTS, longer, max_leaves=8), max_size=4)


def written(nodes) -> str:
    """The template as a user writes it."""
    parts = []
    for node in nodes:
        if isinstance(node, str):
            parts.append(node)
        elif node[0] == "plain":
            parts.append("{{" + written(node[1]) + "}}")
        else:
            parts.append("{" + "|".join(written(one) for one in node[1]) + "}")
    return "".join(parts)


def results(nodes) -> set[str]:
    """Everything that the template may become."""
    choices = []
    for node in nodes:
        if isinstance(node, str):
            choices.append({node})
        elif node[0] == "plain":
            choices.append({"{" + one + "}" for one in results(node[1])})
        else:
            choices.append(set().union(*(results(one) for one in node[1])))
    return {"".join(parts) for parts in product(*choices)}


@pytest.mark.rows("R248")
@MANY
@given(TEMPLATES, SEEDS)
def test_wildcards_become_given_alternatives(template, seed):
    raw = written(template)
    possible = results(template)
    chosen = {caption(raw, seed=seed + turn, enable_wildcard=True) for turn in range(10)}
    assert chosen <= possible
    assert not any("|" in one for one in chosen)
    if len(possible) == 1:
        assert chosen == possible


@pytest.mark.rows("R248")
@MANY
@given(st.lists(st.sampled_from(["a", " b, ", "{{c}}", "{d}", "{e|f}", "{|g|g}", "{h|i {{j}} k|l}", "|"])), SEEDS)
def test_wildcards_that_do_not_nest_draw_once_each(parts, seed):
    """What one choice per pair of braces, from left to right, makes of them."""
    raw = "".join(parts)
    rng = Random(seed)
    rng.choice([raw])  # the line comes first
    protected = raw.replace("{{", "\0").replace("}}", "\1")
    protected = re.sub(r"\{([^}]*)\}", lambda found: rng.choice(found[1].split("|")), protected)
    expected = protected.replace("\0", "{").replace("\1", "}")
    spent = Random(seed)
    assert make_caption(raw, CaptionOptions(enable_wildcard=True), spent, 1, 0) == expected
    assert spent.getstate() == rng.getstate()


@MANY
@given(st.text("{}|ab", max_size=20), SEEDS)
def test_any_braces_are_read_somehow(raw, seed):
    result = caption(raw, seed=seed, enable_wildcard=True)
    left = iter(raw)
    assert all(sign in left for sign in result)  # signs go missing; none is added or moved
    if not ("{" in raw and "}" in raw):
        assert result == raw.replace("{{", "{").replace("}}", "}")


# --- batches ---


@st.composite
def batch_groups(draw) -> list[tuple[list[int], int]]:
    """(items, batch size) of some buckets; items are numbered through."""
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    numbers = iter(range(sum(counts)))
    return [(list(islice(numbers, count)), draw(st.integers(1, 5))) for count in counts]


GROUPS = batch_groups()


class Data:
    """As much of TrainingData as the sampler asks for."""

    def __init__(self, groups: list[tuple[list[int], int]], seed: int):
        self.groups, self.seed = groups, seed
        self.batches_per_epoch = len(self.plan(1))

    def plan(self, epoch: int) -> list[list[int]]:
        return buckets.plan_batches(self.groups, Random(derive(self.seed, "plan", epoch)))


def order(data: Data, epoch: int, *, first_batch: int = 0, rank: int = 0, world: int = 1, accumulation: int = 1):
    batches = EpochBatches(data, rank, world, accumulation)
    batches.start(epoch, first_batch)
    found = list(batches)
    assert len(found) == len(batches)
    return found


def indices(batches: list[list[ItemKey]]) -> list[list[int]]:
    return [[item.index for item in batch] for batch in batches]


@MANY
@given(GROUPS, SEEDS)
def test_a_plan_holds_every_item_once(groups, seed):
    plan = buckets.plan_batches(groups, Random(seed))
    group_of = {item: number for number, (items, _) in enumerate(groups) for item in items}
    assert sorted(item for batch in plan for item in batch) == sorted(group_of)
    assert len(plan) == sum(math.ceil(len(items) / batch_size) for items, batch_size in groups)
    for number, (items, batch_size) in enumerate(groups):
        lengths = sorted(len(batch) for batch in plan if group_of[batch[0]] == number)
        assert sum(lengths) == len(items)
        assert lengths[1:] == [batch_size] * (len(lengths) - 1)  # one batch may be short
        assert 0 < lengths[0] <= batch_size
    assert all(len({group_of[item] for item in batch}) == 1 for batch in plan)
    assert plan == buckets.plan_batches(groups, Random(seed))


@MANY
@given(GROUPS, SEEDS)
def test_epochs_and_seeds_have_orders_of_their_own(groups, seed):
    assume(sum(len(items) for items, _ in groups) >= 20)
    plans = [Data(groups, seed).plan(epoch) for epoch in (1, 2, 3)] + [Data(groups, seed + 1).plan(1)]
    assert all(one != other for at, one in enumerate(plans) for other in plans[:at])


@MANY
@given(SEEDS)
def test_buckets_take_turns(seed):
    """Not one bucket after the other, though every bucket has a single order only."""
    data = Data([([number], 1) for number in range(12)], seed)
    plans = [data.plan(epoch) for epoch in (1, 2, 3)]
    assert all(one != other for at, one in enumerate(plans) for other in [*plans[:at], sorted(one)])


@MANY
@given(GROUPS, SEEDS, st.integers(1, 4), st.integers(1, 9))
def test_ranks_share_the_plan(groups, seed, epoch, world):
    data = Data(groups, seed)
    plan = data.plan(epoch)
    shares = [indices(order(data, epoch, rank=rank, world=world)) for rank in range(world)]
    assert {len(share) for share in shares} == {math.ceil(len(plan) / world)}
    together = [share[turn] for turn in range(len(shares[0])) for share in shares]
    assert together[: len(plan)] == plan
    assert len(together) < len(plan) + world
    assert together[len(plan) :] == [plan[at % len(plan)] for at in range(len(together) - len(plan))]


@MANY
@given(GROUPS, SEEDS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.data())
def test_a_late_start_is_the_tail_of_the_whole(groups, seed, epoch, world, accumulation, data):
    source = Data(groups, seed)
    rank = data.draw(st.integers(0, world - 1))
    how = {"rank": rank, "world": world, "accumulation": accumulation}
    whole = order(source, epoch, **how)
    first = data.draw(st.integers(0, len(whole) + 1))
    assert order(source, epoch, first_batch=first, **how) == whole[first:]


@MANY
@given(GROUPS, SEEDS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
def test_accumulation_changes_the_step_numbers_only(groups, seed, epoch, world, accumulation):
    data = Data(groups, seed)
    plain = order(data, epoch, world=world)
    several = order(data, epoch, world=world, accumulation=accumulation)
    assert indices(several) == indices(plain)
    assert {item.epoch for batch in several for item in batch} == {epoch}
    per_epoch = math.ceil(len(plain) / accumulation)
    steps = [{item.step for item in batch} for batch in several]
    assert steps == [{(epoch - 1) * per_epoch + at // accumulation} for at in range(len(plain))]
    following = order(data, epoch + 1, world=world, accumulation=accumulation)
    assert following[0][0].step == max(steps[-1]) + 1
