"""Who owns which tokens and heads: everything once, in order, as evenly as whole ones allow."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from videopipe.partition import JointSequence, Partition, offsets, split_evenly

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def split_with_rest_on_the_last(total: int, members: int) -> tuple[int, ...]:
    share = total // members
    return (*[share] * (members - 1), total - share * (members - 1))


def uneven(counts: tuple[int, ...]) -> bool:
    return max(counts) - min(counts) > 1


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_an_even_split_loses_nothing_and_differs_by_at_most_one(total: int, members: int) -> None:
    counts = split_evenly(total, members)
    assert len(counts) == members
    assert sum(counts) == total
    assert not uneven(counts)
    assert all(left >= right for left, right in pairwise(counts))


def test_an_uneven_split_is_noticed() -> None:
    assert uneven(split_with_rest_on_the_last(24, 7))
    assert split_evenly(24, 7) == (4, 4, 4, 3, 3, 3, 3)
    assert split_evenly(2, 5) == (1, 1, 0, 0, 0)


@pytest.mark.parametrize(("total", "members", "message"), [(3, 0, "members=0"), (-1, 2, "total=-1")])
def test_impossible_splits_are_refused(total: int, members: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message} must be at least \d, nearest is \d"):
        split_evenly(total, members)


@given(COUNTS)
def test_offsets_are_where_each_part_begins(counts: list[int]) -> None:
    starts = offsets(counts)
    assert starts[0] == 0
    assert starts[-1] == sum(counts)
    assert [stop - start for start, stop in pairwise(starts)] == counts


@given(st.data(), st.integers(1, 8))
def test_members_own_every_token_and_every_head_once(data: st.DataObject, members: int) -> None:
    counts = st.lists(st.integers(0, 9), min_size=members, max_size=members).map(tuple)
    p = Partition(data.draw(counts), data.draw(counts))
    assert p.members == members
    assert [t for m in range(members) for t in range(100)[p.tokens_of(m)]] == list(range(p.num_tokens))
    assert [h for m in range(members) for h in range(100)[p.heads_of(m)]] == list(range(p.num_heads))


@given(st.integers(0, 300), st.integers(0, 48), st.integers(1, 8))
def test_an_even_partition_splits_both(tokens: int, heads: int, members: int) -> None:
    p = Partition.even(tokens, heads, members)
    assert (p.num_tokens, p.num_heads) == (tokens, heads)
    assert not uneven(p.token_counts)
    assert not uneven(p.head_counts)


@pytest.mark.parametrize(
    ("tokens", "heads", "message"),
    [
        ((1, 2), (3,), "need one number for each member"),
        ((), (), "need one number for each member"),
        ((1, -2), (3, 4), r"token_counts=\(1, -2\) must not be negative, nearest is \(1, 0\)"),
        ((1, 2), (-3, 4), r"head_counts=\(-3, 4\) must not be negative, nearest is \(0, 4\)"),
    ],
)
def test_impossible_partitions_are_refused(tokens: tuple[int, ...], heads: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Partition(tokens, heads)


def count_sent(p: Partition, member: int, to_heads: bool) -> int:
    """(token, head) pairs that leave `member`, one by one."""
    sent = 0
    for token in range(p.num_tokens):
        for head in range(p.num_heads):
            token_owner = next(m for m in range(p.members) if token in range(1000)[p.tokens_of(m)])
            head_owner = next(m for m in range(p.members) if head in range(1000)[p.heads_of(m)])
            source, target = (token_owner, head_owner) if to_heads else (head_owner, token_owner)
            sent += source == member != target
    return sent


@given(st.data(), st.integers(1, 4), st.integers(1, 2), st.sampled_from([2, 4, 8]))
def test_bytes_sent_are_what_counting_gives(data: st.DataObject, members: int, batch: int, itemsize: int) -> None:
    counts = st.lists(st.integers(0, 5), min_size=members, max_size=members).map(tuple)
    p = Partition(data.draw(counts), data.draw(counts))
    head_dim = 3
    for member in range(members):
        unit = batch * head_dim * itemsize
        assert p.to_heads_bytes(member, batch, head_dim, itemsize) == count_sent(p, member, True) * unit
        assert p.to_tokens_bytes(member, batch, head_dim, itemsize) == count_sent(p, member, False) * unit


def test_a_formula_that_counts_what_stays_at_home_is_noticed() -> None:
    p = Partition((3, 2), (1, 3))
    everything = p.token_counts[0] * p.num_heads
    assert everything != count_sent(p, 0, True) == p.to_heads_bytes(0, 1, 1, 1)


def is_permutation(order: list[int], total: int) -> bool:
    return sorted(order) == list(range(total))


@given(st.integers(0, 60), st.integers(0, 20), st.integers(1, 8))
def test_the_joint_order_holds_every_token_once_where_its_member_has_it(video: int, text: int, members: int) -> None:
    sequence = JointSequence.even(video, text, members)
    assert (sum(sequence.video_counts), sum(sequence.text_counts)) == (video, text)
    order = sequence.order()
    assert is_permutation(order, video + text)
    starts = offsets(sequence.counts)
    for member in range(members):
        own = order[starts[member] : starts[member + 1]]
        num_video = sequence.video_counts[member]
        assert own[:num_video] == list(range(video))[sequence.video_of(member)]
        assert [index - video for index in own[num_video:]] == list(range(text))[sequence.text_of(member)]


@given(st.integers(0, 60), st.integers(0, 20), st.integers(1, 8))
def test_video_and_text_together_are_even(video: int, text: int, members: int) -> None:
    assert not uneven(JointSequence.even(video, text, members).counts)


def test_text_shared_out_in_the_same_direction_as_video_would_be_uneven() -> None:
    assert uneven(tuple(v + t for v, t in zip(split_evenly(7, 4), split_evenly(5, 4), strict=True)))
    assert not uneven(JointSequence.even(7, 5, 4).counts)


def test_a_member_counted_twice_is_no_permutation() -> None:
    sequence = JointSequence((2, 1), (1, 2))
    assert sequence.order() == [0, 1, 3, 2, 4, 5]
    assert not is_permutation([*sequence.order()[:3], *sequence.order()[:3]], 6)
