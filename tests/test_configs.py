"""The bundled configurations: complete, for the GPUs that their names tell, and within the memory of each card."""

import re
from pathlib import Path

import msgspec
import pytest

from pipelines.bundled import bundled_configs, find_config
from pipelines.explain import Explanation, explain_config
from pipelines.hunyuan_video import HunyuanVideo
from pipelines.models.skip_sparse import block_sparsity
from pipelines.open_sora_plan_family import OpenSoraPlan
from pipelines.skip_sparse_layout import sent_values
from videopipe.config import Config, ConfigError, load_config

CONFIGS = bundled_configs()
GPU = sorted(name for name in CONFIGS if name.startswith("hunyuan") and "gpu" in name and name != "hunyuan_8gpu")
OPEN_SORA_PLAN_GPU = sorted(name for name in CONFIGS if name.startswith("open_sora_plan") and "gpu" in name)
TINY = sorted(name for name in CONFIGS if "tiny" in name)
BUNDLED = sorted(name for name in CONFIGS if name.startswith("moving_shapes"))

# Bytes besides weights, counted as live tensors of diffusers' classes on the meta device: the DiT's activations are
# 19 * tokens * width * itemsize; a decode with tiling holds 2.6 GB for one tile of 17x256x256 and 1.5 times the clip.
CONTEXT = 1_000_000_000  # CUDA's context and libraries
TILE = 2_600_000_000
SPARE = 2  # a decode may take this many times its live tensors: convolution workspaces, fragmentation


def peak_bytes(explained: Explanation, config: Config) -> list[int]:
    """The most that each rank holds at a time, by formula."""
    width = HunyuanVideo.published.facts.num_heads * HunyuanVideo.published.facts.head_dim
    tokens = explained.clip.video_tokens + explained.clip.text_tokens
    peaks = []
    for rank in explained.ranks:
        own = rank.video_tokens + rank.text_tokens
        exchanged = 8 * tokens * rank.heads * 128 * 2 if config.groups.dit_ranks > 1 else 0
        denoise = 19 * own * width * 2 + exchanged
        decode = SPARE * (TILE + int(1.5 * 2 * explained.clip.frame_bytes)) if "decoder" in rank.weight_bytes else 0
        if config.memory.precompute_modulation:  # vectors of all steps, and the largest layer passing by
            denoise += 362 * width * 2 * explained.clip.num_inference_steps + 6 * width * width * 2
        peaks.append(CONTEXT + sum(rank.weight_bytes.values()) + max(denoise, decode))
    return peaks


def test_every_machine_has_its_file() -> None:
    assert set(GPU) == {f"hunyuan_{n}gpu_{card}gb" for n in (1, 2, 4, 8) for card in (48, 80, 141)}
    assert set(OPEN_SORA_PLAN_GPU) == {f"open_sora_plan_{n}gpu_80gb" for n in (1, 2, 4, 8)}
    hunyuan = ["hunyuan_tiny_cpu", "hunyuan_tiny_cpu_2p1", "hunyuan_tiny_cpu_colocated"]
    assert [*hunyuan, "open_sora_plan_tiny_cpu"] == TINY
    assert BUNDLED == ["moving_shapes_cpu", "moving_shapes_open_sora_plan_cpu"]
    assert set(CONFIGS) == {*GPU, *OPEN_SORA_PLAN_GPU, *TINY, *BUNDLED, "hunyuan_8gpu"}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_file_is_complete_and_says_why(name: str) -> None:
    text = CONFIGS[name].read_text()
    config = load_config(CONFIGS[name])
    assert text.startswith("# "), "a comment tells what it is for"
    for table in ("model", "groups", "schedule", "queue", "output", "request", "runtime"):
        assert f"[{table}]" in text
    assert config.runtime.device == ("cpu" if "cpu" in name else "cuda")


