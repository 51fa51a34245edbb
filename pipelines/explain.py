"""What a configuration means for every rank: tokens, heads, traffic, weights. Arithmetic; nothing is started."""

import math
from typing import Any

import msgspec
import torch

from pipelines import explain_calibration
from pipelines.calibration import Choice
from pipelines.checkpoint import CheckpointUnreachableError, open_checkpoint
from pipelines.checks import check_request
from pipelines.engine import make_topology
from pipelines.families import Family, ModelFacts, load_family
from pipelines.side_car import describe_plan
from videopipe.arrangement import Calibration
from videopipe.config import Config, to_toml
from videopipe.geometry import TokenGrid, VideoSpec
from videopipe.partition import JointSequence, Mesh, Partition, ring_bytes, split_evenly
from videopipe.records import VideoRequest
from videopipe.runtime import DTYPES


class RankPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One rank: what it is, what it loads (bytes of weights in memory by part), and what it owns of a sequence.

    The tokens and heads are those of a denoising step, 0 on ranks that only decode. `exchange_bytes_per_layer` is what
    the rank sends to others for q, k, v and the attention's output, on average where layers differ;
    `exchange_bytes_per_step` what it sends in all layers of the evaluations of a step that it takes part in;
    `branch_bytes_per_step` what it sends to its twin in the other half of the DiT group (`attention.cfg_parallel`);
    `gather_bytes_per_clip` what it sends so that finished latents are whole.
    """

    rank: int
    role: str
    device: str
    weight_bytes: dict[str, int]
    video_tokens: int
    text_tokens: int
    heads: int
    exchange_bytes_per_layer: int
    exchange_bytes_per_step: int
    branch_bytes_per_step: int
    gather_bytes_per_clip: int


class ClipPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One clip of the configured size: tensors, and bytes that it moves once.

    `conditioning_bytes` and `latent_bytes` are what travels in all, from the text encoder to the DiT ranks and from
    the DiT group's leader to a decoding rank; 0 where they stay in the same process. `exchange_bytes` is what DiT ranks
    send to each other in all steps and at the end. `halved` says whether the two evaluations of a step run side by side
    on two halves of the DiT group, `step_bytes_otherwise` what a step would send if it were the other way, None where
    there is no other way.
    """

    spec: VideoSpec
    num_inference_steps: int
    evaluations_per_step: int
    latent_shape: tuple[int, ...]
    latent_bytes_each: int
    frame_bytes: int
    video_tokens: int
    text_tokens: int
    conditioning_bytes: int
    latent_bytes: int
    exchange_bytes: int
    halved: bool
    step_bytes_otherwise: int | None


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What `videopipe explain` tells. `sizes_from` says where the model's sizes come from.

    `choice` and `calibration`: how heads travel where something about it is measured, else None; the latter None as
    well where nothing is stored.
    """

    config: Config
    plan: dict[str, Any]
    sizes_from: str
    weights_from: str
    attention_layers: int
    ranks: tuple[RankPlan, ...]
    clip: ClipPlan
    choice: Choice | None = None
    calibration: Calibration | None = None

    def to_json(self) -> str:
        """One JSON object."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def render_text(self) -> str:
        """For people: the resolved TOML, then a table of ranks, then the traffic."""
        clip, queue = self.clip, self.config.queue
        trimmed = " at most: padded ones are dropped" if self.plan["text"] == "trimmed" else ", padded ones masked"
        lines = [
            to_toml(self.config),
            f"# {self.plan['policy']}: {len(self.plan['dit_ranks'])} DiT and {len(self.plan['vae_ranks'])} VAE ranks",
            f"sizes    from {self.sizes_from}",
            f"weights  from {self.weights_from}",
            "",
            *_table(self.ranks),
            "",
            (
                f"# one clip of {clip.spec.height}x{clip.spec.width}, {clip.spec.num_frames} frames, "
                f"{clip.num_inference_steps} steps"
            ),
            f"tokens        {clip.video_tokens:,} of video and {clip.text_tokens} of text{trimmed}",
            (
                f"latents       {list(clip.latent_shape)} float32, {_bytes(clip.latent_bytes_each)}; "
                f"frames uint8, {_bytes(clip.frame_bytes)}"
            ),
            (
                f"queue         {queue.capacity} clips or {_bytes(queue.capacity_bytes)} of latents; "
                f"{queue.max_undelivered} finished clips may wait for the caller"
            ),
            "",
            "# traffic between ranks",
        ]
        if len(self.plan["dit_ranks"]) > 1:
            layer = [rank.exchange_bytes_per_layer for rank in self.ranks if rank.heads or rank.video_tokens]
            step = sum(rank.exchange_bytes_per_step for rank in self.ranks)
            gather = sum(rank.gather_bytes_per_clip for rank in self.ranks)
            lines += [
                f"per layer     {_bytes(min(layer))} to {_bytes(max(layer))} sent by each DiT rank: q, k, v and output",
                (
                    f"per step      {_bytes(step)} in all: {self.attention_layers} layers, DiT evaluations: "
                    f"{clip.evaluations_per_step}"
                ),
                *self._guidance(),
                f"per clip      {_bytes(clip.exchange_bytes)}: all steps, and {_bytes(gather)} to gather the latents",
            ]
        else:
            lines.append("per step      none: one DiT rank")
        lines += [
            f"conditioning  {_bytes(clip.conditioning_bytes)} per clip, text encoder to DiT ranks",
            f"latents       {_bytes(clip.latent_bytes)} per clip, leader to decoding rank",
        ]
        if self.choice is not None:
            lines += explain_calibration.render(self.choice, self.calibration)
        return "\n".join(lines)

    def _guidance(self) -> list[str]:
        """How the branches of guidance are evaluated, and what the other way would send."""
        clip, ranks = self.clip, self.plan["dit_ranks"]
        if clip.step_bytes_otherwise is None:
            return []
        other = f"{_bytes(clip.step_bytes_otherwise)} per step"
        if not clip.halved:
            return [f"guidance      both branches on all DiT ranks; attention.cfg_parallel='on' would send {other}"]
        half, pairs = len(ranks) // 2, sum(rank.branch_bytes_per_step for rank in self.ranks)
        first, second = (
            f"DiT rank {part[0]}" if half == 1 else f"DiT ranks {part[0]} to {part[-1]}"
            for part in (ranks[:half], ranks[half:])
        )
        return [
            (
                f"guidance      one branch on {first}, the other on {second}; {_bytes(pairs)} per step between them; "
                f"all ranks together would send {other}"
            )
        ]


