"""What a wrong caption costs a demo model, and which captions are wrong."""

import torch
from diffusers import HunyuanVideoPipeline

from pipelines.bundled import bundled_models
from pipelines.open_sora_plan import load_parts
from tools.caption_gain import EXCHANGED, DemoModel, caption_gains, exchange, first_model, second_model
from tools.moving_shapes import MovingObject, Scene


def test_an_exchange_changes_one_attribute_and_the_second_one_takes_it_back() -> None:
    scene = Scene(
        objects=(
            MovingObject(colour="red", shape="bar", size="small", motion="up"),
            MovingObject(colour="blue", shape="cross", size="small", motion="rotate"),
        ),
        background="gray",
        placement=4,
    )
    for name in EXCHANGED:
        other = exchange(scene, name)
        left, right = other.objects
        assert (getattr(left, name), getattr(right, name)) == tuple(getattr(o, name) for o in scene.objects[::-1])
        assert exchange(other, name) == scene != other
        assert len({exchange(scene, n) for n in EXCHANGED}) == len(EXCHANGED)


def gains_of(model: DemoModel) -> dict[str, float]:
    return caption_gains(model, 4, seed=1, sigmas=(0.9,))[0.9]


def test_a_wrong_motion_costs_and_a_model_without_its_text_does_not_mind() -> None:
    pipe = HunyuanVideoPipeline.from_pretrained(bundled_models()["moving_shapes"], torch_dtype=torch.float32)
    gains = gains_of(first_model(pipe))
    assert gains["motion"] > 0.1
    assert gains["none"] > 0.1
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):  # the twin: all texts look the same
        torch.nn.init.zeros_(encoder.get_input_embeddings().weight)
    assert abs(gains_of(first_model(pipe))["motion"]) < 1e-3


def test_the_second_model_is_asked_the_same() -> None:
    parts = load_parts(bundled_models()["moving_shapes_open_sora_plan"])
    gains = gains_of(second_model(parts))
    assert gains["motion"] > 0.1
    assert gains["none"] > 0.1
    torch.nn.init.zeros_(parts.text_encoder.get_input_embeddings().weight)
    assert abs(gains_of(second_model(parts))["motion"]) < 1e-3