@pytest.mark.parametrize("name", GPU)
def test_ranks_match_the_cards_and_fit_their_memory(name: str) -> None:
    match = re.fullmatch(r"hunyuan_(\d)gpu_(\d+)gb", name)
    assert match is not None
    gpus, card = int(match[1]), int(match[2]) * 10**9
    config = load_config(CONFIGS[name])
    assert config.world_size == gpus
    assert (config.model.dtype, config.model.vae_dtype, config.decode.tiling) == ("bfloat16", "float16", True)
    explained = explain_config(config)
    assert max(peak_bytes(explained, config)) < 0.9 * card
    assert explained.clip.latent_bytes_each <= config.queue.capacity_bytes


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hunyuan_2gpu_48gb", "groups.text_encoder=dit"),
        ("hunyuan_1gpu_48gb", "memory.precompute_modulation=false"),
        ("hunyuan_8gpu_48gb", "model.dtype=float32"),
    ],
)
def test_the_arithmetic_notices_what_does_not_fit(name: str, change: str) -> None:
    config = load_config(CONFIGS[name], [change])
    assert max(peak_bytes(explain_config(config), config)) > 0.9 * 48 * 10**9


def test_the_plain_8_gpu_name_is_the_80_gb_one() -> None:
    assert load_config(CONFIGS["hunyuan_8gpu"]) == load_config(CONFIGS["hunyuan_8gpu_80gb"])


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_flags_may_move_the_groups(name: str) -> None:
    config = load_config(CONFIGS[name], ["groups.vae_ranks=0", "groups.text_encoder=dit"])
    assert config.policy == "colocated"
    assert load_config(CONFIGS[name], ["groups.vae_ranks=1"]).policy == "decoupled"


def test_names_and_paths_find_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("hunyuan_8gpu") == find_config("hunyuan_8gpu.toml") == CONFIGS["hunyuan_8gpu"]
    own = tmp_path / "hunyuan_8gpu.toml"
    own.write_text("")
    assert find_config("hunyuan_8gpu.toml") == Path("hunyuan_8gpu.toml")  # a file of that name comes first
    assert find_config(str(own)) == own
    with pytest.raises(ConfigError, match=r"config='hunyuan_9gpu' is neither .*nearest is 'hunyuan_[0-9]gpu'"):
        find_config("hunyuan_9gpu")


def test_the_published_sizes_are_those_of_the_classes() -> None:
    """Parameters of diffusers' and transformers' own classes at full size, built without memory."""
    import torch
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    llama = LlamaConfig(
        vocab_size=128320, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
    )
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    published = HunyuanVideo.published
    with torch.device("meta"):
        models = {
            "text_encoder": LlamaModel(llama),
            "text_encoder_2": CLIPTextModel(clip),
            "transformer": HunyuanVideoTransformer3DModel(guidance_embeds=True),
            "vae": AutoencoderKLHunyuanVideo(),
        }
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert counts == published.parameters
    dit = models["transformer"].config
    facts = published.facts
    assert (facts.num_heads, facts.head_dim) == (dit.num_attention_heads, dit.attention_head_dim)
    assert facts.attention_layers == dit.num_layers + dit.num_single_layers
    assert (facts.text_dim, facts.pooled_dim) == (dit.text_embed_dim, dit.pooled_projection_dim)
    assert msgspec.structs.asdict(facts.geometry) == {
        "channels": 16,
        "stride_t": models["vae"].config.temporal_compression_ratio,
        "stride_s": models["vae"].config.spatial_compression_ratio,
        "patch_t": dit.patch_size_t,
        "patch_s": dit.patch_size,
    }


@pytest.mark.parametrize("name", [*OPEN_SORA_PLAN_GPU, "open_sora_plan_tiny_cpu"])
def test_open_sora_plan_files_ask_for_what_the_official_sampling_does(name: str) -> None:
    from pipelines.open_sora_plan import DEFAULT_GUIDANCE_SCALE, DEFAULT_SPEC, DEFAULT_STEPS, NEGATIVE_PROMPT

    config = load_config(CONFIGS[name])
    r = config.request
    assert (r.guidance_scale, r.negative_prompt) == (DEFAULT_GUIDANCE_SCALE, NEGATIVE_PROMPT)
    assert (r.max_sequence_length, config.output.fps) == (512, 18.0)
    if "gpu" in name:
        assert (config.spec(), r.num_inference_steps) == (DEFAULT_SPEC, DEFAULT_STEPS)


