"""What a configuration cannot render, found before a rank is started: requests on the layout at hand."""

from dit_group.xfuser import check_xfuser_tokens
from pipelines.families import Family, ModelFacts
from videopipe.config import Config
from videopipe.records import VideoRequest


def check_request(
    family: Family,
    config: Config,
    facts: ModelFacts,
    request: VideoRequest,
    where: str = "",
    text_tokens: int | None = None,
) -> None:
    """Refuse a request that this model, or this way of sharding its tokens, cannot render.

    Args:
        where: prefix of the field's path in the message, such as `"requests[3]."`.
        text_tokens: of conditioning that the caller gave in place of a prompt.
    Raises:
        ValueError: names the field, the value and the nearest valid value.
    """
    family.check_request(request, facts, where)
    ranks = config.groups.dit_ranks
    if config.attention.strategy == "xfuser" and ranks > 1:
        given = text_tokens is not None
        text = request.max_sequence_length if text_tokens is None else text_tokens
        video = facts.geometry.token_grid(request.spec).video
        check_xfuser_tokens(
            video, text, ranks, f"{where}{'prompt_embeds.shape[1]' if given else 'max_sequence_length'}"
        )
