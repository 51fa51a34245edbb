"""Composes the two groups for a model: one file per model family, launchers, engine, command line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.hunyuan_video import HunyuanVideoPipeline
    from pipelines.open_sora_plan_family import OpenSoraPlanPipeline

__all__ = ["HunyuanVideoPipeline", "OpenSoraPlanPipeline"]


def __getattr__(name: str) -> Any:
    """Pipelines are imported when they are asked for: the command line must answer `--help` without torch."""
    if name == "HunyuanVideoPipeline":
        from pipelines.hunyuan_video import HunyuanVideoPipeline

        return HunyuanVideoPipeline
    if name == "OpenSoraPlanPipeline":
        from pipelines.open_sora_plan_family import OpenSoraPlanPipeline

        return OpenSoraPlanPipeline
    raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
