"""Who owns which tokens and heads: plain arithmetic, no torch."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, Self

import msgspec


def split_evenly(total: int, members: int) -> tuple[int, ...]:
    """`total` items over `members`, sizes differing by at most one, larger ones first.

    Raises:
        ValueError: total < 0 or members < 1.
    """
    if members < 1:
        raise ValueError(f"members={members} must be at least 1, nearest is 1")
    if total < 0:
        raise ValueError(f"total={total} must be at least 0, nearest is 0")
    share, extra = divmod(total, members)
    return tuple(share + (member < extra) for member in range(members))


def offsets(counts: Sequence[int]) -> tuple[int, ...]:
    """Where each member's part begins, and the total at the end: len(counts) + 1 numbers."""
    return (0, *accumulate(counts))


class Partition(msgspec.Struct, frozen=True):
    """Tokens and heads owned by each member of a group; any of them may be zero.

    In the token view a member holds its tokens of all heads, in the head view all tokens of its heads. Both are
    contiguous ranges in member order.
    """

    token_counts: tuple[int, ...]
    head_counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.token_counts) != len(self.head_counts) or not self.token_counts:
            raise ValueError(
                f"token_counts={self.token_counts} and head_counts={self.head_counts} need one number for each member"
            )
        for name, counts in (("token_counts", self.token_counts), ("head_counts", self.head_counts)):
            if min(counts) < 0:
                raise ValueError(f"{name}={counts} must not be negative, nearest is {tuple(max(c, 0) for c in counts)}")

    @classmethod
    def even(cls, num_tokens: int, num_heads: int, members: int) -> Self:
        """Tokens and heads split as evenly as whole ones allow: 24 heads on 7 are 4, 4, 4, 3, 3, 3, 3."""
        return cls(split_evenly(num_tokens, members), split_evenly(num_heads, members))

    @property
    def members(self) -> int:
        """Size of the group."""
        return len(self.token_counts)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole sequence (S)."""
        return sum(self.token_counts)

    @property
    def num_heads(self) -> int:
        """Heads of the whole layer (N)."""
        return sum(self.head_counts)

    def tokens_of(self, member: int) -> slice:
        """The range of tokens that `member` owns in the token view."""
        start = offsets(self.token_counts)
        return slice(start[member], start[member + 1])

    def heads_of(self, member: int) -> slice:
        """The range of heads that `member` owns in the head view."""
        start = offsets(self.head_counts)
        return slice(start[member], start[member + 1])

    def to_heads_bytes(self, member: int, batch: int, head_dim: int, itemsize: int) -> int:
        """Bytes that `member` sends to others when one tensor goes from the token to the head view."""
        foreign_heads = self.num_heads - self.head_counts[member]
        return batch * self.token_counts[member] * foreign_heads * head_dim * itemsize

    def to_tokens_bytes(self, member: int, batch: int, head_dim: int, itemsize: int) -> int:
        """Bytes that `member` sends to others when one tensor goes from the head to the token view."""
        foreign_tokens = self.num_tokens - self.token_counts[member]
        return batch * foreign_tokens * self.head_counts[member] * head_dim * itemsize


class Mesh(msgspec.Struct, frozen=True):
    """The members of a group on two axes: `ulysses_degree` of them divide heads, `ring_degree` pass keys and values on.

    `inside` is the axis of neighbouring members, for the faster links: with `ulysses` inside, members 0 .. degree - 1
    divide heads among themselves; with `ring` inside they form a ring, and heads are divided across.

    Source: USP (arXiv 2405.07719); the reverse mapping, for slow links between machines, as in SwiftFusion
    (arXiv 2601.20273).
    """

    ulysses_degree: int
    ring_degree: int
    inside: Literal["ulysses", "ring"] = "ulysses"

    @classmethod
    def choose(
        cls, members: int, num_heads: int, ulysses_degree: int = 0, inside: Literal["ulysses", "ring"] = "ulysses"
    ) -> Self:
        """A mesh for so many members; degree 0 is the largest divisor of them that heads suffice for.

        Raises:
            ValueError: the degree does not divide the members, or there are fewer heads.
        """
        fitting = [d for d in range(1, members + 1) if members % d == 0 and d <= num_heads]
        degree = ulysses_degree or fitting[-1]
        if degree not in fitting:
            near = min(fitting, key=lambda d: abs(d - degree))
            raise ValueError(
                f"attention.ulysses_degree={ulysses_degree} must divide {members} DiT ranks and not exceed {num_heads} "
                f"heads, nearest is {near}"
            )
        return cls(degree, members // degree, inside)

    @property
    def members(self) -> int:
        """Size of the group."""
        return self.ulysses_degree * self.ring_degree

    def ulysses_members(self, member: int) -> tuple[int, ...]:
        """Those who divide heads with `member`, itself included, in order of their heads."""
        if self.inside == "ulysses":
            first = member - member % self.ulysses_degree
            return tuple(range(first, first + self.ulysses_degree))
        return tuple(range(member % self.ring_degree, self.members, self.ring_degree))

    def ring_members(self, member: int) -> tuple[int, ...]:
        """Those who pass keys and values round with `member`, itself included, in order of the ring."""
        if self.inside == "ring":
            first = member - member % self.ring_degree
            return tuple(range(first, first + self.ring_degree))
        return tuple(range(member % self.ulysses_degree, self.members, self.ulysses_degree))


def ring_bytes(token_counts: Sequence[int], member: int, batch: int, heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes that `member` sends to the next one while keys and values of all members pass round once.

    All blocks leave it but the one that the next member brought itself; one member sends nothing.
    """
    following = (member + 1) % len(token_counts)
    return 2 * batch * (sum(token_counts) - token_counts[following]) * heads * head_dim * itemsize


class JointSequence(msgspec.Struct, frozen=True):
    """Video and text tokens of one joint-attention sequence, both sharded over the same members.

    Member r holds [video_r | text_r]. After an exchange the tokens lie in member order, so the joint order is
    [video_0 text_0 video_1 text_1 ...]: attention does not mind, but a key mask must follow it.
    """

    video_counts: tuple[int, ...]
    text_counts: tuple[int, ...]

    @classmethod
    def even(cls, video: int, text: int, members: int) -> Self:
        """Video and text tokens each split as evenly as whole ones allow.

        The larger text shares go to the members with the smaller video shares, so that totals differ by at most one
        where that is possible.
        """
        return cls(split_evenly(video, members), split_evenly(text, members)[::-1])

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each member, video and text together."""
        return tuple(v + t for v, t in zip(self.video_counts, self.text_counts, strict=True))

    def video_of(self, member: int) -> slice:
        """The range of video tokens of `member`."""
        start = offsets(self.video_counts)
        return slice(start[member], start[member + 1])

    def text_of(self, member: int) -> slice:
        """The range of text tokens of `member`."""
        start = offsets(self.text_counts)
        return slice(start[member], start[member + 1])

    def order(self) -> list[int]:
        """For each position of the joint order, its index in [all video | all text]."""
        video_total = sum(self.video_counts)
        positions: list[int] = []
        for member in range(len(self.video_counts)):
            video, text = self.video_of(member), self.text_of(member)
            positions.extend(range(video.start, video.stop))
            positions.extend(range(video_total + text.start, video_total + text.stop))
        return positions