@pytest.mark.parametrize("name", OPEN_SORA_PLAN_GPU)
def test_open_sora_plan_matches_the_cards_and_fits_their_memory(name: str) -> None:
    from tools.cost_open_sora_plan import step_cost

    match = re.fullmatch(r"open_sora_plan_(\d)gpu_80gb", name)
    assert match is not None
    config = load_config(CONFIGS[name])
    assert config.world_size == int(match[1])
    explained = explain_config(config)
    facts = OpenSoraPlan.published.facts
    assert (explained.clip.evaluations_per_step, explained.clip.video_tokens) == (2, 21_120)
    assert explained.clip.halved == (config.world_size > 1)
    weights = max(sum(rank.weight_bytes.values()) for rank in explained.ranks)
    itemsize = 2
    for rank in explained.ranks:
        members = len(explained.ranks) // (2 if explained.clip.halved else 1)
        assert (rank.text_tokens, rank.heads * members) == (0, facts.num_heads)
        patterns = [block_sparsity(i, True, 4) for i in range(32)]
        sizes = {"ranks": members, "member": rank.rank % members, "heads": 24, "head_dim": 96, "out_values": 32}
        evaluations = 1 if explained.clip.halved else 2
        assert rank.exchange_bytes_per_step == evaluations * itemsize * sent_values(patterns, 21_120, **sizes)
        assert rank.exchange_bytes_per_layer == rank.exchange_bytes_per_step // evaluations // 32
    step = step_cost(explained.clip.video_tokens, sparse_n=4)  # of one rank alone, its weights included
    decode = SPARE * 2_000_000_000  # chunks of 4 latent frames
    assert CONTEXT + weights + step.peak_bytes + decode < 40 * 10**9


def test_the_published_sizes_of_open_sora_plan_are_those_of_the_classes() -> None:
    import torch
    from transformers import MT5Config, MT5EncoderModel

    from pipelines.models.open_sora_plan import OpenSoraPlanTransformer3DModel

    published = OpenSoraPlan.published
    mt5 = MT5Config(vocab_size=250112, d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=24)
    with torch.device("meta"):
        dit, encoder = OpenSoraPlanTransformer3DModel(), MT5EncoderModel(mt5)
    assert sum(p.numel() for p in dit.parameters()) == published.parameters["transformer"]
    assert sum(p.numel() for p in encoder.parameters()) == published.parameters["text_encoder"]
    facts = published.facts
    assert (facts.num_heads, facts.head_dim) == (dit.config.num_attention_heads, dit.config.attention_head_dim)
    assert (facts.attention_layers, facts.text_dim) == (dit.config.num_layers, dit.config.caption_channels)


def test_decoding_a_clip_of_open_sora_plan_is_next_to_nothing() -> None:
    """Why no card is set aside for it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pipelines.models.wf_vae import WFVAEModel
    from pipelines.open_sora_plan import DEFAULT_SPEC, DEFAULT_STEPS
    from tools.cost_open_sora_plan import step_cost

    geometry = OpenSoraPlan.published.facts.geometry
    sizes = {"base_channels": 128, "encoder_energy_flow_hidden_size": 64, "decoder_energy_flow_hidden_size": 128}
    with torch.device("meta"):
        vae = WFVAEModel(norm_type="layernorm", connect_res_layer_num=2, t_interpolation="trilinear", **sizes)
        latents = torch.empty(geometry.latent_shape(DEFAULT_SPEC))
    assert sum(p.numel() for p in vae.parameters()) == OpenSoraPlan.published.parameters["vae"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decode(latents)
    denoise = DEFAULT_STEPS * step_cost(geometry.token_grid(DEFAULT_SPEC).video, sparse_n=4).flops
    assert counter.get_total_flops() / denoise == pytest.approx(0.0032, rel=0.05)