def explain_config(config: Config, calibrate: bool = False) -> Explanation:
    """Explain a resolved configuration for the request size that it names.

    Only JSON files and headers of the checkpoint are read, unless `calibrate` starts the ranks and measures. A hub
    checkpoint that is neither in the local cache nor reachable is explained by the published sizes of its family, and
    the explanation says so.

    Raises:
        ValueError: a size that this model cannot render, a checkpoint of another kind, or nothing to measure.
        RankError: a rank was lost while measuring.
    """
    family = load_family(config.model.family)
    facts, sizes_from, published = _facts(config, family)
    request = VideoRequest(
        id="clip",
        prompt="",
        negative_prompt=config.request.negative_prompt,
        spec=config.spec(),
        num_inference_steps=config.request.num_inference_steps,
        guidance_scale=config.request.guidance_scale,
        true_cfg_scale=config.request.true_cfg_scale,
        max_sequence_length=config.request.max_sequence_length,
    )
    family.check_config(config)
    check_request(family, config, facts, request, "request.")
    as_published = published or config.model.weights == family.published.location
    checkpoint = None if as_published else open_checkpoint(config.model)
    weights, weights_from = family.weight_bytes(config, checkpoint)

    topology = make_topology(config)
    members = len(topology.dit_ranks)
    text = min(config.request.max_sequence_length, facts.text_tokens)
    grid = facts.geometry.token_grid(request.spec, max(text, members) if facts.joint_text else 0)
    evaluations = family.evaluations(request)
    itemsize = DTYPES[config.model.dtype].itemsize
    geometry = facts.geometry
    patch_values = geometry.channels * geometry.patch_t * geometry.patch_s**2
    halved = config.attention.cfg_parallel == "on" and evaluations == 2
    sequence, sent = _evaluation(config, family, facts, grid, members // 2 if halved else members)
    otherwise = None
    if evaluations == 2 and members % 2 == 0:
        # every rank for both branches, or each half for one of them, and pairs exchange what they predict
        otherwise = 2 * sum(_evaluation(config, family, facts, grid, members if halved else members // 2)[1])
        otherwise += 0 if halved else 2 * grid.video * patch_values * itemsize

    ranks = []
    for rank in range(config.world_size):
        member = topology.dit_ranks.index(rank) if rank in topology.dit_ranks else None
        heads = evaluation = branch = gather = place = 0
        if member is not None:
            place = member % len(sequence.counts)
            heads, _ = _attention_share(config, sequence.counts, facts, place)
            evaluation = sent[place]
            values = sequence.video_counts[place] * patch_values
            branch = values * itemsize if halved else 0
            gather = values * 4 * (len(sequence.counts) - 1)  # float32 at most
        holds = {
            "text_encoder": rank == topology.encoder_rank,
            "denoiser": member is not None,
            "decoder": rank in topology.decode_ranks,
        }
        ranks.append(
            RankPlan(
                rank=rank,
                role="vae" if member is None else "dit" if topology.vae_ranks else "dit+vae",
                device=_device(config, rank),
                weight_bytes={part: weights[part] or 0 for part in holds if holds[part]},
                video_tokens=0 if member is None else sequence.video_counts[place],
                text_tokens=0 if member is None else sequence.text_counts[place],
                heads=heads,
                exchange_bytes_per_layer=evaluation // facts.attention_layers,
                exchange_bytes_per_step=evaluation * (1 if halved else evaluations),
                branch_bytes_per_step=branch,
                gather_bytes_per_clip=gather,
            )
        )

    shape = geometry.latent_shape(request.spec)
    encoder_dtype = DTYPES[config.model.text_encoder_dtype or config.model.dtype]
    conditioning = evaluations * encoder_dtype.itemsize * (text * (facts.text_dim + 1) + facts.pooled_dim)
    receivers = sum(rank != topology.encoder_rank for rank in topology.dit_ranks)
    spec = request.spec
    latent_bytes = 4 * math.prod(shape)
    clip = ClipPlan(
        spec=spec,
        num_inference_steps=request.num_inference_steps,
        evaluations_per_step=evaluations,
        latent_shape=shape,
        latent_bytes_each=latent_bytes,
        frame_bytes=spec.num_frames * spec.height * spec.width * 3,
        video_tokens=grid.video,
        text_tokens=text,
        conditioning_bytes=conditioning * receivers,
        latent_bytes=latent_bytes * len(topology.decode_teams[0]) if topology.vae_ranks else 0,
        exchange_bytes=sum(
            request.num_inference_steps * (rank.exchange_bytes_per_step + rank.branch_bytes_per_step)
            + rank.gather_bytes_per_clip
            for rank in ranks
        ),
        halved=halved,
        step_bytes_otherwise=otherwise,
    )
    if calibrate:
        explain_calibration.measure(config, request)
    choice, calibration = explain_calibration.stored(config, facts, request) or (None, None)
    return Explanation(
        config=config,
        plan=describe_plan(config, topology),
        sizes_from=sizes_from,
        weights_from=weights_from,
        attention_layers=facts.attention_layers,
        ranks=tuple(ranks),
        clip=clip,
        choice=choice,
        calibration=calibration,
    )


def _evaluation(
    config: Config, family: Family, facts: ModelFacts, grid: TokenGrid, members: int
) -> tuple[JointSequence, tuple[int, ...]]:
    """Tokens of each member and the bytes that it sends to others in all layers of one evaluation."""
    layout = family.layout(facts, grid.video, members)
    if layout is None:
        sequence = JointSequence.even(grid.video, grid.text, members)
        layer = [_attention_share(config, sequence.counts, facts, member)[1] for member in range(members)]
        return sequence, tuple(size * facts.attention_layers for size in layer)
    itemsize = DTYPES[config.model.dtype].itemsize
    return JointSequence(layout.video_counts, (0,) * members), tuple(n * itemsize for n in layout.sent_values)


def _attention_share(config: Config, counts: tuple[int, ...], facts: ModelFacts, member: int) -> tuple[int, int]:
    """Heads that a member computes in a layer, over its rows or all tokens, and the bytes that it sends to others."""
    a, itemsize = config.attention, DTYPES[config.model.dtype].itemsize
    mesh = Mesh(len(counts), 1)
    if a.strategy == "ring":
        mesh = Mesh(1, len(counts))
    elif a.strategy == "usp":
        mesh = Mesh.choose(len(counts), facts.num_heads, a.ulysses_degree, a.mesh_inside)
    line, ring = mesh.ulysses_members(member), mesh.ring_members(member)
    place = line.index(member)
    partition = Partition(tuple(counts[m] for m in line), split_evenly(facts.num_heads, len(line)))
    heads = partition.head_counts[place]
    into = partition.to_heads_bytes(place, 1, facts.head_dim, itemsize)
    back = partition.to_tokens_bytes(place, 1, facts.head_dim, itemsize)
    blocks = [sum(counts[m] for m in mesh.ulysses_members(other)) for other in ring]
    return heads, 3 * into + back + ring_bytes(blocks, ring.index(member), 1, heads, facts.head_dim, itemsize)


def _facts(config: Config, family: Family) -> tuple[ModelFacts, str, bool]:
    """The model's sizes, where they come from, and whether they are the published ones."""
    checkpoint = open_checkpoint(config.model)
    published = family.published
    on_hub = not checkpoint.is_local and not config.model.weights.startswith((".", "/"))
    if on_hub and config.model.weights == published.location and not checkpoint.is_cached("transformer/config.json"):
        return published.facts, f"the published {published.location}; its files are not on this machine", True
    try:
        return family.facts(checkpoint), f"the config files of {config.model.weights}", False
    except CheckpointUnreachableError:
        why = f"the published {published.location}, because {config.model.weights} cannot be reached"
        return published.facts, why, True


def _device(config: Config, rank: int) -> str:
    kind = config.runtime.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{rank}" if kind == "cuda" else "cpu"


def _table(ranks: tuple[RankPlan, ...]) -> list[str]:
    rows = [["rank", "role", "device", "video tokens", "text tokens", "heads", "weights", "parts"]]
    for rank in ranks:
        parts = ", ".join(f"{part} {_bytes(size)}" for part, size in rank.weight_bytes.items())
        total = _bytes(sum(rank.weight_bytes.values()))
        tokens = [f"{n:,}" if rank.heads or rank.video_tokens else "-" for n in (rank.video_tokens, rank.text_tokens)]
        rows.append([str(rank.rank), rank.role, rank.device, *tokens, str(rank.heads or "-"), total, parts])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _bytes(count: int) -> str:
    """Decimal units, three digits: 730 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{count} B"
