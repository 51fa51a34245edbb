"""What a wrong caption costs a demo model, and which captions are wrong."""

import torch
from diffusers import HunyuanVideoPipeline

from pipelines.bundled import bundled_models
from tools.caption_gain import EXCHANGED, caption_gains, exchange
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


def test_a_wrong_motion_costs_and_a_model_without_its_text_does_not_mind() -> None:
    pipe = HunyuanVideoPipeline.from_pretrained(bundled_models()["moving_shapes"], torch_dtype=torch.float32)
    gains = caption_gains(pipe, 4, seed=1, sigmas=(0.9,))[0.9]
    assert gains["motion"] > 0.1
    assert gains["none"] > 0.1
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):  # the twin: all texts look the same
        torch.nn.init.zeros_(encoder.get_input_embeddings().weight)
    assert abs(caption_gains(pipe, 4, seed=1, sigmas=(0.9,))[0.9]["motion"]) < 1e-3
