"""What measurements choose, on made-up machines: chunks for a slow link, few heads for a slow helper, else plain."""

import random
import statistics
from dataclasses import dataclass

import msgspec
import pytest

from videopipe.arrangement import (
    Arrangement,
    Rules,
    Timing,
    fastest,
    pays,
    relative,
    share_heads,
    ways_with_helpers,
    ways_without_helpers,
)
from videopipe.partition import split_evenly

AUTO = Rules(num_heads=24, members=4, choose_chunks=True, balance=None)


@dataclass(frozen=True)
class Machine:
    """Seconds of a head: attention on a DiT rank and on a helper, travel among DiT ranks and to a helper and back."""

    attend_s: float = 0.010
    assist_s: float = 0.010
    move_s: float = 0.001
    reach_s: float = 0.001
    start_s: float = 0.0002
    linear_s: float = 0.005
    noise: float = 0.01

    def layer_s(self, rules: Rules, way: Arrangement) -> float:
        """The first chunk's way in and the last one's way out are seen, what is between them hides or is hidden."""
        members = rules.members
        own = rules.num_heads / members if way.balance == "rows" else -(-rules.num_heads // members)
        assist = 0.0
        if way.helpers:
            counts = way.head_counts or split_evenly(rules.num_heads, members + len(way.helpers))
            helped = counts[members:]
            own = (rules.num_heads - sum(helped)) / members if way.balance == "rows" else max(counts[:members])
            assist = max(helped) * self.assist_s + self.reach_s * sum(helped)
        chunks = 1 if way.heads_per_chunk is None else -(-int(own) // way.heads_per_chunk)
        attend, move = own * self.attend_s, own * 4 * self.move_s
        if way.in_turns:  # what travels and what helpers do is hidden under everything that a DiT rank computes
            return max(self.linear_s + attend, move, assist)
        pipelined = max(attend, move) + min(attend, move) / chunks
        return self.linear_s + max(pipelined, assist) + chunks * self.start_s

    def timings(self, rules: Rules, ways: tuple[Arrangement, ...], rounds: int = 7, seed: int = 0) -> list[Timing]:
        dice = random.Random(seed)
        times = [tuple(self.layer_s(rules, way) * dice.gauss(1, self.noise) for _ in range(rounds)) for way in ways]
        return [
            Timing(arrangement=w, layer_s=t, ratios=tuple(a / b for a, b in zip(t, times[0], strict=True)))
            for w, t in zip(ways, times, strict=True)
        ]

    def alone(self, rules: Rules) -> Arrangement:
        timings = self.timings(rules, ways_without_helpers(rules))
        return fastest(timings[0], timings[1:]).arrangement

    def helped(self, rules: Rules, helpers: tuple[int, ...]) -> Arrangement:
        """The choice with these helpers, or without if they do not pay."""
        alone = self.alone(rules)
        speeds = [self.assist_s] * len(helpers)
        ways = ways_with_helpers(rules, alone, helpers, self.attend_s, speeds, self.linear_s)
        timings = self.timings(rules, (alone, *ways), seed=1)
        return fastest(timings[0], timings[1:]).arrangement


def test_the_plain_way_comes_first_and_given_values_stay() -> None:
    assert ways_without_helpers(Rules(num_heads=24, members=4)) == (Arrangement(),)
    assert [way.heads_per_chunk for way in ways_without_helpers(AUTO)] == [None, 3, 2, 1]
    assert {way.balance for way in ways_without_helpers(AUTO)} == {"heads"}  # 24 on 4 leaves no head over
    seven = Rules(num_heads=24, members=7, choose_chunks=True, balance=None)
    assert [(way.balance, way.heads_per_chunk) for way in ways_without_helpers(seven)] == [
        ("heads", None),
        ("rows", None),
        ("heads", 2),
        ("heads", 1),
        ("rows", 2),
        ("rows", 1),
    ]
    given = Rules(num_heads=24, members=7, heads_per_chunk=2, balance="rows")
    assert ways_without_helpers(given) == (Arrangement(heads_per_chunk=2, balance="rows"),) and not given.is_open
    assert ways_without_helpers(Rules(num_heads=24, members=1, choose_chunks=True, balance=None)) == (Arrangement(),)


def test_a_slow_link_is_hidden_under_chunks_and_a_fast_one_is_left_alone() -> None:
    assert Machine(move_s=0.002).alone(AUTO).heads_per_chunk is not None
    assert Machine(move_s=0.00001).alone(AUTO) == Arrangement()


def test_leftover_heads_are_divided_where_attention_is_what_counts() -> None:
    seven = Rules(num_heads=24, members=7, balance=None)
    assert Machine(move_s=0.00001).alone(seven).balance == "rows"  # 24/7 heads against 4
    mostly_linear = Machine(attend_s=0.0001, move_s=0.00001, linear_s=0.1)
    assert mostly_linear.alone(seven) == Arrangement()


def test_helpers_get_heads_by_their_speed() -> None:
    assert share_heads(24, 7, 1.0, [1.0]) == (3,)
    assert share_heads(24, 7, 1.0, [2.0]) == (1,)
    assert share_heads(24, 7, 1.0, [5.0]) == (0,)
    assert share_heads(24, 2, 1.0, [1.0, 3.0]) == (7, 2)
    assert sum(share_heads(4, 1, 1.0, [0.001, 0.001])) == 4
    # nobody finishes after the DiT ranks would have without help
    for seconds in (0.3, 1.0, 1.7, 4.0):
        (count,) = share_heads(24, 5, 1.0, [seconds])
        assert count * seconds <= 24 / 5


def test_a_helper_pays_by_its_speed() -> None:
    rules = Rules(num_heads=24, members=7, choose_chunks=True, balance=None, helper_sets=((7,),), choose_helpers=True)
    equal = Machine(move_s=0.00001, reach_s=0.00001).helped(rules, (7,))
    assert equal.helpers == (7,) and equal.head_counts is not None and equal.head_counts[-1] == 3
    slow = Machine(move_s=0.00001, reach_s=0.00001, assist_s=0.016).helped(rules, (7,))
    assert slow.helpers == (7,) and slow.head_counts is not None and slow.head_counts[-1] in (1, 2)
    assert Machine(move_s=0.00001, assist_s=0.2).helped(rules, (7,)).helpers == ()
    far = Machine(reach_s=0.2)  # a helper's heads travel so long that they come back too late
    assert far.helped(rules, (7,)).helpers == ()


def test_branches_take_turns_where_that_hides_something() -> None:
    pair = Rules(num_heads=24, members=4, choose_chunks=True, in_turns=None, helper_sets=((4,),), choose_helpers=True)
    assert Machine(move_s=0.004).alone(pair).in_turns
    assert not Machine(move_s=0.000001).alone(pair).in_turns
    assert not any(way.in_turns for way in ways_without_helpers(msgspec.structs.replace(pair, in_turns=False)))
    assert all(way.in_turns for way in ways_without_helpers(msgspec.structs.replace(pair, in_turns=True)))
    # a helper then has the time of the linear layers as well, and gets more heads
    at_once = Machine(move_s=0.000001, reach_s=0.000001, linear_s=0.06)
    helped = at_once.helped(pair, (4,))
    counts = helped.head_counts
    assert helped.in_turns and counts is not None and counts[4] > share_heads(24, 4, 1.0, [1.0])[0]
    assert counts[4] * 0.010 <= 0.06 + max(counts[:4]) * 0.010 + 0.010  # and none that the others wait for
    assert share_heads(24, 4, 0.01, [0.01], 0.06) == (counts[4],)


def test_shares_that_relieve_nobody_are_not_tried() -> None:
    rules = Rules(num_heads=24, members=4, balance="heads", helper_sets=((4,),), choose_helpers=True)
    ways = ways_with_helpers(rules, Arrangement(), (4,), 1.0, [1.0])
    assert {way.head_counts[-1] for way in ways if way.head_counts} == {4}  # 2 and 3 leave 6 heads to some DiT rank
    assert all(way.head_counts is not None and sum(way.head_counts) == 24 for way in ways)
    assert ways_with_helpers(rules, Arrangement(), (4,), 1.0, [9.0]) == ()
    by_rows = Rules(num_heads=24, members=4, balance=None, helper_sets=((4,),), choose_helpers=True)
    found = ways_with_helpers(by_rows, Arrangement(), (4,), 1.0, [1.0])
    assert Arrangement(helpers=(4,), balance="rows", head_counts=(5, 5, 5, 5, 3)) in found


def test_given_help_is_never_taken_back() -> None:
    rules = Rules(num_heads=24, members=4, choose_chunks=True, helper_sets=((4,),))
    ways = ways_with_helpers(rules, Arrangement(heads_per_chunk=2), (4,), 1.0, [9.0])
    assert ways == (Arrangement(helpers=(4,)), Arrangement(helpers=(4,), heads_per_chunk=2))
    assert rules.without_choice() == (Arrangement(), Arrangement(helpers=(4,)))
    chosen = Rules(num_heads=24, members=4, helper_sets=((4,),), choose_helpers=True)
    assert chosen.without_choice() == (Arrangement(),)


def median_only(timings: list[Timing]) -> Arrangement:
    """The broken twin: it takes the best median, whatever the spread."""
    return min(timings, key=lambda timing: statistics.median(timing.layer_s)).arrangement


def test_noise_goes_to_the_plain_way() -> None:
    """Ways that are equal in truth, measured badly: the plain one stays, where the best median would leave it."""
    machine = Machine(move_s=0.00001, start_s=0.0, noise=0.2)
    ways = ways_without_helpers(AUTO)
    kept = left = 0
    for seed in range(100):
        timings = machine.timings(AUTO, ways, rounds=9, seed=seed)
        kept += fastest(timings[0], timings[1:]).arrangement == Arrangement()
        left += median_only(timings) != Arrangement()
    assert left > 60
    assert kept > 65  # and a second measurement has to agree, see `dit_group.calibrate`


def test_a_small_gain_is_a_tie() -> None:
    assert not pays([0.985] * 9)
    assert pays([0.97] * 9)
    assert pays([0.9, 0.9, 0.9, 0.9, 1.3]) and not pays([0.9, 0.9, 0.9, 1.1, 1.3])
    assert not pays([0.5, 0.6, 1.2])


def test_of_equal_winners_the_simplest_is_taken() -> None:
    def timing(size: int | None, seconds: float) -> Timing:
        return Timing(arrangement=Arrangement(heads_per_chunk=size), layer_s=(seconds,) * 5, ratios=())

    plain = timing(None, 1.0)
    assert fastest(plain, [timing(3, 0.805), timing(1, 0.8)]).arrangement.heads_per_chunk == 3
    assert fastest(plain, [timing(3, 0.9), timing(1, 0.8)]).arrangement.heads_per_chunk == 1
    assert fastest(plain, [timing(3, 0.99)]) is plain
    assert relative(timing(1, 0.8), plain) == (0.8,) * 5


@pytest.mark.parametrize(
    ("way", "text"),
    [
        (Arrangement(), "all heads at once"),
        (Arrangement(heads_per_chunk=1, balance="rows"), "1 head a chunk, leftover heads by rows"),
        (
            Arrangement(helpers=(7,), head_counts=(3,) * 8, helpers_first=True),
            "all heads at once, rank 7 helps with 3 heads, theirs first",
        ),
        (Arrangement(helpers=(6, 7)), "all heads at once, ranks 6, 7 help with equal shares"),
        (Arrangement(in_turns=True), "all heads at once, branches in turns"),
    ],
)
def test_ways_are_told_in_words(way: Arrangement, text: str) -> None:
    assert way.describe() == text
